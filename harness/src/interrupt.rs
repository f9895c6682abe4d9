//! Work that Ctrl-C or SIGTERM may end at any moment.

use std::process::ExitCode;

use anyhow::Result;
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
};

/// Does the work, unless a signal comes first. Then the work is dropped, which ends the processes it has started, and the
/// caller is about to exit.
pub async fn unless_interrupted(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    select! {
        done = work => done,
        _ = interrupt.recv() => Ok(ExitCode::from(130)),
        _ = terminate.recv() => Ok(ExitCode::from(143)),
    }
}
