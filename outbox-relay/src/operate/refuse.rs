//! Why an operator's wish is not carried out.

use std::fmt;

use proto::relay::v1::OutboxPause;
use sqlx::PgConnection;
use uuid::Uuid;

/// Why nothing was done, or, for a database that failed in the middle, why it is not known what was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OperateError {
    /// Some of the events are not what they would have to be; none was touched.
    #[error("{}", join(.0))]
    NotApplicable(Vec<NotApplicable>),
    #[error("already paused {}", describe(.0))]
    AlreadyPaused(OutboxPause),
    #[error("not paused")]
    NotPaused,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// An event that is not what it would have to be.
#[derive(Debug)]
pub(crate) struct NotApplicable {
    pub(crate) event_id: Uuid,
    pub(crate) reason: Reason,
}

/// What is wrong with it.
#[derive(Debug)]
pub(crate) enum Reason {
    Unknown,
    Discarded { by: String, at: prost_types::Timestamp, reason: String },
    NotDead { state: String, requeued: bool },
    TooOld { age_hours: f64, max_age_hours: u32 },
}

impl fmt::Display for NotApplicable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {} ", self.event_id)?;
        match &self.reason {
            Reason::Unknown => write!(f, "is not in the outbox: it never was, or it was delivered"),
            Reason::Discarded { by, at, reason } => write!(f, "was discarded by {by} at {at}: {reason}"),
            Reason::NotDead { state, requeued: true } => write!(f, "is not dead: it was requeued, and is {state}"),
            Reason::NotDead { state, requeued: false } => write!(f, "is not dead: it is {state}"),
            Reason::TooOld { age_hours, max_age_hours } => write!(
                f,
                "is {age_hours:.0} hours old, and after {max_age_hours} (--max-age-hours) its receiver may not remember \
                 whether it had it: see to its effect by hand, then discard it"
            ),
        }
    }
}

fn join(events: &[NotApplicable]) -> String {
    events.iter().map(NotApplicable::to_string).collect::<Vec<_>>().join("; ")
}

/// The pause, as the end of a sentence.
pub(super) fn describe(pause: &OutboxPause) -> String {
    let since = pause.pause_time.unwrap_or_default();
    format!("since {since} by {}: {}", pause.paused_by, pause.reason)
}

/// Says of events that are not dead what they are. There is no index for this: it reads the whole outbox, which is no
/// harm, as only a mistake leads here.
pub(super) async fn explain(
    connection: &mut PgConnection,
    event_ids: &[Uuid],
) -> Result<Vec<NotApplicable>, sqlx::Error> {
    let in_outbox = sqlx::query!(
        r#"-- operate: find events that are not dead
        SELECT event_id, pardoned > 0 AS "requeued!",
            CASE
                WHEN visible_at = 'infinity' THEN 'dead since this moment; try again'
                WHEN visible_at > now() AND lease_token IS NOT NULL THEN 'leased'
                WHEN visible_at > now() AND attempts > pardoned THEN 'backing off'
                ELSE 'waiting'
            END AS "state!"
        FROM outbox WHERE event_id = ANY ($1)"#,
        event_ids,
    )
    .fetch_all(&mut *connection)
    .await?;
    let discarded = sqlx::query!(
        "-- operate: find discarded events
        SELECT event_id, discarded_by, discarded_at, reason FROM outbox_discarded WHERE event_id = ANY ($1)",
        event_ids,
    )
    .fetch_all(connection)
    .await?;
    let reason = |event_id: &Uuid| {
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
