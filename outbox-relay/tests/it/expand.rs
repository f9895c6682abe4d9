//! The migration to subscriptions, over a full outbox, while a service and a relay of the version before run on. Their
//! statements are here as they were.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chassis::{DatabaseUrl, MigrateArguments};
use sqlx::{Connection, PgConnection, migrate::Migrator, types::time::OffsetDateTime};
use testkit::TestDatabase;
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    operator::Operator,
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
};

/// The last migration before subscriptions.
const BEFORE: i64 = 7;
const ROWS: i64 = 50_000;
/// What a caller of the older service would still bear.
const PAUSE_MAX: Duration = Duration::from_secs(2);

const FILL: &str = "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
    SELECT gen_random_uuid(), 1, gen_random_uuid(), 'orders.v1.OrderCreated', '' FROM generate_series(1, $1)";

const OLD_ENQUEUE: &str =
    "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
    SELECT * FROM unnest($1::uuid[], $2::integer[], $3::uuid[], $4::text[], $5::bytea[], $6::text[], $7::text[])";

const OLD_LEASE: &str = "UPDATE outbox
    SET lease_token = $1, visible_at = now() + make_interval(secs => $3)
    WHERE ctid = ANY (ARRAY (
        SELECT free.ctid
        FROM outbox AS free
        WHERE free.visible_at <= now()
          AND free.visible_at >= ANY (ARRAY[coalesce($4::timestamptz - interval '1 s', '-infinity')])
          AND free.event_type LIKE '%'
          AND NOT EXISTS (SELECT FROM outbox_pause)
          AND (free.sequence = 1 OR NOT EXISTS (
              SELECT FROM outbox AS earlier
              WHERE earlier.aggregate_id = free.aggregate_id AND earlier.sequence < free.sequence))
        ORDER BY free.visible_at
        LIMIT $2
        FOR UPDATE OF free SKIP LOCKED))
    RETURNING aggregate_id, sequence, event_id";

const OLD_SETTLE: &str = "DELETE FROM outbox
    WHERE lease_token = $1 AND ctid = ANY (ARRAY (
        SELECT (
            SELECT leased.ctid
            FROM outbox AS leased
            WHERE leased.aggregate_id = handled.aggregate_id AND leased.sequence = handled.sequence)
        FROM unnest($2::uuid[], $3::integer[]) AS handled (aggregate_id, sequence)))";

/// A process of the version before.
struct Old {
    go_on: Arc<AtomicBool>,
    /// The events that it has enqueued or delivered, and its longest statement.
    task: JoinHandle<(HashSet<Uuid>, Duration)>,
}

impl Old {
    async fn stop(self) -> HashSet<Uuid> {
        self.go_on.store(false, Ordering::Relaxed);
        let (events, longest) = self.task.await.unwrap();
        assert!(longest < PAUSE_MAX, "a statement took {longest:?}");
        assert!(!events.is_empty());
        events
    }
}

/// Enqueues two events of a new aggregate at a time.
async fn start_old_service(database: &TestDatabase) -> Old {
    let mut connection = PgConnection::connect(&database.url_as("order_service")).await.unwrap();
    let go_on = Arc::new(AtomicBool::new(true));
    let running = go_on.clone();
    let task = tokio::spawn(async move {
        let (mut events, mut longest) = (HashSet::new(), Duration::ZERO);
        while running.load(Ordering::Relaxed) {
            let (aggregate_id, ids) = (Uuid::new_v4(), [Uuid::now_v7(), Uuid::now_v7()]);
            let nothing: [Option<String>; 2] = [None, None];
            let began = Instant::now();
            sqlx::query(OLD_ENQUEUE)
                .bind([aggregate_id; 2])
                .bind([1, 2])
                .bind(ids)
                .bind(["orders.v1.OrderCreated"; 2])
                .bind([Vec::<u8>::new(), Vec::new()])
                .bind(nothing.clone())
                .bind(nothing)
                .execute(&mut connection)
                .await
                .unwrap();
            longest = longest.max(began.elapsed());
            events.extend(ids);
        }
        (events, longest)
    });
    Old { go_on, task }
}

