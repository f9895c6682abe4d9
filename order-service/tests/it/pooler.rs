//! A pooler before the database.

use std::time::Duration;

use chassis::{Database, DatabaseSettings, DatabaseUrl, PasswordFile, SchemaError};
use order_service::MIGRATORS;
use sqlx::{PgPool, Postgres, QueryBuilder};
use testkit::{TestDatabase, pgbouncer, pgbouncer::PgBouncer, postgres::Server};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    command_line::run,
    service::{ONE_ORDER, Service, order, reserved},
};

/// From this version on, PgBouncer carries prepared statements from session to session.
const CARRIES: (u32, u32) = (1, 21);

fn server() -> Server {
    Server::parse(&std::env::var("POSTGRES_URL").unwrap()).unwrap()
}

/// A PgBouncer before the tests' server, if there is a program of a version that is wanted.
async fn pooler(is_wanted: impl Fn((u32, u32)) -> bool, mode: &str) -> Option<PgBouncer> {
    let Some(program) = pgbouncer::find(is_wanted) else {
        eprintln!("skipped: there is no such PgBouncer (.ci/install-pgbouncer builds a current one for $PGBOUNCER)");
        return None;
    };
    Some(PgBouncer::start(&program, &server(), mode).await.unwrap())
}

async fn listeners(pool: &PgPool) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %'";
    sqlx::query_scalar(count).fetch_one(pool).await.unwrap()
}

/// Places an order, and hears of its reply.
async fn place_and_watch(service: &Service) {
    let placed = service.place(order()).await;
    let request = proto::orders::v1::WatchOrderRequest { order_id: placed.order_id.clone() };
    let mut watch = service.orders().watch_order(request).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    assert_eq!(service.deliver(&[reserved(&placed.order_id)]).await, ["APPLIED"]);
    let settled = timeout(Duration::from_secs(5), watch.message()).await.expect("an answer").unwrap().unwrap();
    assert_eq!(settled.order_id, placed.order_id);
}

#[tokio::test]
async fn the_service_works_behind_a_pooler_that_gives_a_session_to_each_client() {
    for carries in [false, true] {
        let Some(pooler) = pooler(|version| (version >= CARRIES) == carries, "session").await else { continue };
        let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
        let url = pooler.url_for("order_service", database.name());
        let service = Service::start_on(database, &["--database-url", &url]).await;
        place_and_watch(&service).await;
        assert_eq!(listeners(&service.pool).await, 1);
        assert_eq!(service.written().await, ONE_ORDER);
        service.end().await;
    }
}

#[tokio::test]
async fn behind_a_pooler_that_shares_sessions_the_service_works_and_never_listens_there() {
    let Some(pooler) = pooler(|version| version >= CARRIES, "transaction").await else { return };
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let url = pooler.url_for("order_service", database.name());
    let service = Service::start_on(database, &["--database-url", &url]).await;
    futures_util::future::join_all((0..100).map(|_| service.place(order()))).await;
    place_and_watch(&service).await;
    assert_eq!(pooler.listened_channels("order_service", service.database.name()).await, 0);
    assert_eq!(service.written().await.orders, 101);
    service.end().await;
}

#[tokio::test]
async fn behind_a_pooler_that_shares_sessions_the_service_listens_to_the_database_itself_if_told_where_it_is() {
    let Some(pooler) = pooler(|version| version >= CARRIES, "transaction").await else { return };
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let (url, itself) = (pooler.url_for("order_service", database.name()), database.url_as("order_service"));
    let service = Service::start_on(database, &["--database-url", &url, "--listen-database-url", &itself]).await;
    place_and_watch(&service).await;
    assert_eq!(listeners(&service.pool).await, 1);
    service.end().await;
}

async fn connect(url: &str) -> Result<Option<Database>, SchemaError> {
    let url: DatabaseUrl = url.parse().unwrap();
    let settings = DatabaseSettings {
        database_connections: 1,
        database_acquire_ms: 1000,
        database_work_ms: 5000,
        password_file: PasswordFile::default(),
    };
    Database::connect(&url, &settings, &MIGRATORS, &CancellationToken::new()).await
}

#[tokio::test]
async fn a_pooler_that_would_mix_up_the_statements_of_its_clients_is_refused_with_the_ways_out() {
    let Some(pooler) = pooler(|version| version < CARRIES, "transaction").await else { return };
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let refused = connect(&pooler.url_for("order_service", database.name())).await.unwrap_err().to_string();
    for way in ["1.21", "max_prepared_statements", "pool_mode = session", "the database itself"] {
        assert!(refused.contains(way), "{refused}");
    }
}

#[tokio::test]
async fn shared_sessions_whose_isolation_is_not_read_committed_are_refused_with_the_way_out() {
    let Some(pooler) = pooler(|version| version >= CARRIES, "transaction").await else { return };
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let pool = database.pool().await;
    let mut set = QueryBuilder::<Postgres>::new("ALTER DATABASE ");
    set.push(database.name()).push(" SET default_transaction_isolation = 'repeatable read'");
    set.build().persistent(false).execute(&pool).await.unwrap();
    let refused = connect(&pooler.url_for("order_service", database.name())).await.unwrap_err().to_string();
    assert!(
        refused.contains("ALTER ROLE order_service SET default_transaction_isolation = 'read committed'"),
        "{refused}"
    );
}

/// Its lock would be given to another client, and stay when the command has ended.
#[tokio::test]
async fn behind_a_pooler_that_shares_sessions_nobody_erases_or_resends() {
    let Some(pooler) = pooler(|version| version >= CARRIES, "transaction").await else { return };
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let url = pooler.url_for("orders_owner", database.name());
    let erase = ["erase-customer", "ann", "--by", "bob", "--reason", "request 12"];
    let resend = [
        "resend",
        "--subscription",
        "inventory",
        "--receiver",
        "http://127.0.0.1:1",
        "--since",
        "2020-01-01T00:00:00Z",
        "--by",
        "bob",
        "--reason",
        "restored",
    ];
    for command in [&erase[..], &resend] {
        let output = run(&[command, &["--database-url", &url]].concat()).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("a pooler shares its sessions: name the database itself"), "{said}");
    }
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database =
        (SELECT oid FROM pg_database WHERE datname = current_database())";
    assert_eq!(sqlx::query_scalar::<_, i64>(locks).fetch_one(&database.pool().await).await.unwrap(), 0);
}
