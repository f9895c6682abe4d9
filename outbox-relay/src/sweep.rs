//! Looks for events below the floor part by part, when one scan of everything takes too long.
//!
//! Rows that VACUUM cannot remove make a scan slow, and the time limit of a statement then ends it. It would end the
//! next one too. So a sweep divides the time before its top into windows, and a lease scans one of them. The windows
//! follow each other from the top backwards, without a gap, and the last one has no lower bound. So a sweep that ended
//! has scanned everything below its top.
//!
//! Only the width of the windows is a guess. It grows while scans are fast, shrinks when one is slow, and shrinks by
//! far more when one is cut off. Windows that are split as a tree would need a stack, and would find no more.
//!
//! This is a pure decision: the times are the database's, and how long a scan took is told.

use std::time::Duration;

use sqlx::types::time::OffsetDateTime;

/// The width of the first window.
const WIDTH_FIRST: Duration = Duration::from_secs(1);
/// A window this wide has no lower bound.
const WIDTH_MAX: Duration = Duration::from_secs(1 << 22);
/// A window is not split further. Only rows of one moment can be so many that this one is cut off.
const WIDTH_MIN: Duration = Duration::from_millis(1);
/// How much wider the next window is after a fast scan: a sweep over nothing should have few. Others double it.
const WIDER: u32 = 4;
/// How much narrower a window becomes that was cut off. Each cut costs a whole time limit, so there should be few.
const NARROWER: u32 = 16;
/// A scan is fast that takes less.
const FAST: Duration = Duration::from_millis(25);
/// After a scan that is slower, the next window is half as wide.
const SLOW: Duration = Duration::from_millis(200);
/// How far a scan begins below the oldest event of the lease before it: others of the same time may be committed later.
const MARGIN: Duration = Duration::from_secs(1);

/// A span of `visible_at`: from `from` on, or without a lower bound, and before `until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) from: Option<OffsetDateTime>,
    pub(crate) until: OffsetDateTime,
}

/// What a lease found in the rows that it scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The time limit ended the scan.
    CutOff,
    Nothing,
    /// All free events there were.
    All,
    /// As many events as a lease may have. The oldest was created then.
    More(OffsetDateTime),
}

/// One pass over everything below `top`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sweep {
    /// Everything from here to the top has been scanned.
    until: OffsetDateTime,
    width: Duration,
    /// Where the window begins after it was found to hold more than a lease. A lease takes the oldest events, and what
    /// it leaves behind would slow the next scan down.
    risen: Option<OffsetDateTime>,
    /// The last window that was cut off, up to its end.
    dense: Option<Dense>,
    spent: Duration,
}

/// Windows down to `end` are no wider than this. Otherwise they would grow again before they reach the many rows, and be
/// cut off again.
#[derive(Clone, Copy, Debug)]
struct Dense {
    end: OffsetDateTime,
    width_max: Duration,
}

impl Sweep {
    pub(crate) fn below(top: OffsetDateTime) -> Self {
        Self { until: top, width: WIDTH_FIRST, risen: None, dense: None, spent: Duration::ZERO }
    }

    /// The time that its scans took so far.
    pub(crate) fn spent(&self) -> Duration {
        self.spent
    }

    /// Whether the window holds more events than the last lease could take.
    pub(crate) fn has_more(&self) -> bool {
        self.risen.is_some()
    }

    /// What to scan next.
    pub(crate) fn window(&self) -> Window {
        Window { from: self.risen.max(self.lower_end()), until: self.until }
    }

    /// A scan of the window took this long. Returns whether the sweep has ended.
    pub(crate) fn scanned(&mut self, found: Found, took: Duration) -> bool {
        self.spent += took;
        match found {
            Found::More(oldest) => {
                self.risen = self.risen.max(Some((oldest - MARGIN).min(self.until)));
                return false;
            }
            Found::CutOff if self.width > WIDTH_MIN => {
                self.risen = None;
                self.dense = Some(Dense { end: self.until - self.width, width_max: self.width / WIDER });
                self.width = (self.width / NARROWER).max(WIDTH_MIN);
                return false;
            }
            // A moment with so many rows is passed over, or nothing older would ever be found.
            Found::CutOff | Found::Nothing | Found::All => {}
        }
        self.risen = None;
        let Some(end) = self.lower_end() else { return true };
        self.until = end;
        self.dense = self.dense.filter(|dense| dense.end < end);
        self.width = self.next_width(took);
        false
    }

