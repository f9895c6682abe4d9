//! A relay beside a transaction that stays open, behind more delivered rows than a lease can scan in its time.

use std::time::Duration;

use sqlx::{PgPool, Postgres, Transaction};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::{AMPLE, until_within},
};

/// In random order, since a scan takes longest if each row lies on another page than the row before it. Half of them are
/// first events, and half are later ones.
const DELIVERED: &str = "SET synchronous_commit = off;
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
    SELECT gen_random_uuid(), 1 + n % 2, gen_random_uuid(), 'test.v1.Happened', '', at, at
    FROM generate_series(1, 700000) AS n,
        LATERAL (SELECT now() - interval '10 seconds' - interval '1 hour' * random() * least(n, 1) AS at) AS at;
    DELETE FROM outbox";

/// A transaction that began before the rows were delivered, so that VACUUM keeps them.
async fn hold_horizon(pool: &PgPool) -> Transaction<'static, Postgres> {
    let mut holder = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    sqlx::query("SELECT FROM outbox").execute(&mut *holder).await.unwrap();
    holder
}

/// An event of this sequence that waits since as many seconds.
async fn insert_aged(outbox: &Outbox, seconds: f64, aggregate_id: Uuid, sequence: i32) -> Uuid {
    let insert = "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
        SELECT $1, $2, gen_random_uuid(), 'test.v1.Happened', '', at, at
        FROM (SELECT now() - make_interval(secs => $3)) AS aged (at)
        RETURNING event_id";
    let inserted = sqlx::query_scalar(insert).bind(aggregate_id).bind(sequence).bind(seconds);
    inserted.fetch_one(&outbox.pool).await.unwrap()
}

/// How long a scan of all first events takes.
async fn time_a_scan(outbox: &Outbox) -> Duration {
    let scan = "SELECT event_id FROM outbox
        WHERE subscription_id = 1 AND sequence = 1 AND visible_at <= now() ORDER BY visible_at LIMIT 100";
    let mut connection = outbox.pool.acquire().await.unwrap();
    sqlx::query("SET enable_seqscan = off").execute(&mut *connection).await.unwrap();
    let began = Instant::now();
    sqlx::query_scalar::<_, Uuid>(scan).fetch_all(&mut *connection).await.unwrap();
    began.elapsed()
}

async fn insert_behind_a_dead_one(outbox: &Outbox) -> Uuid {
    let insert = "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, visible_at, last_error)
        VALUES ($1, 1, gen_random_uuid(), 'test.v1.Happened', '', 'infinity', 'dead')";
    let line = Uuid::new_v4();
    sqlx::query(insert).bind(line).execute(&outbox.pool).await.unwrap();
    insert_aged(outbox, 0.0, line, 2).await
}

/// Parking begins where the sweep does. On a busy machine a scan above the floor may be cut off too. Then the next sweep
/// begins above an event that waits, which is never parked. So one of several is enough.
async fn park_one(outbox: &Outbox) {
    let mut waiting = Vec::new();
    until_within(AMPLE, "an event behind a dead one is parked", async || {
        waiting.push(insert_behind_a_dead_one(outbox).await);
        outbox.rows().await.iter().any(|row| !row.visible && waiting.contains(&row.event_id))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_starts_behind_more_delivered_rows_than_a_lease_can_scan_delivers_new_and_old_events() {
    let outbox = Outbox::create().await;
    let holder = hold_horizon(&outbox.pool).await;
    sqlx::raw_sql(DELIVERED).execute(&outbox.pool).await.unwrap();
    let line = Uuid::new_v4();
    let mut old = vec![insert_aged(&outbox, 3000.0, line, 1).await, insert_aged(&outbox, 30.0, line, 2).await];
    for seconds in [20.0, 700.0, 1800.0, 3599.0, 7200.0, 400_000.0] {
        old.push(insert_aged(&outbox, seconds, Uuid::new_v4(), 1).await);
    }
    // A lease scans the later events as well. So it is cut off, and a part of the rows is not.
    let work_ms = (time_a_scan(&outbox).await.as_millis() * 2 / 5).to_string();

    let receiver = Receiver::start(Reply::apply).await;
    let began = Instant::now();
    let relay = Relay::start(&outbox, receiver.address, &["--database-work-ms", &work_ms]).await;
    outbox.wait_for_route_state("OPEN").await;
    let mut slowest = Duration::ZERO;
    let mut arrived = None;
    while arrived.is_none() || slowest.is_zero() {
        let enqueued = Instant::now();
        let new = outbox.insert_one().await;
        until_within(Duration::from_secs(20), "a new event is delivered", async || {
            receiver.read(|log| log.times(new)) > 0
        })
        .await;
        slowest = slowest.max(enqueued.elapsed());
        if arrived.is_none() && receiver.read(|log| old.iter().all(|id| log.times(*id) > 0)) {
            arrived = Some(began.elapsed());
        }
        let missing = || receiver.read(|log| old.iter().filter(|id| log.times(**id) == 0).count());
        assert!(began.elapsed() < Duration::from_secs(120), "{} old events are lost", missing());
        sleep(Duration::from_millis(50)).await;
    }
    println!(
        "limit {work_ms} ms: a new event took at most {slowest:.1?}, and the old ones arrived within {:.1?}",
        arrived.unwrap()
    );

    park_one(&outbox).await;
    sqlx::query("DELETE FROM outbox").execute(&outbox.pool).await.unwrap();

    // When the rows can be removed, all is as before: a late event is found by a scan of everything.
    holder.rollback().await.unwrap();
    sqlx::raw_sql("VACUUM outbox").execute(&outbox.pool).await.unwrap();
    let late = outbox.insert_late().await;
    outbox.wait_until_gone(late).await;
    relay.stop().await;
    let log = receiver.read(Log::ids);
    assert!(old.iter().all(|id| log.iter().filter(|delivered| *delivered == id).count() == 1));
    let place = |id: Uuid| log.iter().position(|delivered| *delivered == id);
    assert!(place(old[0]) < place(old[1]), "out of sequence");
}
