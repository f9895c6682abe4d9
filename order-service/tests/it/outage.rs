//! A database that is down, overloaded or slow.

use std::{env, time::Duration};

use chassis::{Database, DatabaseSettings, PasswordFile};
use order_service::MIGRATORS;
use proto::orders::v1::{GetOrderRequest, ListOrdersRequest};
use sqlx::{Connection, PgConnection, QueryBuilder, postgres::PgConnectOptions, types::time::OffsetDateTime};
use testkit::{TestDatabase, postgres::Server};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    cancelled_callers::sessions_are_idle,
    service::{NOTHING, ONE_ORDER, Service, Written, eventually, order, order_once, refusal},
    wake_relays::{hear, listen},
};

/// Returns once the health probe has queried the database after this moment. The probe leaves no visible statement, but its
/// session was busy. No other session may be busy meanwhile.
async fn health_is_probed(service: &Service) {
    let now: OffsetDateTime = sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&service.pool).await.unwrap();
    eventually("health asks the database", async || {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
                AND usename = 'order_service' AND state = 'idle' AND state_change > $1)",
        )
        .bind(now)
        .fetch_one(&service.pool)
        .await
        .unwrap()
    })
    .await;
}

/// A connection to another database of the server: a session cannot close its own database.
async fn maintenance() -> PgConnection {
    Server::parse(&env::var("POSTGRES_URL").unwrap()).unwrap().connect().await.unwrap()
}

async fn allow_connections(service: &Service, allow: bool) {
    let mut statement = QueryBuilder::new("ALTER DATABASE ");
    statement.push(service.database.name()).push(" ALLOW_CONNECTIONS ").push(if allow { "true" } else { "false" });
    statement.build().persistent(false).execute(&mut maintenance().await).await.unwrap();
}

async fn take_database_down(service: &Service) {
    // Connected before: the test's pool is refused new connections too.
    let mut connection = service.pool.acquire().await.unwrap();
    allow_connections(service, false).await;
    let ended: Vec<bool> = sqlx::query_scalar(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
        WHERE datname = current_database() AND usename = 'order_service'",
    )
    .fetch_all(&mut *connection)
    .await
    .unwrap();
    assert!(!ended.is_empty() && ended.iter().all(|ended| *ended), "{ended:?}");
}

#[tokio::test]
async fn calls_are_asked_to_retry_while_the_database_is_down_and_succeed_once_it_is_up() {
    let service = Service::start().await;
    let mut listener = listen(&service, outbox::CHANNEL).await;
    let placed = service.place(order()).await;
    hear(&mut listener).await;

    take_database_down(&service).await;
    let request = order_once();
    let get = GetOrderRequest { order_id: placed.order_id.clone() };
    let list = ListOrdersRequest { customer_id: "ann".into(), ..Default::default() };
    refusal(service.orders().create_order(request.clone()).await).asks_to_retry();
    refusal(service.orders().get_order(get.clone()).await).asks_to_retry();
    refusal(service.orders().list_orders(list).await).asks_to_retry();
    service.becomes(ServingStatus::NotServing).await;

    allow_connections(&service, true).await;
    service.becomes(ServingStatus::Serving).await;
    assert_eq!(service.orders().get_order(get).await.unwrap().into_inner(), placed);
    service.place(request).await;
    assert_eq!(service.written().await, Written { orders: 2, items: 4, events: 2 });
    hear(&mut listener).await;
    service.end().await;
}

