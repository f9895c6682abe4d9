//! The faults, by class, and the seeded schedule they are drawn in.

use std::{fmt, time::Duration};

use fastrand::Rng;

use super::{
    crash::{CrashPoint, POINTS},
    site::Part,
};

/// What is done to the system once. Everything that decides it is in here, drawn from the seed.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    Kill(Part),
    Crash(CrashPoint),
    Postgres(Part, PostgresFault),
    EndConnections { link: usize, reset: bool },
    LoseReply { link: usize },
    HalfOpen { link: usize, lasts: Duration },
    Slow { link: usize, late: Option<Duration>, lasts: Duration },
    StopPastLease(Part),
    WrongClock { part: Part, ahead: bool, lasts: Duration },
    Poison(Poison),
    Receiver { part: Part, how: ReceiverFault },
    FillDisk { lasts: Duration },
    Exhaust { part: Part, pool: bool, lasts: Duration },
    HangUps,
    DeliverAgain,
    SameRequest,
    Garbage { part: Part, seed: u64 },
    Overload,
    RollingRestart,
}

/// How a server is broken.
#[derive(Clone, Copy, Debug)]
pub(super) enum PostgresFault {
    Crash { down: Duration },
    KillBackend,
    TerminateSessions,
}

/// An event that can never be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Poison {
    Undecodable,
    UnknownType,
    OfNoOrder,
    /// Its receiver crashes whenever it gets it.
    Deadly,
}

/// What a receiver does with a delivery.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReceiverFault {
    /// Stands still for so long.
    Hang(Duration),
    /// Crashes on one event so many times, and then takes it.
    CrashOn { times: u32 },
}

/// The classes, in the order of their numbers, from 1; 20 is two to four of them together.
pub(super) const CLASSES: [&str; 20] = [
    "a process killed",
    "a crash at a named point",
    "PostgreSQL crashed, a backend killed, sessions terminated",
    "connections cut or reset",
    "a reply lost after the work was done",
    "a half-open link",
    "a link with delays or one-byte writes",
    "a relay stopped past its lease, then resumed",
    "a process with its clock an hour off",
    "a poison event",
    "a receiver that hangs, or crashes on one event",
    "a full disk",
    "a pool, or all of a server's sessions, used up",
    "callers who hang up within 50 ms",
    "delivered events sent again, also after pruning",
    "one request id 50 times at once, and with another body",
    "malformed, truncated, oversized and random messages",
    "more load than can be taken",
    "a rolling restart",
    "two to four of these together",
];
/// Number of the class of those that strike together.
pub(super) const TOGETHER: usize = 20;

impl Fault {
    /// From 1.
    pub(super) fn class(&self) -> usize {
        match self {
            Self::Kill(_) => 1,
            Self::Crash(_) => 2,
            Self::Postgres(..) => 3,
            Self::EndConnections { .. } => 4,
            Self::LoseReply { .. } => 5,
            Self::HalfOpen { .. } => 6,
            Self::Slow { .. } => 7,
            Self::StopPastLease(_) => 8,
            Self::WrongClock { .. } => 9,
            Self::Poison(_) => 10,
            Self::Receiver { .. } => 11,
            Self::FillDisk { .. } => 12,
            Self::Exhaust { .. } => 13,
            Self::HangUps => 14,
            Self::DeliverAgain => 15,
            Self::SameRequest => 16,
            Self::Garbage { .. } => 17,
            Self::Overload => 18,
            Self::RollingRestart => 19,
        }
    }

    /// The link it strikes, if it strikes one.
    pub(super) fn link(&self) -> Option<usize> {
        match self {
            Self::EndConnections { link, .. }
            | Self::LoseReply { link }
            | Self::HalfOpen { link, .. }
            | Self::Slow { link, .. } => Some(*link),
            _ => None,
        }
    }

    /// Whether it needs the system as it is, or changes it as a whole: it strikes alone.
    fn stands_alone(&self) -> bool {
        matches!(
            self,
            Self::RollingRestart
                | Self::FillDisk { .. }
                | Self::WrongClock { .. }
                | Self::StopPastLease(_)
                | Self::DeliverAgain
        )
    }

    /// One of the class.
    fn draw(class: usize, rng: &mut Rng) -> Self {
        let part = any(rng, &Part::ALL);
        let service = any(rng, &[Part::Orders, Part::Inventory]);
        let lasts = Duration::from_millis(rng.u64(1500..4000));
        let link = rng.usize(..LINKS);
        match class {
            1 => Self::Kill(part),
            2 => Self::Crash(any(rng, &POINTS)),
            3 => Self::Postgres(service, draw_postgres(rng)),
            4 => Self::EndConnections { link, reset: rng.bool() },
            5 => Self::LoseReply { link },
            6 => Self::HalfOpen { link, lasts },
            7 => Self::Slow { link, late: rng.bool().then(|| Duration::from_millis(rng.u64(200..5000))), lasts },
            8 => Self::StopPastLease(any(rng, &Part::RELAYS)),
            9 => Self::WrongClock { part, ahead: rng.bool(), lasts },
            // One that kills its receiver comes once, by itself.
            10 => Self::Poison(any(rng, &[Poison::Undecodable, Poison::UnknownType, Poison::OfNoOrder])),
            11 if rng.bool() => Self::Receiver { part: service, how: ReceiverFault::Hang(lasts) },
            11 => Self::Receiver { part: Part::Inventory, how: ReceiverFault::CrashOn { times: rng.u32(1..4) } },
            12 => Self::FillDisk { lasts },
            13 => Self::Exhaust { part: service, pool: rng.bool(), lasts: lasts.mul_f64(0.6) },
            14 => Self::HangUps,
            15 => Self::DeliverAgain,
            16 => Self::SameRequest,
            17 => Self::Garbage { part, seed: rng.u64(..) },
            18 => Self::Overload,
            _ => Self::RollingRestart,
        }
    }
}

