//! Makes, ends and lists subscriptions.

use chassis::Database;
use proto::relay::v1::deed::Kind;
use sqlx::PgConnection;

use super::{Author, OperateError, begin_durable, deeds::NewDeed};
use crate::subscription::{Subscription, read_subscriptions};

/// Rows of an ended subscription that one statement discards.
const PIECE: i64 = 5000;

impl From<Subscription> for proto::relay::v1::Subscription {
    fn from(of: Subscription) -> Self {
        let Subscription { name, pattern, created_at, created_by, .. } = of;
        Self { name, pattern, create_time: Some(outbox::timestamp(created_at)), created_by, ..Self::default() }
    }
}

/// What a `subscribe` has found or made.
#[derive(Debug)]
pub(crate) struct Subscribed {
    pub(crate) subscription: Subscription,
    /// It was there already, with the same pattern.
    pub(crate) existed: bool,
}

/// Makes a subscription. If it exists with the same pattern, nothing is changed. So the command can be repeated, and a
/// deployment can run it each time. [`crate::subscription::adopt_piece`] then gives it the events that wait for one of its
/// kind.
///
/// Events of transactions that do not see it yet have no row for it. It begins with those that do, and with the events
/// that no other subscription has.
///
/// Two operators may subscribe at once. The lock lets the second see what the first has made: the unique index alone
/// would not keep the rule for older relays.
///
/// # Errors
/// [`OperateError::OtherPattern`], [`OperateError::OlderVersion`], and those of the database.
pub(crate) async fn subscribe(
    connection: &mut PgConnection,
    name: &str,
    pattern: &str,
    by: &str,
) -> Result<Subscribed, OperateError> {
    let mut tx = begin_durable(connection).await?;
    lock_subscriptions(&mut tx).await?;
    let there = read_subscriptions(&mut tx).await?;
    if let Some(same) = there.iter().find(|subscription| subscription.name == name) {
        if same.pattern == pattern {
            return Ok(Subscribed { subscription: same.clone(), existed: true });
        }
        return Err(OperateError::OtherPattern { name: name.to_owned(), pattern: same.pattern.clone() });
    }
    if !there.is_empty() && allows_older_relays(&mut tx).await? {
        return Err(OperateError::OlderVersion);
    }
    let made = sqlx::query_as!(
        Subscription,
        "-- operate: subscribe
        INSERT INTO outbox_subscriptions (name, pattern, created_by) VALUES ($1, $2, $3)
        RETURNING subscription_id AS id, name, pattern, type_like, created_at, created_by",
        name,
        pattern,
        by,
    )
    .fetch_one(&mut *tx)
    .await?;
    let author = Author { name: by.to_owned(), reason: String::new() };
    let about = format!("{name} to {pattern}");
    let deed = NewDeed::new(Kind::Subscribe, &author, Some(made.id), &about);
    NewDeed { can_undo: false, ..deed }.record(&mut tx).await?;
    tx.commit().await?;
    Ok(Subscribed { subscription: made, existed: false })
}

/// Lets one operator subscribe at a time. The role has no right to lock the table against its own kind: for that, it would
/// need the right to change every column. So an advisory lock keeps commands of this version apart. The lock that an insert
/// takes keeps those of the version before away, which lock the table.
async fn lock_subscriptions(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- operate: subscribe one at a time
        SELECT pg_advisory_xact_lock('outbox_subscriptions'::regclass::oid::bigint)"
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "-- operate: lock subscriptions
        LOCK TABLE outbox_subscriptions IN ROW EXCLUSIVE MODE"
    )
    .execute(&mut *tx)
    .await?;
    Ok(())
}

/// Whether relays of a version without subscriptions still work. They lease whatever they find, and would take the
/// events of one subscription to the receiver of another. The contracting migration stops them.
async fn allows_older_relays(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: look for what older relays need
        SELECT to_regclass('outbox_pause') IS NOT NULL AS "allows!""#
    )
    .fetch_one(connection)
    .await
}

