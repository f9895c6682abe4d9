//! The faults, by class, and the schedule that draws them from a seed.

use std::{fmt, time::Duration};

use fastrand::Rng;

use super::{
    site::{Part, Route},
    stand_in::{Answer, StandIn},
};

/// One fault. The seed has drawn everything that decides what it does, except at which point a process crashes: that
/// depends on which statements are executed.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    Kill(Part),
    /// At a point, see `crash`.
    Crash,
    Postgres(Part, PostgresFault),
    EndConnections {
        link: usize,
        reset: bool,
    },
    LoseReply {
        link: usize,
    },
    HalfOpen {
        link: usize,
        lasts: Duration,
    },
    Slow {
        link: usize,
        late: Option<Duration>,
        lasts: Duration,
    },
    StopPastLease(Route),
    WrongClock {
        part: Part,
        ahead: bool,
        lasts: Duration,
    },
    Poison(Poison),
    Receiver {
        part: Part,
        how: ReceiverFault,
    },
    FillDisk {
        lasts: Duration,
    },
    Exhaust {
        part: Part,
        pool: bool,
        lasts: Duration,
    },
    HangUps,
    DeliverAgain,
    SameRequest,
    Garbage {
        part: Part,
        seed: u64,
    },
    Overload,
    RollingRestart,
    /// A database server can only be read: old sessions, or new ones as well.
    ReadOnly {
        part: Part,
        new_sessions: bool,
        lasts: Duration,
    },
    /// The commits of a database server wait for a synchronous standby.
    StandbyAway {
        part: Part,
        lasts: Duration,
    },
    /// The clock of a database server jumps ten days ahead, and is set back.
    ServerClock {
        part: Part,
        lasts: Duration,
    },
    /// A receiver is stood in for, on the way from every relay.
    StandIn {
        receiver: Part,
        stand_in: StandIn,
        lasts: Duration,
    },
}

/// What happens to a database server.
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
    /// It crashes its receiver, each time.
    Deadly,
}

/// What a receiver does with a delivery.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReceiverFault {
    /// Stands still for that long.
    Hang(Duration),
    /// Crashes on one event that many times, and then applies it.
    CrashOn { times: u32 },
}

/// The classes in the order of their numbers, which begin with 1.
pub(super) const CLASSES: [&str; 27] = [
    "a process killed",
    "a crash at a named point",
    "PostgreSQL crashed, a backend killed, or sessions terminated",
    "connections closed or reset",
    "a reply lost after the work was committed",
    "a half-open link",
    "a link with delays, or one byte at a time",
    "a relay stopped past its lease, then resumed",
    "a process whose clock is an hour off",
    "a poison event",
    "a receiver that hangs, or crashes on one event",
    "a full disk",
    "all connections of a pool, or all sessions of a server, in use",
    "callers that hang up within 50 ms",
    "old events delivered again, also after pruning",
    "one request id in 50 calls at once, and for another order",
    "malformed, truncated, oversized, and random messages",
    "more load than a service takes",
    "a rolling restart",
    "a receiver that answers every call UNKNOWN",
    "a receiver that answers every call DEADLINE_EXCEEDED",
    "a proxy that answers for a receiver with a page of HTML",
    "a receiver whose answers have no gRPC status",
    "a server that can only be read, as after a failover",
    "a synchronous standby that is away",
    "a server whose clock jumps ten days ahead, and is set back",
    "two to four of these at the same time",
];
/// Number of the class for faults at the same time.
pub(super) const TOGETHER: usize = 27;

impl Fault {
    /// From 1.
    pub(super) fn class(&self) -> usize {
        match self {
            Self::Kill(_) => 1,
            Self::Crash => 2,
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
            Self::StandIn { stand_in, .. } => match stand_in.answer {
                Answer::Unknown => 20,
                Answer::DeadlineExceeded => 21,
                Answer::Page(_) => 22,
                Answer::NoStatus => 23,
            },
            Self::ReadOnly { .. } => 24,
            Self::StandbyAway { .. } => 25,
            Self::ServerClock { .. } => 26,
        }
    }

