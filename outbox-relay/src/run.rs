//! Runs: consecutive events of one aggregate in one lease.
//!
//! Without them, an aggregate with many events would need a lease for each. A worker that holds the first event of an
//! aggregate may take those behind it under the same token: nobody else can, since an earlier one is left. It delivers
//! them one after the other, and an event only once its predecessor was taken ([`crate::isolate`]). Several of them share a
//! batch only if the receiver says that it applies them in order, and none behind one that it refuses.

use std::{collections::HashMap, time::Duration};

use chassis::Database;
use outbox::AggregateId;
use sqlx::PgConnection;

use crate::{
    fate::Fate,
    leased_row::{LeaseToken, LeasedRow},
};

/// Events at least this far behind the first of their aggregate may be parked while that is leased: no run reaches them.
pub(crate) const FAR: i32 = 1000;

/// How much room a lease has left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    pub(crate) events: usize,
    pub(crate) bytes: usize,
}

/// The lease to extend.
#[derive(Clone, Debug)]
pub(crate) struct Extension {
    pub(crate) token: LeaseToken,
    pub(crate) subscription_id: i16,
    /// The pattern of the subscription, in the syntax of LIKE.
    pub(crate) type_like: String,
    pub(crate) lease_seconds: u32,
    /// Older events are not delivered.
    pub(crate) max_age: Duration,
}

/// Takes the events behind those of the lease, as far as there is room. Of several aggregates it takes the nearest
/// events first.
///
/// # Errors
/// Those of the database. The lease is as it was.
pub(crate) async fn extend(
    database: &Database,
    extension: Extension,
    heads: &[LeasedRow],
    room: Room,
) -> Result<Vec<LeasedRow>, sqlx::Error> {
    let (aggregate_ids, sequences): (Vec<_>, Vec<_>) = heads.iter().map(|row| (row.aggregate_id, row.sequence)).unzip();
    database.run(move |connection| Box::pin(take_runs(connection, extension, aggregate_ids, sequences, room))).await
}

/// An event belongs to a run while each event before it does, and none of those is unrouted that the subscription takes.
/// It may be visible or parked, and it must not have failed, since such an event is delivered alone. A parked event has
/// waited for nothing else than its predecessor.
///
/// The first events still have to carry the token. If the lease has expired meanwhile, another relay may have them.
///
/// The statement takes no lock before it updates. What it takes may have been changed after its snapshot, as by an
/// operator, and is then missing: the row is no longer at its `ctid`. So each row tells which one it follows, and
/// [`number_waves`] finds a gap.
async fn take_runs(
    connection: &mut PgConnection,
    Extension { token, subscription_id, type_like, lease_seconds, max_age }: Extension,
    aggregate_ids: Vec<AggregateId>,
    sequences: Vec<i32>,
    room: Room,
) -> Result<Vec<LeasedRow>, sqlx::Error> {
    sqlx::query_as!(
        LeasedRow,
        r#"-- relay: take runs
        WITH run AS MATERIALIZED (
            SELECT near.row, near.aggregate_id, near.sequence, near.follows
            FROM (
                SELECT line.row, head.aggregate_id, line.sequence, line.follows,
                    row_number() OVER nearest AS place, sum(line.bytes) OVER nearest AS bytes
                FROM unnest($2::uuid[], $3::integer[]) AS head (aggregate_id, sequence)
                CROSS JOIN LATERAL (
                    SELECT later.ctid, later.sequence, octet_length(later.payload),
                        lag(later.sequence, 1, head.sequence) OVER next, row_number() OVER next,
                        bool_and(later.failures = 0 AND later.last_error IS NULL AND later.visible_at < 'infinity'
                            AND (later.lease_token IS NULL OR later.visible_at <= now())) OVER next
                    FROM (
                        SELECT ctid, sequence, payload, failures, last_error, visible_at, lease_token
                        FROM outbox
                        WHERE aggregate_id = head.aggregate_id AND subscription_id = $4
                          AND sequence > head.sequence AND sequence < head.sequence + $10
                        ORDER BY sequence
                        LIMIT $9) AS later
                    WINDOW next AS (ORDER BY later.sequence)
                ) AS line (row, sequence, bytes, follows, distance, is_free)
                WHERE line.is_free
                  AND NOT EXISTS (SELECT FROM outbox_pauses WHERE subscription_id IN (0, $4))
                  AND (SELECT leased.lease_token
                       FROM outbox AS leased
                       WHERE leased.aggregate_id = head.aggregate_id AND leased.subscription_id = $4
                         AND leased.sequence = head.sequence) = $1
                  AND (SELECT NOT EXISTS (
                       SELECT FROM outbox AS unrouted
                       WHERE unrouted.aggregate_id = head.aggregate_id AND unrouted.subscription_id = 0
                         AND unrouted.sequence < line.sequence AND unrouted.event_type LIKE $11))
                WINDOW nearest AS (ORDER BY line.distance, head.aggregate_id ROWS UNBOUNDED PRECEDING)
            ) AS near
            WHERE near.place <= $5 AND near.bytes <= $6
        ), taken AS (
            UPDATE outbox
            SET lease_token = $1, visible_at = now() + make_interval(secs => $7)
            WHERE ctid = ANY (ARRAY (SELECT run.row FROM run))
              AND failures = 0 AND last_error IS NULL AND (lease_token IS NULL OR visible_at <= now())
            RETURNING *
        )
        SELECT aggregate_id AS "aggregate_id!", sequence AS "sequence!", event_id AS "event_id!",
            event_type AS "event_type!", payload AS "payload!", created_at AS "created_at!", failures AS "failures!",
            NULL::double precision AS attempted_seconds,
            extract(epoch FROM now() - created_at)::double precision AS "age_seconds!", false AS "quiet!",
            traceparent, tracestate, created_at < now() - make_interval(secs => $8) AS "expired!",
            false AS "unknown!", follows, false AS "others_wait!", 0 AS "wave!", false AS "adrift!"
        FROM taken JOIN run USING (aggregate_id, sequence)"#,
        token as LeaseToken,
        &aggregate_ids as &[AggregateId],
        &sequences,
        subscription_id,
        i64::try_from(room.events).unwrap_or(i64::MAX),
        i64::try_from(room.bytes).unwrap_or(i64::MAX),
        f64::from(lease_seconds),
        max_age.as_secs_f64(),
        // All heads may have as many behind them. There is no room for more on average.
        i64::try_from(room.events.div_ceil(aggregate_ids.len().max(1))).unwrap_or(i64::MAX),
        FAR,
        type_like,
    )
    .fetch_all(connection)
    .await
}

