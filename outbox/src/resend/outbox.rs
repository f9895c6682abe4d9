//! The part of `resend` that reads and writes the outbox.

use std::collections::HashSet;

use sqlx::{PgConnection, types::time::OffsetDateTime};
use tracing::warn;

use super::{Position, ResendError, SentEvent};
use crate::{AggregateId, CHANNEL, EventId, notify};

/// A subscription that has not ended.
#[derive(Debug)]
pub(super) struct Subscription {
    id: i16,
    name: String,
    pub(super) created_at: OffsetDateTime,
}

/// Finds the subscription of this name.
pub(super) async fn find_subscription(connection: &mut PgConnection, name: &str) -> Result<Subscription, ResendError> {
    let there = sqlx::query_as!(
        Subscription,
        "-- outbox: find subscriptions
        SELECT subscription_id AS id, name, created_at FROM outbox_subscriptions WHERE ended_at IS NULL ORDER BY name"
    )
    .fetch_all(connection)
    .await?;
    let names: Vec<String> = there.iter().map(|subscription| subscription.name.clone()).collect();
    let there_are = || if names.is_empty() { "are none".to_owned() } else { format!("are {}", names.join(", ")) };
    let found = there.into_iter().find(|subscription| subscription.name == name);
    found.ok_or_else(|| ResendError::NoSubscription { name: name.to_owned(), there: there_are() })
}

/// What the outbox keeps of some events, for one subscription.
#[derive(Debug)]
pub(super) struct Kept {
    /// The database's time.
    pub(super) now: OffsetDateTime,
    /// The events that are in the outbox.
    pub(super) waiting: HashSet<Position>,
    /// The events that an operator has given up.
    pub(super) discarded: HashSet<EventId>,
    /// The types that the subscription gets.
    types: HashSet<String>,
}

impl Kept {
    #[cfg(test)]
    pub(super) fn none(now: OffsetDateTime) -> Self {
        Self { now, waiting: HashSet::new(), discarded: HashSet::new(), types: HashSet::new() }
    }

    pub(super) fn is_for_subscription(&self, sent: &SentEvent) -> bool {
        self.types.contains(&sent.event.event_type)
    }
}

/// A row that matches no subscription yet counts too: it goes to the first one that is made for it.
pub(super) async fn read_kept(
    connection: &mut PgConnection,
    subscription: &Subscription,
    events: &[SentEvent],
) -> Result<Kept, sqlx::Error> {
    let aggregate_ids: Vec<AggregateId> = events.iter().map(|sent| sent.event.aggregate_id).collect();
    let event_ids: Vec<EventId> = events.iter().map(|sent| sent.event.id).collect();
    let types: HashSet<&str> = events.iter().map(|sent| sent.event.event_type.as_str()).collect();
    let types: Vec<&str> = types.into_iter().collect();
    let kept = sqlx::query!(
        r#"-- outbox: read what is kept
        SELECT now() AS "now!", ARRAY (
                SELECT aggregate_id FROM outbox
                WHERE aggregate_id = ANY ($1) AND subscription_id IN (0, $4::smallint)
                ORDER BY aggregate_id, subscription_id, sequence) AS "waiting!: Vec<AggregateId>", ARRAY (
                SELECT sequence FROM outbox
                WHERE aggregate_id = ANY ($1) AND subscription_id IN (0, $4::smallint)
                ORDER BY aggregate_id, subscription_id, sequence) AS "sequences!", ARRAY (
                SELECT event_id FROM outbox_discarded
                WHERE event_id = ANY ($2) AND subscription_id = $4) AS "discarded!: Vec<EventId>", ARRAY (
                SELECT event_type FROM unnest($3::text[]) AS event_type
                WHERE event_type LIKE (SELECT type_like FROM outbox_subscriptions WHERE subscription_id = $4))
                AS "types!""#,
        &aggregate_ids as &[AggregateId],
        &event_ids as &[EventId],
        &types as &[&str],
        subscription.id,
    )
    .fetch_one(connection)
    .await?;
    Ok(Kept {
        now: kept.now,
        waiting: kept.waiting.into_iter().zip(kept.sequences).collect(),
        discarded: kept.discarded.into_iter().collect(),
        types: kept.types.into_iter().collect(),
    })
}

/// Enqueues the events again, in one statement, which is one transaction. Returns how many. An event that came into the
/// outbox meanwhile is left out.
pub(super) async fn enqueue_again(
    connection: &mut PgConnection,
    subscription: &Subscription,
    lost: &[SentEvent],
    by: &str,
    reason: &str,
) -> Result<u64, sqlx::Error> {
    let rows = crate::Rows::of(lost.iter().map(|sent| &sent.event));
    let times: Vec<OffsetDateTime> = lost.iter().map(|sent| sent.at).collect();
    let enqueued = sqlx::query_scalar!(
        r#"-- outbox: resend
        SELECT outbox_resend($1, $2, $3, $4, $5, $6, $7, $8, $9) AS "enqueued!""#,
        subscription.id,
        &rows.aggregate_ids as &[AggregateId],
        &rows.sequences,
        &rows.event_ids as &[EventId],
        &rows.event_types as &[&str],
        &rows.payloads as &[&[u8]],
        &times,
        by,
        reason,
    )
    .fetch_one(connection)
    .await?;
    Ok(enqueued.unsigned_abs())
}

/// Without a notification relays poll within their interval, so the operator gets no error.
pub(super) async fn wake_relays(connection: &mut PgConnection) {
    if let Err(cause) = notify(connection, CHANNEL).await {
        warn!(%cause, "cannot notify relays; they will poll");
    }
}
