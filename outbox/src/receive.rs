//! Serves `events.v1.EventReceiver`: applies each event once, and completely or not at all.

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
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, codec::CompressionEncoding};
use tracing::{info, warn};

use crate::{
    Envelope, EventId,
    accept::{Acceptance, accept},
    gather::{Answer, Batch, Waiting},
    prune::prune_until_shutdown,
};

const EVENTS_MAX: usize = 1000;
/// More than a full batch of the largest orders takes.
const BATCH_BYTES_MAX: usize = 16 * 1024 * 1024;
/// A source that is not accepted is named with this many characters.
const SOURCE_CHARS_MAX: usize = 100;
/// How long a batch waits for a slot. By default, this wait, the wait for a connection and the work together are
/// shorter than a call may take. A call that is cut off has no answer, and a relay may have to count that against an
/// event.
const WAIT_MAX: Duration = Duration::from_secs(3);

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
    outcome: Outcome,
    reason: &'static str,
    detail: String,
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

/// Settings of the inbox.
#[derive(Args, Clone, Debug)]
pub struct InboxSettings {
    /// Hours for which ids of applied events are kept. Older events are rejected, since they may have been applied
    /// before. Relays deliver events up to six sevenths of this.
    #[arg(long, env = "RETENTION_HOURS", default_value_t = 168, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    pub retention_hours: u32,
    /// Maximum number of batches of events that are applied at once. Others wait. Raise it if batches rarely change the
    /// same rows.
    #[arg(long, env = "BATCHES_AT_ONCE", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub batches_at_once: u16,
    /// Services whose events are accepted, by the --source of their relays. Batches with events of others are refused.
    /// Without it, events of any service are accepted.
    #[arg(long, env = "ACCEPT_SOURCES", value_name = "SOURCE,…", value_delimiter = ',')]
    pub accept_sources: Vec<String>,
}

impl InboxSettings {
    fn retention(&self) -> Duration {
        Duration::from_secs(3600) * self.retention_hours
    }

    /// A variable that is set to nothing means any source too, and not the one without a name.
    fn sources(&self) -> Vec<String> {
        let sources = self.accept_sources.iter().map(|source| source.trim());
        sources.filter(|source| !source.is_empty()).map(str::to_owned).collect()
    }
}

/// Serves `events.v1.EventReceiver` for a service.
#[derive(Debug)]
pub struct Receiver<H> {
    database: Database,
    handler: Arc<H>,
    refuse: Refuse,
    retention: Duration,
    /// The services whose events are accepted; any if it is empty.
    sources: Vec<String>,
    /// Batches that change the same rows wait for each other in any case. Waiting for a slot here takes neither a
    /// connection, which other calls may need, nor processor time.
    slots: Arc<Semaphore>,
    waiting: Arc<Waiting>,
}

impl<H: Handler> Receiver<H> {
    /// Returns the server, to be added to the service's routes, and prunes the inbox until `shutdown`.
    pub fn start(
        database: &Database,
        handler: H,
        refuse: Refuse,
        settings: &InboxSettings,
        shutdown: CancellationToken,
    ) -> EventReceiverServer<Self> {
        let retention = settings.retention();
        tokio::spawn(prune_until_shutdown(database.clone(), retention, shutdown));
        let slots = Arc::new(Semaphore::new(settings.batches_at_once.into()));
        let (database, handler, sources) = (database.clone(), Arc::new(handler), settings.sources());
        let receiver = Self { database, handler, refuse, retention, sources, slots, waiting: Arc::default() };
        // The limit holds for the size of a message as it comes, and for the size that it has when it is decompressed.
        EventReceiverServer::new(receiver)
            .max_decoding_message_size(BATCH_BYTES_MAX)
            .accept_compressed(CompressionEncoding::Gzip)
    }

    /// Refuses a batch whole if one of its events is of a source that is not accepted. An outbox has one source, so the
    /// relay has a wrong name or a wrong receiver, and no other event of it would fare better.
    fn check_sources(&self, events: &[Event]) -> Result<(), Status> {
        let accepted = &self.sources;
        let Some(event) = events.iter().find(|event| !accepted.is_empty() && !accepted.contains(&event.source)) else {
            return Ok(());
        };
        // The sender decides how long the name is.
        let source: String = event.source.chars().take(SOURCE_CHARS_MAX).collect();
        let message = format!(
            "events of {source:?} are not accepted here, only those of {}: correct the relay's route or its --source, or \
             add the source to --accept-sources (ACCEPT_SOURCES) of this service",
            accepted.join(", ")
        );
        Err(self.refuse.with(Code::PermissionDenied, "SOURCE_NOT_ACCEPTED", message))
    }

