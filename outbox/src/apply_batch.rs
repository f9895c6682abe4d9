//! Applies a batch of events once: the inbox and the effects in one transaction.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use chassis::trace::Trace;
use proto::events::v1::{Event, EventResult, Outcome};
use sqlx::{Connection, PgConnection, types::time::OffsetDateTime};
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    Envelope, EventId,
    accept::{Acceptance, accept},
    handler::{ApplyError, Handler, Refusal},
};

/// The reason of an event that is older than the inbox remembers.
pub(crate) const STALE: &str = "STALE";

/// A delivered event that its handler has read.
struct Arrived<E> {
    id: EventId,
    time: OffsetDateTime,
    event: E,
}

/// Applies a batch, and returns one result per event, in order, after the commit.
///
/// The inbox does not record refused events. So a later version of the service that knows such an event can apply it.
pub(crate) async fn apply_batch<H: Handler>(
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
    if fresh.is_empty() {
        // All are duplicates, and the relay is about to forget them.
        chassis::confirm_seen(&mut tx).await?;
    } else {
        handler.apply(&mut tx, &fresh).await?;
    }
    tx.commit().await?;
    if !fresh.is_empty() {
        handler.committed();
    }
    Ok(accepted)
}

/// Holds back the events behind a refused one of the same source and subject: they would be applied before it. An event
/// whose subject is unreadable is refused itself.
fn hold_back<E>(events: &[Event], arrived: &mut [Result<Arrived<E>, Refusal>]) {
    let mut refused: HashMap<(&str, Uuid), i64> = HashMap::new();
    for (event, entry) in events.iter().zip(arrived) {
        let Ok(subject) = Uuid::try_parse(&event.subject) else { continue };
        let line = (event.source.as_str(), subject);
        if entry.is_ok() && refused.get(&line).is_some_and(|sequence| event.sequence > *sequence) {
            *entry = Err(Refusal::retry("BEHIND_REFUSED", "an earlier event of the same subject was not applied"));
        }
        if entry.is_err() {
            let first = refused.entry(line).or_insert(event.sequence);
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
        STALE,
        format!("older than {hours} hours (--retention-hours): it may have been applied, and its record pruned"),
    )
}

fn refused(event: &Event, refusal: &Refusal) -> EventResult {
    let Refusal { outcome, reason, detail } = refusal;
    warn!(
        event_id = event.id,
        subject = event.subject,
        event_type = event.r#type,
        sequence = event.sequence,
        trace_id = Trace::id_in(&event.traceparent),
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
