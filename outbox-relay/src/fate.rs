//! What becomes of an event after its delivery.

use std::time::Duration;

/// A receiver that asks for more time than this is probed earlier: it may have been replaced in the meantime.
pub(crate) const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// What becomes of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It was applied, now or earlier.
    Delete,
    /// It can never be applied: it is dead, with this reason.
    Dead(String),
    /// It failed alone, and is delivered again after a back-off, or with its route. The reason is kept with the row,
    /// whether an attempt is charged or not. If that is the last attempt, the event is dead.
    Failed { charge: bool, wait: Wait, reason: String },
    /// Its receiver does not know its type yet, or a clock is wrong. It is tried again after this time, and the reason is
    /// kept with the row.
    Held { wait: Duration, reason: String },
    /// Nothing was learned about it, and it is delivered again.
    Back(Wait),
}

/// When an event is visible again, and so its position among the visible ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// At once, behind all that are visible now. The route's back-off protects a receiver that is down.
    None,
    /// At once, before all others. This is for suspects. Behind a backlog that never shrinks they would never be
    /// delivered again, so the event that crashes the receiver would never be found.
    BeforeAllOthers,
    /// After a random time, of which the longest doubles with every failure. At least this long, such as the time that
    /// the receiver has asked for.
    BackOff { at_least: Duration },
    /// After this time.
    For(Duration),
}
