//! Where the scans of a route's leases begin: a hint that spares them the rows that are gone.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sqlx::types::time::OffsetDateTime;
use tokio::time::Instant;

/// How long an event below the floor may stay unseen.
pub(crate) const RESCAN_INTERVAL: Duration = Duration::from_secs(1);

/// The floor of a route, shared by its workers in a process.
///
/// While a transaction is open anywhere on the server, VACUUM cannot remove the rows that were delivered since it
/// began. A scan from the start of the index would visit each of them. These rows lie before the oldest event of the
/// last lease, so scans begin there. Events that still wait lie above it as a rule: events are leased in the order of
/// `visible_at`, which is never before their `created_at`. There are two exceptions:
///
/// - A settlement makes successors and suspects visible. They are no older than the oldest event it settles, unless
///   their transactions began in another order than they were committed in. So a settlement lowers the floor to that
///   event.
/// - A row may lie anywhere if it was locked, committed late, or made visible by another process or another route. So
///   one lease a second scans everything, and the events it takes lower the floor for the leases that follow. Such
///   events are found late but never lost, and only the first batch of them waits.
///
/// All times are the database's. None is compared with this process's clock.
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
    /// Whether the last lease scanned only above the floor.
    last_was_partial: bool,
}

/// Where a lease begins its scan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// Skip rows that became visible before this; `None`: scan everything.
    pub(crate) floor: Option<OffsetDateTime>,
    changes: u64,
}

impl Floor {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State { floor: None, changes: 0, rescan_at: Instant::now(), last_was_partial: false }),
        }
    }

    /// Where a lease that is requested `now` begins its scan.
    pub(crate) fn start(&self, now: Instant) -> Start {
        self.with(|state| {
            let mut floor = state.floor;
            if now >= state.rescan_at {
                state.rescan_at = now + RESCAN_INTERVAL;
                floor = None;
            }
            state.last_was_partial = floor.is_some();
            Start { floor, changes: state.changes }
        })
    }

    /// Whether an event may lie below the floor, where the last lease did not scan.
    pub(crate) fn may_hide_events(&self) -> bool {
        self.with(|state| state.last_was_partial)
    }

    /// A lease has taken events, the oldest of them `oldest`. The floor rises to that, unless it has changed since the
    /// lease began. A settlement that lowered it may know of an event that this lease could not see.
    pub(crate) fn took(&self, start: Start, oldest: OffsetDateTime) {
        self.with(|state| {
            let unchanged = state.changes == start.changes;
            state.set(if unchanged { Some(oldest) } else { state.floor.min(Some(oldest)) });
        });
    }

    /// An event as old as `oldest` may have become free. A lease that began earlier cannot have seen it. So this counts
    /// as a change even if the floor is low enough already.
    pub(crate) fn lower(&self, oldest: OffsetDateTime) {
        self.with(|state| {
            state.floor = state.floor.min(Some(oldest));
            state.changes += 1;
        });
    }

    /// No code here panics half-way, so the state behind a poisoned lock is sound.
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

    /// A floor at `second`, when no full scan is due.
    fn floor_at(second: i64) -> Floor {
        let floor = Floor::new();
        floor.took(floor.start(Instant::now()), at(second));
        floor
    }

    #[test]
    fn one_lease_in_an_interval_scans_everything_and_the_others_only_above_the_floor() {
        let floor = Floor::new();
        let mut now = Instant::now();
        for _ in 0..3 {
            let everywhere = floor.start(now);
            assert_eq!(everywhere.floor, None);
            assert!(!floor.may_hide_events());
            floor.took(everywhere, at(7));
            assert_eq!(floor.start(now).floor, Some(at(7)));
            assert!(floor.may_hide_events());
            assert_eq!(floor.start(now + RESCAN_INTERVAL / 2).floor, Some(at(7)));
            now += RESCAN_INTERVAL;
        }
    }

    #[test]
    fn it_follows_the_oldest_leased_event_up_and_down() {
        let floor = floor_at(7);
        for second in [8, 9, 3, 4] {
            floor.took(floor.start(Instant::now()), at(second));
            assert_eq!(floor.start(Instant::now()).floor, Some(at(second)));
        }
    }

    #[test]
    fn a_lease_that_began_before_a_settlement_cannot_raise_it_above_the_settled_events() {
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
    fn an_event_found_by_a_full_scan_lowers_it_whatever_other_leases_took_meanwhile() {
        let floor = floor_at(7);
        let (everywhere, other) = (floor.start(Instant::now()), floor.start(Instant::now()));
        floor.took(other, at(8));
        floor.took(everywhere, at(2));
        assert_eq!(floor.start(Instant::now()).floor, Some(at(2)));
    }
}
