//! `migrate` while orders are placed, and while transactions hold its tables for long.

use std::{
    process::Output,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use chassis::{DatabaseUrl, MigrateArguments, MigrateError};
use order_service::MIGRATORS;
use sqlx::{
    PgPool, Postgres, SqlSafeStr, Transaction,
    migrate::{Migration, MigrationType, Migrator},
};
use testkit::{Scratch, TestDatabase, processes::Process};
use tokio::{
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    command_line::{order_service, run},
    service::{LIMIT, Service, eventually, order},
};

/// A migration may hold orders up for 2 s at most. The rest is for a busy machine.
const LET_GO_LIMIT: Duration = Duration::from_secs(4);
/// What an order takes on a busy machine that nothing holds up.
const UNHINDERED: Duration = Duration::from_millis(1500);

const ADD_COLUMN: &str = "ALTER TABLE outbox ADD COLUMN extra integer";
/// Names no table, so nothing waits for the transactions that are open on it.
const ADD_COLUMN_UNSEEN: &str = "DO $$ BEGIN EXECUTE 'ALTER TABLE out' || 'box ADD COLUMN extra integer'; END $$";
const BUILD_INDEX: &str = "CREATE INDEX CONCURRENTLY orders_extra ON orders (created_at)";

/// The migrations of a version that adds one. `build` says that it builds an index concurrently.
fn next_version(sql: &'static str, build: bool) -> Migrator {
    let known = MIGRATORS.last().unwrap();
    let mut migrations: Vec<Migration> = known.iter().cloned().collect();
    migrations.push(Migration::new(1000, "next".into(), MigrationType::Simple, sql.into_sql_str(), build));
    Migrator { migrations: migrations.into(), table_name: known.table_name.clone(), ..Migrator::DEFAULT }
}

/// A migration to the next version that goes on in this process.
struct Migrating {
    task: JoinHandle<Result<(), MigrateError>>,
    shutdown: CancellationToken,
}

impl Migrating {
    fn start(database: &TestDatabase, next: Migrator) -> Self {
        let url: DatabaseUrl = database.url_as("orders_owner").parse().unwrap();
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone();
        let task =
            tokio::spawn(async move { chassis::migrate(&url, &[&next], &MigrateArguments::default(), &stop).await });
        Self { task, shutdown }
    }

    async fn finish(self) -> Result<(), MigrateError> {
        timeout(LIMIT * 2, self.task).await.expect("an end").unwrap()
    }
}

/// Orders that are placed one after the other.
struct Load {
    placed: Arc<AtomicUsize>,
    go_on: Arc<AtomicBool>,
    task: JoinHandle<Duration>,
}

impl Load {
    fn start(service: &Service) -> Self {
        let (placed, go_on) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
        let (count, running, mut client) = (placed.clone(), go_on.clone(), service.orders());
        let task = tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            while running.load(Ordering::Relaxed) {
                let began = Instant::now();
                client.create_order(order()).await.unwrap();
                longest = longest.max(began.elapsed());
                count.fetch_add(1, Ordering::Relaxed);
            }
            longest
        });
        Self { placed, go_on, task }
    }

    /// Returns when so many more were placed.
    async fn goes_on_for(&self, more: usize) {
        let wanted = self.placed.load(Ordering::Relaxed) + more;
        eventually("more orders are placed", async || self.placed.load(Ordering::Relaxed) >= wanted).await;
    }

    /// Returns how long the slowest order took.
    async fn stop(self) -> Duration {
        self.go_on.store(false, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

/// A transaction that has read, as a dump does, and stays open.
async fn read(pool: &PgPool, query: &'static str) -> Transaction<'static, Postgres> {
    let mut reader = pool.begin().await.unwrap();
    sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").execute(&mut *reader).await.unwrap();
    sqlx::raw_sql(query).execute(&mut *reader).await.unwrap();
    reader
}

async fn is_true(pool: &PgPool, condition: &'static str) -> bool {
    sqlx::query_scalar(condition).fetch_one(pool).await.unwrap()
}

const LOOKS: &str = "SELECT EXISTS (SELECT FROM pg_stat_activity
    WHERE datname = current_database() AND query LIKE '-- migrate: find open transactions%')";
const WAITS_FOR_LOCK: &str = "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE datname = current_database() AND usename = 'orders_owner' AND NOT granted)";
/// For longer than the timeout of a lock.
const WAITS_LONG: &str = "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE datname = current_database() AND usename = 'orders_owner' AND waitstart < clock_timestamp() - interval '3 s')";
const EXTRA_COLUMN: &str =
    "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'outbox'::regclass AND attname = 'extra')";
const EXTRA_INDEX: &str =
    "SELECT count(*) = 1 FROM pg_index WHERE indisvalid AND indexrelid = to_regclass('orders_extra')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_go_on_unhindered_while_a_migration_waits_for_a_long_reader() {
    let service = Service::start().await;
    let reader = read(&service.pool, "SELECT count(*) FROM outbox").await;
    let load = Load::start(&service);
    let migrating = Migrating::start(&service.database, next_version(ADD_COLUMN, false));
    eventually("the migration looks", async || is_true(&service.pool, LOOKS).await).await;
    load.goes_on_for(100).await;
    assert!(!is_true(&service.pool, EXTRA_COLUMN).await);
    reader.rollback().await.unwrap();
    migrating.finish().await.unwrap();
    assert!(is_true(&service.pool, EXTRA_COLUMN).await);
    let longest = load.stop().await;
    assert!(longest < UNHINDERED, "an order took {longest:?}");
    service.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_does_not_get_its_lock_lets_go_and_tries_again() {
    let service = Service::start().await;
    let reader = read(&service.pool, "SELECT count(*) FROM outbox").await;
    let load = Load::start(&service);
    let migrating = Migrating::start(&service.database, next_version(ADD_COLUMN_UNSEEN, false));
    for _ in 0..2 {
        eventually("the migration waits", async || is_true(&service.pool, WAITS_FOR_LOCK).await).await;
        eventually("the migration lets go", async || !is_true(&service.pool, WAITS_FOR_LOCK).await).await;
        load.goes_on_for(1).await;
    }
    reader.rollback().await.unwrap();
    migrating.finish().await.unwrap();
    assert!(is_true(&service.pool, EXTRA_COLUMN).await);
    let longest = load.stop().await;
    assert!(longest < LET_GO_LIMIT, "an order took {longest:?}");
    service.end().await;
}

/// It waits for every older snapshot of the database, and to begin again would waste what is built.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_is_built_once_beside_a_long_reader_and_orders_go_on() {
    let service = Service::start().await;
    let reader = read(&service.pool, "SELECT count(*) FROM outbox").await;
    let load = Load::start(&service);
    let migrating = Migrating::start(&service.database, next_version(BUILD_INDEX, true));
    eventually("the migration waits for long", async || is_true(&service.pool, WAITS_LONG).await).await;
    load.goes_on_for(10).await;
    reader.rollback().await.unwrap();
    migrating.finish().await.unwrap();
    assert!(is_true(&service.pool, EXTRA_INDEX).await);
    let longest = load.stop().await;
    assert!(longest < UNHINDERED, "an order took {longest:?}");
    service.end().await;
}

#[tokio::test]
async fn a_signal_cancels_an_index_that_waits_and_the_next_run_builds_it() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let pool = database.pool().await;
    let reader = read(&pool, "SELECT count(*) FROM outbox").await;
    let migrating = Migrating::start(&database, next_version(BUILD_INDEX, true));
    eventually("the migration waits", async || is_true(&pool, WAITS_FOR_LOCK).await).await;
    migrating.shutdown.cancel();
    let stopped = migrating.finish().await.unwrap_err();
    assert!(format!("{:#}", anyhow::Error::from(stopped)).contains("a signal ended it"));
    eventually("nothing waits", async || !is_true(&pool, WAITS_FOR_LOCK).await).await;
    reader.rollback().await.unwrap();
    Migrating::start(&database, next_version(BUILD_INDEX, true)).finish().await.unwrap();
    assert!(is_true(&pool, EXTRA_INDEX).await);
}