/// Links that a fault can strike: of each process to its database, of each relay to its receiver, of clients to each service.
const LINKS: usize = 12;

fn any<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
    choices[rng.usize(..choices.len())]
}

fn draw_postgres(rng: &mut Rng) -> PostgresFault {
    match rng.u8(..3) {
        0 => PostgresFault::Crash { down: Duration::from_millis(rng.u64(0..1500)) },
        1 => PostgresFault::KillBackend,
        _ => PostgresFault::TerminateSessions,
    }
}

/// The faults of a run: step after step, each of one or of two to four that strike together.
#[derive(Debug)]
pub(super) struct Schedule {
    rng: Rng,
    /// For what has to strike once more, which depends on what happens, as the schedule must not.
    again: Rng,
    /// Whether the last step was such a one: others take turns with them.
    was_again: bool,
    /// Classes that come before any does for a second time.
    first: Vec<usize>,
    /// Crash points, likewise.
    points: Vec<CrashPoint>,
    deadly: bool,
}

impl Schedule {
    /// The same for the same seed. A run that is long enough also has an event that kills its receiver until it is dead.
    pub(super) fn of(seed: u64, deadly: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut first: Vec<usize> = (1..TOGETHER).collect();
        rng.shuffle(&mut first);
        Self { again: rng.fork(), rng, was_again: false, first, points: Vec::new(), deadly }
    }

    /// What strikes next. Once every class has had its turn, those come first that are `left`, since they had no effect.
    pub(super) fn next_step(&mut self, left: &[usize]) -> Vec<Fault> {
        if let Some(class) = self.first.pop() {
            // Few minutes are to hold all classes: what does not stand alone is joined by the next.
            let mut step = vec![self.draw(class)];
            while let Some(next) = self.first.last().copied()
                && step.len() < 3
                && !step[0].stands_alone()
            {
                let other = self.draw(next);
                if other.stands_alone() {
                    break;
                }
                self.first.pop();
                step.push(other);
            }
            return step;
        }
        self.was_again = !self.was_again && !left.is_empty();
        if self.was_again {
            // Of those that strike together any will do.
            let classes = if left[0] == TOGETHER { vec![1, 4] } else { vec![left[0]] };
            return classes.into_iter().map(|class| Fault::draw(class, &mut self.again)).collect();
        }
        if std::mem::take(&mut self.deadly) {
            return vec![Fault::Poison(Poison::Deadly)];
        }
        let together = if self.rng.u8(..3) == 0 { self.rng.usize(2..5) } else { 1 };
        self.draw_step(together)
    }

    /// So many of any class.
    fn draw_step(&mut self, together: usize) -> Vec<Fault> {
        let mut step = Vec::new();
        while step.len() < together {
            // Half are crashes: there are many points.
            let class = if self.rng.bool() { 2 } else { self.rng.usize(1..TOGETHER) };
            let fault = self.draw(class);
            if together == 1 || !fault.stands_alone() {
                step.push(fault);
            }
        }
        step
    }

    fn draw(&mut self, class: usize) -> Fault {
        if class != 2 {
            return Fault::draw(class, &mut self.rng);
        }
        if self.points.is_empty() {
            self.points = POINTS.into();
            self.rng.shuffle(&mut self.points);
        }
        self.points.pop().map_or_else(|| Fault::draw(1, &mut self.rng), Fault::Crash)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(part) => write!(f, "kill {}", part.name()),
            Self::Crash(point) => write!(f, "crash {}", point.name),
            Self::StopPastLease(relay) => write!(f, "stop {} past its lease", relay.name()),
            other => write!(f, "{other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{Fault, Schedule, TOGETHER};

    fn steps(seed: u64, count: usize) -> Vec<Vec<Fault>> {
        let mut schedule = Schedule::of(seed, true);
        (0..count).map(|_| schedule.next_step(&[])).collect()
    }

    #[test]
    fn a_seed_repeats_its_schedule_and_another_has_another() {
        let shown = |seed| format!("{:?}", steps(seed, 50));
        assert_eq!(shown(7), shown(7));
        assert_ne!(shown(7), shown(8));
        let (mut calm, mut again) = (Schedule::of(7, true), Schedule::of(7, true));
        for _ in 0..100 {
            let left = if again.was_again { &[][..] } else { &[12, TOGETHER] };
            let mut next = again.next_step(left);
            if again.was_again {
                next = again.next_step(&[]);
            }
            assert_eq!(format!("{next:?}"), format!("{:?}", calm.next_step(&[])));
        }
    }

    #[test]
    fn every_class_strikes_before_any_strikes_at_random_and_every_point_before_any_does_twice() {
        for seed in 0..100 {
            let early: Vec<usize> = steps(seed, 19).into_iter().flatten().map(|fault| fault.class()).collect();
            let classes: HashSet<usize> = early[..19].iter().copied().collect();
            assert_eq!(classes.len(), TOGETHER - 1, "seed {seed}");
            let crashes = steps(seed, 200).into_iter().flatten().filter_map(|fault| match fault {
                Fault::Crash(point) => Some(point.name),
                _ => None,
            });
            let crashes: Vec<_> = crashes.take(super::POINTS.len()).collect();
            assert_eq!(crashes.iter().collect::<HashSet<_>>().len(), super::POINTS.len(), "seed {seed}");
        }
    }
}
