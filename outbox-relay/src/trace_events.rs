//! Spans of events and of their deliveries, for those whose trace is sampled.
//!
//! Each row of an event has a span of its own, from its transaction to its end. Its id follows from the row, so that every
//! relay that delivers it names the same one. The relay that ends the row sends the span. A delivery is a span with a link
//! to each of its events, and so is a delivery that repeats it.

use std::time::{Duration, SystemTime};

use chassis::trace::{self, KeyValue, NewSpan, Span, SpanKind, Trace};
use outbox::{AggregateId, EventId};
use tokio::time::Instant;
use tracing::warn;

use crate::{fate::Fate, lease::Lease, leased_row::LeasedRow, settle::Settled, subscription::Subscription};

/// Odd, and with about as many ones as zeros.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The subscription that rows are delivered for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Destination {
    pub(crate) id: i16,
    pub(crate) name: String,
}

impl From<&Subscription> for Destination {
    fn from(subscription: &Subscription) -> Self {
        Self { id: subscription.id, name: subscription.name.clone() }
    }
}

/// The context of what has caused an event, and that of its row's own span.
struct Traces {
    cause: Trace,
    own: Trace,
}

/// Of a row, if spans are sent and its trace is sampled.
fn traces_of(row: &LeasedRow, subscription_id: i16) -> Option<Traces> {
    let traceparent = row.traceparent.as_deref().filter(|_| trace::is_on())?;
    let cause = Trace::read(traceparent, row.tracestate.as_deref().unwrap_or_default())?;
    let own = cause.is_sampled().then(|| cause.of_span(span_name(row.event_id, subscription_id)))?;
    Some(Traces { cause, own })
}

/// The context of the row's span, if spans are sent and its trace is sampled.
pub(crate) fn trace_of(row: &LeasedRow, subscription_id: i16) -> Option<Trace> {
    traces_of(row, subscription_id).map(|traces| traces.own)
}

fn span_name(event_id: EventId, subscription_id: i16) -> u64 {
    let (high, low) = event_id.uuid().as_u64_pair();
    high.rotate_left(32) ^ low ^ u64::from(subscription_id.unsigned_abs()).wrapping_mul(SPREAD)
}

/// The span of a delivery; `None` if no trace of these events is sampled.
pub(crate) fn begin_delivery(rows: &[LeasedRow], destination: &Destination) -> Option<Span> {
    let links: Vec<_> = rows.iter().filter_map(|row| trace_of(row, destination.id)).collect();
    if links.is_empty() {
        return None;
    }
    let attributes = vec![
        KeyValue::new("messaging.system.name", "outbox"),
        KeyValue::new("messaging.operation.name", "send"),
        KeyValue::new("messaging.operation.type", "send"),
        KeyValue::new("messaging.destination.name", destination.name.clone()),
        KeyValue::new("messaging.batch.message_count", i64::try_from(rows.len()).unwrap_or(i64::MAX)),
        KeyValue::new("rpc.system.name", "grpc"),
        KeyValue::new("rpc.method", "events.v1.EventReceiver/Deliver"),
    ];
    let name = format!("send {}", destination.name);
    NewSpan { name, kind: SpanKind::Client, parent: None, links, attributes }.begin()
}

/// Events of one lease that the log names.
const NAMED_MAX: usize = 3;

/// Events of a lease that failed alone, for the log: whoever reads it looks for the order, and for its trace.
pub(crate) struct FailedEvents(Vec<FailedEvent>);

struct FailedEvent {
    event_id: EventId,
    subject: AggregateId,
    event_type: String,
    sequence: i32,
    failures: i32,
    trace_id: String,
    reason: String,
}

impl FailedEvents {
    pub(crate) fn of(rows: &[LeasedRow], fates: &[Fate]) -> Self {
        let failed = rows.iter().zip(fates).filter_map(|(row, fate)| {
            let (reason, again) = match fate {
                Fate::Failed { reason, .. } => (reason, 1),
                Fate::Dead(reason) => (reason, 0),
                Fate::Delete | Fate::Held { .. } | Fate::Back(_) => return None,
            };
            Some(FailedEvent {
                event_id: row.event_id,
                subject: row.aggregate_id,
                event_type: row.event_type.clone(),
                sequence: row.sequence,
                failures: row.failures + again,
                trace_id: row.traceparent.as_deref().and_then(Trace::id_in).unwrap_or_default(),
                reason: reason.clone(),
            })
        });
        Self(failed.take(NAMED_MAX).collect())
    }

