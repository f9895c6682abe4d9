//! Reads the envelope of a delivered event.

use prost::{Message, Name};
use proto::events::v1::Event;
use sqlx::types::time::OffsetDateTime;
use uuid::Uuid;

use crate::{AggregateId, EventId, Refusal, TraceContext};

/// A delivered event with a valid envelope. Its data is not decoded yet.
#[derive(Debug)]
pub struct Envelope<'a> {
    /// The id to deduplicate by.
    pub id: EventId,
    /// The aggregate that the event is about.
    pub subject: AggregateId,
    /// When the event was enqueued, by the clock of its database.
    pub time: OffsetDateTime,
    event: &'a Event,
}

impl<'a> Envelope<'a> {
    /// Checks the envelope.
    ///
    /// # Errors
    /// UNDECODABLE, with the field that is not what the contract says.
    pub fn read(event: &'a Event) -> Result<Self, Refusal> {
        let uuid = |field, text: &str| Uuid::parse_str(text).map_err(|_| undecodable(format!("{field} is not a UUID")));
        let (id, subject) = (uuid("id", &event.id)?.into(), uuid("subject", &event.subject)?.into());
        if event.sequence < 1 {
            return Err(undecodable(format!("sequence is {}, and must be at least 1", event.sequence)));
        }
        let time = event.time.as_ref().and_then(read_timestamp);
        let time = time.ok_or_else(|| undecodable("time is missing or out of range".into()))?;
        Ok(Self { id, subject, time, event })
    }

    /// The full protobuf name of the event's data.
    pub fn type_name(&self) -> &str {
        &self.event.r#type
    }

    /// The trace of the call that caused the event, for the events that this one causes.
    pub fn trace(&self) -> TraceContext {
        TraceContext::from_headers(Some(&self.event.traceparent), Some(&self.event.tracestate))
    }

    /// Whether the event's data is a message of type `M`.
    pub fn carries<M: Name>(&self) -> bool {
        self.event.r#type == M::full_name()
    }

    /// Decodes the event's data as a message of type `M`.
    ///
    /// # Errors
    /// UNKNOWN_TYPE if the event is of another type, and UNDECODABLE if its data is not a message of its type.
    pub fn decode<M: Message + Name + Default>(&self) -> Result<M, Refusal> {
        if !self.carries::<M>() {
            return Err(Refusal::unknown_type(self));
        }
        M::decode(self.event.data.clone())
            .map_err(|cause| undecodable(format!("data is not a {}: {cause}", M::full_name())))
    }
}

fn undecodable(detail: String) -> Refusal {
    Refusal::reject("UNDECODABLE", detail)
}

/// Converts a time of the database for the contract.
pub fn timestamp(time: OffsetDateTime) -> prost_types::Timestamp {
    // `nanosecond` is below 1,000,000,000.
    prost_types::Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() }
}

fn read_timestamp(timestamp: &prost_types::Timestamp) -> Option<OffsetDateTime> {
    // Timestamps of the contract start at year 1. The calendar here has earlier years, which PostgreSQL may not have.
    let time = OffsetDateTime::from_unix_timestamp(timestamp.seconds).ok().filter(|time| time.year() >= 1)?;
    time.replace_nanosecond(timestamp.nanos.try_into().ok()?).ok()
}
