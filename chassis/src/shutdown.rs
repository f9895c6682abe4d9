//! Makes a signal a graceful shutdown.

use std::{io, process};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// A token that SIGTERM or SIGINT cancels.
///
/// A second signal ends the process at once. Its sender does not want to wait, and the system recovers from a crash at
/// any line.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn shutdown_signal() -> io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        for signals in 0.. {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if signals > 0 {
                warn!("{name} again: exiting at once");
                process::exit(130);
            }
            info!("{name}: finishing the work in flight");
            cancelled.cancel();
        }
    });
    Ok(token)
}
