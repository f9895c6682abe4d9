//! Decides when a group of calls begins its transaction, and how many calls it takes.
//!
//! A transaction begins at once when none is in flight, so a lone call waits for no other. Of many calls, half are a
//! group: while one half is in the database, the other half are answered, call again and gather. Neither half waits for
//! the other. If all calls were one group, the database would be idle while the service answers, and the service while
//! the database commits. Two transactions that begin together are no better: they also end together.

use std::time::Duration;

/// A transaction places at most this many orders. This bounds how long the first waits for the last; a larger group is
/// no faster.
pub(crate) const GROUP_MAX: usize = 512;

/// From this many orders on, half of the calls are worth a transaction. Each transaction costs as much as several
/// orders, so smaller halves cost more than they gain.
const WORTH_A_GROUP: usize = 16;

/// How long a transaction may take before another may begin beside it: a fixed time, plus a share for each of its
/// orders. A transaction that waits for no lock and no slow disk is done well before.
///
/// So several transactions wait for a slow disk at once, and a connection that hangs holds up only its own calls. (If
/// all writers hang, all calls wait until the database's time limit ends the work.)
const PATIENCE: Duration = Duration::from_millis(1);
const PATIENCE_PER_ORDER: Duration = Duration::from_micros(16);

/// What a decision depends on.
#[derive(Clone, Debug)]
pub(crate) struct Situation {
    /// Calls that are in no transaction yet; at most [`GROUP_MAX`].
    pub(crate) waiting: usize,
    /// Time until the oldest waiting call is to be refused; `None` if no call waits.
    pub(crate) expires_in: Option<Duration>,
    /// Transactions in flight.
    pub(crate) transactions: usize,
    /// How many transactions may be in flight at once.
    pub(crate) writers: usize,
    /// Calls in the transactions in flight.
    pub(crate) in_flight: usize,
    /// Calls of the transaction that has ended since the last decision. Their callers are about to call again, so they
    /// count like calls in flight. It is zero after a gather, because callers that call again have arrived by then.
    pub(crate) just_answered: usize,
    /// Time left until another transaction may begin beside the last one.
    pub(crate) patience_left: Duration,
    /// Whether the last decision was [`Decision::Gather`].
    pub(crate) has_gathered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Receive the calls that are about to arrive, then decide again.
    Gather,
    /// Begin a transaction with this many of the oldest calls.
    Begin(usize),
    /// Refuse the calls that have waited too long.
    RefuseLate,
    /// Wait until a call arrives, a transaction ends or this time is over.
    Wait(Option<Duration>),
}

/// What to do next.
///
/// A call that may begin does so even if it is late, as after the process was suspended: to refuse it would help
/// nobody.
///
/// The first group gathers if it is small. Otherwise the first call after a commit would be a group by itself. Its
/// neighbours were answered in the same moment, and their next calls arrive a little later. A group that begins beside
/// others has waited long enough for that.
pub(crate) fn decide(situation: &Situation) -> Decision {
    let &Situation { waiting, transactions, in_flight, just_answered, patience_left, .. } = situation;
    let Some(expires_in) = situation.expires_in else { return Decision::Wait(None) };
    let (is_first, has_writer) = (transactions == 0, transactions < situation.writers);
    if has_writer && (is_first || patience_left.is_zero()) {
        if is_first && waiting < WORTH_A_GROUP && !situation.has_gathered {
            return Decision::Gather;
        }
        return Decision::Begin(group_size(waiting, in_flight + just_answered));
    }
    if expires_in.is_zero() {
        return Decision::RefuseLate;
    }
    Decision::Wait(Some(if has_writer { expires_in.min(patience_left) } else { expires_in }))
}

/// How long a transaction with this many calls may take until another may begin beside it.
pub(crate) fn patience(calls: usize) -> Duration {
    PATIENCE + PATIENCE_PER_ORDER * u32::try_from(calls).unwrap_or(u32::MAX)
}

