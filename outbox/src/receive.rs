//! Receives events, as `events.v1.EventReceiver`: each is applied once, and each only whole.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use chassis::{Database, Fields, Refuse};
use clap::Args;
use proto::events::v1::{
    DeliverRequest, DeliverResponse, DescribeRequest, DescribeResponse, Event, EventResult, Outcome,
    event_receiver_server::{EventReceiver, EventReceiverServer},
};
use sqlx::{Connection, PgConnection, Postgres, Transaction, types::time::OffsetDateTime};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    Envelope, Malformed,
    accept::{Acceptance, accept},
    prune::prune_until_shutdown,
};

const EVENTS_MAX: usize = 1000;
/// A full batch of the largest orders is under 8 MB.
const BATCH_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How long a batch waits for those before it. With the wait for a connection and the work itself, as they are by default, it
/// stays under the time a call may take, or the caller would be cut off without a word, which a relay may have to charge to an
/// event.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// What a service does with the events it receives.
pub trait Handler: Send + Sync + 'static {
    /// An event as the service understands it.
    type Event: Send + Sync;

    /// Decodes an event and checks all that can be checked by looking at it.
    ///
    /// # Errors
    /// Why it will never be applied here.
    fn read(&self, envelope: &Envelope<'_>) -> Result<Self::Event, Refusal>;

    /// Applies events that are new to this service, in their order, in the transaction that records them. When it
    /// returns an error all of it is undone, the records included.
    ///
    /// # Errors
    /// [`ApplyError::Refused`] names events that cannot be applied; it is then called again without these. Each such
    /// round refuses at least one event, so there are at most as many as events.
    fn apply(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        events: &[&Self::Event],
    ) -> impl Future<Output = Result<(), ApplyError>> + Send;

    /// Called after the commit of anything that [`Handler::apply`] did, even if the caller has hung up: the place to
    /// notify others from.
    fn committed(&self) {}
}

/// Why an event is not applied.
#[derive(Clone, Debug)]
pub struct Refusal {
    outcome: Outcome,
    reason: &'static str,
    detail: String,
}

impl Refusal {
    /// It will never work, however often it comes. `reason` is a constant in UPPER_SNAKE_CASE.
    pub fn reject(reason: &'static str, detail: impl Into<String>) -> Self {
        Self { outcome: Outcome::Rejected, reason, detail: detail.into() }
    }

    /// It does not work now, and may later. `reason` is a constant in UPPER_SNAKE_CASE.
    pub fn retry(reason: &'static str, detail: impl Into<String>) -> Self {
        Self { outcome: Outcome::Retry, reason, detail: detail.into() }
    }

    /// The event is of a type that this service does not receive.
    pub fn unknown_type(envelope: &Envelope<'_>) -> Self {
        Self::reject("UNKNOWN_TYPE", format!("this service does not know events of type {}", envelope.type_name()))
    }
}

impl From<Malformed> for Refusal {
    fn from(malformed: Malformed) -> Self {
        Self::reject("UNDECODABLE", malformed.to_string())
    }
}

/// Why a batch was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Some of its events cannot be, given by id.
    #[error("some events cannot be applied")]
    Refused(HashMap<Uuid, Refusal>),
    /// The database.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Settings of the inbox.
#[derive(Args, Clone, Debug)]
pub struct InboxSettings {
    /// Hours for which the ids of applied events are remembered. Older events are refused, since they may have been
    /// applied and forgotten; relays must not deliver any that are (their --max-age-hours).
    #[arg(long, env = "RETENTION_HOURS", default_value_t = 168, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    pub retention_hours: u32,
    /// Batches of events applied at once; further ones wait. Raise it where batches rarely want the same rows.
    #[arg(long, env = "BATCHES_AT_ONCE", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub batches_at_once: u16,
}

impl InboxSettings {
    fn retention(&self) -> Duration {
        Duration::from_secs(3600) * self.retention_hours
    }
}

