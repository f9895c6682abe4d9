//! A leased row of the outbox.

use outbox::{AggregateId, EventId};
use prost::bytes::Bytes;
use sqlx::types::time::OffsetDateTime;

outbox::id! {
    /// The fencing token of a lease. Every statement that settles or renews names it, and a later lease of the same row
    /// replaces it.
    pub(crate) struct LeaseToken
}

/// One leased row of the outbox.
#[derive(Debug)]
pub(crate) struct LeasedRow {
    pub(crate) aggregate_id: AggregateId,
    pub(crate) sequence: i32,
    pub(crate) event_id: EventId,
    pub(crate) event_type: String,
    /// Shared by every delivery of the event.
    pub(crate) payload: Bytes,
    pub(crate) created_at: OffsetDateTime,
    /// How often it failed alone, charged or not, since it was enqueued or requeued.
    pub(crate) failures: i32,
    /// How long ago it last failed alone, in seconds.
    pub(crate) attempted_seconds: Option<f64>,
    /// How long ago it was enqueued, in seconds.
    pub(crate) age_seconds: f64,
    /// It is older than an hour, and was charged no attempt within the last hour.
    pub(crate) quiet: bool,
    pub(crate) traceparent: Option<String>,
    pub(crate) tracestate: Option<String>,
    /// Whether it is too old to be delivered.
    pub(crate) expired: bool,
    /// Whether its receiver does not know its type.
    pub(crate) unknown: bool,
    /// The sequence of the event before it in its run; `None`: it is the first of its aggregate.
    pub(crate) follows: Option<i32>,
    /// Whether any event of the subscription with a later sequence was visible.
    pub(crate) others_wait: bool,
    /// Its place in its run. Waves are delivered one after the other.
    pub(crate) wave: i32,
    /// Whether it was leased without its predecessor.
    pub(crate) adrift: bool,
}

impl LeasedRow {
    /// Whether it is not delivered.
    pub(crate) fn is_set_aside(&self) -> bool {
        self.expired || self.unknown || self.adrift
    }

    /// Roughly what the event adds to a message. Ids, source, times and field tags are a few hundred bytes.
    pub(crate) fn message_bytes(&self) -> usize {
        let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        self.payload.len() + self.event_type.len() + length(&self.traceparent) + length(&self.tracestate) + 300
    }
}
