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
    site::{Part, Site},
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
    /// there are as many crashes as faults, although traps at rare points spring between the faults.
    uncounted: Semaphore,
}

#[derive(Clone, Copy, Debug)]
struct Tried {
    point: CrashPoint,
    is_set: bool,
    crashes: u32,
}

impl Crashes {
    /// The seed decides in which order the points have their first trap.
    pub(super) fn of(seed: u64) -> Self {
        let untried = |point| Tried { point, is_set: false, crashes: 0 };
        let mut points: Vec<Tried> = points().into_iter().map(untried).collect();
        Rng::with_seed(seed).shuffle(&mut points);
        Self { points: Mutex::new(points), uncounted: Semaphore::new(0) }
    }

    /// Makes the proxies watch for the points, until the guards are dropped.
    pub(super) fn watch(self: &Arc<Self>, site: &Site, history: &Arc<History>) -> Vec<TrapGuard> {
        let mut guards = Vec::new();
        for part in Part::ALL {
            guards.push(self.watch_link(site, part, site.to_database(part), Hold::Keep, history));
            if part.is_relay() {
                for hold in [Hold::Keep, Hold::PassBefore] {
                    guards.push(self.watch_link(site, part, site.to_receiver(part), hold, history));
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
            let point = crashes.spring(Kind::of(part), hold, mark);
            if let Some(point) = point {
                history.fault(&format!("crash {point}"), "killed");
            }
            point.is_some()
        };
        let action = move || _ = unit.signal(Signal::KILL);
        link.set_trap(Trap { at: Box::new(at), hold, action: Box::new(action), times: u32::MAX, sprung: None })
    }

    /// Springs the trap at this mark, if one is set. It kills only one of the processes of a kind.
    fn spring(&self, kind: Kind, hold: Hold, mark: &Mark) -> Option<CrashPoint> {
        let mut points = self.lock();
        let is_at = |point: CrashPoint| point.kind == kind && point.place.hold() == hold && point.place.is_at(mark);
        let tried = points.iter_mut().find(|tried| tried.is_set && is_at(tried.point))?;
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

    async fn count_crash(&self, limit: Duration) -> bool {
        match timeout(limit, self.uncounted.acquire()).await {
            Ok(Ok(crash)) => {
                crash.forget();
                true
            }
            _ => false,
        }
    }

    /// Sets a trap at the point with the fewest crashes among those without a trap. So points that were never reached
    /// come first, and a rare point, whose trap stays set, delays no other.
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

#[cfg(test)]
mod tests {
    use super::{Crashes, Hold, Kind};
    use crate::wire::Mark;

    fn passes(crashes: &Crashes, kind: Kind, name: &str) -> bool {
        crashes.spring(kind, Hold::Keep, &Mark::Statement(name.into())).is_some()
    }

    #[test]
    fn every_point_has_a_trap_before_any_has_a_second_one() {
        let crashes = Crashes::of(7);
        assert!(!passes(&crashes, Kind::OrderService, "COMMIT"), "no trap is set");
        let points = crashes.counts().len();
        for _ in 0..points {
            crashes.set_next();
        }
        assert!(crashes.lock().iter().all(|tried| tried.is_set));
        assert!(passes(&crashes, Kind::OrderService, "COMMIT"));
        assert!(!passes(&crashes, Kind::OrderService, "COMMIT"), "a trap springs once");
        assert!(passes(&crashes, Kind::InventoryService, "COMMIT"), "each process has a trap of its own");
        assert_eq!(crashes.counts().iter().map(|(_, count)| count).sum::<u32>(), 2);
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
