//! Why an operator's command is refused.

use std::fmt;

use chassis::WorkError;
use outbox::EventId;
use proto::relay::v1::OutboxPause;
use sqlx::PgConnection;

use crate::subscription::Subscription;

/// Why a command failed. Nothing was changed, except that a database that failed in the middle may have committed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OperateError {
    /// The command does not apply to some of the events. It changed none of them.
    #[error("{}", join(.0))]
    NotApplicable(Vec<NotApplicable>),
    #[error("{}already paused {}", named(.0, " is "), describe(.0))]
    AlreadyPaused(OutboxPause),
    #[error("not paused{}", others(.0))]
    NotPaused(Vec<OutboxPause>),
    /// The names that nobody has subscribed, and those there are.
    #[error("nobody has subscribed {unknown}; there {}", are(.there))]
    NoSubscription { unknown: String, there: String },
    #[error(
        "{name} is subscribed to {pattern} already: choose another name; to `unsubscribe` it would discard its events"
    )]
    OtherPattern { name: String, pattern: String },
    #[error(
        "relays of an earlier version may still run, and would deliver the events of a second subscription to the receiver \
         of the first: when none does, run the `migrate --contract` command of the service that owns the database"
    )]
    OlderVersion,
    #[error(
        "the service that owns this outbox defines no function outbox_refuse, so a discard can refuse nothing: discard \
         without it, and end by hand what waits for the event"
    )]
    NoRefusals,
    /// Why the service that owns the outbox cannot refuse what the event tells of.
    #[error("nothing was discarded, since it cannot be refused: {0}; discard the event without it")]
    NotRefused(String),
    #[error("somebody has paused, resumed or set another pace meanwhile; look at the status")]
    PaceLost,
    #[error("there is no deed {0}: `outbox-relay deeds` lists them")]
    NoDeed(i64),
    /// Nothing of the deed can be undone.
    #[error("deed {deed_id} {why}")]
    CannotUndo { deed_id: i64, why: &'static str },
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl WorkError for OperateError {
    fn of_database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

/// An event that the command does not apply to.
#[derive(Debug)]
pub(crate) struct NotApplicable {
    pub(crate) event_id: EventId,
    pub(crate) reason: Reason,
}

/// Why the command does not apply to an event.
#[derive(Debug)]
pub(crate) enum Reason {
    Unknown,
    UnknownToAll,
    Discarded { by: String, at: prost_types::Timestamp, reason: String },
    NotDead { state: String, requeued: bool },
    TooOld { age_hours: f64, max_age_hours: f64 },
    NotDiscarded,
    RefusedBy { by: String, at: prost_types::Timestamp },
    SubscriptionEnded,
    Forgotten { age_hours: f64, max_age_hours: f64 },
}

impl fmt::Display for NotApplicable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {} ", self.event_id)?;
        match &self.reason {
            Reason::UnknownToAll => write!(
                f,
                "is unknown, and so is a subject with this id: neither the outbox nor a receiver has it on record"
            ),
            Reason::Unknown => write!(f, "is not in the outbox: it was delivered, or never existed"),
            Reason::Discarded { by, at, reason } => write!(f, "was discarded by {by} at {at}: {reason}"),
            Reason::NotDead { state, requeued: true } => write!(f, "is not dead: it was requeued, and is {state}"),
            Reason::NotDead { state, requeued: false } => write!(f, "is not dead: it is {state}"),
            Reason::TooOld { age_hours, max_age_hours } => write!(
                f,
                "is {age_hours:.0} hours old; after {max_age_hours:.0} its receiver may not remember whether \
                 it applied the event: repair the effect by hand, then discard the event"
            ),
            Reason::NotDiscarded => write!(f, "is not among the discarded events"),
            Reason::RefusedBy { by, at } => write!(
                f,
                "was discarded by {by} at {at} with a refusal: what it tells of has ended, and others know it"
            ),
            Reason::SubscriptionEnded => write!(f, "was for a subscription that has ended, so nobody would deliver it"),
            Reason::Forgotten { age_hours, max_age_hours } => write!(
                f,
                "is {age_hours:.0} hours old; after {max_age_hours:.0} its receiver may not remember whether \
                 it applied the event: repair the effect by hand"
            ),
        }
    }
}

