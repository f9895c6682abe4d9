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
/// Those of the database; a violation of `outbox_pkey` means that the aggregate already has an event of this sequence.
pub async fn enqueue(tx: &mut Transaction<'_, Postgres>, events: &[NewEvent]) -> Result<(), sqlx::Error> {
    if events.is_empty() {
        return Ok(());
    }
    let aggregate_ids: Vec<Uuid> = events.iter().map(|event| event.aggregate_id).collect();
    let sequences: Vec<i32> = events.iter().map(|event| event.sequence).collect();
    let event_ids: Vec<Uuid> = events.iter().map(|_| Uuid::now_v7()).collect();
    let event_types: Vec<String> = events.iter().map(|event| event.event_type.clone()).collect();
    let payloads: Vec<Vec<u8>> = events.iter().map(|event| event.payload.clone()).collect();
    let traceparents: Vec<Option<String>> = events.iter().map(|event| event.trace.traceparent.clone()).collect();
    let tracestates: Vec<Option<String>> = events.iter().map(|event| event.trace.tracestate.clone()).collect();
    sqlx::query!(
        "-- outbox: enqueue
        INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
        SELECT * FROM unnest($1::uuid[], $2::integer[], $3::uuid[], $4::text[], $5::bytea[], $6::text[], $7::text[])",
        &aggregate_ids,
        &sequences,
        &event_ids,
        &event_types,
        &payloads,
        &traceparents as &[Option<String>],
        &tracestates as &[Option<String>],
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
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