    /// Waits for the answer to a batch, and for a slot meanwhile. Whoever gets a slot applies the oldest batches. These may
    /// be without its own, and then it waits for another slot.
    async fn answer(&self, number: u64, mut answered: oneshot::Receiver<Answer>) -> Answer {
        let limit = Instant::now() + WAIT_MAX;
        loop {
            let slot = tokio::select! {
                biased;
                answer = &mut answered => return answer.unwrap_or_else(|_| Err(self.refuse_shared())),
                slot = timeout_at(limit, self.slots.clone().acquire_owned()) => slot,
            };
            match slot {
                Ok(slot) => {
                    let applied = self.apply_next(slot.expect("the semaphore is never closed")).await;
                    if let Err(error) = applied {
                        return answered.try_recv().unwrap_or_else(|_| Err(self.refuse.database(&error)));
                    }
                }
                Err(_) if self.waiting.remove(number) => {
                    return Err(self.refuse.later(Code::Unavailable, "BUSY", "busy with other batches; try again"));
                }
                Err(_) => return answered.await.unwrap_or_else(|_| Err(self.refuse_shared())),
            }
        }
    }

    /// Applies the oldest batches that wait, and answers them. This caller may give up. Then the work holds the slot, even
    /// after its caller is gone: at most until a connection is made and the work is done.
    ///
    /// # Errors
    /// Those of the database. If the work did not begin or end, the batches have no answer.
    async fn apply_next(&self, slot: OwnedSemaphorePermit) -> Result<(), sqlx::Error> {
        let group = self.waiting.take();
        if group.is_empty() {
            return Ok(());
        }
        let (handler, refuse, retention) = (self.handler.clone(), self.refuse, self.retention);
        self.database
            .run(move |connection| {
                Box::pin(async move {
                    let _slot = slot;
                    apply_group(connection, &*handler, group, (retention, refuse)).await
                })
            })
            .await
    }

    /// The refusal of a batch that shared a transaction which another caller began. That one has logged the cause.
    fn refuse_shared(&self) -> Status {
        self.refuse.database_logged(&sqlx::Error::PoolTimedOut)
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
        self.check_sources(&events)?;
        let (number, answered) = self.waiting.add(events);
        let results = self.answer(number, answered).await?;
        Ok(Response::new(DeliverResponse { results }))
    }

    /// Pings the database too: relays take an answer as the sign that a delivery can be applied.
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let answers = self.database.run(|connection| Box::pin(connection.ping()));
        answers.await.map_err(|error| self.refuse.database(&error))?;
        let seconds = self.retention.as_secs().cast_signed();
        Ok(Response::new(DescribeResponse {
            retention: Some(prost_types::Duration { seconds, nanos: 0 }),
            types: self.handler.types(),
            sources: self.sources.clone(),
            ordered: true,
        }))
    }
}

/// A delivered event that its handler has read.
struct Arrived<E> {
    id: EventId,
    time: OffsetDateTime,
    event: E,
}

/// Applies the batches in one transaction, and answers each after the commit.
///
/// If the database refuses the data of an event, that must not fail the batches of others. Then each is applied in a
/// transaction of its own.
async fn apply_group<H: Handler>(
    connection: &mut PgConnection,
    handler: &H,
    mut group: Vec<Batch>,
    (retention, refuse): (Duration, Refuse),
) -> Result<(), sqlx::Error> {
    let mut begin = 0;
    let mut ranges = Vec::new();
    for batch in &group {
        ranges.push(begin..begin + batch.events.len());
        begin += batch.events.len();
    }
    let events: Vec<Event> = group.iter_mut().flat_map(|batch| std::mem::take(&mut batch.events)).collect();
    let answers = ranges.into_iter().zip(group.into_iter().map(|batch| batch.answer));
    // A caller that is gone gets no answer.
    match apply_batch(connection, handler, &events, retention).await {
        Ok(results) => answers.for_each(|(range, answer)| drop(answer.send(Ok(results[range].to_vec())))),
        Err(sqlx::Error::Database(_)) if answers.len() > 1 => {
            for (range, answer) in answers {
                let results = apply_batch(connection, handler, &events[range], retention).await;
                drop(answer.send(results.map_err(|error| refuse.database(&error))));
            }
        }
        Err(error) => {
            let refusal = refuse.database(&error);
            answers.for_each(|(_, answer)| drop(answer.send(Err(refusal.clone()))));
            return Err(error);
        }
    }
    Ok(())
}