/// Half of all calls, those `elsewhere` included, if that many wait; all waiting calls, if half is not worth a
/// transaction.
fn group_size(waiting: usize, elsewhere: usize) -> usize {
    let half = (waiting + elsewhere).div_ceil(2);
    if half < WORTH_A_GROUP { waiting } else { waiting.min(half) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);
    /// No call waits, and no transaction is in flight.
    const IDLE: Situation = Situation {
        waiting: 0,
        expires_in: None,
        transactions: 0,
        writers: 2,
        in_flight: 0,
        just_answered: 0,
        patience_left: Duration::ZERO,
        has_gathered: false,
    };

    fn waiting(waiting: usize) -> Situation {
        Situation { waiting, expires_in: Some(LIMIT), ..IDLE }
    }

    /// One transaction of ten calls is in flight, with some of its patience left.
    fn beside_one(waiting: usize, patience_left: Duration) -> Situation {
        Situation { transactions: 1, in_flight: 10, patience_left, ..self::waiting(waiting) }
    }

    fn check(table: impl IntoIterator<Item = (Situation, Decision)>) {
        for (situation, expected) in table {
            assert_eq!(decide(&situation), expected, "{situation:?}");
        }
    }

    #[test]
    fn nothing_is_done_while_no_call_waits() {
        let busy = Situation { transactions: 1, in_flight: 10, patience_left: MS, ..IDLE };
        let ended = Situation { just_answered: 10, ..IDLE };
        let full = Situation { transactions: 2, in_flight: 20, ..IDLE };
        check([IDLE, busy, ended, full].map(|situation| (situation, Decision::Wait(None))));
    }

    #[test]
    fn the_first_transaction_begins_at_once_and_a_small_one_gathers_before() {
        let gathered = |waiting| Situation { has_gathered: true, ..self::waiting(waiting) };
        check([
            (waiting(1), Decision::Gather),
            (waiting(15), Decision::Gather),
            (waiting(16), Decision::Begin(16)),
            (gathered(1), Decision::Begin(1)),
            (gathered(15), Decision::Begin(15)),
            (gathered(40), Decision::Begin(20)),
            (Situation { patience_left: MS, ..waiting(16) }, Decision::Begin(16)),
            (Situation { just_answered: 20, ..waiting(15) }, Decision::Gather),
        ]);
    }

    #[test]
    fn another_transaction_begins_beside_one_once_patience_with_it_is_over() {
        check([
            (beside_one(1, 3 * MS), Decision::Wait(Some(3 * MS))),
            (beside_one(GROUP_MAX, MS), Decision::Wait(Some(MS))),
            (beside_one(1, Duration::ZERO), Decision::Begin(1)),
            (beside_one(64, Duration::ZERO), Decision::Begin(37)),
        ]);
    }

    #[test]
    fn no_transaction_begins_while_all_writers_are_busy() {
        for writers in 1..=3 {
            let full = Situation { transactions: writers, writers, in_flight: 10, ..waiting(100) };
            let patient = Situation { patience_left: MS, ..full.clone() };
            check([full, patient].map(|situation| (situation, Decision::Wait(Some(LIMIT)))));
        }
    }

    #[test]
    fn calls_in_flight_and_calls_just_answered_count_for_half() {
        check([
            (Situation { just_answered: 32, ..waiting(32) }, Decision::Begin(32)),
            (Situation { just_answered: 10, ..waiting(40) }, Decision::Begin(25)),
            (Situation { just_answered: 10, ..beside_one(40, Duration::ZERO) }, Decision::Begin(30)),
            (Situation { just_answered: 44, ..waiting(20) }, Decision::Begin(20)),
        ]);
    }

    #[test]
    fn a_late_call_is_refused_unless_it_may_begin() {
        let late = |situation| Situation { expires_in: Some(Duration::ZERO), ..situation };
        let soon = |situation| Situation { expires_in: Some(MS), ..situation };
        let full = Situation { transactions: 2, in_flight: 20, ..waiting(5) };
        check([
            (late(waiting(5)), Decision::Gather),
            (late(waiting(30)), Decision::Begin(30)),
            (late(beside_one(5, Duration::ZERO)), Decision::Begin(5)),
            (late(beside_one(5, 3 * MS)), Decision::RefuseLate),
            (late(full.clone()), Decision::RefuseLate),
            (soon(beside_one(5, 3 * MS)), Decision::Wait(Some(MS))),
            (soon(full), Decision::Wait(Some(MS))),
        ]);
    }

    /// The loop depends on it: it begins with at least one call, and never asks for more calls than wait.
    #[test]
    fn a_group_has_at_least_one_call_and_at_most_all_that_wait() {
        for waiting in 1..=GROUP_MAX {
            for elsewhere in [0, 1, 15, 16, 100, GROUP_MAX, 3 * GROUP_MAX] {
                assert!(
                    (1..=waiting).contains(&group_size(waiting, elsewhere)),
                    "{waiting} wait, {elsewhere} elsewhere"
                );
            }
        }
    }

    #[test]
    fn few_calls_are_one_group() {
        for calls in 1..=30 {
            assert_eq!(group_size(calls, 0), calls);
        }
    }

    #[test]
    fn of_many_calls_half_are_a_group_wherever_the_others_are() {
        for (waiting, elsewhere, expected) in [(31, 0, 16), (64, 0, 32), (32, 32, 32), (48, 16, 32), (20, 44, 20)] {
            assert_eq!(group_size(waiting, elsewhere), expected, "{waiting} calls wait, {elsewhere} are elsewhere");
        }
    }

    #[test]
    fn patience_grows_with_the_orders() {
        for calls in 0..GROUP_MAX {
            assert!(patience(calls) < patience(calls + 1));
        }
    }
}
