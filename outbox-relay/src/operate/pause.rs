//! Pauses all leasing from an outbox, or from one subscription, and resumes it.

use proto::relay::v1::OutboxPause;
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{OperateError, begin_durable, subscribe::find_subscription, wake_relays};

/// Stands for all subscriptions.
const ALL: i16 = 0;

struct PauseRow {
    subscription: String,
    paused_at: OffsetDateTime,
    paused_by: String,
    reason: String,
}

impl From<PauseRow> for OutboxPause {
    fn from(row: PauseRow) -> Self {
        let PauseRow { subscription, paused_at, paused_by, reason } = row;
        Self { pause_time: Some(outbox::timestamp(paused_at)), paused_by, reason, subscription }
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
    by: &str,
    reason: &str,
) -> Result<OutboxPause, OperateError> {
    let name = subscription.unwrap_or_default();
    loop {
        let subscription_id = find_subscription(connection, subscription).await?.unwrap_or(ALL);
        let mut tx = begin_durable(connection).await?;
        let paused = sqlx::query_as!(
            PauseRow,
            r#"-- operate: pause
            INSERT INTO outbox_pauses (subscription_id, paused_by, reason) VALUES ($1, $2, $3)
            ON CONFLICT DO NOTHING
            RETURNING $4::text AS "subscription!", paused_at, paused_by, reason"#,
            subscription_id,
            by,
            reason,
            name,
        )
        .fetch_optional(&mut *tx)
        .await?;
        tx.commit().await?;
        if let Some(paused) = paused {
            return Ok(paused.into());
        }
        if let Some(pause) = read_pauses(connection).await?.into_iter().find(|pause| pause.subscription == name) {
            return Err(OperateError::AlreadyPaused(pause));
        }
        // Another operator resumed it between the two statements: pause again.
    }
}

/// Ends the pause of the subscription, or that of all, and returns it.
///
/// # Errors
/// [`OperateError::NotPaused`], [`OperateError::NoSubscription`], and those of the database.
pub(crate) async fn resume(
    connection: &mut PgConnection,
    subscription: Option<&str>,
) -> Result<OutboxPause, OperateError> {
    let subscription_id = find_subscription(connection, subscription).await?.unwrap_or(ALL);
    let mut tx = begin_durable(connection).await?;
    let ended = sqlx::query_as!(
        PauseRow,
        r#"-- operate: resume
        DELETE FROM outbox_pauses
        WHERE subscription_id = $1
        RETURNING $2::text AS "subscription!", paused_at, paused_by, reason"#,
        subscription_id,
        subscription.unwrap_or_default(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    tx.commit().await?;
    let Some(ended) = ended else {
        return Err(OperateError::NotPaused(read_pauses(connection).await?));
    };
    wake_relays(connection).await;
    Ok(ended.into())
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
