//! Counts failures that come again and again, so that the log has a few lines for an outage and not thousands.

use std::sync::atomic::{AtomicU32, Ordering};

/// A failure is logged if it is the first, and then every so often.
const LOGGED_EVERY: u32 = 100;

/// Failures of one kind in a row.
#[derive(Debug, Default)]
pub(crate) struct Failures(AtomicU32);

impl Failures {
    /// Counts one, and returns whether to log it.
    pub(crate) fn count(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOGGED_EVERY)
    }

    /// Notes a success, and returns how many failures it ends.
    pub(crate) fn end(&self) -> u32 {
        // A success is common, and a write by each worker would be dearer than this read.
        if self.0.load(Ordering::Relaxed) == 0 { 0 } else { self.0.swap(0, Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Failures, LOGGED_EVERY};

    #[test]
    fn the_first_failure_is_logged_and_then_one_of_many_until_a_success() {
        let failures = Failures::default();
        let logged = (0..=LOGGED_EVERY).map(|_| failures.count()).filter(|logged| *logged).count();
        assert_eq!(logged, 2);
        assert_eq!((failures.end(), failures.end()), (LOGGED_EVERY + 1, 0));
        assert!(failures.count());
    }
}
