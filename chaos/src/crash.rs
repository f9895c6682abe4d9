//! Crashes at points: a process is killed at the moment one of its messages passes a proxy.
//!
//! A trap stays set until a process comes to its point, and other faults go on meanwhile. Many statements are rare:
//! some are executed only after a failure or at a shutdown. A fault that waited for them would take the time of others,
//! and one that waited only briefly would miss them.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fastrand::Rng;
use rustix::process::Signal;
use tokio::{sync::Semaphore, time::timeout};

use super::{
    history::History,
    points::{CrashPoint, Kind, points},
    proxy::Link,
    site::{Part, Route, Site},
    trap::{Hold, Trap, TrapGuard},
    wire::Mark,
};

/// A fault sets one trap after another until one springs, but at most this many. If a database is down, none springs,
/// and more traps would kill all processes at the moment it is up again.
const TRAPS_MAX: u32 = 4;
/// How long a fault waits before it sets the next trap. Any statement of normal work passes within this time.
const NEXT_TRAP_AFTER: Duration = Duration::from_millis(250);

/// The points of a run, where traps are set, and how often a process was killed at each.
#[derive(Debug)]
pub(super) struct Crashes {
    points: Mutex<Vec<Tried>>,
    /// A permit for each crash that no fault has counted. A fault counts such a crash as its own, and sets no trap. So
    /// traps at rare points, which spring between the faults, add no crashes.
    uncounted: Semaphore,
}

#[derive(Clone, Copy, Debug)]
struct Tried {
    point: CrashPoint,
    is_set: bool,
    crashes: u32,
}

impl Crashes {
    /// The seed decides in which order the points have their first trap. The common points come first: a run must reach
    /// each of them, and their traps spring so soon that they hardly delay the others.
    pub(super) fn of(seed: u64) -> Self {
        let untried = |point| Tried { point, is_set: false, crashes: 0 };
        let mut points: Vec<Tried> = points().into_iter().map(untried).collect();
        Rng::with_seed(seed).shuffle(&mut points);
        points.sort_by_key(|tried| !tried.point.is_common());
        Self { points: Mutex::new(points), uncounted: Semaphore::new(0) }
    }

    /// Makes the proxies watch for the points, until the guards are dropped.
    pub(super) fn watch(self: &Arc<Self>, site: &Site, history: &Arc<History>) -> Vec<TrapGuard> {
        let mut guards = Vec::new();
        for part in Part::ALL {
            guards.push(self.watch_link(site, part, site.to_database(part), Hold::Keep, history));
            for route in Route::of(part) {
                for hold in [Hold::Keep, Hold::PassBefore] {
                    guards.push(self.watch_link(site, part, site.to_receiver(route), hold, history));
                }
            }
        }
        guards
    }

    fn watch_link(
        self: &Arc<Self>,
        site: &Site,
        part: Part,
        link: &Arc<Link>,
        hold: Hold,
        history: &Arc<History>,
    ) -> TrapGuard {
        let (crashes, history, unit) = (self.clone(), history.clone(), site.unit(part).clone());
        let at = move |mark: &Mark| {
            let point = crashes.spring(Kind::of(part), hold, mark, || unit.signal(Signal::KILL));
            if let Some(point) = point {
                history.fault(&format!("crash {point}"), "killed");
            }
            point.is_some()
        };
        // `at` kills: whether there was a process decides whether the trap springs.
        link.set_trap(Trap { at: Box::new(at), hold, action: Box::new(|| {}), times: u32::MAX, sprung: None })
    }

    /// Springs the trap at this mark, if one is set. It kills only one of the processes of a kind. Bytes may pass after
    /// their process has ended: then `kill` finds none, and the trap stays set.
    fn spring(&self, kind: Kind, hold: Hold, mark: &Mark, kill: impl FnOnce() -> bool) -> Option<CrashPoint> {
        let mut points = self.lock();
        let is_at = |point: CrashPoint| point.kind == kind && point.place.hold() == hold && point.place.is_at(mark);
        let tried = points.iter_mut().find(|tried| tried.is_set && is_at(tried.point))?;
        if !kill() {
            return None;
        }
        tried.is_set = false;
        tried.crashes += 1;
        self.uncounted.add_permits(1);
        Some(tried.point)
    }

    /// Counts a crash. Sets one trap after another until there is one. Returns whether there was one.
    pub(super) async fn crash(&self) -> bool {
        if self.count_crash(Duration::ZERO).await {
            return true;
        }
        for _ in 0..TRAPS_MAX {
            self.set_next();
            if self.count_crash(NEXT_TRAP_AFTER).await {
                return true;
            }
        }
        false
    }

    /// Forgets the crashes that no fault has counted. Faults that strike together must not count one, since it happened
    /// before them.
    pub(super) fn forget_uncounted(&self) {
        self.uncounted.forget_permits(usize::MAX);
    }

