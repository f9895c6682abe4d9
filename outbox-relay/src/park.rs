//! Parks events that wait for a predecessor: hides them from the scans of leases.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use chassis::Database;
use outbox::AggregateId;
use sqlx::{PgConnection, types::time::OffsetDateTime};

use crate::run::FAR;

/// The oldest visible rows that one statement examines.
const ROWS_MAX: i64 = 2000;
/// Statements in one pass, so that the other maintenance is not delayed.
const STATEMENTS_MAX: u32 = 100;
/// Time of one pass, for the same reason.
const TIME_MAX: Duration = Duration::from_secs(1);
/// If a statement parks fewer rows than this, most of the rows it examined are free. The next statement would see them
/// again.
const WORTH_ANOTHER: u64 = 200;
/// Longest time that a row is parked. It bounds the cost of a wrong guess about its predecessor.
const PARKED_MAX: Duration = Duration::from_secs(300);

/// Parks the oldest visible rows whose aggregate's first event cannot be delivered now. Otherwise each lease would look at
/// them in vain.
///
/// The first event is backing off or dead. Or it is leased since the pass before, and the row is so far behind it that no
/// run reaches it: a row nearby may be the first within a moment, and is not worth it. A line of which run after run is
/// delivered is shorter in a moment, and parking it would take longer than delivering it.
///
/// A parked row becomes visible by time alone: when the first event does, or after a few minutes if that is earlier. Then
/// it is leased, or parked again. A row may also be taken in a run, and a far one is woken when it comes first
/// ([`crate::run`]). So no wake-up can be lost for longer than that. The infinity of a dead event is not copied, since it
/// would mark the later ones dead too.
///
/// While a sweep looks for what is below the floor of a subscription, this begins where the sweep did, as leases do.
///
/// # Errors
/// Those of the database.
pub(crate) async fn park(database: &Database, swept: &Swept, leased: &mut Leased) -> Result<(), sqlx::Error> {
    let began = Instant::now();
    let (before, all_swept) = (std::mem::take(&mut leased.firsts), swept.clone());
    leased.firsts = database.run(move |connection| Box::pin(find_leased(connection, all_swept))).await?;
    // An aggregate that is stuck in one subscription counts as stuck in all. That parks what another is about to deliver,
    // which wakes it.
    let stuck: Vec<_> = leased.firsts.intersection(&before).map(|first| first.aggregate_id).collect();
    for _ in 0..STATEMENTS_MAX {
        let (swept, stuck) = (swept.clone(), stuck.clone());
        let parking = database.run(move |connection| Box::pin(park_oldest(connection, swept, stuck)));
        if began.elapsed() > TIME_MAX || parking.await? < WORTH_ANOTHER {
            break;
        }
    }
    Ok(())
}

/// The subscriptions that are swept, and the time below which the rows of each are, as the arrays that the statements take.
#[derive(Clone, Debug, Default)]
pub(crate) struct Swept {
    pub(crate) subscription_ids: Vec<i16>,
    pub(crate) below: Vec<OffsetDateTime>,
}

