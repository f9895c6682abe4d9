//! Resumes slowly: relays deliver no more than so many events in a second.

use std::time::Duration;

use proto::relay::v1::{OutboxPace, OutboxPause, deed::Kind};
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{
    Author, OperateError, begin_durable,
    deeds::NewDeed,
    pause::{ALL, delete_pause, read_pauses},
    refuse::describe,
    subscribe::find_subscription,
    wake_relays,
};

/// A pace as an operator asks for it.
#[derive(Clone, Debug)]
pub(crate) struct SlowDown {
    /// `None` for all subscriptions.
    pub(crate) subscription: Option<String>,
    pub(crate) events_per_second: i32,
    pub(crate) author: Author,
}

/// How often relays are asked whether they know a pace. They read the paces once a second.
pub(crate) const RELAYS_KNOW_POLL: Duration = Duration::from_millis(200);

/// A pace that is set while its pause goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prepared {
    set_at: OffsetDateTime,
    paused_at: OffsetDateTime,
    /// After the pace was committed.
    told_at: OffsetDateTime,
}

/// What [`set_pace`] has done.
#[derive(Debug)]
pub(crate) enum SetPace {
    /// There was a pause, which goes on until [`resume_slowly`]. A relay that did not know of the pace would deliver as fast
    /// as it can, so [`relays_know`] comes before. What ends this in between leaves a pause with a pace: a `resume` ends both.
    Prepared(Prepared),
    /// There was a pace and no pause. Now there is another pace.
    Changed(OutboxPause),
}

/// Sets the pace of a subscription that is paused, or has a pace.
///
/// # Errors
/// [`OperateError::NotPaused`] if there is neither a pause nor a pace, [`OperateError::NoSubscription`], and those of the
/// database.
pub(crate) async fn set_pace(connection: &mut PgConnection, slow_down: &SlowDown) -> Result<SetPace, OperateError> {
    let only = find_subscription(connection, slow_down.subscription.as_deref()).await?;
    let mut tx = begin_durable(connection).await?;
    let set = sqlx::query!(
        r#"-- operate: set pace
        INSERT INTO outbox_paces AS pace (subscription_id, events_per_second, set_by, reason)
        SELECT $1, $2, $3, $4
        WHERE EXISTS (SELECT FROM outbox_pauses WHERE subscription_id = $1)
           OR EXISTS (SELECT FROM outbox_paces WHERE subscription_id = $1)
        ON CONFLICT (subscription_id) DO UPDATE
        SET events_per_second = excluded.events_per_second, set_at = now(), set_by = excluded.set_by,
            reason = excluded.reason
        RETURNING set_at, (SELECT paused_at FROM outbox_pauses WHERE subscription_id = $1) AS paused_at"#,
        only.unwrap_or(ALL),
        slow_down.events_per_second,
        slow_down.author.name,
        slow_down.author.reason,
    );
    let Some(set) = set.fetch_optional(&mut *tx).await? else {
        tx.rollback().await?;
        return Err(OperateError::NotPaused(read_pauses(connection).await?));
    };
    let Some(paused_at) = set.paused_at else {
        let deed_id = record(&mut tx, slow_down, only, None).await?;
        tx.commit().await?;
        let subscription = slow_down.subscription.clone().unwrap_or_default();
        return Ok(SetPace::Changed(OutboxPause { subscription, deed_id, ..OutboxPause::default() }));
    };
    tx.commit().await?;
    let told_at = sqlx::query_scalar!(
        r#"-- operate: read the time after a pace
        SELECT clock_timestamp() AS "now!""#
    );
    let told_at = told_at.fetch_one(connection).await?;
    Ok(SetPace::Prepared(Prepared { set_at: set.set_at, paused_at, told_at }))
}

async fn record(
    tx: &mut PgConnection,
    slow_down: &SlowDown,
    only: Option<i16>,
    ended: Option<&OutboxPause>,
) -> Result<i64, sqlx::Error> {
    let pause = ended.map(|pause| format!("; paused {}", describe(pause))).unwrap_or_default();
    let about = format!("{} events per second{pause}", slow_down.events_per_second);
    let deed = NewDeed::new(Kind::Resume, &slow_down.author, only, &about);
    NewDeed { can_undo: ended.is_some(), ..deed }.record(tx).await
}

/// Whether every relay that reports has read the paces since then. One of a version before never has.
///
/// # Errors
/// Those of the database.
pub(crate) async fn relays_know(connection: &mut PgConnection, prepared: Prepared) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: ask whether relays know the pace
        SELECT NOT EXISTS (
            SELECT FROM outbox_routes
            WHERE seen_at > now() - interval '10 s' AND (paces_read_at > $1) IS NOT TRUE) AS "know!""#,
        prepared.told_at,
    )
    .fetch_one(connection)
    .await
}

/// Ends the pause whose pace was set, and records the deed. Returns the pause.
///
/// # Errors
/// [`OperateError::PaceLost`] if somebody has paused, resumed or set another pace meanwhile, [`OperateError::NoSubscription`],
/// and those of the database.
pub(crate) async fn resume_slowly(
    connection: &mut PgConnection,
    slow_down: &SlowDown,
    prepared: Prepared,
) -> Result<OutboxPause, OperateError> {
    let only = find_subscription(connection, slow_down.subscription.as_deref()).await?;
    let name = slow_down.subscription.as_deref().unwrap_or_default();
    let mut tx = begin_durable(connection).await?;
    let ended = delete_pause(&mut tx, only, name, Some(prepared.paused_at)).await?;
    let is_there = sqlx::query!(
        "-- operate: lock pace
        SELECT FROM outbox_paces WHERE subscription_id = $1 AND set_at = $2 FOR UPDATE",
        only.unwrap_or(ALL),
        prepared.set_at,
    );
    let is_there = is_there.fetch_optional(&mut *tx).await?.is_some();
    let Some(ended) = ended.filter(|_| is_there) else { return Err(OperateError::PaceLost) };
    let deed_id = record(&mut tx, slow_down, only, Some(&ended)).await?;
    tx.commit().await?;
    wake_relays(connection).await;
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
