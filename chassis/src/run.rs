//! How a process begins to listen, and how it ends.

use std::{fmt::Display, io, net::SocketAddr, process::ExitCode};

use tokio::{net::TcpListener, runtime};

use crate::{SchemaError, ServeError};

/// Why a process could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The database refuses this process, or its schema is not one this process knows.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The server.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// What this process was told to use cannot be used; the text says what, why, and what to do.
    #[error("{0}")]
    Unusable(String),
    /// A task that should have run to the end panicked: better to end, and be started again, than to report health
    /// without it.
    #[error("{0} panicked")]
    Panicked(&'static str),
}

/// Listens on an address.
///
/// # Errors
/// With the address, which the system's own message leaves out.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    TcpListener::bind(address).await.map_err(named)
}

/// Does the work of `main`, and returns its exit code: on an error 1, after one line on stderr.
///
/// On one thread, since two take 1.5 times as much of the processor for the same calls: a connection's task runs at once on
/// whatever thread has an answer for it, and writes them one by one, where one thread makes all the answers of a commit
/// ready before it writes them together. Who has processors left starts more processes.
///
/// Nothing is waited for once the work is done. A name that is being looked up, in a thread that cannot be interrupted,
/// would hold up the end for as long as a resolver is silent, past every drain time.
pub fn run(work: impl Future<Output = Result<(), impl Display>>) -> ExitCode {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(error),
    };
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    outcome.map_or_else(fail, |()| ExitCode::SUCCESS)
}

fn fail(error: impl Display) -> ExitCode {
    // In the form that anyhow shows all causes in.
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, process::ExitCode, thread, time::Duration};

    use tokio::{task::spawn_blocking, time::Instant};

    #[test]
    fn the_end_waits_for_no_thread_that_cannot_be_interrupted() {
        let began = Instant::now();
        let code = super::run(async {
            drop(spawn_blocking(|| thread::sleep(Duration::from_secs(60))));
            Ok::<_, Infallible>(())
        });
        assert_eq!(code, ExitCode::SUCCESS);
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}