    pub(crate) fn log(&self, subscription: &str) {
        for FailedEvent { event_id, subject, event_type, sequence, failures, trace_id, reason } in &self.0 {
            warn!(subscription, %event_id, %subject, event_type, sequence, failures, trace_id, reason, "event failed");
        }
    }
}

/// Events of a lease that end with it, if they are settled so.
pub(crate) struct EndingEvents {
    leased_at: Instant,
    events: Vec<EndingEvent>,
}

struct EndingEvent {
    event_id: EventId,
    traces: Traces,
    name: String,
    age: f64,
    /// Why it failed, and is dead if that was its last attempt; `None`: it was handled.
    failed: Option<String>,
    attributes: Vec<KeyValue>,
}

impl EndingEvents {
    pub(crate) fn of(lease: &Lease, fates: &[Fate], destination: &Destination) -> Self {
        let ending = lease.rows.iter().zip(fates).filter_map(|(row, fate)| {
            let failed = match fate {
                Fate::Delete => None,
                Fate::Dead(reason) | Fate::Failed { charge: true, reason, .. } => Some(reason.clone()),
                Fate::Failed { charge: false, .. } | Fate::Held { .. } | Fate::Back(_) => return None,
            };
            let traces = traces_of(row, destination.id)?;
            let attributes = vec![
                KeyValue::new("messaging.system.name", "outbox"),
                KeyValue::new("messaging.operation.name", "create"),
                KeyValue::new("messaging.operation.type", "create"),
                KeyValue::new("messaging.destination.name", destination.name.clone()),
                KeyValue::new("messaging.message.id", row.event_id.to_string()),
                KeyValue::new("outbox.subject", row.aggregate_id.to_string()),
                KeyValue::new("outbox.sequence", i64::from(row.sequence)),
                KeyValue::new("outbox.failures", i64::from(row.failures)),
            ];
            let name = format!("create {}", row.event_type);
            Some(EndingEvent { event_id: row.event_id, traces, name, age: row.age_seconds, failed, attributes })
        });
        Self { leased_at: lease.leased_at, events: ending.collect() }
    }

    /// Sends their spans, which end now.
    ///
    /// If some rows were lost, or the settlement may have failed, another relay may send one of these too. Twice is better
    /// than never: the spans of its deliveries name it.
    pub(crate) fn tell(self, settled: &Settled) {
        #[expect(clippy::disallowed_methods, reason = "spans have the times of this process's clock")]
        let now = SystemTime::now();
        let held = self.leased_at.elapsed();
        for EndingEvent { event_id, traces: Traces { cause, own }, name, age, failed, attributes } in self.events {
            if failed.is_some() && !settled.dead.contains(&event_id) {
                continue;
            }
            let began = now - held - Duration::from_secs_f64(age.max(0.0));
            let new = NewSpan { name, kind: SpanKind::Producer, parent: Some(&cause), links: Vec::new(), attributes };
            let Some(mut span) = new.begin_known(&own, began) else { return };
            if let Some(reason) = failed {
                span.fail(reason);
            }
            span.end_at(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use outbox::{AggregateId, EventId};
    use uuid::Uuid;

    use super::span_name;

    #[test]
    fn each_row_of_each_event_has_a_span_of_its_own() {
        let subjects = (0..50).map(|_| AggregateId::from(Uuid::now_v7()));
        let rows = subjects.flat_map(|subject| {
            ["orders.v1.OrderCreated", "inventory.v1.StockReserved"]
                .into_iter()
                .flat_map(move |of| (1..4).map(move |sequence| EventId::derive(of, subject, sequence)))
        });
        let names: HashSet<u64> = rows.flat_map(|event_id| (1..4).map(move |id| span_name(event_id, id))).collect();
        assert_eq!(names.len(), 50 * 2 * 3 * 3);
    }
}
