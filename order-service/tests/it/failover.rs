//! A database whose server changes: it can only read, it moves to another host, or its standby is away.

use std::time::Duration;

use chassis::{Database, DatabaseSettings, DatabaseUrl, PasswordFile};
use order_service::MIGRATORS;
use proto::orders::v1::{CreateOrderRequest, GetOrderRequest};
use sqlx::{Postgres, QueryBuilder};
use testkit::{OwnServer, TestDatabase};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::service::{ONE_ORDER, Service, Written, eventually, order, order_once, refusal};

/// Repeats the call until it succeeds, and returns how often it failed.
async fn place_in_the_end(service: &Service, request: &CreateOrderRequest) -> usize {
    for failed in 0..200 {
        match service.orders().create_order(request.clone()).await {
            Ok(_) => return failed,
            Err(status) => refusal::<()>(Err(status)).asks_to_retry(),
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("the order is not placed")
}

#[tokio::test]
async fn writes_work_again_at_once_when_old_sessions_can_only_read_and_new_ones_can_write() {
    let Some(server) = OwnServer::start().await else { return };
    let service = Service::start_on(server.database("orders_owner", &MIGRATORS).await, &[]).await;
    // Many sessions, all of which will be able to read only.
    let calls = (0..50).map(|_| service.place(order()));
    futures_util::future::join_all(calls).await;
    server.execute("ALTER ROLE order_service SET default_transaction_read_only = off").await;
    server.set("default_transaction_read_only = on").await;

    let begun = Instant::now();
    let failed = place_in_the_end(&service, &order_once()).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(failed <= 2, "{failed} calls failed");
    assert_eq!(service.health().await, Some(ServingStatus::Serving));
    service.end().await;
}

#[tokio::test]
async fn health_is_not_serving_while_the_database_can_only_be_read() {
    let Some(server) = OwnServer::start().await else { return };
    let service = Service::start_on(server.database("orders_owner", &MIGRATORS).await, &[]).await;
    server.set("default_transaction_read_only = on").await;
    service.becomes(ServingStatus::NotServing).await;
    refusal(service.orders().create_order(order()).await).asks_to_retry();

    server.set("default_transaction_read_only = off").await;
    service.becomes(ServingStatus::Serving).await;
    service.place(order()).await;
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

#[tokio::test]
async fn a_changed_type_of_a_column_costs_a_connection_one_call() {
    let service = Service::start_with(&["--database-connections", "1"]).await;
    let placed = service.place(order()).await;
    let get = GetOrderRequest { order_id: placed.order_id.clone() };
    service.orders().get_order(get.clone()).await.unwrap();
    service.execute("ALTER TABLE orders ALTER customer_id TYPE varchar(1000)").await;

    refusal(service.orders().get_order(get.clone()).await).asks_to_retry();
    for _ in 0..5 {
        assert_eq!(service.orders().get_order(get.clone()).await.unwrap().into_inner(), placed);
    }
    service.end().await;
}

/// It reads the order in the transaction of a group, which as a whole does not fail.
#[tokio::test]
async fn a_changed_type_of_a_column_costs_a_repeated_call_one_attempt() {
    let service = Service::start_with(&["--database-connections", "1"]).await;
    let request = order_once();
    let placed = service.place(request.clone()).await;
    assert_eq!(service.place(request.clone()).await, placed);
    service.execute("ALTER TABLE orders ALTER customer_id TYPE varchar(1000)").await;

    let failed = place_in_the_end(&service, &request).await;
    assert!(failed <= 1, "{failed} calls failed");
    service.end().await;
}

#[tokio::test]
async fn of_several_hosts_the_one_that_can_write_is_used_and_followed() {
    let (Some(one), Some(other)) = (OwnServer::start().await, OwnServer::start().await) else { return };
    let database = one.database("orders_owner", &MIGRATORS).await;
    // The same name and schema on the other server, as after a replication.
    let copy = other.database("orders_owner", &MIGRATORS).await;
    let name = copy.name().to_owned();
    drop(copy.pool().await);
    other.execute(&format!("ALTER DATABASE {name} RENAME TO {}", database.name())).await;
    other.set("default_transaction_read_only = on").await;
    let hosts = [&other, &one].map(OwnServer::address);
    let url = format!("postgres://order_service:order_service@127.0.0.1:1,{}/{}", hosts.join(","), database.name());
    let url = format!("{url}?target_session_attrs=read-write");
    let service = Service::start_on(database, &["--database-url", &url]).await;
    service.place(order()).await;
    assert_eq!(service.written().await, ONE_ORDER);

    other.set("default_transaction_read_only = off").await;
    one.set("default_transaction_read_only = on").await;
    let failed = place_in_the_end(&service, &order_once()).await;
    assert!(failed <= 2, "{failed} calls failed");
    // The first server, whose pool this is, has no more orders.
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

async fn sessions(service: &Service) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'order_service'";
    sqlx::query_scalar(count).fetch_one(&service.pool).await.unwrap()
}

#[tokio::test]
async fn while_a_synchronous_standby_is_away_orders_are_refused_at_once_and_no_sessions_pile_up() {
    let Some(server) = OwnServer::start().await else { return };
    let flags = ["--writers", "2", "--database-work-ms", "1000", "--database-acquire-ms", "500"];
    let service = Service::start_on(server.database("orders_owner", &MIGRATORS).await, &flags).await;
    let before = sessions(&service).await;
    server.take_standby_away().await;
    let requests: Vec<_> = (0..10).map(|_| order_once()).collect();
    let calls = requests.iter().map(|request| async {
        refusal(service.orders().create_order(request.clone()).await).asks_to_retry();
    });
    futures_util::future::join_all(calls).await;

    for _ in 0..40 {
        let begun = Instant::now();
        refusal(service.orders().create_order(requests[0].clone()).await).asks_to_retry();
        assert!(begun.elapsed() < Duration::from_millis(400), "refused after {:?}", begun.elapsed());
        sleep(Duration::from_millis(50)).await;
    }
    service.becomes(ServingStatus::NotServing).await;
    // The writers, the probe of health, and the one that asks for them.
    let now = sessions(&service).await;
    assert!(now <= before + 4, "{before} sessions became {now}");

    server.need_no_standby().await;
    for request in &requests {
        place_in_the_end(&service, request).await;
    }
    service.becomes(ServingStatus::Serving).await;
    assert_eq!(service.written().await, Written { orders: 10, items: 20, events: 10 });
    service.end().await;
}

/// After a crash the server shows commits that no standby has.
#[tokio::test]
async fn a_repeated_call_is_not_acknowledged_before_the_standby_has_its_order() {
    let Some(server) = OwnServer::start().await else { return };
    let service =
        Service::start_on(server.database("orders_owner", &MIGRATORS).await, &["--database-work-ms", "1000"]).await;
    let request = order_once();
    let placed = service.place(request.clone()).await;
    let cancel_id = order_once().request_id;
    let cancelled = service.place(order()).await;
    service.cancel(&cancelled.order_id, &cancel_id).await.unwrap();

    server.take_standby_away().await;
    refusal(service.orders().create_order(request.clone()).await).asks_to_retry();
    refusal(service.cancel(&cancelled.order_id, &cancel_id).await).asks_to_retry();
    assert_eq!(service.get(&placed.order_id).await, placed, "orders can be read all the time");

    server.need_no_standby().await;
    place_in_the_end(&service, &request).await;
    assert_eq!(service.place(request).await, placed);
    eventually("the cancellation is acknowledged", async || {
        service.cancel(&cancelled.order_id, &cancel_id).await.is_ok()
    })
    .await;
    service.end().await;
}

/// What a role, a database or a server may say, and what work relies on.
#[tokio::test]
async fn sessions_have_the_settings_that_work_relies_on_whatever_the_defaults_of_the_role() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let pool = database.pool().await;
    for setting in [
        "default_transaction_isolation = 'serializable'",
        "search_path = 'nowhere, public, pg_temp'",
        "lock_timeout = '1ms'",
        "statement_timeout = '700ms'",
        "synchronous_commit = off",
        "enable_seqscan = on",
        "timezone = 'Asia/Tokyo'",
    ] {
        let mut set = QueryBuilder::<Postgres>::new("ALTER ROLE order_service IN DATABASE ");
        set.push(database.name()).push(" SET ").push(setting);
        set.build().persistent(false).execute(&pool).await.unwrap();
    }
    let url: DatabaseUrl = database.url_as("order_service").parse().unwrap();
    let settings = DatabaseSettings {
        database_connections: 1,
        database_acquire_ms: 1000,
        database_work_ms: 5000,
        password_file: PasswordFile::default(),
    };
    let connected = Database::connect(&url, &settings, &MIGRATORS, &CancellationToken::new()).await;
    let database = connected.unwrap().unwrap();
    let read = "SELECT concat_ws(', ', current_setting('transaction_isolation'), current_setting('search_path'),
        current_setting('lock_timeout'), current_setting('statement_timeout'), current_setting('synchronous_commit'),
        current_setting('enable_seqscan'), current_setting('timezone'))";
    let told: Result<String, sqlx::Error> =
        database.run(move |connection| Box::pin(sqlx::query_scalar(read).fetch_one(connection))).await;
    assert_eq!(told.unwrap(), "read committed, public, 0, 4500ms, on, off, UTC");
}

#[tokio::test]
async fn a_setting_in_the_url_itself_holds() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let url = format!("{}?options=-c%20lock_timeout%3D7s", database.url_as("order_service"));
    let url: DatabaseUrl = url.parse().unwrap();
    let mut connection = url.connect().await.unwrap();
    let told: String = sqlx::query_scalar("SHOW lock_timeout").fetch_one(&mut connection).await.unwrap();
    assert_eq!(told, "7s");
}
