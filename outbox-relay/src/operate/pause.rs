//! Pauses all leasing from an outbox, and resumes it.

use proto::relay::v1::OutboxPause;
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{OperateError, begin_durable, wake_relays};

struct PauseRow {
    paused_at: OffsetDateTime,
    paused_by: String,
    reason: String,
}

impl From<PauseRow> for OutboxPause {
    fn from(row: PauseRow) -> Self {
        let PauseRow { paused_at, paused_by, reason } = row;
        Self { pause_time: Some(outbox::timestamp(paused_at)), paused_by, reason }
    }
}

/// Pauses the outbox: relays lease nothing until it is resumed. If two operators pause at once, the unique key decides.
///
/// # Errors
/// [`OperateError::AlreadyPaused`], and those of the database.
pub(crate) async fn pause(connection: &mut PgConnection, by: &str, reason: &str) -> Result<OutboxPause, OperateError> {
    loop {
        let mut tx = begin_durable(connection).await?;
        let paused = sqlx::query_as!(
            PauseRow,
            "-- operate: pause
            INSERT INTO outbox_pause (paused_by, reason) VALUES ($1, $2)
            ON CONFLICT DO NOTHING
            RETURNING paused_at, paused_by, reason",
            by,
            reason,
        )
        .fetch_optional(&mut *tx)
        .await?;
        tx.commit().await?;
        if let Some(paused) = paused {
            return Ok(paused.into());
        }
        if let Some(pause) = read_pause(connection).await? {
            return Err(OperateError::AlreadyPaused(pause));
        }
        // Another operator resumed it between the two statements: pause again.
    }
}

/// Ends the pause, and returns it.
///
/// # Errors
/// [`OperateError::NotPaused`], and those of the database.
pub(crate) async fn resume(connection: &mut PgConnection) -> Result<OutboxPause, OperateError> {
    let mut tx = begin_durable(connection).await?;
    let ended = sqlx::query_as!(
        PauseRow,
        "-- operate: resume
        DELETE FROM outbox_pause RETURNING paused_at, paused_by, reason"
    )
    .fetch_optional(&mut *tx)
    .await?;
    tx.commit().await?;
    let ended = ended.ok_or(OperateError::NotPaused)?;
    wake_relays(connection).await;
    Ok(ended.into())
}

/// The pause, if there is one.
///
/// # Errors
/// Those of the database.
pub(super) async fn read_pause(connection: &mut PgConnection) -> Result<Option<OutboxPause>, sqlx::Error> {
    let row = sqlx::query_as!(
        PauseRow,
        "-- operate: read pause
        SELECT paused_at, paused_by, reason FROM outbox_pause"
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(OutboxPause::from))
}