/// Applies a batch, and returns one result per event, in order, after the commit.
///
/// The inbox does not record refused events. So a later version of the service that knows such an event can apply it.
async fn apply_batch<H: Handler>(
    connection: &mut PgConnection,
    handler: &H,
    events: &[Event],
    retention: Duration,
) -> Result<Vec<EventResult>, sqlx::Error> {
    let mut arrived: Vec<Result<Arrived<H::Event>, Refusal>> =
        events.iter().map(|event| read(handler, event)).collect();
    let mut accepted = loop {
        hold_back(events, &mut arrived);
        match apply_once(connection, handler, &arrived, retention).await {
            Ok(accepted) => break accepted,
            Err(ApplyError::Refused(refusals)) => refuse(&mut arrived, &refusals)?,
            Err(ApplyError::Database(error)) => return Err(error),
        }
    };
    let results = events.iter().zip(arrived).map(|(event, arrived)| match arrived {
        Err(refusal) => refused(event, &refusal),
        Ok(Arrived { id, .. }) => match accepted.get(&id) {
            Some(Acceptance::Fresh) => {
                // If the event is in the batch twice, the second one is a duplicate.
                accepted.insert(id, Acceptance::Duplicate);
                result(event, Outcome::Applied)
            }
            Some(Acceptance::Duplicate) => {
                info!(event_id = %id, subject = event.subject, "duplicate skipped");
                result(event, Outcome::Duplicate)
            }
            Some(Acceptance::Stale) | None => {
                refused(event, &Refusal::retry("NOT_ACCEPTED", "the inbox returned no row for the event"))
            }
        },
    });
    Ok(results.collect())
}

fn read<H: Handler>(handler: &H, event: &Event) -> Result<Arrived<H::Event>, Refusal> {
    let envelope = Envelope::read(event)?;
    Ok(Arrived { id: envelope.id, time: envelope.time, event: handler.read(&envelope)? })
}

/// Applies the new events in one transaction, and returns what the inbox knew of each.
async fn apply_once<H: Handler>(
    connection: &mut PgConnection,
    handler: &H,
    arrived: &[Result<Arrived<H::Event>, Refusal>],
    retention: Duration,
) -> Result<HashMap<EventId, Acceptance>, ApplyError> {
    let sound: Vec<&Arrived<H::Event>> = arrived.iter().flatten().collect();
    if sound.is_empty() {
        return Ok(HashMap::new());
    }
    let ids: Vec<(EventId, OffsetDateTime)> = sound.iter().map(|arrived| (arrived.id, arrived.time)).collect();

    let mut tx = connection.begin().await?;
    let accepted = accept(&mut tx, &ids, retention).await?;
    let is_stale = |arrived: &&&Arrived<H::Event>| accepted.get(&arrived.id) == Some(&Acceptance::Stale);
    let refusals: HashMap<_, _> = sound.iter().filter(is_stale).map(|arrived| (arrived.id, stale(retention))).collect();
    if !refusals.is_empty() {
        return Err(ApplyError::Refused(refusals));
    }
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

/// Holds back the events behind a refused one of the same subject: they would be applied before it.
fn hold_back<E>(events: &[Event], arrived: &mut [Result<Arrived<E>, Refusal>]) {
    let mut refused: HashMap<&str, i64> = HashMap::new();
    for (event, entry) in events.iter().zip(arrived) {
        if entry.is_ok() && refused.get(event.subject.as_str()).is_some_and(|sequence| event.sequence > *sequence) {
            *entry = Err(Refusal::retry("BEHIND_REFUSED", "an earlier event of the same subject was not applied"));
        }
        if entry.is_err() {
            let first = refused.entry(&event.subject).or_insert(event.sequence);
            *first = event.sequence.min(*first);
        }
    }
}

/// Replaces the refused events by their refusals.
fn refuse<E>(
    arrived: &mut [Result<Arrived<E>, Refusal>],
    refusals: &HashMap<EventId, Refusal>,
) -> Result<(), sqlx::Error> {
    let mut found = false;
    for entry in arrived {
        if let Some(refusal) = entry.as_ref().ok().and_then(|arrived| refusals.get(&arrived.id)) {
            *entry = Err(refusal.clone());
            found = true;
        }
    }
    // Without this the batch would be tried again here for ever. The error is no outage: after INTERNAL a relay looks for
    // the event at fault at once, and its route stays open.
    let none = || sqlx::Error::InvalidArgument("the handler refused no event that it was given".into());
    found.then_some(()).ok_or_else(none)
}

fn stale(retention: Duration) -> Refusal {
    let hours = retention.as_secs() / 3600;
    Refusal::reject(
        "STALE",
        format!("older than {hours} hours (--retention-hours): it may have been applied, and its record pruned"),
    )
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
