//! The time of a lease does not depend on what else is in the outbox.

use std::{sync::Arc, time::Duration};

use chassis::Database;
use clap::Parser;
use outbox::AggregateId;
use sqlx::PgPool;
use testkit::TestDatabase;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    floor::Floor,
    lease::{LeaseQuery, Scope, lease},
    live::RelayId,
    park::{Leased, Swept, park},
    settings::Settings,
    subscription::read_subscriptions,
};

const BATCH: u32 = 100;
const SCOPE: Scope = Scope { limit: BATCH, max_age: Duration::from_hours(144) };
/// Many, since medians of a few dozen scatter too much while other tests run.
const ROUNDS: usize = 200;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
}

/// The first subscription has id 1, and gets the rows that are inserted directly.
const SUBSCRIBE_ALL: &str =
    "INSERT INTO outbox_subscriptions (name, pattern, created_by) VALUES ('all', '*', 'a test');
    ALTER TABLE outbox ALTER subscription_id SET DEFAULT 1";

/// An outbox, and the relay's access to it.
pub(crate) struct Outbox {
    pub(crate) pool: PgPool,
    pub(crate) database: Database,
    lease_query: LeaseQuery,
    _test: TestDatabase,
}

impl Outbox {
    pub(crate) async fn create() -> Self {
        let test = TestDatabase::create("orders_owner", &[&outbox::MIGRATOR]).await;
        let url = test.url_as("outbox_relay");
        let arguments = ["relay", "--database-url", &url, "--route", "all=http://localhost:1", "--source", "orders"];
        let settings = Cli::try_parse_from(arguments).unwrap().settings;
        let never = CancellationToken::new();
        let database =
            Database::connect(&settings.database_url, &settings.database, &[], &never).await.unwrap().unwrap();
        let pool = test.pool().await;
        sqlx::raw_sql(SUBSCRIBE_ALL).execute(&pool).await.unwrap();
        let mut connection = pool.acquire().await.unwrap();
        let subscription = read_subscriptions(&mut connection).await.unwrap().remove(0);
        drop(connection);
        let lease_query = LeaseQuery::of(&settings, &RelayId::new(), &subscription, &Arc::new(Floor::new()));
        Self { pool, database, lease_query, _test: test }
    }

    pub(crate) async fn run(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&self.pool).await.unwrap();
    }

    /// Leases a batch, deletes it, and inserts as many new events, so that every lease finds the same number.
    async fn time_one_lease(&self) -> Duration {
        let began = Instant::now();
        let leased = lease(&self.database, &self.lease_query, SCOPE).await.unwrap().unwrap();
        let took = began.elapsed();
        assert_eq!(leased.rows.len(), BATCH as usize);
        let aggregate_ids: Vec<AggregateId> = leased.rows.iter().map(|row| row.aggregate_id).collect();
        sqlx::query("DELETE FROM outbox WHERE aggregate_id = ANY ($1)")
            .bind(aggregate_ids)
            .execute(&self.pool)
            .await
            .unwrap();
        self.run(WAITING_100).await;
        took
    }
}

const WAITING_100: &str = "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
    SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '' FROM generate_series(1, 100)";

/// No statistics, and generic plans for new connections.
const NO_STATISTICS: &str = "ALTER TABLE outbox SET (autovacuum_enabled = false);
    DO $$ BEGIN
        EXECUTE format('ALTER DATABASE %I SET plan_cache_mode = force_generic_plan', current_database());
    END $$";

/// In random order, so that the position of a row is not related to its time.
const WAITING_100_000: &str = "SET synchronous_commit = off;
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
    SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', at, at
    FROM generate_series(1, 100000) AS n, LATERAL (SELECT now() - interval '1 hour' * random() * least(n, 1) AS at) AS at";

pub(crate) const WAITING_MILLION: &str = "SET synchronous_commit = off;
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
    SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', at, at
    FROM generate_series(1, 1000000) AS n, LATERAL (SELECT now() - interval '1 hour' * (1000000 - n) / 1000000 AS at) AS at";

/// Half of them back off, half are dead. Each has a successor, and these are the oldest visible rows.
pub(crate) const STUCK: &str = "SET synchronous_commit = off;
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, visible_at, attempts, last_error)
    SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '',
        CASE WHEN n % 2 = 0 THEN 'infinity' ELSE now() + interval '1 hour' END, 1, 'BUSY: later'
    FROM generate_series(1, 100000) AS n;
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
    SELECT aggregate_id, 2, gen_random_uuid(), 'test.v1.Happened', '', now() - interval '2 hours', now() - interval '2 hours'
    FROM outbox WHERE last_error IS NOT NULL";