/// Serves `events.v1.EventReceiver` for a service.
#[derive(Debug)]
pub struct Receiver<H> {
    database: Database,
    handler: Arc<H>,
    refuse: Refuse,
    retention: Duration,
    /// A batch that wants the rows of another has to wait for it in any case. Here it waits without a connection, which other
    /// calls may need, and without costing the processor's time (see ARCHITECTURE.md for how much that is).
    room: Arc<Semaphore>,
}

impl<H: Handler> Receiver<H> {
    /// The server, ready to be added to the service's routes; and starts pruning the inbox, until `shutdown`.
    pub fn start(
        database: &Database,
        handler: H,
        refuse: Refuse,
        settings: &InboxSettings,
        shutdown: CancellationToken,
    ) -> EventReceiverServer<Self> {
        let retention = settings.retention();
        tokio::spawn(prune_until_shutdown(database.clone(), retention, shutdown));
        let room = Arc::new(Semaphore::new(settings.batches_at_once.into()));
        let receiver = Self { database: database.clone(), handler: Arc::new(handler), refuse, retention, room };
        EventReceiverServer::new(receiver).max_decoding_message_size(BATCH_BYTES_MAX)
    }
}

#[tonic::async_trait]
impl<H: Handler> EventReceiver for Receiver<H> {
    async fn deliver(&self, request: Request<DeliverRequest>) -> Result<Response<DeliverResponse>, Status> {
        let events = request.into_inner().events;
        let mut fields = Fields::default();
        if events.len() > EVENTS_MAX {
            fields.refuse("events", format!("must be at most {EVENTS_MAX}, and are {}", events.len()));
        }
        let events = fields.finish(events).map_err(|bad| self.refuse.invalid("INVALID_BATCH", bad))?;
        let (handler, retention) = (self.handler.clone(), self.retention);
        // Waited for by the caller, who may give up, and then kept by the work, which outlives its caller: at the longest for
        // as long as a connection may take to be made, and the work itself.
        let waiting = timeout(WAIT_MAX, self.room.clone().acquire_owned());
        let granted =
            waiting.await.map_err(|_| self.refuse.later(Code::Unavailable, "BUSY", "busy with other batches"))?;
        let place = granted.expect("nobody closes it");
        self.database
            .run(move |connection| {
                Box::pin(async move {
                    let _place = place;
                    apply_batch(connection, &*handler, &events, retention).await
                })
            })
            .await
            .map(|results| Response::new(DeliverResponse { results }))
            .map_err(|error| self.refuse.database(&error))
    }

    /// Asks the database too: a relay takes the answer for the sign that a delivery can be applied.
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let answers = self.database.run(|connection| Box::pin(connection.ping()));
        answers.await.map_err(|error| self.refuse.database(&error))?;
        let seconds = self.retention.as_secs().cast_signed();
        Ok(Response::new(DescribeResponse { retention: Some(prost_types::Duration { seconds, nanos: 0 }) }))
    }
}

/// An event that may be applied, as far as one can tell by looking at it.
struct Arrived<E> {
    id: Uuid,
    time: OffsetDateTime,
    event: E,
}