fn join(events: &[NotApplicable]) -> String {
    events.iter().map(NotApplicable::to_string).collect::<Vec<_>>().join("; ")
}

impl OperateError {
    /// Nobody has subscribed these names.
    pub(crate) fn no_subscription(unknown: &[&str], there: &[Subscription]) -> Self {
        let there: Vec<_> = there.iter().map(|subscription| &*subscription.name).collect();
        Self::NoSubscription { unknown: unknown.join(", "), there: there.join(", ") }
    }
}

fn are(names: &str) -> String {
    if names.is_empty() { "is no subscription".to_owned() } else { format!("are {names}") }
}

/// The name of the paused subscription with `then`; nothing for the pause of all.
pub(super) fn named(pause: &OutboxPause, then: &str) -> String {
    if pause.subscription.is_empty() { String::new() } else { format!("{}{then}", pause.subscription) }
}

/// Whether it is a pause of this subscription, or of all.
pub(super) fn holds_up(pause: &OutboxPause, subscription: &str) -> bool {
    pause.subscription.is_empty() || pause.subscription == subscription
}

/// The command that ends it.
pub(super) fn resume_command(pause: &OutboxPause) -> String {
    end_of_pause(&pause.subscription)
}

/// The command that ends a pause or a pace of this subscription, or with no name that of all.
pub(super) fn end_of_pause(subscription: &str) -> String {
    match subscription {
        "" => "`outbox-relay resume`".into(),
        name => format!("`outbox-relay resume --subscription {name}`"),
    }
}

fn others(pauses: &[OutboxPause]) -> String {
    let command = |pause: &OutboxPause| match pause.subscription.as_str() {
        "" => "`resume` would end the pause of all".to_owned(),
        name => format!("`resume --subscription {name}` would end the pause of {name}"),
    };
    pauses.iter().map(|pause| format!("; {}", command(pause))).collect()
}

/// The pause, as the end of a sentence.
pub(super) fn describe(pause: &OutboxPause) -> String {
    let since = pause.pause_time.unwrap_or_default();
    format!("since {since} by {}: {}", pause.paused_by, pause.reason)
}

/// Looks up the state of events that are not dead. It reads the whole outbox, since there is no index for this. Only a
/// mistake leads here, so that does no harm. An event may be dead for another subscription than the one that is asked for.
pub(super) async fn explain(
    connection: &mut PgConnection,
    event_ids: &[EventId],
    only: Option<i16>,
) -> Result<Vec<NotApplicable>, sqlx::Error> {
    let in_outbox = sqlx::query!(
        r#"-- operate: find events that are not dead
        SELECT event_id AS "event_id: EventId", attempts_before_requeue > 0 AS "requeued!",
            CASE
                WHEN visible_at = 'infinity' THEN 'dead since just now; try again'
                WHEN visible_at > now() AND lease_token IS NOT NULL THEN 'leased'
                WHEN visible_at > now() AND attempts > attempts_before_requeue THEN 'backing off'
                ELSE 'waiting'
            END AS "state!"
        FROM outbox WHERE event_id = ANY ($1) AND ($2::smallint IS NULL OR subscription_id = $2)"#,
        event_ids as &[EventId],
        only,
    )
    .fetch_all(&mut *connection)
    .await?;
    let discarded = sqlx::query!(
        r#"-- operate: find discarded events
        SELECT event_id AS "event_id: EventId", discarded_by, discarded_at, reason
        FROM outbox_discarded WHERE event_id = ANY ($1) AND ($2::smallint IS NULL OR subscription_id = $2)"#,
        event_ids as &[EventId],
        only,
    )
    .fetch_all(connection)
    .await?;
    let reason = |event_id: &EventId| {
        if let Some(row) = in_outbox.iter().find(|row| row.event_id == *event_id) {
            return Reason::NotDead { state: row.state.clone(), requeued: row.requeued };
        }
        discarded.iter().find(|row| row.event_id == *event_id).map_or(Reason::Unknown, |row| Reason::Discarded {
            by: row.discarded_by.clone(),
            at: outbox::timestamp(row.discarded_at),
            reason: row.reason.clone(),
        })
    };
    Ok(event_ids.iter().map(|event_id| NotApplicable { event_id: *event_id, reason: reason(event_id) }).collect())
}
