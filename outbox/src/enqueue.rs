//! Writes events into the outbox, in the transaction of the change that they report.

use chassis::trace::Trace;
use prost::{Message, Name};
use sqlx::{Postgres, Transaction};

use crate::{AggregateId, EventId};

/// The W3C trace context of a call. Events pass it on to the work that they cause.
#[derive(Clone, Debug, Default)]
pub struct TraceContext {
    traceparent: Option<String>,
    tracestate: Option<String>,
}

impl TraceContext {
    /// Reads the two headers of a call.
    ///
    /// A caller must not decide how large an outbox row is, or whether it can be written (PostgreSQL allows no NUL in
    /// text). So a header is dropped if it is longer than the standard requires services to support, or has other than
    /// printable characters.
    pub fn from_headers(traceparent: Option<&str>, tracestate: Option<&str>) -> Self {
        let bounded = |header: Option<&str>, chars_max| {
            let sound = |text: &&str| {
                !text.is_empty()
                    && text.len() <= chars_max
                    && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
            };
            header.filter(sound).map(str::to_owned)
        };
        Self { traceparent: bounded(traceparent, 55), tracestate: bounded(tracestate, 512) }
    }

    /// For a span of what this context belongs to.
    pub fn trace(&self) -> Option<Trace> {
        Trace::read(self.traceparent.as_deref()?, self.tracestate.as_deref().unwrap_or_default())
    }
}

/// An event to enqueue.
#[derive(Clone, Debug)]
pub struct NewEvent {
    pub(crate) id: EventId,
    pub(crate) aggregate_id: AggregateId,
    pub(crate) sequence: i32,
    pub(crate) event_type: String,
    pub(crate) payload: Vec<u8>,
    trace: TraceContext,
}

impl NewEvent {
    /// Makes `message` the event number `sequence` of an aggregate. Numbers start at 1 and have no gaps. The same number
    /// of an aggregate makes the same event id again.
    pub fn of<M: Message + Name>(
        aggregate_id: impl Into<AggregateId>,
        sequence: i32,
        message: &M,
        trace: &TraceContext,
    ) -> Self {
        let (aggregate_id, event_type) = (aggregate_id.into(), M::full_name());
        let id = EventId::derive(&event_type, aggregate_id, sequence);
        Self { id, aggregate_id, sequence, event_type, payload: message.encode_to_vec(), trace: trace.clone() }
    }

    /// The context of the call that caused it.
    pub fn trace(&self) -> &TraceContext {
        &self.trace
    }
}

/// Enqueues the events.
///
/// It takes a transaction and not a connection, so that nobody writes an event without its change by mistake. It sends
/// nothing: call [`Notifier::notify`](crate::Notifier::notify) after the commit.
///
/// A transaction that enqueues event n+1 must see event n committed, for example because both lock the aggregate's row.
/// The relay relies on this: it delivers an aggregate's events in sequence, and looks only at the rows that are left.
///
/// # Errors
/// Those of the database. A violation of `outbox_pkey` means that the aggregate already has an event with this
/// sequence. (Not every such mistake shows: the key holds within one subscription, and two events of one sequence may go
/// to different ones.) A violation of `outbox_payload_deliverable` means that an event is over 1 MiB: store large data elsewhere,
/// and let the receiver fetch it.
pub async fn enqueue(tx: &mut Transaction<'_, Postgres>, events: &[NewEvent]) -> Result<(), sqlx::Error> {
    if events.is_empty() {
        return Ok(());
    }
    let rows = Rows::of(events);
    sqlx::query_scalar!(
        "-- outbox: enqueue
        SELECT outbox_enqueue($1, $2, $3, $4, $5, $6, $7)",
        &rows.aggregate_ids as &[AggregateId],
        &rows.sequences,
        &rows.event_ids as &[EventId],
        &rows.event_types as &[&str],
        &rows.payloads as &[&[u8]],
        &rows.traceparents as &[Option<&str>],
        &rows.tracestates as &[Option<&str>],
    )
    .fetch_one(&mut **tx)
    .await?;
    Ok(())
}

/// Outbox columns of events, as array parameters. They are for statements that write a change and its events at once;
/// all other callers use [`enqueue`].
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the columns are documented in the schema")]
pub struct Rows<'e> {
    pub aggregate_ids: Vec<AggregateId>,
    pub sequences: Vec<i32>,
    pub event_ids: Vec<EventId>,
    pub event_types: Vec<&'e str>,
    pub payloads: Vec<&'e [u8]>,
    pub traceparents: Vec<Option<&'e str>>,
    pub tracestates: Vec<Option<&'e str>>,
}

impl<'e> Rows<'e> {
    /// One row for each event, in their order.
    pub fn of(events: impl IntoIterator<Item = &'e NewEvent>) -> Self {
        let mut rows = Self::default();
        for event in events {
            rows.aggregate_ids.push(event.aggregate_id);
            rows.sequences.push(event.sequence);
            rows.event_ids.push(event.id);
            rows.event_types.push(&event.event_type);
            rows.payloads.push(&event.payload);
            rows.traceparents.push(event.trace.traceparent.as_deref());
            rows.tracestates.push(event.trace.tracestate.as_deref());
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::TraceContext;

    #[test]
    fn trace_headers_that_are_too_long_or_not_printable_are_dropped() {
        let trace = TraceContext::from_headers(Some(&"0".repeat(56)), Some(&"k=v,".repeat(129)));
        assert_eq!((trace.traceparent, trace.tracestate), (None, None));
        assert_eq!(TraceContext::from_headers(Some("00-\0"), None).traceparent, None);
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(TraceContext::from_headers(Some(parent), Some("")).traceparent.as_deref(), Some(parent));
    }
}