/// Answers one result per event, in order, once their effects are committed. An event that is refused leaves no trace in
/// the inbox, so it is applied if it comes again to a version that knows it.
async fn apply_batch<H: Handler>(
    connection: &mut PgConnection,
    handler: &H,
    events: &[Event],
    retention: Duration,
) -> Result<Vec<EventResult>, sqlx::Error> {
    let mut arrived: Vec<Result<Arrived<H::Event>, Refusal>> =
        events.iter().map(|event| read(handler, event)).collect();
    let mut accepted = loop {
        match apply_once(connection, handler, &arrived, retention).await {
            Ok(accepted) => break accepted,
            Err(ApplyError::Refused(refusals)) => refuse(&mut arrived, &refusals)?,
            Err(ApplyError::Database(error)) => return Err(error),
        }
    };
    let results = events.iter().zip(arrived).map(|(event, arrived)| match arrived {
        Err(refusal) => refused(event, &refusal),
        Ok(Arrived { id, .. }) => match accepted.get(&id) {
            Some(Acceptance::Stale) => refused(event, &stale(retention)),
            Some(Acceptance::Fresh) => {
                // An event that stands twice in one batch is a duplicate the second time.
                accepted.insert(id, Acceptance::Duplicate);
                result(event, Outcome::Applied)
            }
            Some(Acceptance::Duplicate) => {
                info!(event_id = %id, subject = event.subject, "duplicate skipped");
                result(event, Outcome::Duplicate)
            }
            None => refused(event, &Refusal::retry("NOT_ACCEPTED", "the inbox said nothing about it")),
        },
    });
    Ok(results.collect())
}

fn read<H: Handler>(handler: &H, event: &Event) -> Result<Arrived<H::Event>, Refusal> {
    let envelope = Envelope::read(event)?;
    Ok(Arrived { id: envelope.id, time: envelope.time, event: handler.read(&envelope)? })
}

/// Applies those of the events that are new, and says what the inbox knew of each.
async fn apply_once<H: Handler>(
    connection: &mut PgConnection,
    handler: &H,
    arrived: &[Result<Arrived<H::Event>, Refusal>],
    retention: Duration,
) -> Result<HashMap<Uuid, Acceptance>, ApplyError> {
    let sound: Vec<&Arrived<H::Event>> = arrived.iter().flatten().collect();
    if sound.is_empty() {
        return Ok(HashMap::new());
    }
    let ids: Vec<(Uuid, OffsetDateTime)> = sound.iter().map(|arrived| (arrived.id, arrived.time)).collect();

    let mut tx = connection.begin().await?;
    let accepted = accept(&mut tx, &ids, retention).await?;
    // The first of each id: the same event may stand twice in a batch.
    let mut seen = HashSet::new();
    let fresh = |arrived: &&&Arrived<H::Event>| {
        accepted.get(&arrived.id) == Some(&Acceptance::Fresh) && seen.insert(arrived.id)
    };
    let fresh: Vec<&H::Event> = sound.iter().filter(fresh).map(|arrived| &arrived.event).collect();
    if !fresh.is_empty() {
        handler.apply(&mut tx, &fresh).await?;
    }
    tx.commit().await?;
    if !fresh.is_empty() {
        handler.committed();
    }
    Ok(accepted)
}

/// Takes the events out that were refused.
fn refuse<E>(
    arrived: &mut [Result<Arrived<E>, Refusal>],
    refusals: &HashMap<Uuid, Refusal>,
) -> Result<(), sqlx::Error> {
    let mut found = false;
    for entry in arrived {
        if let Some(refusal) = entry.as_ref().ok().and_then(|arrived| refusals.get(&arrived.id)) {
            *entry = Err(refusal.clone());
            found = true;
        }
    }
    // The batch would be tried for ever here; and by relays, if they were told that the database is away.
    let none = || sqlx::Error::InvalidArgument("the handler refused events that it was not given".into());
    found.then_some(()).ok_or_else(none)
}

fn stale(retention: Duration) -> Refusal {
    let hours = retention.as_secs() / 3600;
    Refusal::reject("STALE", format!("older than {hours} hours: whether it was applied is not on record any more"))
}

fn refused(event: &Event, refusal: &Refusal) -> EventResult {
    let Refusal { outcome, reason, detail } = refusal;
    warn!(
        event_id = event.id,
        event_type = event.r#type,
        reason,
        detail,
        "event not applied: {}",
        outcome.as_str_name()
    );
    EventResult { reason: (*reason).into(), detail: detail.clone(), ..result(event, *outcome) }
}

fn result(event: &Event, outcome: Outcome) -> EventResult {
    EventResult { event_id: event.id.clone(), outcome: outcome.into(), ..EventResult::default() }
}
