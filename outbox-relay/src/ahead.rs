//! How many batches a worker leases at once.
//!
//! A lease and its settlement cost about as much for one row as for many. So with a backlog of small batches, a worker
//! leases several at once, and delivers them one after the other. The events of the last wait for the others meanwhile, and
//! other workers cannot take them. So it does so only while leases are full, and only as many as it delivers within a
//! short time.

use std::time::Duration;

/// A worker leases less once a lease has taken longer than this.
const TIME_MAX: Duration = Duration::from_millis(100);
/// More events than this, in several batches, are not worth it: their lease costs hardly anything by then.
const EVENTS_MAX: u32 = 64;

/// The number of batches to lease next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ahead(u32);

impl Default for Ahead {
    fn default() -> Self {
        Self(1)
    }
}

impl Ahead {
    /// How many events to lease, if a batch has at most this many.
    pub(crate) fn events(self, batch: u32) -> u32 {
        batch.max(batch.saturating_mul(self.0).min(EVENTS_MAX))
    }

    /// After a lease that was full, or not, and took this long until it was settled.
    pub(crate) fn after(self, is_full: bool, took: Duration) -> Self {
        if !is_full {
            Self::default()
        } else if took > TIME_MAX {
            Self((self.0 / 2).max(1))
        } else if took < TIME_MAX / 2 {
            Self((self.0 * 2).min(EVENTS_MAX))
        } else {
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Ahead;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn a_backlog_of_small_batches_is_leased_in_larger_and_larger_pieces() {
        let mut ahead = Ahead::default();
        let mut events = Vec::new();
        for _ in 0..8 {
            events.push(ahead.events(3));
            ahead = ahead.after(true, MILLISECOND);
        }
        assert_eq!(events, [3, 6, 12, 24, 48, 64, 64, 64]);
        assert_eq!(ahead.after(false, MILLISECOND).events(3), 3, "there is no backlog any more");
    }

    #[test]
    fn a_large_batch_is_leased_alone() {
        let grown = Ahead::default().after(true, MILLISECOND).after(true, MILLISECOND);
        assert_eq!((grown.events(64), grown.events(500), grown.events(1000)), (64, 500, 1000));
    }

    #[test]
    fn a_lease_takes_no_more_than_is_delivered_in_a_short_time() {
        for call in [2, 7, 30, 400].map(|milliseconds| MILLISECOND * milliseconds) {
            let mut ahead = Ahead::default();
            for _ in 0..100 {
                let took = call * ahead.events(1);
                assert!(took <= call.max(2 * super::TIME_MAX), "{call:?}: {took:?}");
                ahead = ahead.after(true, took);
            }
            let took = call * ahead.events(1);
            assert!(
                took >= super::TIME_MAX / 4 || ahead.events(1) == 64 || call > super::TIME_MAX / 4,
                "{call:?}: {took:?}"
            );
        }
    }
}