async fn start_old_relay(database: &TestDatabase) -> Old {
    let mut connection = PgConnection::connect(&database.url_as("outbox_relay")).await.unwrap();
    let go_on = Arc::new(AtomicBool::new(true));
    let running = go_on.clone();
    let task = tokio::spawn(async move {
        let (mut events, mut longest) = (HashSet::new(), Duration::ZERO);
        while running.load(Ordering::Relaxed) {
            let (token, began) = (Uuid::new_v4(), Instant::now());
            let rows: Vec<(Uuid, i32, Uuid)> = sqlx::query_as(OLD_LEASE)
                .bind(token)
                .bind(20_i64)
                .bind(30.0)
                .bind(None::<OffsetDateTime>)
                .fetch_all(&mut connection)
                .await
                .unwrap();
            let aggregate_ids: Vec<_> = rows.iter().map(|(aggregate_id, ..)| *aggregate_id).collect();
            let sequences: Vec<_> = rows.iter().map(|(_, sequence, _)| *sequence).collect();
            let settle = sqlx::query(OLD_SETTLE).bind(token).bind(aggregate_ids).bind(sequences);
            let settled = settle.execute(&mut connection).await.unwrap();
            assert_eq!(settled.rows_affected(), rows.len() as u64);
            longest = longest.max(began.elapsed());
            events.extend(rows.into_iter().map(|(.., event_id)| event_id));
        }
        (events, longest)
    });
    Old { go_on, task }
}

/// The outbox with the migrations up to a version.
async fn migrated_to(version: i64) -> Outbox {
    let until = outbox::MIGRATOR.iter().filter(|migration| migration.version <= version).cloned().collect::<Vec<_>>();
    let table_name = outbox::MIGRATOR.table_name.clone();
    let before = Migrator { migrations: until.into(), table_name, ..Migrator::DEFAULT };
    let database = TestDatabase::create("orders_owner", &[]).await;
    let mut owner = PgConnection::connect(&database.url_as("orders_owner")).await.unwrap();
    before.run(&mut owner).await.unwrap();
    sqlx::raw_sql("GRANT INSERT ON outbox TO order_service").execute(&mut owner).await.unwrap();
    let pool = database.pool().await;
    Outbox { database, pool }
}