/// Numbers the events of each run: the first of an aggregate is of wave 0, the next of wave 1. An event behind a gap is
/// adrift: it is not delivered.
pub(crate) fn number_waves(rows: &mut [LeasedRow]) {
    rows.sort_unstable_by_key(|row| (row.aggregate_id, row.sequence));
    let mut before: Option<(AggregateId, i32, i32)> = None;
    for row in rows {
        let wave = match (row.follows, before) {
            (None, _) => Some(0),
            (Some(follows), Some((aggregate_id, sequence, wave)))
                if aggregate_id == row.aggregate_id && sequence == follows =>
            {
                Some(wave + 1)
            }
            _ => None,
        };
        row.adrift = wave.is_none();
        row.wave = wave.unwrap_or_default();
        before = wave.map(|wave| (row.aggregate_id, row.sequence, wave));
    }
}

/// The index of the event before each event, in the same run.
pub(crate) fn predecessors(rows: &[LeasedRow]) -> Vec<Option<usize>> {
    if rows.iter().all(|row| row.wave == 0) {
        return vec![None; rows.len()];
    }
    let at: HashMap<_, _> =
        rows.iter().enumerate().map(|(index, row)| ((row.aggregate_id, row.sequence), index)).collect();
    let before = |row: &LeasedRow| row.follows.and_then(|sequence| at.get(&(row.aggregate_id, sequence)).copied());
    rows.iter().map(before).collect()
}

/// The last events that the receiver took, by aggregate, if far ones may follow.
#[derive(Debug)]
pub(crate) struct LastTaken {
    subscription_id: i16,
    /// The sequence of the event, and whether it was not the first of its run.
    sequences: HashMap<AggregateId, (i32, bool)>,
}

impl LastTaken {
    pub(crate) fn of(subscription_id: i16, rows: &[LeasedRow], fates: &[Fate]) -> Self {
        let mut sequences = HashMap::new();
        for (row, _) in rows.iter().zip(fates).filter(|(row, fate)| row.sequence >= FAR && **fate == Fate::Delete) {
            let (last, in_run) = sequences.entry(row.aggregate_id).or_insert((row.sequence, false));
            *last = row.sequence.max(*last);
            *in_run |= row.wave > 0;
        }
        Self { subscription_id, sequences }
    }
}