    /// It grows unless the scan was slow. Otherwise a sweep would never end if each statement takes a while, however
    /// few rows it scans. For the same reason a slow scan alone makes it no narrower than at first.
    fn next_width(&self, took: Duration) -> Duration {
        if took > SLOW {
            return (self.width / 2).max(WIDTH_FIRST.min(self.width));
        }
        let wider = self.width * if took < FAST { WIDER } else { 2 };
        wider.min(self.dense.map_or(WIDTH_MAX, |dense| dense.width_max)).max(WIDTH_MIN)
    }

    /// No event is older than the epoch. So a sweep ends even if all its windows have to be narrow.
    fn lower_end(&self) -> Option<OffsetDateTime> {
        if self.width >= WIDTH_MAX {
            return None;
        }
        Some(self.until - self.width).filter(|end| *end > OffsetDateTime::UNIX_EPOCH)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use sqlx::types::time::OffsetDateTime;

    use super::{Found, MARGIN, SLOW, Sweep, WIDTH_MIN, Window};

    fn at(second: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(second).unwrap()
    }

    /// Long after the epoch.
    const TOP: i64 = 1_800_000_000;
    const LIMIT: Duration = Duration::from_secs(1);

    /// An outbox: how long a scan takes is given by how many rows that are gone lie in it.
    struct Gone {
        /// Rows that are gone, as seconds before the top: from, to, and how many.
        spans: Vec<(i64, i64, u32)>,
        each: Duration,
    }

    impl Gone {
        fn scan(&self, window: Window) -> (bool, Duration) {
            let age = |time: OffsetDateTime| (at(TOP) - time).as_seconds_f64();
            let (newest, oldest) = (age(window.until), window.from.map_or(f64::INFINITY, age));
            let rows: f64 = self
                .spans
                .iter()
                .map(|(from, to, rows)| {
                    let (from, to) = (*from as f64, *to as f64);
                    let within = (oldest.min(to) - newest.max(from)).max(0.0) / (to - from);
                    within * f64::from(*rows)
                })
                .sum();
            let took = self.each.mul_f64(rows);
            (took > LIMIT, took.min(LIMIT))
        }

        /// The windows that a whole sweep scanned to their end, and how many were cut off.
        fn sweep(&self) -> (Vec<Window>, usize) {
            let (mut sweep, mut scanned, mut cuts) = (Sweep::below(at(TOP)), Vec::new(), 0);
            for _ in 0..100_000 {
                let window = sweep.window();
                let (cut_off, took) = self.scan(window);
                cuts += usize::from(cut_off);
                if !cut_off {
                    scanned.push(window);
                }
                if sweep.scanned(if cut_off { Found::CutOff } else { Found::Nothing }, took) {
                    return (scanned, cuts);
                }
            }
            panic!("the sweep does not end: {sweep:?}");
        }
    }

    fn assert_covers(windows: &[Window]) {
        let mut end = at(TOP);
        for window in windows {
            assert_eq!(window.until, end, "a gap");
            let Some(from) = window.from else {
                assert_eq!(Some(window), windows.last());
                return;
            };
            assert!(from < end);
            end = from;
        }
        panic!("the oldest events are not scanned");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// However the rows that are gone lie, and however many there are.
        #[test]
        fn a_sweep_ends_and_has_scanned_every_moment_below_its_top(
            spans in prop::collection::vec((0i64..10_000_000, 1i64..5_000_000, 0u32..5_000_000), 0..6),
        ) {
            let spans = spans.into_iter().map(|(from, width, rows)| (from, from + width, rows)).collect();
            let (windows, _) = Gone { spans, each: Duration::from_nanos(400) }.sweep();
            assert_covers(&windows);
        }

        /// Scans that take any time and find anything, as on a busy machine.
        #[test]
        fn every_moment_is_scanned_or_lies_in_a_shortest_window_that_was_cut_off(
            scans in prop::collection::vec((0u8..8, 0u64..1500), 0..400),
        ) {
            let (mut sweep, mut end) = (Sweep::below(at(TOP)), at(TOP));
            // After these scans all others are fast.
            for (found, millis) in scans.into_iter().chain([(7, 1); 1000]) {
                let window = sweep.window();
                prop_assert_eq!(window.until, end);
                prop_assert!(window.from.is_none_or(|from| from <= end));
                let (whole, full) = (sweep.lower_end(), sweep.has_more());
                let found = match found {
                    0 | 1 => Found::CutOff,
                    2 => Found::More(window.from.unwrap_or(end - Duration::from_secs(3600)) + WIDTH_MIN),
                    3 => Found::All,
                    _ => Found::Nothing,
                };
                let ended = sweep.scanned(found, Duration::from_millis(millis));
                if matches!(found, Found::Nothing | Found::All) {
                    prop_assert!(full || window.from == whole);
                }
                if ended {
                    prop_assert_eq!(whole, None);
                    return Ok(());
                }
                let moved = sweep.window().until != end;
                prop_assert!(!moved || sweep.window().until == whole.unwrap());
                if found == Found::CutOff && moved {
                    prop_assert_eq!(whole, Some(end - WIDTH_MIN));
                }
                prop_assert!(!moved || !matches!(found, Found::More(_)), "events are left in the window");
                end = sweep.window().until;
            }
            prop_assert!(false, "the sweep does not end");
        }
    }

    #[test]
    fn a_sweep_ends_though_each_statement_takes_a_while() {
        let (mut sweep, mut windows) = (Sweep::below(at(TOP)), 1);
        while !sweep.scanned(Found::Nothing, SLOW) {
            windows += 1;
            assert!(windows < 30);
        }
    }

    #[test]
    fn a_sweep_over_nothing_has_few_windows() {
        let (windows, cuts) = Gone { spans: Vec::new(), each: LIMIT }.sweep();
        assert!(windows.len() <= 12, "{windows:?}");
        assert_eq!(cuts, 0);
    }

    /// Wherever they lie.
    #[test]
    fn millions_of_rows_that_are_gone_are_passed_in_bounded_scans_with_few_cut_off() {
        for age in [0, 3600, 86_400, 10 * 86_400, 100 * 86_400] {
            let gone = Gone { spans: vec![(age, age + 3600, 8_000_000)], each: Duration::from_nanos(500) };
            let (windows, cuts) = gone.sweep();
            assert_covers(&windows);
            assert!(windows.len() < 80, "{age}: {}", windows.len());
            assert!(cuts <= 8, "{age}: {cuts}");
            let slow = windows.iter().filter(|window| gone.scan(**window).1 > 2 * SLOW).count();
            assert!(slow <= 4, "{age}: {slow}");
        }
    }

    #[test]
    fn a_moment_with_more_rows_than_can_be_scanned_is_passed_over_alone() {
        let (mut sweep, moment) = (Sweep::below(at(TOP)), at(TOP - 5000));
        let (mut passed, mut scans) = (Vec::new(), 0);
        loop {
            scans += 1;
            assert!(scans < 100, "the sweep does not end");
            let window = sweep.window();
            let cut_off = moment < window.until && window.from.is_none_or(|from| from <= moment);
            let found = if cut_off { Found::CutOff } else { Found::Nothing };
            if sweep.scanned(found, if cut_off { LIMIT } else { Duration::ZERO }) {
                break;
            }
            if cut_off && sweep.window().until != window.until {
                passed.push(window);
            }
        }
        assert_eq!(passed.len(), 1);
        assert_eq!(passed[0].until - passed[0].from.unwrap(), WIDTH_MIN);
    }

    /// What a lease took would be scanned again by the next one, so that a long line would take the square of its time.
    #[test]
    fn a_window_with_more_events_than_a_lease_is_scanned_again_from_where_the_lease_began() {
        let mut sweep = Sweep::below(at(TOP));
        for _ in 0..5 {
            assert!(!sweep.scanned(Found::Nothing, Duration::ZERO));
        }
        let whole = sweep.window();
        let from = whole.from.unwrap();
        assert!(!sweep.scanned(Found::More(from + Duration::from_secs(100)), LIMIT));
        assert!(sweep.has_more());
        let rest = Window { from: Some(from + Duration::from_secs(100) - MARGIN), until: whole.until };
        assert_eq!(sweep.window(), rest);
        // An event may be much older than the time at which it became visible.
        assert!(!sweep.scanned(Found::More(at(7)), LIMIT));
        assert_eq!(sweep.window(), rest);
        assert!(!sweep.scanned(Found::All, Duration::ZERO));
        assert_eq!(sweep.window().until, from);
        assert!(!sweep.has_more());
    }
}