/// Deleted rows that VACUUM may not remove, since the snapshot of `holder` is older than their deletion.
const DELIVERED_200_000: &str = "SET synchronous_commit = off;
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
    SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', at, at
    FROM generate_series(1, 200000) AS n, LATERAL (SELECT now() - interval '1 hour' * (200000 - n) / 200000 AS at) AS at;
    DELETE FROM outbox";

pub(crate) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::test]
async fn a_lease_is_as_fast_with_a_million_waiting_events_and_200_000_stuck_ones_as_with_few() {
    let (full, empty) = (Outbox::create().await, Outbox::create().await);
    full.run(WAITING_MILLION).await;
    full.run(STUCK).await;
    for _ in 0..3 {
        empty.run(WAITING_100).await;
    }
    for outbox in [&full, &empty] {
        outbox.run("ANALYZE outbox").await;
    }
    let unparked = full.time_one_lease().await;
    let began = Instant::now();
    let visible = "SELECT count(*) FROM outbox WHERE sequence > 1 AND visible_at <= now()";
    while sqlx::query_scalar::<_, i64>(visible).fetch_one(&full.pool).await.unwrap() > 0 {
        park(&full.database, &Swept::default(), &mut Leased::default()).await.unwrap();
    }
    let parked = began.elapsed();
    // Autovacuum does this by itself within a minute.
    for outbox in [&full, &empty] {
        outbox.run("VACUUM (ANALYZE) outbox").await;
    }

    assert_as_fast(&full, &empty).await;
    println!("before parking {unparked:.1?}; parked in {parked:.1?}");
}

#[tokio::test]
async fn a_lease_is_as_fast_with_200_000_delivered_rows_that_a_long_transaction_keeps_as_with_none() {
    let (kept, empty) = (Outbox::create().await, Outbox::create().await);
    let mut holder = kept.pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    sqlx::query("SELECT FROM outbox").execute(&mut *holder).await.unwrap();
    kept.run(DELIVERED_200_000).await;
    for outbox in [&kept, &empty] {
        for _ in 0..3 {
            outbox.run(WAITING_100).await;
        }
        // The first lease scans everything.
        outbox.time_one_lease().await;
    }
    assert_as_fast(&kept, &empty).await;
    holder.rollback().await.unwrap();
}

/// Without statistics and parameters, the planner has to guess how many rows lie between two times.
#[tokio::test]
async fn a_lease_is_as_fast_with_100_000_waiting_events_that_the_planner_has_no_statistics_of() {
    let (full, empty) = (Outbox::create().await, Outbox::create().await);
    for outbox in [&full, &empty] {
        outbox.run(NO_STATISTICS).await;
        for _ in 0..3 {
            outbox.run(WAITING_100).await;
        }
    }
    full.run(WAITING_100_000).await;
    assert_as_fast(&full, &empty).await;
}

#[tokio::test]
async fn an_event_below_the_floor_is_not_scanned_at_first_and_found_within_a_second() {
    let outbox = Outbox::create().await;
    outbox.run(WAITING_100).await;
    let began = Instant::now();
    assert!(lease(&outbox.database, &outbox.lease_query, SCOPE).await.unwrap().is_some());
    outbox
        .run(
            "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
            SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', at, at
            FROM (SELECT now() - interval '1 minute') AS late (at)",
        )
        .await;
    // On a busy machine the second may be over before this lease.
    if lease(&outbox.database, &outbox.lease_query, SCOPE).await.unwrap().is_some() {
        assert!(began.elapsed() > Duration::from_millis(990), "the lease began below the floor");
        return;
    }
    while lease(&outbox.database, &outbox.lease_query, SCOPE).await.unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(5), "an event below the floor is lost");
    }
    assert!(began.elapsed() > Duration::from_millis(990), "the lease began below the floor");
}

async fn assert_as_fast(full: &Outbox, empty: &Outbox) {
    let (mut in_full, mut in_empty) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        in_full.push(full.time_one_lease().await);
        in_empty.push(empty.time_one_lease().await);
    }
    let (in_full, in_empty) = (median(in_full), median(in_empty));
    let ratio = in_full.as_secs_f64() / in_empty.as_secs_f64();
    println!("medians {in_full:.2?} / {in_empty:.2?} = {ratio:.2}");
    assert!(ratio < 2.0, "{in_full:?} instead of {in_empty:?}");
}
