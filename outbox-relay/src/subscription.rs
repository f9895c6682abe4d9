//! Subscriptions, as the relay sees them: which rows of the outbox a route delivers.

use chassis::Database;
use sqlx::{PgConnection, types::time::OffsetDateTime};
use tracing::info;

/// The subscription of events that matched none when they were enqueued.
pub(crate) const UNROUTED: i16 = 0;
/// The unrouted rows that one statement looks at.
const ROWS_MAX: i64 = 5000;

/// A subscription that has not ended.
#[derive(Clone, Debug)]
pub(crate) struct Subscription {
    pub(crate) id: i16,
    pub(crate) name: String,
    pub(crate) pattern: String,
    /// The pattern, in the syntax of SQL's LIKE.
    pub(crate) type_like: String,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) created_by: String,
}

/// Reads all subscriptions, ordered by name.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_subscriptions(connection: &mut PgConnection) -> Result<Vec<Subscription>, sqlx::Error> {
    sqlx::query_as!(
        Subscription,
        "-- relay: read subscriptions
        SELECT subscription_id AS id, name, pattern, type_like, created_at, created_by
        FROM outbox_subscriptions
        WHERE ended_at IS NULL
        ORDER BY name"
    )
    .fetch_all(connection)
    .await
}

/// Which unrouted rows to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unrouted {
    /// The newest: those of transactions that did not see a subscription yet, since it was just being made.
    Newest,
    All,
}

/// Gives unrouted events to the first subscription that matches their type: some thousands at most. Returns whether there
/// may be more.
///
/// `subscribe` does so for the events there are. But a transaction that did not see the new subscription may commit
/// later. So relays look for its events as well. Until then they hold back the later events of their aggregates, as
/// `lease` says.
///
/// # Errors
/// Those of the database.
pub(crate) async fn adopt_unrouted(database: &Database, unrouted: Unrouted) -> Result<bool, sqlx::Error> {
    let adopted = database.run(move |connection| Box::pin(adopt_piece(connection, unrouted))).await?;
    if adopted > 0 {
        info!(adopted, "events that matched no subscription go to the first one made for their type");
    }
    Ok(adopted >= ROWS_MAX.unsigned_abs())
}

/// Adopts at most some thousand rows. No row can be there twice: an event is unrouted only if no subscription had it.
///
/// A row that a relay of the version before has leased is left to it. Its settlement would find nothing while the row
/// moves, and the row would be delivered again once the lease expires.
///
/// The update finds its rows by `ctid` alone, and asks once more whether they are unrouted in a subquery. As a plain
/// condition, an index that begins with another column might serve it, and be read whole.
///
/// # Errors
/// Those of the database.
pub(crate) async fn adopt_piece(connection: &mut PgConnection, unrouted: Unrouted) -> Result<u64, sqlx::Error> {
    let adopted = sqlx::query!(
        "-- relay: adopt unrouted
        UPDATE outbox AS adopted
        SET subscription_id = (
            SELECT min(matching.subscription_id)
            FROM outbox_subscriptions AS matching
            WHERE matching.ended_at IS NULL AND adopted.event_type LIKE matching.type_like)
        WHERE (SELECT adopted.subscription_id = $1) AND ctid = ANY (ARRAY (
            SELECT free.ctid
            FROM (
                (SELECT first.ctid, first.event_type
                 FROM outbox AS first
                 WHERE first.subscription_id = $1 AND first.sequence = 1
                   AND (first.visible_at <= now() OR (NOT $3 AND first.lease_token IS NULL))
                 ORDER BY first.visible_at DESC
                 LIMIT CASE WHEN $3 THEN $2::bigint END)
                UNION ALL
                (SELECT later.ctid, later.event_type
                 FROM outbox AS later
                 WHERE later.subscription_id = $1 AND later.sequence > 1
                   AND (later.visible_at <= now() OR (NOT $3 AND later.lease_token IS NULL))
                 ORDER BY later.visible_at DESC
                 LIMIT CASE WHEN $3 THEN $2::bigint END)) AS free
            WHERE EXISTS (
                SELECT FROM outbox_subscriptions AS matching
                WHERE matching.ended_at IS NULL AND free.event_type LIKE matching.type_like)
            LIMIT $2::bigint))",
        UNROUTED,
        ROWS_MAX,
        unrouted == Unrouted::Newest,
    )
    .execute(connection)
    .await?;
    Ok(adopted.rows_affected())
}
