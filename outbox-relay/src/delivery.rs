//! The result of a delivery: what the receiver says of each event, or how the call failed.

use std::time::Duration;

/// The result of a delivery.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// One answer per event, in order.
    Answered(Vec<Answer>),
    /// The receiver has answered for none of the events.
    Failed(Failed),
}

/// What the receiver says of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is applied, now or earlier.
    Taken,
    /// It can never be applied, for this reason.
    Rejected(String),
    /// It failed, for a reason of its own.
    Retry(String),
}

/// A delivery without an answer to its events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) failure: Failure,
    /// In words, for people.
    pub(crate) reason: String,
    /// The time that the receiver, or a proxy before it, has asked for.
    pub(crate) retry_after: Duration,
}

/// How a delivery failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The connection was never made, so no event can be the cause.
    Unreachable,
    /// The receiver, or a proxy before it, says that it cannot work now. One event may be the cause: a proxy says the
    /// same of a receiver that crashed over it, or took too long.
    Unavailable,
    /// The events were sent and no reply came. They may have been applied, and one may be the cause.
    Silent,
    /// The receiver refused the call.
    Refused,
    /// The call is perhaps larger than the receiver, or a proxy, accepts.
    TooLarge,
    /// The receiver does not allow this relay to call it, or does not implement the call.
    Barred,
    /// The answer is not one to this batch: none of its results names one of its events. The receiver has a fault.
    Unmatched,
}

impl Failure {
    /// The value of the metric's label.
    fn as_str(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Unavailable => "unavailable",
            Self::Silent => "silent",
            Self::Refused => "refused",
            Self::TooLarge => "too_large",
            Self::Barred => "barred",
            Self::Unmatched => "unmatched",
        }
    }
}

impl Delivery {
    /// All values of the metric's label.
    pub(crate) const LABELS: [&str; 8] =
        ["answered", "unreachable", "unavailable", "silent", "refused", "too_large", "barred", "unmatched"];

    /// The value of the metric's label.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Answered(_) => "answered",
            Self::Failed(failed) => failed.failure.as_str(),
        }
    }
}
