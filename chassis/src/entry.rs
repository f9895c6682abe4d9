//! The entry of every process: command line, runtime, socket, shutdown signal and exit code.

use std::{fmt::Display, io, net::SocketAddr, process::ExitCode};

use clap::Parser;
use futures_util::future::try_join_all;
use tokio::{net::TcpListener, runtime};
use tokio_util::sync::CancellationToken;

use crate::{SchemaError, ServeError, TlsError, parse, shutdown_signal, trace};

/// Why a process could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The address cannot be bound, or signals cannot be handled.
    #[error(transparent)]
    Start(#[from] io::Error),
    /// The database refuses this process, or does not have the schema that this process needs.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The certificates cannot be used, or there are none where they are needed.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A setting names something that cannot be used. The text says what, why, and what to do.
    #[error("{0}")]
    Unusable(String),
    /// The command line names something that does not exist. The text says what there is.
    #[error("{0}")]
    Arguments(String),
    /// A task that must run until shutdown panicked. The process ends, to be restarted, because without the task it
    /// would only look healthy.
    #[error("{0} panicked")]
    Panicked(&'static str),
}

/// The `main` of a process: parses the command line, runs the command, and returns the exit code. An error is one line
/// on stderr, with exit code 1.
///
/// The command runs on one thread. With several threads, each answer starts its connection's task on another thread,
/// and is written alone. One thread prepares all answers of a commit, and writes them together. To use more processors,
/// start more processes.
pub fn main<C: Parser, E: Display>(command: impl AsyncFnOnce(C) -> Result<(), E>) -> ExitCode {
    run(command(parse()))
}

/// Binds the `addresses`, and serves on them until SIGTERM or SIGINT. Both cancel the token that `serve` is given.
///
/// # Errors
/// Those of `serve`, and of the sockets.
pub async fn serve_until_signal<const N: usize, S, E: From<io::Error>>(
    addresses: [SocketAddr; N],
    settings: S,
    serve: impl AsyncFnOnce([TcpListener; N], S, CancellationToken) -> Result<(), E>,
) -> Result<(), E> {
    let shutdown = shutdown_signal()?;
    let tracing = trace::start();
    let served = serve(bind_all(addresses).await?, settings, shutdown).await;
    if let Some(tracing) = tracing {
        tracing.end().await;
    }
    served
}

async fn bind_all<const N: usize>(addresses: [SocketAddr; N]) -> io::Result<[TcpListener; N]> {
    let listeners = try_join_all(addresses.map(bind)).await?;
    // As many as addresses.
    listeners.try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
}

pub(crate) async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    // The system's message leaves the address out.
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    TcpListener::bind(address).await.map_err(named)
}

/// The end waits for no other thread. A thread that looks a name up cannot be interrupted, and a silent resolver would
/// delay the end past every drain time.
fn run(work: impl Future<Output = Result<(), impl Display>>) -> ExitCode {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(error),
    };
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    outcome.map_or_else(fail, |()| ExitCode::SUCCESS)
}

fn fail(error: impl Display) -> ExitCode {
    // In this form anyhow prints all causes on the line.
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, process::ExitCode, thread, time::Duration};

    use tokio::{task::spawn_blocking, time::Instant};

    #[test]
    fn the_end_does_not_wait_for_a_blocked_thread() {
        let began = Instant::now();
        let code = super::run(async {
            drop(spawn_blocking(|| thread::sleep(Duration::from_secs(60))));
            Ok::<_, Infallible>(())
        });
        assert_eq!(code, ExitCode::SUCCESS);
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}
