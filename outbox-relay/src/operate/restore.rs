//! Restores a discarded event, as dead as it was.

use outbox::EventId;
use proto::relay::v1::RestoreDiscardedEventResponse;
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{
    OperateError, Reason, begin_durable, count, find_subscription, refuse::NotApplicable, requeue::MAX_AGE_UNTOLD,
};

/// A discarded event, in one subscription.
struct Discarded {
    refused: bool,
    by: String,
    at: OffsetDateTime,
    has_ended: bool,
    age_hours: f64,
    max_age_hours: f64,
}

impl Discarded {
    /// Why it cannot be restored; `None` if it can.
    fn reason(self) -> Option<Reason> {
        let Self { refused, by, at, has_ended, age_hours, max_age_hours } = self;
        if refused {
            return Some(Reason::RefusedBy { by, at: outbox::timestamp(at) });
        }
        if has_ended {
            return Some(Reason::SubscriptionEnded);
        }
        (age_hours > max_age_hours).then_some(Reason::Forgotten { age_hours, max_age_hours })
    }
}

/// Moves the event back into the outbox, dead, in each subscription in which it was discarded, or in the given one. Its
/// last error then also says who discarded it, and who restored it. Later events of its aggregate that are left wait for
/// it again.
///
/// The relay's role may not insert into the outbox, so a function of the schema does it. It does not restore what was
/// refused, whatever a caller has checked. The other reasons against it can come true at any time after it as well.
///
/// # Errors
/// [`OperateError::NotApplicable`] if it cannot be restored in one of these subscriptions; then it was in none. And those
/// of the database.
pub(crate) async fn restore(
    connection: &mut PgConnection,
    event_id: EventId,
    subscription: Option<&str>,
    by: &str,
) -> Result<RestoreDiscardedEventResponse, OperateError> {
    let subscription_id = find_subscription(connection, subscription).await?;
    let mut tx = begin_durable(connection).await?;
    let discarded = find_discarded(&mut tx, event_id, subscription_id).await?;
    let reasons: Vec<Reason> = match discarded.is_empty() {
        true => vec![Reason::NotDiscarded],
        false => discarded.into_iter().filter_map(Discarded::reason).collect(),
    };
    if !reasons.is_empty() {
        let refused = reasons.into_iter().map(|reason| NotApplicable { event_id, reason });
        return Err(OperateError::NotApplicable(refused.collect()));
    }
    let restored = sqlx::query_scalar!(
        r#"-- operate: restore
        SELECT outbox_restore($1, $2, $3) AS "restored!""#,
        event_id as EventId,
        subscription_id,
        by,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(RestoreDiscardedEventResponse { restored: count(restored.unsigned_abs()) })
}

async fn find_discarded(
    connection: &mut PgConnection,
    event_id: EventId,
    subscription_id: Option<i16>,
) -> Result<Vec<Discarded>, sqlx::Error> {
    sqlx::query_as!(
        Discarded,
        r#"-- operate: find discarded event
        SELECT refused, discarded_by AS by, discarded_at AS at,
            EXISTS (
                SELECT FROM outbox_subscriptions AS named
                WHERE named.subscription_id = discarded.subscription_id AND named.ended_at IS NOT NULL) AS "has_ended!",
            (extract(epoch FROM now() - created_at) / 3600)::double precision AS "age_hours!",
            coalesce((
                SELECT max_age_seconds FROM outbox_subscriptions AS named
                WHERE named.subscription_id = discarded.subscription_id), $3) / 3600.0::double precision
                AS "max_age_hours!"
        FROM outbox_discarded AS discarded
        WHERE event_id = $1 AND ($2::smallint IS NULL OR subscription_id = $2)
        ORDER BY subscription_id"#,
        event_id as EventId,
        subscription_id,
        MAX_AGE_UNTOLD,
    )
    .fetch_all(connection)
    .await
}