    /// The link it breaks, if it breaks one.
    pub(super) fn link(&self) -> Option<usize> {
        match self {
            Self::EndConnections { link, .. }
            | Self::LoseReply { link }
            | Self::HalfOpen { link, .. }
            | Self::Slow { link, .. } => Some(*link),
            _ => None,
        }
    }

    /// Whether no other fault may strike at the same time: this one needs a healthy system, or changes all of it.
    fn stands_alone(&self) -> bool {
        matches!(
            self,
            Self::RollingRestart
                | Self::FillDisk { .. }
                | Self::WrongClock { .. }
                | Self::StopPastLease(_)
                | Self::DeliverAgain
                | Self::ReadOnly { .. }
                | Self::StandbyAway { .. }
                | Self::ServerClock { .. }
        )
    }

    /// One of the class.
    fn draw(class: usize, rng: &mut Rng) -> Self {
        let part = any(rng, &Part::ALL);
        let service = any(rng, &Part::SERVICES);
        let lasts = Duration::from_millis(rng.u64(1500..4000));
        let link = rng.usize(..LINKS);
        match class {
            1 => Self::Kill(part),
            2 => Self::Crash,
            3 => Self::Postgres(any(rng, &[Part::Orders, Part::Inventory]), draw_postgres(rng)),
            4 => Self::EndConnections { link, reset: rng.bool() },
            5 => Self::LoseReply { link },
            6 => Self::HalfOpen { link, lasts },
            7 => Self::Slow { link, late: rng.bool().then(|| Duration::from_millis(rng.u64(200..5000))), lasts },
            8 => Self::StopPastLease(any(rng, &Route::ALL)),
            9 => Self::WrongClock { part, ahead: rng.bool(), lasts },
            // `Deadly` strikes once, and takes most of a run.
            10 => Self::Poison(any(rng, &[Poison::Undecodable, Poison::UnknownType, Poison::OfNoOrder])),
            11 if rng.bool() => Self::Receiver { part: service, how: ReceiverFault::Hang(lasts) },
            11 => {
                let part = any(rng, &[Part::Inventory, Part::Loyalty]);
                Self::Receiver { part, how: ReceiverFault::CrashOn { times: rng.u32(1..4) } }
            }
            12 => Self::FillDisk { lasts },
            13 => Self::Exhaust { part: service, pool: rng.bool(), lasts: lasts.mul_f64(0.6) },
            14 => Self::HangUps,
            15 => Self::DeliverAgain,
            16 => Self::SameRequest,
            17 => Self::Garbage { part, seed: rng.u64(..) },
            18 => Self::Overload,
            19 => Self::RollingRestart,
            24 => Self::ReadOnly { part: any(rng, &[Part::Orders, Part::Inventory]), new_sessions: rng.bool(), lasts },
            // Longer than a unit of work may take.
            25 => Self::StandbyAway { part: any(rng, &[Part::Orders, Part::Inventory]), lasts: lasts + WORK_LIMIT },
            26 => Self::ServerClock { part: any(rng, &[Part::Orders, Part::Inventory]), lasts: lasts * 2 },
            _ => Self::StandIn { receiver: service, stand_in: draw_stand_in(class, rng), lasts: lasts.mul_f64(1.5) },
        }
    }
}

/// Longer than a unit of work of any process.
const WORK_LIMIT: Duration = Duration::from_secs(5);
/// Links that a fault can break: each process to its database, each relay to its receivers, clients to each service.
const LINKS: usize = Part::ALL.len() + Route::ALL.len() + Part::SERVICES.len();

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

fn draw_stand_in(class: usize, rng: &mut Rng) -> StandIn {
    let answer = match class {
        20 => Answer::Unknown,
        21 => Answer::DeadlineExceeded,
        22 => Answer::Page(any(rng, &[502, 503, 504])),
        _ => Answer::NoStatus,
    };
    // Mostly Describe works. Otherwise the route stays closed, and no event is delivered.
    StandIn { answer, describes: rng.u8(..4) > 0 }
}

