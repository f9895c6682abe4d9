//! Where the scans of a route's leases begin: a hint that spares them the rows that are gone.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sqlx::types::time::OffsetDateTime;
use tokio::time::Instant;

use crate::sweep::{Found, Sweep, Window};

/// How long an event below the floor may stay unseen, unless a sweep has to find it.
pub(crate) const RESCAN_INTERVAL: Duration = Duration::from_secs(1);
/// Scans of a sweep pause after this time, for the rest of an interval. So they occupy a part of one worker.
const BURST: Duration = Duration::from_millis(200);
/// A sweep has several scans, each with a round trip. However fast the scan was that somebody cut off, a sweep that takes
/// half of this is fast enough.
const QUICK_LEAST: Duration = Duration::from_millis(200);
/// A worker that has not told after this time how its window ended has failed, and another one scans it.
const CLAIM: Duration = Duration::from_secs(10);
/// How far below the floor a scan begins: other events of the same time may be committed later.
const MARGIN: Duration = Duration::from_secs(1);

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
/// With millions of such rows, a scan of everything takes longer than a statement may. A relay that starts then would
/// never get a floor. So if its scan is too slow, the floor becomes the database's present, and new events flow. In
/// place of full scans, a [`Sweep`] looks at everything below, part by part, until a whole sweep is quick. Meanwhile
/// nothing takes the floor below the top of the sweep, or the leases above the floor would become slow too. What lies
/// there is found by this sweep or the next one: late, but never lost.
///
/// All times are the database's. None is compared with this process's clock.
#[derive(Debug)]
pub(crate) struct Floor {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` is below everything. While it sweeps there is one.
    floor: Option<OffsetDateTime>,
    changes: u64,
    /// When a lease scans below the floor again.
    rescan_at: Instant,
    /// Whether the last lease scanned only above the floor, or a part of what is below.
    last_was_partial: bool,
    sweeping: Option<Sweeping>,
}

#[derive(Debug)]
struct Sweeping {
    sweep: Sweep,
    /// The floor is not lowered below this. It is the top of the sweep, or higher if a scan above that was slow.
    least: OffsetDateTime,
    /// Full scans are fast enough again once a whole sweep takes less than this.
    quick: Duration,
    /// Time of the scans since the last pause.
    burst: Duration,
    /// Leases scan the sweep's window and above the floor by turns, so neither waits for the other.
    last_was_window: bool,
}

/// Which rows a lease scans.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    pub(crate) scan: Scan,
    changes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    Everything,
    /// Rows that became visible above this floor.
    Above(OffsetDateTime),
    Part(Window),
}

impl Scan {
    /// Skip rows that became visible before this.
    pub(crate) fn from(self) -> Option<OffsetDateTime> {
        match self {
            Self::Everything => None,
            Self::Above(floor) => Some(floor - MARGIN),
            Self::Part(window) => window.from,
        }
    }

    /// Skip rows that became visible then or later.
    pub(crate) fn until(self) -> Option<OffsetDateTime> {
        match self {
            Self::Everything | Self::Above(_) => None,
            Self::Part(window) => Some(window.until),
        }
    }
}

impl Floor {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                floor: None,
                changes: 0,
                rescan_at: Instant::now(),
                last_was_partial: false,
                sweeping: None,
            }),
        }
    }

    /// What a lease that is requested `now` scans.
    pub(crate) fn start(&self, now: Instant) -> Start {
        self.with(|state| {
            let scan = state.next(now);
            state.last_was_partial = scan != Scan::Everything;
            Start { scan, changes: state.changes }
        })
    }

    /// Whether an event may lie below the floor, where the last lease did not scan.
    pub(crate) fn may_hide_events(&self) -> bool {
        self.with(|state| state.last_was_partial)
    }

    /// A lease has taken events, the oldest of them `oldest`. The floor rises to that, unless it has changed since the
    /// lease began. A settlement that lowered it may know of an event that this lease could not see.
    pub(crate) fn took(&self, start: Start, oldest: OffsetDateTime) {
        if matches!(start.scan, Scan::Part(_)) {
            return;
        }
        self.with(|state| {
            let oldest = state.not_too_low(oldest);
            let unchanged = state.changes == start.changes;
            state.set(if unchanged { Some(oldest) } else { state.floor.min(Some(oldest)) });
        });
    }

    /// An event as old as `oldest` may have become free. A lease that began earlier cannot have seen it. So this counts
    /// as a change even if the floor is low enough already.
    pub(crate) fn lower(&self, oldest: OffsetDateTime) {
        self.with(|state| {
            state.floor = state.floor.min(Some(state.not_too_low(oldest)));
            state.changes += 1;
        });
    }

    /// A scan took too long, and the database's time is `present`. Returns whether a sweep begins.
    ///
    /// If everything was scanned, the scans above the floor may be fast, and the floor stays. If a scan above it was
    /// slow, there is no use in the floor. A sweep that goes on is not begun anew: on a slow database it would never get
    /// far. The next one begins at the floor.
    pub(crate) fn too_slow(&self, start: Start, took: Duration, present: OffsetDateTime, now: Instant) -> bool {
        self.with(|state| {
            let top = match start.scan {
                Scan::Everything if state.sweeping.is_none() => state.floor.unwrap_or(present),
                Scan::Above(floor) if state.changes == start.changes => present.max(floor),
                // Another worker was as slow, and has told.
                Scan::Everything | Scan::Above(_) | Scan::Part(_) => return false,
            };
            state.set(Some(top));
            if let Some(sweeping) = &mut state.sweeping {
                sweeping.least = top;
                return false;
            }
            let quick = took.clamp(QUICK_LEAST, RESCAN_INTERVAL) / 2;
            let sweep = Sweep::below(top);
            state.sweeping = Some(Sweeping { sweep, least: top, quick, burst: Duration::ZERO, last_was_window: false });
            state.rescan_at = now;
            true
        })
    }

    /// The scan of a window has ended. Returns whether full scans are fast enough again, so that the sweeps end.
    pub(crate) fn swept(&self, window: Window, found: Found, took: Duration, now: Instant) -> bool {
        self.with(|state| {
            let Some(sweeping) = &mut state.sweeping else { return false };
            // Several workers may have scanned it, if it held many events, or if one was very slow.
            if sweeping.sweep.window() != window {
                return false;
            }
            let swept_all = sweeping.sweep.scanned(found, took);
            state.rescan_at = now + sweeping.pause_after(found, took);
            if !swept_all {
                return false;
            }
            state.rescan_at = now + RESCAN_INTERVAL;
            if sweeping.sweep.spent() < sweeping.quick {
                state.sweeping = None;
                return true;
            }
            // What was left behind since it began lies below the floor of now.
            sweeping.least = state.floor.unwrap_or(sweeping.least);
            sweeping.sweep = Sweep::below(sweeping.least);
            false
        })
    }

    /// Whether a worker that found nothing should scan again: it has not scanned above the floor, or a window is due.
    pub(crate) fn goes_on(&self, start: Start, now: Instant) -> bool {
        self.with(|state| matches!(start.scan, Scan::Part(_)) || (state.sweeping.is_some() && now >= state.rescan_at))
    }

    /// While it sweeps: where the rows end that are too many for a scan.
    pub(crate) fn sweeps_below(&self) -> Option<OffsetDateTime> {
        self.with(|state| state.sweeping.as_ref().map(|sweeping| sweeping.least))
    }

    /// No code here panics half-way, so the state behind a poisoned lock is sound.
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl State {
    fn next(&mut self, now: Instant) -> Scan {
        let due = now >= self.rescan_at;
        if let (Some(sweeping), Some(floor)) = (&mut self.sweeping, self.floor) {
            sweeping.last_was_window = due && !sweeping.last_was_window;
            if !sweeping.last_was_window {
                return Scan::Above(floor);
            }
            // Others help with a window that holds many events, and no other.
            if !sweeping.sweep.has_more() {
                self.rescan_at = now + CLAIM;
            }
            return Scan::Part(sweeping.sweep.window());
        }
        if due {
            self.rescan_at = now + RESCAN_INTERVAL;
            return Scan::Everything;
        }
        self.floor.map_or(Scan::Everything, Scan::Above)
    }

    fn set(&mut self, floor: Option<OffsetDateTime>) {
        if self.floor != floor {
            self.floor = floor;
            self.changes += 1;
        }
    }

    fn not_too_low(&self, time: OffsetDateTime) -> OffsetDateTime {
        self.sweeping.as_ref().map_or(time, |sweeping| time.max(sweeping.least))
    }
}

impl Sweeping {
    /// It goes on at once while it finds events, and otherwise for a short time.
    fn pause_after(&mut self, found: Found, took: Duration) -> Duration {
        if matches!(found, Found::All | Found::More(_)) {
            return Duration::ZERO;
        }
        self.burst += took;
        if self.burst < BURST {
            return Duration::ZERO;
        }
        self.burst = Duration::ZERO;
        RESCAN_INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use sqlx::types::time::OffsetDateTime;
    use tokio::time::Instant;

    use super::{BURST, CLAIM, Floor, RESCAN_INTERVAL, Scan, Start};
    use crate::sweep::{Found, Window};

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
            assert_eq!(everywhere.scan, Scan::Everything);
            assert!(!floor.may_hide_events());
            floor.took(everywhere, at(7));
            assert_eq!(floor.start(now).scan, Scan::Above(at(7)));
            assert!(floor.may_hide_events());
            assert_eq!(floor.start(now + RESCAN_INTERVAL / 2).scan, Scan::Above(at(7)));
            now += RESCAN_INTERVAL;
        }
    }

    #[test]
    fn it_follows_the_oldest_leased_event_up_and_down() {
        let floor = floor_at(7);
        for second in [8, 9, 3, 4] {
            floor.took(floor.start(Instant::now()), at(second));
            assert_eq!(floor.start(Instant::now()).scan, Scan::Above(at(second)));
        }
    }

    #[test]
    fn a_lease_that_began_before_a_settlement_cannot_raise_it_above_the_settled_events() {
        let floor = floor_at(7);
        let before = floor.start(Instant::now());
        floor.lower(at(5));
        floor.took(before, at(9));
        assert_eq!(floor.start(Instant::now()).scan, Scan::Above(at(5)));
        floor.lower(at(6));
        assert_eq!(floor.start(Instant::now()).scan, Scan::Above(at(5)));
        floor.took(floor.start(Instant::now()), at(9));
        assert_eq!(floor.start(Instant::now()).scan, Scan::Above(at(9)));

        let before = floor.start(Instant::now());
        floor.lower(at(10));
        floor.took(before, at(12));
        assert!(matches!(floor.start(Instant::now()).scan, Scan::Above(floor) if floor <= at(10)));
    }

    #[test]
    fn an_event_found_by_a_full_scan_lowers_it_whatever_other_leases_took_meanwhile() {
        let floor = floor_at(7);
        let (everywhere, other) = (floor.start(Instant::now()), floor.start(Instant::now()));
        floor.took(other, at(8));
        floor.took(everywhere, at(2));
        assert_eq!(floor.start(Instant::now()).scan, Scan::Above(at(2)));
    }

    const LIMIT: Duration = Duration::from_secs(4);
    const NOTHING: Duration = Duration::ZERO;
    /// Long after the epoch, as the database's present is.
    const PRESENT: i64 = 1_800_000_000;

    /// A route whose first scan of everything was cut off.
    fn sweeping(now: Instant) -> Floor {
        let floor = Floor::new();
        assert!(floor.too_slow(floor.start(now), LIMIT, at(PRESENT), now));
        floor
    }

    /// The next window, and the scan above the floor that comes before it, if one does.
    fn next_window(floor: &Floor, now: Instant) -> Option<Window> {
        let part = |start: Start| match start.scan {
            Scan::Part(window) => Some(window),
            Scan::Above(_) => None,
            Scan::Everything => panic!("a full scan"),
        };
        part(floor.start(now)).or_else(|| part(floor.start(now)))
    }

    #[test]
    fn when_the_first_scan_is_cut_off_new_events_flow_above_the_present_and_a_sweep_begins_there() {
        let (floor, now) = (Floor::new(), Instant::now());
        let (first, other) = (floor.start(now), floor.start(now));
        assert_eq!((first.scan, other.scan), (Scan::Everything, Scan::Everything));
        assert!(floor.too_slow(first, LIMIT, at(PRESENT), now));
        assert!(!floor.too_slow(other, LIMIT, at(PRESENT + 1), now), "one sweep");
        assert_eq!(next_window(&floor, now).unwrap().until, at(PRESENT));
        assert_eq!(floor.start(now).scan, Scan::Above(at(PRESENT)));
        assert!(floor.may_hide_events());
        assert_eq!(floor.sweeps_below(), Some(at(PRESENT)));
    }

    #[test]
    fn a_running_relay_keeps_its_floor_if_only_the_full_scan_was_cut_off() {
        let (floor, now) = (floor_at(7), Instant::now());
        let everything = floor.start(now + RESCAN_INTERVAL);
        assert_eq!(everything.scan, Scan::Everything);
        assert!(floor.too_slow(everything, LIMIT, at(PRESENT), now));
        assert_eq!(next_window(&floor, now).unwrap().until, at(7));
        assert_eq!(floor.start(now).scan, Scan::Above(at(7)));
    }

    #[test]
    fn a_floor_above_which_scans_are_slow_gives_way_to_the_present() {
        let (floor, now) = (floor_at(7), Instant::now());
        let (one, other) = (floor.start(now), floor.start(now));
        assert!(floor.too_slow(one, LIMIT, at(PRESENT), now));
        assert!(!floor.too_slow(other, LIMIT, at(PRESENT + 1), now), "one sweep");
        assert_eq!(next_window(&floor, now).unwrap().until, at(PRESENT));
        // It becomes slow again before the sweep has ended. What is between is for the next one.
        let again = above(&floor, now);
        assert!(!floor.too_slow(again, LIMIT, at(PRESENT + 60), now), "the sweep goes on");
        assert_eq!(next_window(&floor, now + CLAIM).unwrap().until, at(PRESENT));
        floor.lower(at(PRESENT + 1));
        assert_eq!(above(&floor, now).scan, Scan::Above(at(PRESENT + 60)));
    }

    /// The next scan above the floor.
    fn above(floor: &Floor, now: Instant) -> Start {
        let next = [floor.start(now), floor.start(now)];
        next.into_iter().find(|start| matches!(start.scan, Scan::Above(_))).unwrap()
    }

    /// Otherwise the leases above the floor would scan all that is gone.
    #[test]
    fn while_it_sweeps_no_old_event_takes_the_floor_below_the_top_of_the_sweep() {
        let now = Instant::now();
        let floor = sweeping(now);
        let part = floor.start(now);
        assert!(matches!(part.scan, Scan::Part(_)));
        floor.took(part, at(5));
        assert_eq!(above(&floor, now).scan, Scan::Above(at(PRESENT)));
        floor.took(part, at(PRESENT + 5));
        assert_eq!(above(&floor, now).scan, Scan::Above(at(PRESENT)), "a window says nothing of what is above");
        floor.lower(at(5));
        assert_eq!(above(&floor, now).scan, Scan::Above(at(PRESENT)));
        floor.took(above(&floor, now), at(6));
        assert_eq!(above(&floor, now).scan, Scan::Above(at(PRESENT)));
        floor.took(above(&floor, now), at(PRESENT + 9));
        assert_eq!(above(&floor, now).scan, Scan::Above(at(PRESENT + 9)));
        floor.lower(at(7));
        assert_eq!(above(&floor, now).scan, Scan::Above(at(PRESENT)));
    }

    #[test]
    fn a_window_is_scanned_by_one_worker_and_by_others_only_if_that_one_is_gone_or_it_holds_many_events() {
        let now = Instant::now();
        let floor = sweeping(now);
        let window = next_window(&floor, now).unwrap();
        assert_eq!(next_window(&floor, now), None);
        assert_eq!(next_window(&floor, now + CLAIM), Some(window));
        assert!(!floor.swept(window, Found::More(window.until), NOTHING, now));
        let rest = next_window(&floor, now).unwrap();
        assert_eq!((rest.until, next_window(&floor, now)), (window.until, Some(rest)));
        // Only the first answer about a window counts: the other worker has seen an older one.
        floor.swept(rest, Found::All, NOTHING, now);
        let next = next_window(&floor, now).unwrap();
        assert_eq!(Some(next.until), window.from);
        floor.swept(rest, Found::All, NOTHING, now);
        floor.swept(window, Found::CutOff, LIMIT, now);
        assert_eq!(next_window(&floor, now + CLAIM), Some(next));
    }

    #[test]
    fn a_sweep_pauses_unless_it_finds_events() {
        let now = Instant::now();
        let floor = sweeping(now);
        for (found, took, pauses) in [
            (Found::Nothing, BURST / 2, false),
            (Found::Nothing, BURST / 2, true),
            (Found::All, BURST * 2, false),
            (Found::CutOff, LIMIT, true),
            (Found::Nothing, NOTHING, false),
        ] {
            let late = now + RESCAN_INTERVAL;
            floor.swept(next_window(&floor, late).unwrap(), found, took, now);
            let above = Start { scan: Scan::Above(at(PRESENT)), changes: 0 };
            assert_eq!(floor.goes_on(above, now), !pauses, "{found:?}");
            assert!(floor.goes_on(above, late));
        }
    }

    /// Sweeps until the end of one, with such scans. Returns whether that was the last.
    fn sweep(floor: &Floor, took: Duration, now: Instant) -> bool {
        for _ in 0..100 {
            let window = next_window(floor, now + CLAIM).unwrap();
            let last = floor.swept(window, Found::Nothing, took, now);
            if window.from.is_none() {
                return last;
            }
        }
        panic!("the sweep does not end: {floor:?}");
    }

    #[test]
    fn sweeps_follow_each_other_until_a_whole_one_is_quick() {
        let now = Instant::now();
        let floor = sweeping(now);
        assert!(!sweep(&floor, RESCAN_INTERVAL / 10, now));
        // The next one begins where leases scanned meanwhile.
        floor.took(above(&floor, now), at(PRESENT + 5));
        assert!(!sweep(&floor, RESCAN_INTERVAL / 10, now));
        assert_eq!(floor.sweeps_below(), Some(at(PRESENT + 5)));
        assert!(sweep(&floor, RESCAN_INTERVAL / 100, now));
        assert_eq!(floor.sweeps_below(), None);
        assert_eq!(floor.start(now).scan, Scan::Above(at(PRESENT + 5)));
        assert_eq!(floor.start(now + RESCAN_INTERVAL).scan, Scan::Everything);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever leases and settlements do in whatever order, every scan above the floor joins the sweep below it:
        /// no moment lies between them, except where a lease above the floor has taken events.
        #[test]
        fn no_moment_lies_between_the_sweep_and_the_floor(
            steps in prop::collection::vec((0u8..6, 0i64..100), 1..200),
        ) {
            let (floor, mut now) = (Floor::new(), Instant::now());
            let (mut starts, mut leased_to) = (vec![floor.start(now)], at(0));
            for (step, number) in steps {
                let start = starts[usize::try_from(number).unwrap() % starts.len()];
                now += RESCAN_INTERVAL * u32::from(number % 7 == 0);
                match step {
                    0 => starts.push(floor.start(now)),
                    1 => {
                        let oldest = at(PRESENT + number);
                        if start.scan.until().is_none() {
                            leased_to = leased_to.max(oldest);
                        }
                        floor.took(start, oldest);
                    }
                    2 => floor.lower(at(PRESENT + number)),
                    3 => {
                        if floor.too_slow(start, LIMIT, at(PRESENT + number), now) {
                            leased_to = leased_to.max(at(PRESENT + number));
                            prop_assert!(floor.sweeps_below().is_some());
                        }
                    }
                    _ => if let Scan::Part(window) = start.scan {
                        let found = if step == 4 { Found::Nothing } else { Found::CutOff };
                        floor.swept(window, found, RESCAN_INTERVAL / 20, now);
                    },
                }
                let top = floor.sweeps_below();
                for scan in [floor.start(now).scan, floor.start(now).scan] {
                    match scan {
                        Scan::Above(above) => {
                            prop_assert!(top.is_none_or(|top| top <= above), "the floor is below the sweep");
                            prop_assert!(above <= leased_to.max(top.unwrap_or(leased_to)), "above what was leased");
                        }
                        Scan::Part(window) => prop_assert!(Some(window.until) <= top),
                        Scan::Everything => prop_assert_eq!(top, None),
                    }
                }
            }
        }
    }

    /// Each lease above the floor is slow too, and says so.
    #[test]
    fn a_sweep_gets_on_though_all_statements_are_slow() {
        let (floor, slow) = (Floor::new(), RESCAN_INTERVAL + BURST);
        let (mut now, mut present) = (Instant::now(), 1_000_000);
        assert!(floor.too_slow(floor.start(now), slow, at(present), now));
        let mut lowest = present;
        for _ in 0..2000 {
            let start = floor.start(now);
            (now, present) = (now + slow, present + 2);
            match start.scan {
                Scan::Part(window) => {
                    lowest = lowest.min(window.until.unix_timestamp());
                    floor.swept(window, Found::Nothing, slow, now);
                }
                Scan::Above(_) => assert!(!floor.too_slow(start, slow, at(present), now), "a sweep is begun anew"),
                Scan::Everything => panic!("it takes too long"),
            }
        }
        assert!(lowest < 1_000_000 - 900, "it swept down to {lowest}");
    }

    #[test]
    fn sweeps_end_however_fast_the_scan_was_that_somebody_cut_off() {
        let (floor, mut now) = (Floor::new(), Instant::now());
        assert!(floor.too_slow(floor.start(now), Duration::from_millis(1), at(1_000_000), now));
        for _ in 0..1000 {
            now += RESCAN_INTERVAL;
            match floor.start(now).scan {
                Scan::Part(window) => drop(floor.swept(window, Found::Nothing, Duration::from_millis(2), now)),
                Scan::Above(_) => {}
                Scan::Everything => return,
            }
        }
        panic!("it never scans everything again");
    }
}
