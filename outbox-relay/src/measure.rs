//! Metrics of the relay.

use metrics::{counter, describe_counter, describe_gauge, gauge};

use crate::{delivery::Delivery, settle::Settled};

const EVENTS: &str = "outbox_relay_events_total";
const DELIVERIES: &str = "outbox_relay_deliveries_total";
const ROUTE_OPEN: &str = "outbox_relay_route_open";

/// Says what each metric is.
pub(crate) fn describe() {
    describe_counter!(
        EVENTS,
        "Leased events by outcome: handled (deleted), retried (failed alone, charged or not), died (kept as dead), released (visible \
         again, no attempt spent), lost (the lease expired and another relay has them), unsettled (the database failed; the \
         lease expires)"
    );
    describe_counter!(
        DELIVERIES,
        "Deliveries by outcome: answered, unreachable (no connection), unavailable (receiver or proxy), silent (no \
         reply), refused (the whole batch), too_large (perhaps), barred (this relay may not deliver), unmatched (an \
         answer to other events)"
    );
    describe_gauge!(
        ROUTE_OPEN,
        "1 while the receiver of the route takes deliveries, 0 while it is unavailable or bars this relay"
    );
}

/// Creates a route's metrics with zeros, since Prometheus can take no rate of a metric that does not exist yet.
pub(crate) fn register(route: &str) {
    settled(route, &Settled::default());
    for outcome in Delivery::LABELS {
        counter!(DELIVERIES, "route" => route.to_owned(), "outcome" => outcome).increment(0);
    }
    route_open(route, false);
}

pub(crate) fn delivered(route: &str, outcome: &'static str) {
    counter!(DELIVERIES, "route" => route.to_owned(), "outcome" => outcome).increment(1);
}

pub(crate) fn settled(route: &str, settled: &Settled) {
    let Settled { handled, retried, died, released, lost, unsettled, .. } = *settled;
    let counts = [
        ("handled", handled),
        ("retried", retried),
        ("died", died),
        ("released", released),
        ("lost", lost),
        ("unsettled", unsettled),
    ];
    for (outcome, events) in counts {
        let events = u64::try_from(events).unwrap_or(u64::MAX);
        counter!(EVENTS, "route" => route.to_owned(), "outcome" => outcome).increment(events);
    }
}

pub(crate) fn route_open(route: &str, open: bool) {
    gauge!(ROUTE_OPEN, "route" => route.to_owned()).set(if open { 1.0 } else { 0.0 });
}