/// Makes the events visible that follow these, once these are settled. Far events are parked while the first event of
/// their aggregate is leased, and now one of them may be the first. Without this it would be found when its time is over,
/// or by another event of its aggregate.
///
/// # Errors
/// Those of the database.
pub(crate) async fn wake_next(database: &Database, last: LastTaken) -> Result<(), sqlx::Error> {
    if last.sequences.is_empty() {
        return Ok(());
    }
    let subscription_id = last.subscription_id;
    for next in database.run(|connection| Box::pin(find_next(connection, last))).await? {
        database.run(move |connection| Box::pin(wake(connection, subscription_id, next))).await?;
    }
    Ok(())
}

struct Next {
    aggregate_id: AggregateId,
    sequence: i32,
}

/// The events that follow and are hidden, or may be so in a moment: those behind runs. A run may have come so far while a
/// statement parks what was far behind when it began.
async fn find_next(
    connection: &mut PgConnection,
    LastTaken { subscription_id, sequences }: LastTaken,
) -> Result<Vec<Next>, sqlx::Error> {
    let (aggregate_ids, last): (Vec<_>, Vec<_>) = sequences.into_iter().unzip();
    let (sequences, in_runs): (Vec<_>, Vec<_>) = last.into_iter().unzip();
    sqlx::query_as!(
        Next,
        r#"-- relay: find the next of runs
        SELECT handled.aggregate_id AS "aggregate_id!", next.sequence
        FROM unnest($2::uuid[], $3::integer[], $4::boolean[]) AS handled (aggregate_id, sequence, in_run)
        CROSS JOIN LATERAL (
            SELECT sequence, visible_at > now() AS is_hidden
            FROM outbox
            WHERE aggregate_id = handled.aggregate_id AND subscription_id = $1 AND sequence > handled.sequence
            ORDER BY sequence
            LIMIT 1) AS next
        WHERE next.is_hidden OR handled.in_run"#,
        subscription_id,
        &aggregate_ids as &[AggregateId],
        &sequences,
        &in_runs,
    )
    .fetch_all(connection)
    .await
}

/// Wakes one event, which is found by its key. So this waits for a statement that parks it, and wins. It writes the row
/// even if it is visible: a statement that is about to park it has an older snapshot, and then finds it changed.
///
/// One statement for several events could wait for another that leases them in another order, in a circle.
async fn wake(
    connection: &mut PgConnection,
    subscription_id: i16,
    Next { aggregate_id, sequence }: Next,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- relay: wake the next of a run
        UPDATE outbox
        SET visible_at = now()
        WHERE aggregate_id = $1 AND subscription_id = $2 AND sequence = $3
          AND lease_token IS NULL AND failures = 0 AND last_error IS NULL AND visible_at < 'infinity'",
        aggregate_id as AggregateId,
        subscription_id,
        sequence,
    )
    .execute(connection)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::Duration};

    use outbox::{AggregateId, EventId};
    use sqlx::{Connection, PgConnection};
    use testkit::TestDatabase;
    use tokio::time::sleep;

    use super::{FAR, LastTaken, find_next, wake};

    /// A statement parks an event, while the run before it comes so far that the event is the first.
    #[tokio::test]
    async fn the_next_event_of_a_run_is_visible_though_it_is_being_parked() {
        let test = TestDatabase::create("orders_owner", &[&outbox::MIGRATOR]).await;
        test.insert_for_subscription(1).await;
        let (pool, aggregate_id) = (test.pool().await, AggregateId::from(EventId::new().uuid()));
        let mut relay = PgConnection::connect(&test.url_as("outbox_relay")).await.unwrap();
        let insert = "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
            VALUES ($1, $2, gen_random_uuid(), 'test.v1.Happened', '')";
        sqlx::query(insert).bind(aggregate_id).bind(FAR + 7).execute(&pool).await.unwrap();

        let mut parking = pool.begin().await.unwrap();
        let park = "UPDATE outbox SET visible_at = now() + interval '1 minute'";
        sqlx::query(park).execute(&mut *parking).await.unwrap();
        let waking = tokio::spawn(async move {
            let last = LastTaken { subscription_id: 1, sequences: HashMap::from([(aggregate_id, (FAR + 5, true))]) };
            for next in find_next(&mut relay, last).await.unwrap() {
                wake(&mut relay, 1, next).await.unwrap();
            }
        });
        let waits = "SELECT count(*) > 0 FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%wake the next%'";
        while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&pool).await.unwrap() {
            assert!(!waking.is_finished(), "it does not wait for the statement that parks");
            sleep(Duration::from_millis(10)).await;
        }
        parking.commit().await.unwrap();
        waking.await.unwrap();
        let visible = "SELECT visible_at <= now() FROM outbox";
        assert!(sqlx::query_scalar::<_, bool>(visible).fetch_one(&pool).await.unwrap());
    }
}
