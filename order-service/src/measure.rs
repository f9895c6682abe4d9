//! Metrics of orders and of their intake.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const ORDERS: &str = "orders_total";
const SETTLED: &str = "order_settled_seconds";
const GROUP: &str = "intake_group_orders";
const WAIT: &str = "intake_wait_seconds";
const COMMIT: &str = "intake_commit_seconds";
const REFUSED: &str = "intake_refused_total";
const QUEUE: &str = "intake_queue_orders";

/// Says what each metric is, and creates those that are counted with zeros.
pub(crate) fn describe() {
    describe_counter!(
        ORDERS,
        "Orders by what became of them: placed, repeated (an earlier call had placed it), confirmed, rejected, cancelled. \
         Confirmed and rejected are counted just before their commit"
    );
    describe_histogram!(
        SETTLED,
        Unit::Seconds,
        "From the begin of the transaction that placed an order until it was confirmed or rejected"
    );
    describe_histogram!(GROUP, "Orders that shared a transaction");
    describe_histogram!(WAIT, Unit::Seconds, "How long an order waited for its transaction");
    describe_histogram!(
        COMMIT,
        Unit::Seconds,
        "How long the transaction of a group took, with the wait for a connection"
    );
    describe_gauge!(QUEUE, "Orders that wait for their transaction or are in it, as of a second ago at most");
    describe_counter!(
        REFUSED,
        "Orders that were told to come again: full (too many wait), share (too many of their customer wait), late (no transaction in time), standby (a synchronous \
         standby is away)"
    );
    for outcome in ["placed", "repeated", "cancelled"] {
        orders(outcome, 0);
    }
    // Whoever compares them with those that were placed needs both from the start.
    for outcome in ["confirmed", "rejected"] {
        settled(outcome, &[]);
    }
    for reason in ["full", "share", "late", "standby"] {
        refused(reason, 0);
    }
}

pub(crate) fn orders(outcome: &'static str, orders: usize) {
    counter!(ORDERS, "outcome" => outcome).increment(u64::try_from(orders).unwrap_or(u64::MAX));
}

/// These orders were settled so, after this many seconds each.
pub(crate) fn settled(outcome: &'static str, seconds: &[f64]) {
    orders(outcome, seconds.len());
    let durations = histogram!(SETTLED, "outcome" => outcome);
    // A clock may have been set back. A negative sum would look like a restart.
    seconds.iter().for_each(|seconds| durations.record(seconds.max(0.0)));
}

pub(crate) fn begun(waited: impl ExactSizeIterator<Item = Duration>) {
    histogram!(GROUP).record(waited.len() as f64);
    let durations = histogram!(WAIT);
    waited.for_each(|waited| durations.record(waited.as_secs_f64()));
}

pub(crate) fn ended(took: Duration) {
    histogram!(COMMIT).record(took.as_secs_f64());
}

pub(crate) fn queued(orders: usize) {
    gauge!(QUEUE).set(orders as f64);
}

pub(crate) fn refused(reason: &'static str, orders: usize) {
    counter!(REFUSED, "reason" => reason).increment(u64::try_from(orders).unwrap_or(u64::MAX));
}
