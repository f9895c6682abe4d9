//! Waiting for a condition, with a time limit.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Longer than anything takes on a busy machine. Only a test that fails waits this long.
pub(crate) const AMPLE: Duration = Duration::from_secs(120);

pub(crate) async fn until(what: &str, condition: impl AsyncFnMut() -> bool) {
    until_within(AMPLE, what, condition).await;
}

pub(crate) async fn until_within(limit: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}
