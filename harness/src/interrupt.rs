//! Work that Ctrl-C or SIGTERM may end at any moment.

use std::process::ExitCode;

use anyhow::Result;
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
};

/// Does the work, or drops it when a signal comes first. The process is about to end then: what the work has started ends with
/// its future, or with the process.
pub async fn unless_interrupted(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    select! {
        done = work => done,
        _ = interrupt.recv() => Ok(ExitCode::from(130)),
        _ = terminate.recv() => Ok(ExitCode::from(143)),
    }
}
