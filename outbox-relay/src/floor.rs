//! Where a route's leases begin to look: a hint, which keeps them from looking at what is gone.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sqlx::types::time::OffsetDateTime;
use tokio::time::Instant;

/// How long what lies below the floor may stay unseen.
pub(crate) const RESCAN_INTERVAL: Duration = Duration::from_secs(1);

/// The floor of a route, shared by its workers in a process.
///
/// A transaction that stays open anywhere on the server keeps VACUUM from removing the rows that were delivered since it
/// began, and a scan from the start of the index meets each of them: a lease took 60 ms over 400,000, instead of 0.4. They
/// lie before the oldest event of the last lease. What waits does as a rule not, since events are leased in the order of
/// `visible_at`, which is never before their `created_at`. The exceptions:
///
/// - What a settlement frees, successors and suspects, is no older than the oldest event it settles, but for transactions
///   that began in another order than they were committed in: a settlement lowers the floor to that.
/// - What was locked by somebody, committed late, or freed by another process, or another route of this one, may lie
///   anywhere. So one lease a second
///   looks everywhere, and what it takes lowers the floor for those that follow: it is found late, never lost, and however
///   much there is of it, the first of it is waited for and not each batch.
///
/// All times are the database's, and none is compared with this process's clock.
#[derive(Debug)]
pub(crate) struct Floor {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` is below everything.
    floor: Option<OffsetDateTime>,
    changes: u64,
    rescan_at: Instant,
    /// Whether a lease has looked above the floor only, and none everywhere since.
    passed_over: bool,
}

/// What a lease begins with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// Look at nothing that became visible before this; `None`: look everywhere.
    pub(crate) floor: Option<OffsetDateTime>,
    changes: u64,
}

impl Floor {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State { floor: None, changes: 0, rescan_at: Instant::now(), passed_over: false }) }
    }

    /// Where a lease begins to look that is asked for `now`.
    pub(crate) fn start(&self, now: Instant) -> Start {
        self.with(|state| {
            let mut floor = state.floor;
            if now >= state.rescan_at {
                state.rescan_at = now + RESCAN_INTERVAL;
                floor = None;
            }
            state.passed_over = floor.is_some();
            Start { floor, changes: state.changes }
        })
    }

    /// Whether something may lie below the floor that the last lease did not look at.
    pub(crate) fn may_hide_something(&self) -> bool {
        self.with(|state| state.passed_over)
    }

    /// A lease has taken events, the oldest of them `oldest`. The floor rises to that, unless it was changed since the
    /// lease began: whoever lowered it may know of something that this lease could not see.
    pub(crate) fn took(&self, start: Start, oldest: OffsetDateTime) {
        self.with(|state| {
            let unchanged = state.changes == start.changes;
            state.set(if unchanged { Some(oldest) } else { state.floor.min(Some(oldest)) });
        });
    }

    /// Something may have become free that is as old as `oldest`. A lease that has begun before cannot have seen it, so it
    /// counts as a change even where the floor is low enough already.
    pub(crate) fn lower(&self, oldest: OffsetDateTime) {
        self.with(|state| {
            state.floor = state.floor.min(Some(oldest));
            state.changes += 1;
        });
    }

    /// Nothing here panics half-way, so what a poisoned lock guards is sound.
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl State {
    fn set(&mut self, floor: Option<OffsetDateTime>) {
        if self.floor != floor {
            self.floor = floor;
            self.changes += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Floor, RESCAN_INTERVAL};
    use sqlx::types::time::OffsetDateTime;
    use tokio::time::Instant;

    fn at(second: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(second).unwrap()
    }

    /// A floor at `second`, when no look at everything is due.
    fn floor_at(second: i64) -> Floor {
        let floor = Floor::new();
        floor.took(floor.start(Instant::now()), at(second));
        floor
    }

    #[test]
    fn one_lease_in_an_interval_looks_everywhere_and_the_others_above_the_floor() {
        let floor = Floor::new();
        let mut now = Instant::now();
        for _ in 0..3 {
            let everywhere = floor.start(now);
            assert_eq!(everywhere.floor, None);
            assert!(!floor.may_hide_something());
            floor.took(everywhere, at(7));
            assert_eq!(floor.start(now).floor, Some(at(7)));
            assert!(floor.may_hide_something());
            assert_eq!(floor.start(now + RESCAN_INTERVAL / 2).floor, Some(at(7)));
            now += RESCAN_INTERVAL;
        }
    }

    #[test]
    fn it_follows_what_is_leased_up_and_down() {
        let floor = floor_at(7);
        for second in [8, 9, 3, 4] {
            floor.took(floor.start(Instant::now()), at(second));
            assert_eq!(floor.start(Instant::now()).floor, Some(at(second)));
        }
    }

    #[test]
    fn what_a_settlement_frees_is_above_it_and_a_lease_from_before_cannot_lift_it_over_that() {
        let floor = floor_at(7);
        let before = floor.start(Instant::now());
        floor.lower(at(5));
        floor.took(before, at(9));
        assert_eq!(floor.start(Instant::now()).floor, Some(at(5)));
        floor.lower(at(6));
        assert_eq!(floor.start(Instant::now()).floor, Some(at(5)));
        floor.took(floor.start(Instant::now()), at(9));
        assert_eq!(floor.start(Instant::now()).floor, Some(at(9)));

        let before = floor.start(Instant::now());
        floor.lower(at(10));
        floor.took(before, at(12));
        assert!(floor.start(Instant::now()).floor <= Some(at(10)));
    }

    #[test]
    fn what_a_look_everywhere_finds_lowers_it_whatever_others_have_taken_meanwhile() {
        let floor = floor_at(7);
        let (everywhere, other) = (floor.start(Instant::now()), floor.start(Instant::now()));
        floor.took(other, at(8));
        floor.took(everywhere, at(2));
        assert_eq!(floor.start(Instant::now()).floor, Some(at(2)));
    }
}