/// Such limits are for the statements of a service, or of a person.
#[tokio::test]
async fn limits_and_an_isolation_that_were_set_for_the_role_do_not_reach_a_migration() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let pool = database.pool().await;
    for setting in [
        "statement_timeout = '1s'",
        "lock_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '1ms'",
        "default_transaction_isolation = 'serializable'",
        "standard_conforming_strings = off",
    ] {
        let mut set = sqlx::QueryBuilder::new("ALTER ROLE orders_owner IN DATABASE ");
        set.push(database.name()).push(" SET ").push(setting);
        set.build().persistent(false).execute(&pool).await.unwrap();
    }
    let next = r"SELECT pg_sleep(1.5);
        CREATE TABLE extra AS SELECT current_setting('transaction_isolation') AS isolation, '\' AS backslash";
    Migrating::start(&database, next_version(next, false)).finish().await.unwrap();
    let found: (String, String) = sqlx::query_as("SELECT * FROM extra").fetch_one(&pool).await.unwrap();
    assert_eq!(found, ("read committed".into(), r"\".into()));
}

/// The third migration of the orders, which the database seems to lack.
async fn forget_a_migration(pool: &PgPool) {
    sqlx::raw_sql("DELETE FROM _orders_migrations WHERE version = 3").execute(pool).await.unwrap();
}

async fn add_unknown_migrations(pool: &PgPool) {
    let add = "INSERT INTO _orders_migrations (version, description, success, checksum, execution_time)
        SELECT 9000 + number, 'of the next version', true, 'any', 0 FROM generate_series(1, 2) AS number";
    sqlx::raw_sql(add).execute(pool).await.unwrap();
}

async fn migrate(database: &TestDatabase, flags: &[&str]) -> (Option<i32>, String, String) {
    let url = database.url_as("orders_owner");
    let Output { status, stdout, stderr } = run(&[&["migrate", "--database-url", &url], flags].concat()).await;
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[tokio::test]
async fn the_version_before_leaves_a_newer_database_as_it_is_and_says_so() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    add_unknown_migrations(&database.pool().await).await;
    for flags in [&[][..], &["--contract"]] {
        let (code, stdout, stderr) = migrate(&database, flags).await;
        assert_eq!((code, &*stderr), (Some(0), ""), "{stdout}");
        assert!(stdout.contains("is ahead by 2 migrations; nothing to do"), "{stdout}");
    }
}

#[tokio::test]
async fn a_database_that_is_ahead_and_lacks_a_migration_is_refused_and_stays_as_it_is() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let pool = database.pool().await;
    add_unknown_migrations(&pool).await;
    forget_a_migration(&pool).await;
    let (code, stdout, stderr) = migrate(&database, &[]).await;
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stderr.contains("has migration 9001") && stderr.contains("lacks migration 3 (for speed)"), "{stderr}");
}

#[tokio::test]
async fn a_migration_that_waits_names_the_reader_and_ends_after_its_time_or_by_a_signal() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let pool = database.pool().await;
    forget_a_migration(&pool).await;
    let mut reader = read(&pool, "SELECT count(*) FROM orders").await;
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *reader).await.unwrap();

    let (code, stdout, stderr) = migrate(&database, &["--give-up-after", "2"]).await;
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stderr.contains("--give-up-after"), "{stderr}");
    assert!(stdout.contains("migration 3 (for speed) waits") && stdout.contains(&format!("pid {pid} (")), "{stdout}");

    let scratch = Scratch::new();
    let log = scratch.join("log");
    let mut command = order_service(&["migrate", "--database-url", &database.url_as("orders_owner")]);
    command.env("RUST_LOG", "info");
    let mut process = Process::spawn_command("migrate", command, &log).unwrap();
    eventually("it waits", async || std::fs::read_to_string(&log).unwrap().contains("waits")).await;
    let status = process.terminate(LIMIT).await.unwrap().status;
    assert_eq!(status.code(), Some(1));
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.contains("a signal ended it: it is safe to run again"), "{log}");
}
