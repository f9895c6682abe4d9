//! How long a migration waits for others.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::Cause;

/// Until when a migration waits, and the signal that ends it.
pub(super) struct Patience<'s> {
    deadline: Option<Instant>,
    shutdown: &'s CancellationToken,
}

impl<'s> Patience<'s> {
    /// Without a limit, it ends by the signal only.
    pub(super) fn new(limit: Option<Duration>, shutdown: &'s CancellationToken) -> Self {
        Self { deadline: limit.map(|limit| Instant::now() + limit), shutdown }
    }

    /// A pause, since others hold the migration up. It fails if the time is over, or when the signal comes.
    pub(super) async fn pause(&self, pause: Duration) -> Result<(), Cause> {
        if self.is_over() {
            return Err(Cause::GaveUp);
        }
        let left = self.deadline.map_or(pause, |deadline| deadline.saturating_duration_since(Instant::now()));
        let sleeping = async {
            sleep(pause.min(left)).await;
            Ok(())
        };
        self.unless_stopped(sleeping).await
    }

    /// Does work that may be dropped when the signal comes.
    pub(super) async fn unless_stopped<T>(&self, work: impl Future<Output = Result<T, Cause>>) -> Result<T, Cause> {
        self.shutdown.run_until_cancelled(work).await.unwrap_or(Err(Cause::Stopped))
    }

    pub(super) fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.shutdown.is_cancelled()
    }

    pub(super) async fn stopped(&self) {
        self.shutdown.cancelled().await;
    }
}
