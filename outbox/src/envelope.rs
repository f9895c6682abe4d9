//! Reads the envelope of a delivered event.

use prost::{Message, Name};
use proto::events::v1::Event;
use sqlx::types::time::OffsetDateTime;
use uuid::Uuid;

use crate::TraceContext;

/// A delivered event whose envelope is sound; its data is not decoded yet.
#[derive(Debug)]
pub struct Envelope<'a> {
    /// What to deduplicate by.
    pub id: Uuid,
    /// The aggregate the event is about.
    pub subject: Uuid,
    /// When the event was committed, by the clock of its database.
    pub time: OffsetDateTime,
    event: &'a Event,
}

/// Why an event can never be applied.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// A field of the envelope is not what the contract says.
    #[error("{field} is not a UUID")]
    NotAUuid {
        /// The field's name.
        field: &'static str,
    },
    /// The sequence is below 1.
    #[error("sequence is {0}, and counts from 1")]
    Sequence(i64),
    /// There is no time, or none that a calendar has.
    #[error("time is missing or out of range")]
    Time,
    /// The data is not an encoded message of the event's type.
    #[error("data is not a {type_name}: {cause}")]
    Undecodable {
        /// The type the event claims.
        type_name: String,
        /// What the decoder said.
        cause: prost::DecodeError,
    },
}

impl<'a> Envelope<'a> {
    /// Checks the envelope.
    ///
    /// # Errors
    /// [`Malformed`], which no repetition will mend.
    pub fn read(event: &'a Event) -> Result<Self, Malformed> {
        let uuid = |field, text: &str| Uuid::parse_str(text).map_err(|_| Malformed::NotAUuid { field });
        let (id, subject) = (uuid("id", &event.id)?, uuid("subject", &event.subject)?);
        if event.sequence < 1 {
            return Err(Malformed::Sequence(event.sequence));
        }
        let time = event.time.as_ref().and_then(read_timestamp).ok_or(Malformed::Time)?;
        Ok(Self { id, subject, time, event })
    }

    /// Full protobuf name of what the event claims to carry.
    pub fn type_name(&self) -> &str {
        &self.event.r#type
    }

    /// The trace of the call that caused the event, to be passed on to the events that this one causes.
    pub fn trace(&self) -> TraceContext {
        TraceContext::from_headers(Some(&self.event.traceparent), Some(&self.event.tracestate))
    }

    /// Whether the event's data is a message of type `M`.
    pub fn carries<M: Name>(&self) -> bool {
        self.event.r#type == M::full_name()
    }

    /// Decodes the data as a message of type `M`.
    ///
    /// # Errors
    /// [`Malformed::Undecodable`].
    pub fn decode<M: Message + Name + Default>(&self) -> Result<M, Malformed> {
        M::decode(self.event.data.clone()).map_err(|cause| Malformed::Undecodable { type_name: M::full_name(), cause })
    }
}

/// A time of the database as the contract carries it.
pub fn timestamp(time: OffsetDateTime) -> prost_types::Timestamp {
    // `nanosecond` is below 1,000,000,000.
    prost_types::Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() }
}

fn read_timestamp(timestamp: &prost_types::Timestamp) -> Option<OffsetDateTime> {
    // From year 1, as the contract's timestamps are: Postgres does not go as far back as the calendar here does.
    let time = OffsetDateTime::from_unix_timestamp(timestamp.seconds).ok().filter(|time| time.year() >= 1)?;
    time.replace_nanosecond(timestamp.nanos.try_into().ok()?).ok()
}