/// The first events of lines that were leased at the last pass.
#[derive(Debug, Default)]
pub(crate) struct Leased {
    firsts: HashSet<First>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct First {
    subscription_id: i16,
    aggregate_id: AggregateId,
    sequence: i32,
}

/// Looks at the same rows as [`park_oldest`].
async fn find_leased(connection: &mut PgConnection, swept: Swept) -> Result<HashSet<First>, sqlx::Error> {
    let firsts = sqlx::query_as!(
        First,
        r#"-- relay: find lines whose first is leased
        SELECT line.subscription_id AS "subscription_id!", line.aggregate_id AS "aggregate_id!", first.sequence
        FROM (
            SELECT DISTINCT oldest.subscription_id, oldest.aggregate_id
            FROM (SELECT 0 UNION ALL SELECT subscription_id FROM outbox_subscriptions) AS each (subscription)
            LEFT JOIN unnest($2::smallint[], $3::timestamptz[]) AS swept (subscription, below) USING (subscription)
            CROSS JOIN LATERAL (
                SELECT subscription_id, aggregate_id
                FROM outbox
                WHERE subscription_id = each.subscription AND sequence > 1 AND visible_at <= now()
                  AND visible_at >= coalesce(swept.below, '-infinity')
                ORDER BY visible_at
                LIMIT $1) AS oldest) AS line
        CROSS JOIN LATERAL (
            SELECT sequence, visible_at, lease_token
            FROM outbox
            WHERE aggregate_id = line.aggregate_id AND subscription_id = line.subscription_id
            ORDER BY sequence
            LIMIT 1) AS first
        WHERE first.visible_at > now() AND first.lease_token IS NOT NULL"#,
        ROWS_MAX,
        &swept.subscription_ids,
        &swept.below,
    );
    Ok(firsts.fetch_all(connection).await?.into_iter().collect())
}

/// Examines only the oldest visible rows of each subscription. Leases begin there as well, so a row costs them nothing
/// before it is among these. The first event is looked up once for each aggregate, since rows that VACUUM cannot remove yet
/// may lie before it. The arrays are there so that no statistics can make the plan read more.
///
/// Concurrent changes to these rows stand. The statement skips a locked row. A row that was changed after the snapshot
/// is no longer at its `ctid`. A requeue or a discard makes the successors of its event visible too, and waits for the
/// locks of this statement.
async fn park_oldest(connection: &mut PgConnection, swept: Swept, stuck: Vec<AggregateId>) -> Result<u64, sqlx::Error> {
    let parked = sqlx::query!(
        "-- relay: park
        WITH front AS MATERIALIZED (
            SELECT oldest.*
            FROM (SELECT 0 UNION ALL SELECT subscription_id FROM outbox_subscriptions) AS each (subscription)
            LEFT JOIN unnest($4::smallint[], $5::timestamptz[]) AS swept (subscription, below) USING (subscription)
            CROSS JOIN LATERAL (
                SELECT ctid AS row, subscription_id, aggregate_id, sequence
                FROM outbox
                WHERE subscription_id = each.subscription AND sequence > 1 AND visible_at <= now()
                  AND visible_at >= coalesce(swept.below, '-infinity')
                ORDER BY visible_at
                LIMIT $1) AS oldest
        ), hidden AS MATERIALIZED (
            SELECT line.subscription_id, line.aggregate_id, first.sequence,
                -- With jitter. Otherwise all rows that wait for dead ones would become visible together.
                least(first.visible_at, now() + make_interval(secs => $2 * (1 - random() / 4))) AS until,
                CASE WHEN first.lease_token IS NULL THEN 0 ELSE (
                    SELECT far.sequence
                    FROM outbox AS far
                    WHERE far.aggregate_id = line.aggregate_id AND far.subscription_id = line.subscription_id
                    ORDER BY far.sequence
                    LIMIT 1 OFFSET $3)
                END AS from_sequence
            FROM (SELECT DISTINCT subscription_id, aggregate_id FROM front) AS line
            CROSS JOIN LATERAL (
                SELECT sequence, visible_at, lease_token
                FROM outbox
                WHERE aggregate_id = line.aggregate_id AND subscription_id = line.subscription_id
                ORDER BY sequence
                LIMIT 1) AS first
            WHERE first.visible_at > now() AND (first.lease_token IS NULL OR line.aggregate_id = ANY ($6))
        ), waiting AS MATERIALIZED (
            SELECT array_agg(front.row) AS rows, array_agg(hidden.until) AS untils
            FROM front JOIN hidden USING (subscription_id, aggregate_id)
            WHERE front.sequence > hidden.sequence AND front.sequence >= hidden.from_sequence
        )
        UPDATE outbox AS successor
        SET visible_at = (SELECT untils[array_position(rows, successor.ctid)] FROM waiting)
        WHERE ctid = ANY (ARRAY (
            SELECT locked.ctid
            FROM outbox AS locked
            WHERE locked.ctid = ANY ((SELECT rows FROM waiting)::tid[])
            FOR UPDATE OF locked SKIP LOCKED))",
        ROWS_MAX,
        PARKED_MAX.as_secs_f64(),
        i64::from(FAR),
        &swept.subscription_ids,
        &swept.below,
        &stuck as &[AggregateId],
    )
    .execute(connection)
    .await?;
    Ok(parked.rows_affected())
}
