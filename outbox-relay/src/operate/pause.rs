//! Pauses all leasing from an outbox, or from one subscription, and resumes it.

use proto::relay::v1::{OutboxPause, deed::Kind};
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{
    Author, OperateError, begin_durable, deeds::NewDeed, refuse::describe, subscribe::find_subscription, wake_relays,
};

/// Stands for all subscriptions.
pub(super) const ALL: i16 = 0;

struct PauseRow {
    subscription: String,
    paused_at: OffsetDateTime,
    paused_by: String,
    reason: String,
}

impl From<PauseRow> for OutboxPause {
    fn from(row: PauseRow) -> Self {
        let PauseRow { subscription, paused_at, paused_by, reason } = row;
        let pause_time = Some(outbox::timestamp(paused_at));
        Self { pause_time, paused_by, reason, subscription, deed_id: 0 }
    }
}

/// Pauses the subscription, or all: relays lease none of its events until it is resumed. If two operators pause at once,
/// the unique key decides.
///
/// # Errors
/// [`OperateError::AlreadyPaused`], [`OperateError::NoSubscription`], and those of the database.
pub(crate) async fn pause(
    connection: &mut PgConnection,
    subscription: Option<&str>,
    author: &Author,
) -> Result<OutboxPause, OperateError> {
    let name = subscription.unwrap_or_default();
    loop {
        let subscription_id = find_subscription(connection, subscription).await?;
        let mut tx = begin_durable(connection).await?;
        if let Some(paused) = insert_pause(&mut tx, subscription_id, name, author).await? {
            // What is resumed later is resumed at the pace that is asked for then.
            delete_pace(&mut tx, subscription_id).await?;
            let deed_id = NewDeed::new(Kind::Pause, author, subscription_id, "").record(&mut tx).await?;
            tx.commit().await?;
            return Ok(OutboxPause { deed_id, ..paused });
        }
        tx.rollback().await?;
        if let Some(pause) = read_pauses(connection).await?.into_iter().find(|pause| pause.subscription == name) {
            return Err(OperateError::AlreadyPaused(pause));
        }
        // Another operator resumed it between the two statements: pause again.
    }
}

/// Returns `None` if it is paused already.
pub(super) async fn insert_pause(
    tx: &mut PgConnection,
    subscription_id: Option<i16>,
    name: &str,
    author: &Author,
) -> Result<Option<OutboxPause>, sqlx::Error> {
    let paused = sqlx::query_as!(
        PauseRow,
        r#"-- operate: pause
        INSERT INTO outbox_pauses (subscription_id, paused_by, reason) VALUES ($1, $2, $3)
        ON CONFLICT DO NOTHING
        RETURNING $4::text AS "subscription!", paused_at, paused_by, reason"#,
        subscription_id.unwrap_or(ALL),
        author.name,
        author.reason,
        name,
    );
    Ok(paused.fetch_optional(tx).await?.map(OutboxPause::from))
}

/// Ends the pause and the pace of the subscription, or those of all. Either may be missing. Returns the pause; without a time
/// if there was a pace only.
///
/// # Errors
/// [`OperateError::NotPaused`], [`OperateError::NoSubscription`], and those of the database.
pub(crate) async fn resume(
    connection: &mut PgConnection,
    subscription: Option<&str>,
    author: &Author,
) -> Result<OutboxPause, OperateError> {
    let subscription_id = find_subscription(connection, subscription).await?;
    let mut tx = begin_durable(connection).await?;
    let name = subscription.unwrap_or_default();
    let ended = delete_pause(&mut tx, subscription_id, name, None).await?;
    let paced = delete_pace(&mut tx, subscription_id).await?;
    let (ended, about) = match ended {
        Some(ended) => {
            let about = format!("paused {}", describe(&ended));
            (ended, about)
        }
        None if paced => (OutboxPause { subscription: name.to_owned(), ..OutboxPause::default() }, "a pace".into()),
        None => {
            tx.rollback().await?;
            return Err(OperateError::NotPaused(read_pauses(connection).await?));
        }
    };
    let deed = NewDeed::new(Kind::Resume, author, subscription_id, &about);
    // Whoever wants a pace again says how fast.
    let deed_id = NewDeed { can_undo: ended.pause_time.is_some(), ..deed }.record(&mut tx).await?;
    tx.commit().await?;
    wake_relays(connection).await;
    Ok(OutboxPause { deed_id, ..ended })
}

/// Returns the pause, or `None` if there is none, or one that began at another time than the given.
pub(super) async fn delete_pause(
    tx: &mut PgConnection,
    subscription_id: Option<i16>,
    name: &str,
    began: Option<OffsetDateTime>,
) -> Result<Option<OutboxPause>, sqlx::Error> {
    let ended = sqlx::query_as!(
        PauseRow,
        r#"-- operate: resume
        DELETE FROM outbox_pauses
        WHERE subscription_id = $1 AND ($3::timestamptz IS NULL OR paused_at = $3)
        RETURNING $2::text AS "subscription!", paused_at, paused_by, reason"#,
        subscription_id.unwrap_or(ALL),
        name,
        began,
    );
    Ok(ended.fetch_optional(tx).await?.map(OutboxPause::from))
}

/// Returns whether there was one. Whoever changes both changes the pause first, so that no two wait for each other.
pub(super) async fn delete_pace(tx: &mut PgConnection, subscription_id: Option<i16>) -> Result<bool, sqlx::Error> {
    let deleted = sqlx::query!(
        "-- operate: end pace
        DELETE FROM outbox_paces WHERE subscription_id = $1",
        subscription_id.unwrap_or(ALL),
    );
    Ok(deleted.execute(tx).await?.rows_affected() > 0)
}

/// The pauses there are; of all subscriptions first.
///
/// # Errors
/// Those of the database.
pub(super) async fn read_pauses(connection: &mut PgConnection) -> Result<Vec<OutboxPause>, sqlx::Error> {
    let rows = sqlx::query_as!(
        PauseRow,
        r#"-- operate: read pauses
        SELECT coalesce(name, '') AS "subscription!", paused_at, paused_by, outbox_pauses.reason
        FROM outbox_pauses LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE ended_at IS NULL
        ORDER BY 1"#
    )
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(OutboxPause::from).collect())
}
