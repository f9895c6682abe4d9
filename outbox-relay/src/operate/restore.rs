//! Restores a discarded event, as dead as it was.

use outbox::EventId;
use proto::relay::v1::{RestoreDiscardedEventResponse, deed::Kind};
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{
    Author, OperateError, Reason, begin_durable, count, deeds::NewDeed, describe_named, find_subscription,
    refuse::NotApplicable, requeue::MAX_AGE_UNTOLD,
};

/// A discarded event, in one subscription.
struct Discarded {
    subscription_id: i16,
    refused: bool,
    by: String,
    at: OffsetDateTime,
    has_ended: bool,
    age_hours: f64,
    max_age_hours: f64,
}

impl Discarded {
    /// Why it cannot be restored; `None` if it can.
    fn reason(&self) -> Option<Reason> {
        let Self { refused, ref by, at, has_ended, age_hours, max_age_hours, .. } = *self;
        if refused {
            return Some(Reason::RefusedBy { by: by.clone(), at: outbox::timestamp(at) });
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
    author: &Author,
) -> Result<RestoreDiscardedEventResponse, OperateError> {
    let subscription_id = find_subscription(connection, subscription).await?;
    let mut tx = begin_durable(connection).await?;
    let discarded = find_discarded(&mut tx, event_id, subscription_id).await?;
    let reasons: Vec<Reason> = match discarded.is_empty() {
        true => vec![Reason::NotDiscarded],
        false => discarded.iter().filter_map(Discarded::reason).collect(),
    };
    if !reasons.is_empty() {
        let refused = reasons.into_iter().map(|reason| NotApplicable { event_id, reason });
        return Err(OperateError::NotApplicable(refused.collect()));
    }
    let about = describe_named(&[event_id]);
    let deed_id = NewDeed::new(Kind::Restore, author, subscription_id, &about).record(&mut tx).await?;
    let subscription_ids: Vec<_> = discarded.iter().map(|discarded| discarded.subscription_id).collect();
    let restored = bring_back(&mut tx, &vec![event_id; discarded.len()], &subscription_ids, author, deed_id).await?;
    if restored < discarded.len() as u64 {
        // Another operator was faster.
        return Err(OperateError::NotApplicable(vec![NotApplicable { event_id, reason: Reason::NotDiscarded }]));
    }
    tx.commit().await?;
    Ok(RestoreDiscardedEventResponse { restored: count(restored), deed_id })
}

/// Restores these events, each in its subscription, and records them with the deed. Returns the number of rows.
pub(super) async fn bring_back(
    tx: &mut PgConnection,
    event_ids: &[EventId],
    subscription_ids: &[i16],
    author: &Author,
    deed_id: i64,
) -> Result<u64, sqlx::Error> {
    // The function is called once for each row, before anything is recorded.
    let recorded = sqlx::query!(
        "-- operate: restore
        WITH named AS MATERIALIZED (
            SELECT discarded.event_id, discarded.subscription_id, discarded.aggregate_id, discarded.sequence
            FROM unnest($1::uuid[], $2::smallint[]) AS named (event_id, subscription_id)
            JOIN outbox_discarded AS discarded USING (event_id, subscription_id)
        ), brought_back AS MATERIALIZED (
            SELECT named.*, outbox_restore(event_id, subscription_id, $3) AS rows FROM named
        )
        INSERT INTO outbox_deed_events (deed_id, event_id, subscription_id, aggregate_id, sequence)
        SELECT $4, event_id, subscription_id, aggregate_id, sequence FROM brought_back WHERE rows > 0",
        event_ids as &[EventId],
        subscription_ids,
        author.name,
        deed_id,
    );
    Ok(recorded.execute(tx).await?.rows_affected())
}

async fn find_discarded(
    connection: &mut PgConnection,
    event_id: EventId,
    subscription_id: Option<i16>,
) -> Result<Vec<Discarded>, sqlx::Error> {
    sqlx::query_as!(
        Discarded,
        r#"-- operate: find discarded event
        SELECT subscription_id, refused, discarded_by AS by, discarded_at AS at,
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
