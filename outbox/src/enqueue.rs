//! Writes events into the outbox, in the transaction of the change they tell of.

use prost::{Message, Name};
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

/// W3C trace context, carried from the call that caused an event to the work the event causes.
#[derive(Clone, Debug, Default)]
pub struct TraceContext {
    traceparent: Option<String>,
    tracestate: Option<String>,
}

impl TraceContext {
    /// Takes the two headers as a caller sent them. What is longer than the standard obliges anyone to carry (55 and
    /// 512 characters) is dropped, and so is what a header cannot hold: a caller must not decide how large an outbox row
    /// is, nor whether it can be written (Postgres has no NUL in text).
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
}

/// An event to be enqueued.
#[derive(Clone, Debug)]
pub struct NewEvent {
    aggregate_id: Uuid,
    sequence: i32,
    event_type: String,
    payload: Vec<u8>,
    trace: TraceContext,
}

impl NewEvent {
    /// `message` as event number `sequence` (from 1, without gaps) of the aggregate.
    pub fn of<M: Message + Name>(aggregate_id: Uuid, sequence: i32, message: &M, trace: &TraceContext) -> Self {
        let (event_type, payload) = (M::full_name(), message.encode_to_vec());
        Self { aggregate_id, sequence, event_type, payload, trace: trace.clone() }
    }
}

/// Enqueues the events.
///
/// It takes a transaction, not a connection, so that an event without its change cannot be written by mistake. Nothing
/// is sent from here: call [`Notifier::notify`](crate::Notifier::notify) after the commit.
///
/// Whoever writes event n+1 must have seen event n committed (by a lock on the aggregate's row, say): that is what lets
/// the relay deliver an aggregate's events in sequence by looking only at the rows that are still there.
///
/// # Errors
/// Those of the database; a violation of `outbox_pkey` means that the aggregate already has an event of this sequence, one
/// of `outbox_payload_deliverable` that an event takes over 1 MiB. Put large things where the receiver can fetch them.
pub async fn enqueue(tx: &mut Transaction<'_, Postgres>, events: &[NewEvent]) -> Result<(), sqlx::Error> {
    if events.is_empty() {
        return Ok(());
    }
    let rows = Rows::of(events);
    sqlx::query!(
        "-- outbox: enqueue
        INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
        SELECT * FROM unnest($1::uuid[], $2::integer[], $3::uuid[], $4::text[], $5::bytea[], $6::text[], $7::text[])",
        &rows.aggregate_ids,
        &rows.sequences,
        &rows.event_ids,
        &rows.event_types as &[&str],
        &rows.payloads as &[&[u8]],
        &rows.traceparents as &[Option<&str>],
        &rows.tracestates as &[Option<&str>],
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The columns of the outbox that events fill, as the arrays a statement takes. For who writes change and event in one
/// statement of its own; everybody else calls [`enqueue`].
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the columns are documented in the schema")]
pub struct Rows<'e> {
    pub aggregate_ids: Vec<Uuid>,
    pub sequences: Vec<i32>,
    pub event_ids: Vec<Uuid>,
    pub event_types: Vec<&'e str>,
    pub payloads: Vec<&'e [u8]>,
    pub traceparents: Vec<Option<&'e str>>,
    pub tracestates: Vec<Option<&'e str>>,
}

impl<'e> Rows<'e> {
    /// A row per event, in their order; each is given its id here.
    pub fn of(events: impl IntoIterator<Item = &'e NewEvent>) -> Self {
        let mut rows = Self::default();
        for event in events {
            rows.aggregate_ids.push(event.aggregate_id);
            rows.sequences.push(event.sequence);
            rows.event_ids.push(Uuid::now_v7());
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
    fn trace_headers_longer_than_the_standard_are_dropped() {
        let trace = TraceContext::from_headers(Some(&"0".repeat(56)), Some(&"k=v,".repeat(129)));
        assert_eq!((trace.traceparent, trace.tracestate), (None, None));
        assert_eq!(TraceContext::from_headers(Some("00-\0"), None).traceparent, None);
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(TraceContext::from_headers(Some(parent), Some("")).traceparent.as_deref(), Some(parent));
    }
}