    async fn count_crash(&self, limit: Duration) -> bool {
        match timeout(limit, self.uncounted.acquire()).await {
            Ok(Ok(crash)) => {
                crash.forget();
                true
            }
            _ => false,
        }
    }

    /// Sets a trap at the point with the fewest crashes among those without a trap. Among equals, common points come
    /// first. So points that were never reached precede others, and a rare point, whose trap stays set, delays none.
    fn set_next(&self) {
        let mut points = self.lock();
        let next = points.iter_mut().filter(|tried| !tried.is_set).min_by_key(|tried| tried.crashes);
        if let Some(next) = next {
            next.is_set = true;
        }
    }

    /// All points, each with its crashes.
    pub(super) fn counts(&self) -> Vec<(CrashPoint, u32)> {
        let mut counts: Vec<_> = self.lock().iter().map(|tried| (tried.point, tried.crashes)).collect();
        counts.sort_unstable();
        counts
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Tried>> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kinds of which no process has crashed at a point.
pub(super) fn kinds_without_crash(crashes: &[(CrashPoint, u32)]) -> Vec<Kind> {
    let crashed = |kind: &Kind| crashes.iter().any(|(point, count)| point.kind == *kind && *count > 0);
    Kind::ALL.into_iter().filter(|kind| !crashed(kind)).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Crashes, Hold, Kind};
    use crate::wire::Mark;

    fn passes(crashes: &Crashes, kind: Kind, name: &str) -> bool {
        crashes.spring(kind, Hold::Keep, &Mark::Statement(name.into()), || true).is_some()
    }

    fn set_all(crashes: &Crashes) {
        for _ in 0..crashes.counts().len() {
            crashes.set_next();
        }
    }

    #[test]
    fn every_point_has_a_trap_before_any_has_a_second_one() {
        let crashes = Crashes::of(7);
        assert!(!passes(&crashes, Kind::OrderService, "COMMIT"), "no trap is set");
        set_all(&crashes);
        assert!(crashes.lock().iter().all(|tried| tried.is_set));
        assert!(passes(&crashes, Kind::OrderService, "COMMIT"));
        assert!(!passes(&crashes, Kind::OrderService, "COMMIT"), "a trap springs once");
        assert!(passes(&crashes, Kind::InventoryService, "COMMIT"), "each process has a trap of its own");
        assert_eq!(crashes.counts().iter().map(|(_, count)| count).sum::<u32>(), 2);
    }

    #[tokio::test]
    async fn a_crash_counts_only_if_a_process_was_killed() {
        let crashes = Crashes::of(7);
        set_all(&crashes);
        let commit = Mark::Statement("COMMIT".into());
        assert_eq!(crashes.spring(Kind::OrderService, Hold::Keep, &commit, || false), None);
        assert!(crashes.counts().iter().all(|(_, count)| *count == 0));
        assert!(!crashes.count_crash(Duration::ZERO).await);
        assert!(passes(&crashes, Kind::OrderService, "COMMIT"), "the trap is still set");
        assert!(crashes.count_crash(Duration::ZERO).await);
    }

    #[tokio::test]
    async fn a_forgotten_crash_is_not_counted_by_a_fault() {
        let crashes = Crashes::of(7);
        set_all(&crashes);
        assert!(passes(&crashes, Kind::OrderService, "COMMIT"));
        crashes.forget_uncounted();
        assert!(!crashes.count_crash(Duration::ZERO).await);
        assert!(passes(&crashes, Kind::InventoryService, "COMMIT"));
        assert!(crashes.count_crash(Duration::ZERO).await, "a later crash is counted");
    }

    #[test]
    fn the_common_points_have_their_traps_first() {
        let crashes = Crashes::of(7);
        let common = crashes.counts().iter().filter(|(point, _)| point.is_common()).count();
        for _ in 0..common {
            crashes.set_next();
        }
        assert!(crashes.lock().iter().all(|tried| tried.is_set == tried.point.is_common()));
    }

    #[test]
    fn a_point_that_was_not_reached_comes_before_one_that_was() {
        let crashes = Crashes::of(7);
        let set = |crashes: &Crashes| crashes.lock().iter().filter(|tried| tried.is_set).count();
        for _ in 0..crashes.counts().len() {
            crashes.set_next();
            // Every point but one is reached as soon as it has a trap.
            crashes.lock().iter_mut().skip(1).filter(|tried| tried.is_set).for_each(|tried| {
                (tried.is_set, tried.crashes) = (false, tried.crashes + 1);
            });
        }
        assert_eq!(set(&crashes), 1, "the trap of the rare point stays set");
        assert!(crashes.lock().iter().skip(1).all(|tried| tried.crashes == 1));
    }
}