async fn migrate(outbox: &Outbox, contract: bool) {
    let url: DatabaseUrl = outbox.database.url_as("orders_owner").parse().unwrap();
    let how = MigrateArguments { contract, ..MigrateArguments::default() };
    chassis::migrate(&url, &[&outbox::MIGRATOR], &how, &CancellationToken::new()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_outbox_is_migrated_while_a_service_and_a_relay_of_the_version_before_run_on() {
    let outbox = migrated_to(BEFORE).await;
    sqlx::query(FILL).bind(ROWS).execute(&outbox.pool).await.unwrap();
    let filled: Vec<Uuid> = sqlx::query_scalar("SELECT event_id FROM outbox").fetch_all(&outbox.pool).await.unwrap();
    let (service, old_relay) = (start_old_service(&outbox.database).await, start_old_relay(&outbox.database).await);

    migrate(&outbox, false).await;
    let operator = Operator::of(&outbox);
    operator.does(&["subscribe", "inventory", "orders.v1.*"]).await;
    let refused = operator.is_refused(&["subscribe", "loyalty", "orders.v1.*"]).await;
    assert!(
        refused.contains("relays of an earlier version may still run") && refused.contains("--contract"),
        "{refused}"
    );
    operator.does(&["pause", "--reason", "older relays obey it"]).await;
    let obeyed = "SELECT count(*) FROM outbox_pause";
    assert_eq!(sqlx::query_scalar::<_, i64>(obeyed).fetch_one(&outbox.pool).await.unwrap(), 1);
    operator.does(&["resume"]).await;

    let receiver = Receiver::start(Reply::apply).await;
    let relay =
        Relay::start_with_routes(&outbox.relay_url(), &[&format!("inventory=http://{}", receiver.address)], &[]).await;
    receiver.wait_for_deliveries(20).await;
    let enqueued = service.stop().await;
    outbox.wait_until_empty_within(Duration::from_secs(180)).await;
    let of_old = old_relay.stop().await;
    relay.stop().await;
    let received = receiver.read(Log::ids);
    let of_new: HashSet<Uuid> = received.iter().copied().collect();
    assert_eq!(of_new.len(), received.len(), "an event was delivered twice");
    assert_eq!(of_new.intersection(&of_old).count(), 0, "an event was delivered by both relays");
    let all: HashSet<Uuid> = filled.into_iter().chain(enqueued).collect();
    assert_eq!(of_new.union(&of_old).copied().collect::<HashSet<_>>(), all);

    migrate(&outbox, true).await;
    operator.does(&["subscribe", "loyalty", "orders.v1.*"]).await;
    let mut late = PgConnection::connect(&outbox.relay_url()).await.unwrap();
    let lease = sqlx::query(OLD_LEASE).bind(Uuid::new_v4()).bind(20_i64).bind(30.0).bind(None::<OffsetDateTime>);
    let failed = lease.execute(&mut late).await.unwrap_err().to_string();
    assert!(failed.contains("relation \"outbox_pause\" does not exist"), "{failed}");
    outbox.enqueue("orders.v1.OrderCreated", 1).await;
    assert_eq!(outbox.count().await, 2);
}

/// A build that was interrupted leaves an index that is no index.
#[tokio::test]
async fn a_migration_that_was_interrupted_while_it_built_an_index_can_be_repeated() {
    let outbox = migrated_to(9).await;
    let mut reader = outbox.pool.begin().await.unwrap();
    sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM outbox")
        .execute(&mut *reader)
        .await
        .unwrap();
    let mut owner = PgConnection::connect(&outbox.database.url_as("orders_owner")).await.unwrap();
    sqlx::query("SET statement_timeout = '300ms'").execute(&mut owner).await.unwrap();
    let build = "CREATE INDEX CONCURRENTLY outbox_first ON outbox (subscription_id, visible_at) WHERE sequence = 1";
    assert!(sqlx::query(build).execute(&mut owner).await.is_err());
    let invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid";
    assert_eq!(sqlx::query_scalar::<_, i64>(invalid).fetch_one(&outbox.pool).await.unwrap(), 1);
    reader.rollback().await.unwrap();

    migrate(&outbox, false).await;
    assert_eq!(sqlx::query_scalar::<_, i64>(invalid).fetch_one(&outbox.pool).await.unwrap(), 0);
    migrate(&outbox, true).await;
    migrate(&outbox, false).await;
}

/// The server finishes an index although `migrate` was killed. The index is sound, and no migration has recorded it.
#[tokio::test]
async fn a_migration_whose_index_was_finished_after_it_was_killed_can_be_repeated() {
    let outbox = migrated_to(9).await;
    let mut owner = PgConnection::connect(&outbox.database.url_as("orders_owner")).await.unwrap();
    let build = "CREATE INDEX CONCURRENTLY outbox_first ON outbox (subscription_id, visible_at) WHERE sequence = 1";
    sqlx::query(build).execute(&mut owner).await.unwrap();
    migrate(&outbox, true).await;
    let built = "SELECT count(*) FROM pg_index WHERE indisvalid AND indexrelid = 'outbox_first'::regclass";
    assert_eq!(sqlx::query_scalar::<_, i64>(built).fetch_one(&outbox.pool).await.unwrap(), 1);
}

/// It would be enqueued for one subscription only, so it must fail, whatever rights the service has.
#[tokio::test]
async fn an_older_service_cannot_enqueue_after_the_contracting_migration() {
    let outbox = migrated_to(BEFORE).await;
    migrate(&outbox, true).await;
    let mut service = PgConnection::connect(&outbox.database.url_as("order_service")).await.unwrap();
    let insert = "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
        VALUES (gen_random_uuid(), 1, gen_random_uuid(), 'a.v1.B', '')";
    let failed = sqlx::query(insert).execute(&mut service).await.unwrap_err().to_string();
    assert!(failed.contains("null value in column \"subscription_id\""), "{failed}");
}
