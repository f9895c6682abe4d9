//! Resumes slowly: relays deliver no more than so many events in a second.

use proto::relay::v1::{OutboxPace, OutboxPause, deed::Kind};
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{
    Author, OperateError, begin_durable,
    deeds::NewDeed,
    pause::{delete_pause, read_pauses},
    refuse::describe,
    subscribe::find_subscription,
    wake_relays,
};

/// Stands for all subscriptions.
const ALL: i16 = 0;

/// A pace as an operator asks for it.
#[derive(Clone, Debug)]
pub(crate) struct SlowDown {
    /// `None` for all subscriptions.
    pub(crate) subscription: Option<String>,
    pub(crate) events_per_second: i32,
    pub(crate) author: Author,
}

/// Sets the pace while the pause goes on. [`relays_know`] says when [`resume_slowly`] may end the pause: a relay that did not
/// know of the pace would deliver as fast as it can.
///
/// # Errors
/// [`OperateError::NotPaused`] if there is neither a pause nor a pace, [`OperateError::NoSubscription`], and those of the
/// database.
pub(crate) async fn set_pace(
    connection: &mut PgConnection,
    slow_down: &SlowDown,
) -> Result<OffsetDateTime, OperateError> {
    let subscription_id = find_subscription(connection, slow_down.subscription.as_deref()).await?.unwrap_or(ALL);
    let mut tx = begin_durable(connection).await?;
    let set_at = sqlx::query_scalar!(
        "-- operate: set pace
        INSERT INTO outbox_paces AS pace (subscription_id, events_per_second, set_by, reason)
        SELECT $1, $2, $3, $4
        WHERE EXISTS (SELECT FROM outbox_pauses WHERE subscription_id = $1)
           OR EXISTS (SELECT FROM outbox_paces WHERE subscription_id = $1)
        ON CONFLICT (subscription_id) DO UPDATE
        SET events_per_second = excluded.events_per_second, set_at = now(), set_by = excluded.set_by,
            reason = excluded.reason
        RETURNING set_at",
        subscription_id,
        slow_down.events_per_second,
        slow_down.author.name,
        slow_down.author.reason,
    )
    .fetch_optional(&mut *tx)
    .await?;
    tx.commit().await?;
    match set_at {
        Some(set_at) => Ok(set_at),
        None => Err(OperateError::NotPaused(read_pauses(connection).await?)),
    }
}

/// Whether every relay that reports has read the paces since then. It does so before it reports.
///
/// # Errors
/// Those of the database.
pub(crate) async fn relays_know(connection: &mut PgConnection, set_at: OffsetDateTime) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: ask whether relays know the pace
        SELECT NOT EXISTS (
            SELECT FROM outbox_routes WHERE seen_at > now() - interval '10 s' AND seen_at <= $1) AS "know!""#,
        set_at,
    )
    .fetch_one(connection)
    .await
}

/// Ends the pause whose pace was set, and records the deed. Returns the pause; one without a time if there was a pace only.
///
/// # Errors
/// [`OperateError::NoSubscription`], and those of the database.
pub(crate) async fn resume_slowly(
    connection: &mut PgConnection,
    slow_down: &SlowDown,
) -> Result<OutboxPause, OperateError> {
    let SlowDown { subscription, events_per_second, author } = slow_down;
    let subscription_id = find_subscription(connection, subscription.as_deref()).await?;
    let name = subscription.clone().unwrap_or_default();
    let mut tx = begin_durable(connection).await?;
    let ended = delete_pause(&mut tx, subscription_id, &name, None).await?;
    let pause = ended.as_ref().map(|pause| format!("; paused {}", describe(pause))).unwrap_or_default();
    let about = format!("{events_per_second} events per second{pause}");
    let deed = NewDeed::new(Kind::Resume, author, subscription_id, &about);
    let deed_id = NewDeed { can_undo: ended.is_some(), ..deed }.record(&mut tx).await?;
    tx.commit().await?;
    wake_relays(connection).await;
    let ended = ended.unwrap_or_else(|| OutboxPause { subscription: name, ..OutboxPause::default() });
    Ok(OutboxPause { deed_id, ..ended })
}

/// The paces there are, with the names of their subscriptions; of all subscriptions first.
///
/// # Errors
/// Those of the database.
pub(super) async fn read_paces(connection: &mut PgConnection) -> Result<Vec<(String, OutboxPace)>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"-- operate: read paces
        SELECT coalesce(name, '') AS "subscription!", events_per_second, set_at, set_by, pace.reason
        FROM outbox_paces AS pace LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE ended_at IS NULL
        ORDER BY 1"#
    );
    let rows = rows.fetch_all(connection).await?;
    let paces = rows.into_iter().map(|row| {
        let set_time = Some(outbox::timestamp(row.set_at));
        let events_per_second = row.events_per_second;
        (row.subscription, OutboxPace { events_per_second, set_time, set_by: row.set_by, reason: row.reason })
    });
    Ok(paces.collect())
}

/// The pace, as the end of a sentence.
pub(super) fn describe_pace(pace: &OutboxPace) -> String {
    let OutboxPace { events_per_second, set_by, reason, .. } = pace;
    let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    format!("to {events_per_second} events per second since {} by {set_by}{reason}", pace.set_time.unwrap_or_default())
}
