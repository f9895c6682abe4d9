//! What a service has to do to receive events.

use std::{collections::HashMap, future::Future};

use proto::events::v1::Outcome;
use sqlx::{Postgres, Transaction};

use crate::{Envelope, EventId};

/// What a service does with the events that it receives.
pub trait Handler: Send + Sync + 'static {
    /// A decoded event.
    type Event: Send + Sync;

    /// Decodes an event, and checks it as far as that is possible without the database.
    ///
    /// # Errors
    /// The refusal of an event that this service cannot apply.
    fn read(&self, envelope: &Envelope<'_>) -> Result<Self::Event, Refusal>;

    /// Applies new events, in their order, in the transaction that records their ids. After an error the transaction is
    /// rolled back, with the ids.
    ///
    /// # Errors
    /// [`ApplyError::Refused`] names events that cannot be applied. `apply` then runs again without them, in a new
    /// transaction, until it refuses none. At least one of them must be an event that `apply` was given; otherwise the
    /// delivery fails.
    fn apply(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        events: &[&Self::Event],
    ) -> impl Future<Output = Result<(), ApplyError>> + Send;

    /// The full names of the event types that [`Handler::read`] knows, as `M::full_name()` gives them. Relays ask for
    /// them. An empty list says nothing.
    fn types(&self) -> Vec<String> {
        Vec::new()
    }

    /// Runs after each commit of [`Handler::apply`], even if the caller has hung up. Send notifications here.
    fn committed(&self) {}
}

/// Why an event is not applied.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub(crate) outcome: Outcome,
    pub(crate) reason: &'static str,
    pub(crate) detail: String,
}

impl Refusal {
    /// The event can never be applied, so it is dead. `reason` is a constant in UPPER_SNAKE_CASE.
    pub fn reject(reason: &'static str, detail: impl Into<String>) -> Self {
        Self { outcome: Outcome::Rejected, reason, detail: detail.into() }
    }

    /// The event cannot be applied now, and is retried. `reason` is a constant in UPPER_SNAKE_CASE.
    pub fn retry(reason: &'static str, detail: impl Into<String>) -> Self {
        Self { outcome: Outcome::Retry, reason, detail: detail.into() }
    }

    /// This service does not receive events of this type.
    pub fn unknown_type(envelope: &Envelope<'_>) -> Self {
        Self::reject("UNKNOWN_TYPE", format!("this service does not know events of type {}", envelope.type_name()))
    }
}

/// Why a batch was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// These events cannot be applied.
    #[error("some events cannot be applied")]
    Refused(HashMap<EventId, Refusal>),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}