#[tokio::test]
async fn a_call_that_finds_no_free_connection_is_asked_to_retry_and_health_stays_serving() {
    let service = Service::start_with(&["--database-connections", "1", "--database-acquire-ms", "1000"]).await;
    let lock = service.lock_orders().await;
    let mut orders = service.orders();
    let first = tokio::spawn(async move { orders.create_order(order()).await });
    service.waits_for_a_lock().await;
    refusal(service.orders().create_order(order()).await).asks_to_retry();
    health_is_probed(&service).await;
    assert_eq!(service.health().await, Some(ServingStatus::Serving), "an overload is no outage");

    lock.rollback().await.unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

#[tokio::test]
async fn work_that_takes_too_long_is_cut_off_and_rolled_back_and_can_be_repeated() {
    let service = Service::start_with(&["--database-connections", "1", "--database-work-ms", "200"]).await;
    let lock = service.lock_orders().await;
    let request = order_once();
    refusal(service.orders().create_order(request.clone()).await).asks_to_retry();
    lock.rollback().await.unwrap();
    assert_eq!(service.written().await, NOTHING);

    service.place(request).await;
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

/// The server has the whole statement by then. If only the connection were cut, the statement would commit once the lock is
/// gone.
#[tokio::test]
async fn an_order_that_was_refused_for_taking_too_long_is_not_committed_later() {
    let service = Service::start_with(&["--database-connections", "1", "--database-work-ms", "500"]).await;
    // To prepare the statement on the only connection.
    service.place(order()).await;
    let lock = service.lock_orders().await;
    refusal(service.orders().create_order(order()).await).asks_to_retry();
    lock.rollback().await.unwrap();
    sessions_are_idle(&service).await;
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

/// A proxy to the server of `url` that delays the first byte of every connection. Returns the URL of the proxy.
async fn slow_proxy(url: &str, delay: Duration) -> String {
    let server = url.parse::<PgConnectOptions>().unwrap();
    let (host, port) = (server.get_host().to_owned(), server.get_port());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let host = host.clone();
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let mut server = TcpStream::connect((host, port)).await.unwrap();
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    let (before, after) = url.split_once('@').unwrap();
    let (_, database) = after.split_once('/').unwrap();
    format!("{before}@{proxy}/{database}")
}

async fn connect(url: &str, database_connections: u32, acquire_limit: Duration) -> Database {
    let database_acquire_ms = acquire_limit.as_millis().try_into().unwrap();
    let settings = DatabaseSettings {
        database_connections,
        database_acquire_ms,
        database_work_ms: 5000,
        password_file: PasswordFile::default(),
    };
    Database::connect(&url.parse().unwrap(), &settings, &MIGRATORS, &CancellationToken::new()).await.unwrap().unwrap()
}

/// As after an outage on a busy machine: if each attempt ended with the call that wanted it, none would ever succeed.
#[tokio::test]
async fn a_connection_is_made_even_if_that_takes_longer_than_a_call_may_wait() {
    let server = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let url = slow_proxy(&server.url_as("order_service"), Duration::from_millis(600)).await;
    let database = connect(&url, 2, Duration::from_millis(200)).await;

    let begun = || database.run::<(), sqlx::Error, _>(|connection| Box::pin(connection.ping()));
    assert!(matches!(begun().await, Err(sqlx::Error::PoolTimedOut)), "no call waits longer than it may");
    eventually("a later call finds the connection made", async || begun().await.is_ok()).await;
}

/// A connection that is kept for the next work would keep the transaction and its locks until then.
#[tokio::test]
async fn a_transaction_that_work_leaves_open_is_rolled_back_at_once() {
    let server = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let database = connect(&server.url_as("order_service"), 2, Duration::from_secs(5)).await;
    let leave_open = database.run::<(), sqlx::Error, _>(|connection| {
        Box::pin(async move {
            let mut tx = connection.begin().await?;
            sqlx::raw_sql("SELECT FROM orders FOR UPDATE").execute(&mut *tx).await?;
            Ok(())
        })
    });
    leave_open.await.unwrap();
    let mut lock = server.pool().await.begin().await.unwrap();
    sqlx::raw_sql("SET LOCAL lock_timeout = '3s'; LOCK TABLE orders").execute(&mut *lock).await.unwrap();
}

/// Each unit of work gets a connection, kept or from the pool, and no connection is lost.
#[tokio::test]
async fn work_that_exceeds_the_connections_waits_for_them() {
    const CALLERS: usize = 20;
    let server = TestDatabase::create("orders_owner", &MIGRATORS).await;
    for connections in [1, 2, 5] {
        let database = connect(&server.url_as("order_service"), connections, Duration::from_secs(5)).await;
        let mut callers = JoinSet::new();
        for caller in 0..CALLERS {
            let database = database.clone();
            callers.spawn(async move {
                for unit in 0..CALLERS {
                    // Some fail, and their connections go back to the pool.
                    let sql = if (caller + unit) % 4 == 0 { "SELECT 1 / 0" } else { "SELECT 1" };
                    let work = database.run::<_, sqlx::Error, _>(move |connection| {
                        Box::pin(async move { sqlx::raw_sql(sql).execute(connection).await })
                    });
                    let done = work.await;
                    assert!(!matches!(done, Err(sqlx::Error::PoolTimedOut)), "{connections} connections");
                }
            });
        }
        callers.join_all().await;
    }
}
