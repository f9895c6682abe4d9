//! Pauses all leasing from an outbox, or from one subscription, and resumes it.

use proto::relay::v1::OutboxPause;
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{OperateError, begin_durable, subscribe::check_subscription, wake_relays};

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
    loop {
        check_subscription(connection, subscription).await?;
        let mut tx = begin_durable(connection).await?;
        let paused = sqlx::query_as!(
            PauseRow,
            r#"-- operate: pause
            INSERT INTO outbox_pauses (subscription_id, paused_by, reason)
            SELECT paused.id, $2, $3
            FROM (SELECT 0 WHERE $1::text IS NULL
                  UNION ALL
                  SELECT subscription_id FROM outbox_subscriptions WHERE name = $1 AND ended_at IS NULL) AS paused (id)
            ON CONFLICT DO NOTHING
            RETURNING coalesce($1, '') AS "subscription!", paused_at, paused_by, reason"#,
            subscription,
            by,
            reason,
        )
        .fetch_optional(&mut *tx)
        .await?;
        tx.commit().await?;
        if let Some(paused) = paused {
            return Ok(paused.into());
        }
        let name = subscription.unwrap_or_default();
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
    check_subscription(connection, subscription).await?;
    let mut tx = begin_durable(connection).await?;
    let ended = sqlx::query_as!(
        PauseRow,
        r#"-- operate: resume
        DELETE FROM outbox_pauses
        WHERE CASE WHEN $1::text IS NULL THEN subscription_id = 0 ELSE subscription_id =
            (SELECT subscription_id FROM outbox_subscriptions WHERE name = $1 AND ended_at IS NULL) END
        RETURNING coalesce($1, '') AS "subscription!", paused_at, paused_by, reason"#,
        subscription,
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
