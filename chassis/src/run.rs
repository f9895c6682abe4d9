//! How a process begins to listen, and how it ends.

use std::{fmt::Display, io, net::SocketAddr, process::ExitCode};

use tokio::net::TcpListener;

use crate::{SchemaError, ServeError};

/// Why a process could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The database refuses this process.
    #[error("cannot use the database: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema is not one this process knows.
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

/// What `main` returns: on an error 1, after one line on stderr.
pub fn exit_code(outcome: Result<(), impl Display>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // In the form that anyhow shows all causes in.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