/// The id of the subscription with this name, if one is given.
///
/// # Errors
/// [`OperateError::NoSubscription`] if nobody has subscribed it, and those of the database.
pub(crate) async fn find_subscription(
    connection: &mut PgConnection,
    name: Option<&str>,
) -> Result<Option<i16>, OperateError> {
    let Some(name) = name else { return Ok(None) };
    let there = read_subscriptions(connection).await?;
    match there.iter().find(|subscription| subscription.name == name) {
        Some(found) => Ok(Some(found.id)),
        None => Err(OperateError::no_subscription(&[name], &there)),
    }
}

/// Ends a subscription: it gets no further events, and its relays end by themselves. [`discard_piece`] then discards those
/// that are there. Whatever stops the command between two pieces, a relay discards the rest, and so do events of
/// transactions that still saw the subscription.
///
/// # Errors
/// [`OperateError::NoSubscription`], and those of the database.
pub(crate) async fn unsubscribe(
    connection: &mut PgConnection,
    name: &str,
    author: &Author,
) -> Result<(), OperateError> {
    let mut tx = begin_durable(connection).await?;
    let ended = sqlx::query_scalar!(
        "-- operate: unsubscribe
        UPDATE outbox_subscriptions SET ended_at = now(), ended_by = $2, reason = $3
        WHERE name = $1 AND ended_at IS NULL
        RETURNING subscription_id",
        name,
        author.name,
        author.reason,
    )
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(subscription_id) = ended {
        sqlx::query!(
            "-- operate: forget pauses of an ended subscription
            WITH pauses AS (DELETE FROM outbox_pauses WHERE subscription_id = $1)
            DELETE FROM outbox_paces WHERE subscription_id = $1",
            subscription_id,
        )
        .execute(&mut *tx)
        .await?;
        let deed = NewDeed::new(Kind::Unsubscribe, author, Some(subscription_id), name);
        NewDeed { can_undo: false, ..deed }.record(&mut tx).await?;
    }
    tx.commit().await?;
    if ended.is_none() {
        find_subscription(connection, Some(name)).await?;
    }
    Ok(())
}

/// Discards events of subscriptions that have ended: some thousands at most. Returns whether there may be more.
///
/// # Errors
/// Those of the database.
pub(crate) async fn discard_ended(database: &Database) -> Result<bool, sqlx::Error> {
    Ok(database.run(|connection| Box::pin(discard_piece(connection))).await? >= PIECE.unsigned_abs())
}

/// A row that a relay has leased goes as well. Its settlement then finds nothing, and its receiver may have applied it.
///
/// # Errors
/// Those of the database.
pub(crate) async fn discard_piece(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let mut tx = begin_durable(connection).await?;
    let discarded = sqlx::query!(
        "-- operate: discard events of ended subscriptions
        WITH given_up AS (
            DELETE FROM outbox
            WHERE ctid = ANY (ARRAY (
                SELECT left_over.row
                FROM outbox_subscriptions AS ended
                CROSS JOIN LATERAL (
                    SELECT ctid FROM outbox WHERE subscription_id = ended.subscription_id AND sequence = 1
                    UNION ALL
                    SELECT ctid FROM outbox WHERE subscription_id = ended.subscription_id AND sequence > 1
                    LIMIT $1
                ) AS left_over (row)
                WHERE ended.ended_at IS NOT NULL
                LIMIT $1))
            RETURNING event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload,
                traceparent, tracestate, last_error)
        INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type,
            payload, traceparent, tracestate, last_error, discarded_by, reason)
        SELECT event_id, subscription_id, aggregate_id, sequence, given_up.created_at, attempts, event_type, payload,
            traceparent, tracestate, coalesce(last_error, 'not delivered'), ended_by, 'unsubscribed: ' || reason
        FROM given_up JOIN outbox_subscriptions USING (subscription_id)
        ON CONFLICT (event_id, subscription_id) DO UPDATE
        SET created_at = excluded.created_at, attempts = excluded.attempts, last_error = excluded.last_error,
            discarded_at = excluded.discarded_at, discarded_by = excluded.discarded_by, reason = excluded.reason",
        PIECE,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(discarded.rows_affected())
}
