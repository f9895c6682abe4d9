//! Metrics of the inbox.

use metrics::{counter, describe_counter, describe_histogram, histogram};
use proto::events::v1::{EventResult, Outcome};

use crate::apply_batch::STALE;

const EVENTS: &str = "inbox_events_total";
const TOGETHER: &str = "inbox_transaction_events";

const LABELS: [&str; 5] = ["applied", "duplicate", "rejected", "stale", "retry"];

/// Says what each metric is, and creates those that are counted with zeros.
pub(crate) fn describe() {
    describe_counter!(
        EVENTS,
        "Delivered events by outcome: applied, duplicate (applied before), rejected, stale (older than the inbox \
         remembers; rejected, too), retry"
    );
    describe_histogram!(TOGETHER, "Events that shared a transaction");
    for outcome in LABELS {
        counter!(EVENTS, "outcome" => outcome).increment(0);
    }
}

/// A transaction has ended with these results.
pub(crate) fn applied(results: &[EventResult]) {
    histogram!(TOGETHER).record(results.len() as f64);
    for label in LABELS {
        let events = results.iter().filter(|result| label_of(result) == label).count();
        if events > 0 {
            counter!(EVENTS, "outcome" => label).increment(u64::try_from(events).unwrap_or(u64::MAX));
        }
    }
}

fn label_of(result: &EventResult) -> &'static str {
    match result.outcome() {
        Outcome::Applied => "applied",
        Outcome::Duplicate => "duplicate",
        Outcome::Rejected if result.reason == STALE => "stale",
        Outcome::Rejected => "rejected",
        Outcome::Retry | Outcome::Unspecified => "retry",
    }
}
