//! Counts failures that come again and again, so that the log has a few lines for an outage and not thousands.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use chassis::LogLimit;
use tokio::time::Instant;

/// A failure is logged if it is the first, and then one in this time. A later one may have another cause, so a number of
/// failures would not do: the log could hide that cause for minutes.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Failures of one kind in a row.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    count: AtomicU32,
    limit: LogLimit,
}

impl Failures {
    /// Counts one, and returns whether to log it.
    pub(crate) fn count(&self) -> bool {
        self.count_at(Instant::now())
    }

    fn count_at(&self, now: Instant) -> bool {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.limit.allows(now, LOG_INTERVAL)
    }

    /// Notes a success, and returns how many failures it ends.
    pub(crate) fn end(&self) -> u32 {
        // A success is common, and a write by each worker would be dearer than this read.
        if self.count.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.limit.reset();
        self.count.swap(0, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::{Failures, LOG_INTERVAL};

    #[test]
    fn the_first_failure_is_logged_and_then_one_in_an_interval_until_a_success() {
        let (failures, now) = (Failures::default(), Instant::now());
        let logged = [now, now, now + LOG_INTERVAL / 2, now + LOG_INTERVAL, now + LOG_INTERVAL];
        assert_eq!(logged.map(|now| failures.count_at(now)), [true, false, false, true, false]);
        assert_eq!((failures.end(), failures.end()), (5, 0));
        assert!(failures.count_at(now + LOG_INTERVAL));
    }
}