/// The faults of a run, step by step. A step is one fault, or several at the same time.
#[derive(Debug)]
pub(super) struct Schedule {
    rng: Rng,
    /// For classes that are tried again because they had no effect. What happens in the run decides on these, so they
    /// must not take numbers from the schedule.
    again: Rng,
    /// Whether the last step was such a class. They alternate with the schedule.
    was_again: bool,
    /// Classes that have not struck yet.
    first: Vec<usize>,
    deadly: bool,
}

impl Schedule {
    /// `deadly` adds an event that crashes its receiver until it is dead.
    pub(super) fn of(seed: u64, deadly: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut first: Vec<usize> = (1..TOGETHER).collect();
        rng.shuffle(&mut first);
        Self { again: rng.fork(), rng, was_again: false, first, deadly }
    }

    /// The faults of the next step. Every class strikes once first. Then the classes that are `left`, which had no
    /// effect, alternate with random ones.
    pub(super) fn next_step(&mut self, left: &[usize]) -> Vec<Fault> {
        if let Some(class) = self.first.pop() {
            // A short run has room for all classes only if they strike several at a time.
            let mut step = vec![Fault::draw(class, &mut self.rng)];
            while let Some(next) = self.first.last().copied()
                && step.len() < 3
                && !step[0].stands_alone()
            {
                let other = Fault::draw(next, &mut self.rng);
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
            // Any faults will do for the class of several at the same time.
            let classes = if left[0] == TOGETHER { vec![1, 4] } else { vec![left[0]] };
            return classes.into_iter().map(|class| Fault::draw(class, &mut self.again)).collect();
        }
        if std::mem::take(&mut self.deadly) {
            return vec![Fault::Poison(Poison::Deadly)];
        }
        let together = if self.rng.u8(..3) == 0 { self.rng.usize(2..5) } else { 1 };
        self.draw_step(together)
    }

    /// That many faults of any class.
    fn draw_step(&mut self, together: usize) -> Vec<Fault> {
        let mut step = Vec::new();
        while step.len() < together {
            // Half of them are crashes, since there are many points.
            let class = if self.rng.bool() { 2 } else { self.rng.usize(1..TOGETHER) };
            let fault = Fault::draw(class, &mut self.rng);
            if together == 1 || !fault.stands_alone() {
                step.push(fault);
            }
        }
        step
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(part) => write!(f, "kill {}", part.name()),
            Self::Crash => write!(f, "crash at a point"),
            Self::StopPastLease(route) => {
                write!(f, "stop {} past its lease, on the way to {}", route.relay.name(), route.receiver.name())
            }
            other => write!(f, "{other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use fastrand::Rng;

    use super::{CLASSES, Fault, Schedule, TOGETHER};

    fn steps(seed: u64, count: usize) -> Vec<Vec<Fault>> {
        let mut schedule = Schedule::of(seed, true);
        (0..count).map(|_| schedule.next_step(&[])).collect()
    }

    #[test]
    fn the_seed_alone_decides_on_the_schedule() {
        let shown = |seed| format!("{:?}", steps(seed, 50));
        assert_eq!(shown(7), shown(7));
        assert_ne!(shown(7), shown(8));
        let (mut plain, mut again) = (Schedule::of(7, true), Schedule::of(7, true));
        for _ in 0..100 {
            let left = if again.was_again { &[][..] } else { &[12, TOGETHER] };
            let mut next = again.next_step(left);
            if again.was_again {
                next = again.next_step(&[]);
            }
            assert_eq!(format!("{next:?}"), format!("{:?}", plain.next_step(&[])));
        }
    }

    #[test]
    fn every_class_strikes_once_before_any_strikes_again() {
        for seed in 0..100 {
            let once = TOGETHER - 1;
            let early: Vec<usize> = steps(seed, once).into_iter().flatten().map(|fault| fault.class()).collect();
            let classes: HashSet<usize> = early[..once].iter().copied().collect();
            assert_eq!(classes.len(), once, "seed {seed}");
        }
    }

    #[test]
    fn a_fault_is_of_the_class_that_it_was_drawn_for() {
        assert_eq!(TOGETHER, CLASSES.len());
        for class in 1..TOGETHER {
            assert_eq!(Fault::draw(class, &mut Rng::with_seed(7)).class(), class);
        }
    }
}
