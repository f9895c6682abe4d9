//! The command `erase-customer`.

use std::process::{Output, Stdio};

use prost::Message;
use proto::orders::v1::{CreateOrderRequest, Order, OrderCreated};
use sqlx::{PgPool, error::DatabaseError, types::time::OffsetDateTime};
use tokio::net::TcpListener;
use tonic::Code;
use uuid::Uuid;

use crate::{
    command_line::{order_service, run},
    service::{Service, eventually, order, order_once, refusal, reserved},
};

/// No word of any other text in the database.
const CUSTOMER: &str = "kowalczyk-4711";
const ERASED: &str = "(erased)";

fn arguments(url: &str) -> [&str; 8] {
    ["erase-customer", CUSTOMER, "--by", "bob", "--reason", "request 12", "--database-url", url]
}

async fn erase(service: &Service) -> Output {
    run(&arguments(&service.database.url_as("orders_owner"))).await
}

async fn erase_all(service: &Service) -> String {
    let Output { status, stdout, stderr } = erase(service).await;
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// The command could not erase all. Returns why.
fn is_held_up(output: Output) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
    assert!(stderr.starts_with("error: not all is erased: ") && stderr.ends_with("repeat the command\n"), "{stderr}");
    stderr
}

/// Each run of the command: by whom, why, orders, events, and whether nothing was left.
async fn record(service: &Service) -> Vec<(String, String, i64, i64, bool)> {
    let record =
        "SELECT done_by, reason, orders, events, finished_at IS NOT NULL FROM order_erasures ORDER BY erasure_id";
    sqlx::query_as(record).fetch_all(&service.pool).await.unwrap()
}

fn run_of(orders: i64, events: i64, finished: bool) -> (String, String, i64, i64, bool) {
    ("bob".into(), "request 12".into(), orders, events, finished)
}

async fn place(service: &Service) -> Order {
    service.place(CreateOrderRequest { customer_id: CUSTOMER.into(), ..order() }).await
}

/// Its event is delivered, and inventory has answered.
async fn place_settled(service: &Service) -> Order {
    let placed = place(service).await;
    execute(service, "DELETE FROM outbox WHERE aggregate_id = $1", &placed).await;
    assert_eq!(service.deliver(&[reserved(&placed.order_id)]).await, ["APPLIED"]);
    service.get(&placed.order_id).await
}

async fn execute(service: &Service, sql: &'static str, of: &Order) {
    let changed = sqlx::query(sql).bind(of.order_id.parse::<Uuid>().unwrap()).execute(&service.pool).await.unwrap();
    assert!(changed.rows_affected() > 0, "{sql}");
}

/// As a relay leaves an event that was refused.
async fn mark_dead(service: &Service, of: &Order) {
    let dead =
        "UPDATE outbox SET visible_at = 'infinity', last_error = 'refused' WHERE aggregate_id = $1 AND sequence = 1";
    execute(service, dead, of).await;
}

/// As `outbox-relay dead discard` does.
async fn discard(service: &Service, of: &Order) {
    let discard = "WITH given_up AS (DELETE FROM outbox WHERE aggregate_id = $1 AND sequence = 1 RETURNING *)
        INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type,
            payload, last_error, discarded_by, reason)
        SELECT event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload, last_error,
            'bob', 'given up'
        FROM given_up";
    execute(service, discard, of).await;
}

/// A cancelled order whose first event was discarded.
async fn place_discarded(service: &Service) -> Order {
    let placed = place(service).await;
    mark_dead(service, &placed).await;
    discard(service, &placed).await;
    service.cancel(&placed.order_id, "").await.unwrap();
    service.get(&placed.order_id).await
}

/// What the discarded event says when it is restored, as the relay does that.
async fn restore(service: &Service, of: &Order) -> OrderCreated {
    let relay = PgPool::connect(&service.database.url_as("outbox_relay")).await.unwrap();
    let restore = "SELECT outbox_restore(event_id, NULL, 'bob') FROM outbox_discarded WHERE aggregate_id = $1";
    let order_id: Uuid = of.order_id.parse().unwrap();
    let restored: i64 = sqlx::query_scalar(restore).bind(order_id).fetch_one(&relay).await.unwrap();
    assert_eq!(restored, 1);
    let payload = "SELECT payload FROM outbox WHERE aggregate_id = $1 AND sequence = 1 AND visible_at = 'infinity'";
    let payload: Vec<u8> = sqlx::query_scalar(payload).bind(order_id).fetch_one(&relay).await.unwrap();
    OrderCreated::decode(payload.as_slice()).unwrap()
}

#[tokio::test]
async fn no_table_names_an_erased_customer_and_orders_and_discarded_events_can_still_be_used() {
    let service = Service::start().await;
    let other = service.place(order()).await;
    let (settled, discarded) = (place_settled(&service).await, place_discarded(&service).await);
    assert_eq!(service.database.tables_that_hold(CUSTOMER).await, ["orders", "outbox_discarded"]);
    service.execute("ANALYZE").await;
    assert!(service.database.statistics_hold(CUSTOMER).await);

    let output = erase_all(&service).await;
    assert!(output.contains("erased from 2 orders and 1 discarded events: erasure 1"), "{output}");
    assert_eq!(service.database.tables_that_hold(CUSTOMER).await, [""; 0]);
    assert!(!service.database.statistics_hold(CUSTOMER).await);
    assert_eq!(service.newest_of(CUSTOMER).await, None);
    for placed in [&settled, &discarded] {
        assert_eq!(service.get(&placed.order_id).await, Order { customer_id: ERASED.into(), ..placed.clone() });
    }
    assert_eq!(service.get(&other.order_id).await, other);
    assert_eq!(record(&service).await, [run_of(2, 1, true)]);

    let Order { order_id, currency_code, items, total_minor, .. } = discarded.clone();
    let expected = OrderCreated { order_id, customer_id: ERASED.into(), currency_code, items, total_minor };
    assert_eq!(restore(&service, &discarded).await, expected);
    service.end().await;
}

/// Of an outbox that is empty by then, PostgreSQL would keep them for ever.
#[tokio::test]
async fn no_samples_are_taken_of_payloads() {
    let service = Service::start().await;
    let waiting = place(&service).await;
    let discarded = place_discarded(&service).await;
    assert_ne!(waiting.order_id, discarded.order_id);
    service.execute("ANALYZE").await;
    let sampled = "SELECT array_agg(DISTINCT tablename::text ORDER BY tablename::text)
        FROM pg_stats WHERE tablename IN ('outbox', 'outbox_discarded') AND ($1 OR attname = 'payload')";
    let sampled = async |all: bool| -> Option<Vec<String>> {
        sqlx::query_scalar(sampled).bind(all).fetch_one(&service.pool).await.unwrap()
    };
    assert_eq!(sampled(true).await.unwrap(), ["outbox", "outbox_discarded"]);
    assert_eq!(sampled(false).await, None);
    service.end().await;
}

#[tokio::test]
async fn orders_that_have_to_wait_are_left_whole_and_a_later_run_erases_them() {
    let service = Service::start().await;
    let (settled, pending, dead) = (place_settled(&service).await, place(&service).await, place(&service).await);
    let waiting = place(&service).await;
    mark_dead(&service, &dead).await;
    for settling in [&dead, &waiting] {
        service.cancel(&settling.order_id, "").await.unwrap();
    }
    execute(&service, "DELETE FROM outbox WHERE aggregate_id = $1", &pending).await;

    let why = is_held_up(erase(&service).await);
    assert!(why.contains("that still name the customer: 3, such as "), "{why}");
    for part in [
        "PENDING: 1,",
        "waits: 1,",
        "with a dead one: 1;",
        "dead list",
        "until relays have delivered",
        "until the orders are settled",
    ] {
        assert!(why.contains(part), "{part} in {why}");
    }
    let customer = async |order: &Order| service.get(&order.order_id).await.customer_id;
    assert_eq!(customer(&settled).await, ERASED);
    for left in [&pending, &dead, &waiting] {
        assert_eq!(customer(left).await, CUSTOMER);
    }

    discard(&service, &dead).await;
    execute(&service, "DELETE FROM outbox WHERE aggregate_id = $1 AND sequence = 1", &waiting).await;
    assert_eq!(service.deliver(&[reserved(&pending.order_id)]).await, ["APPLIED"]);
    erase_all(&service).await;
    assert_eq!(service.database.tables_that_hold(CUSTOMER).await, [""; 0]);
    // The event that tells of a cancellation names nobody, and still waits.
    assert_eq!(service.events_of(&waiting.order_id).await, ["orders.v1.OrderCancelled"]);
    erase_all(&service).await;
    assert_eq!(record(&service).await, [run_of(1, 0, false), run_of(3, 1, true), run_of(0, 0, true)]);
    service.end().await;
}

/// The order does not tell any more whether the call is a repeated one.
#[tokio::test]
async fn a_call_that_is_repeated_after_the_erasure_places_nothing_and_tells_nothing() {
    let service = Service::start().await;
    let mut request = order_once();
    request.customer_id = CUSTOMER.into();
    let placed = service.place(request.clone()).await;
    let cancellation = Uuid::new_v4().to_string();
    service.cancel(&placed.order_id, &cancellation).await.unwrap();
    execute(&service, "DELETE FROM outbox WHERE aggregate_id = $1", &placed).await;
    erase_all(&service).await;

    let written = service.written().await;
    let refused = refusal(service.orders().create_order(request).await);
    refused.is(Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert!(![ERASED, CUSTOMER, &placed.order_id].iter().any(|told| refused.text.contains(told)), "{refused:?}");
    assert_eq!(service.written().await, written);
    let cancelled = service.cancel(&placed.order_id, &cancellation).await.unwrap().into_inner();
    assert_eq!(cancelled.customer_id, ERASED);
    service.end().await;
}

#[tokio::test]
async fn a_customer_who_orders_again_is_a_new_one() {
    let service = Service::start().await;
    let erased = place_settled(&service).await;
    erase_all(&service).await;
    let new = place(&service).await;
    assert_eq!(service.newest_of(CUSTOMER).await.unwrap().order_id, new.order_id);
    assert_eq!(service.get(&erased.order_id).await.customer_id, ERASED);
    service.end().await;
}

/// Starts the command while a transaction holds what it needs, and ends that transaction once the command waits for it.
async fn erase_behind(service: &Service, held: sqlx::Transaction<'static, sqlx::Postgres>) -> Output {
    let url = service.database.url_as("orders_owner");
    let running = tokio::spawn(order_service(&arguments(&url)).output());
    waits(service).await;
    held.commit().await.unwrap();
    running.await.unwrap().unwrap()
}

async fn waits(service: &Service) {
    eventually("the command waits for a lock", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND usename = 'orders_owner' AND wait_event_type = 'Lock'";
        let waiting: i64 = sqlx::query_scalar(waiting).fetch_one(&service.pool).await.unwrap();
        waiting > 0
    })
    .await;
}

#[tokio::test]
async fn an_event_that_is_restored_meanwhile_keeps_its_order_as_it_was() {
    let service = Service::start().await;
    let placed = place_discarded(&service).await;
    let mut restoring = service.pool.begin().await.unwrap();
    let restore = sqlx::query("SELECT outbox_restore(event_id, NULL, 'bob') FROM outbox_discarded");
    restore.execute(&mut *restoring).await.unwrap();

    let why = is_held_up(erase_behind(&service, restoring).await);
    assert!(why.contains("waits: 0, with a dead one: 1;"), "{why}");
    assert_eq!(service.get(&placed.order_id).await.customer_id, CUSTOMER);
    discard(&service, &placed).await;
    erase_all(&service).await;
    assert_eq!(service.database.tables_that_hold(CUSTOMER).await, [""; 0]);
    service.end().await;
}

#[tokio::test]
async fn an_order_that_is_cancelled_meanwhile_is_erased_and_cancelled() {
    let service = Service::start().await;
    let placed = place_settled(&service).await;
    let mut cancelling = service.pool.begin().await.unwrap();
    let cancel = sqlx::query("UPDATE orders SET status = 'CANCELLED', cancelled_at = now()");
    cancel.execute(&mut *cancelling).await.unwrap();

    let output = erase_behind(&service, cancelling).await;
    assert!(output.status.success(), "{output:?}");
    let found = service.get(&placed.order_id).await;
    assert_eq!((found.customer_id.as_str(), found.status().as_str_name()), (ERASED, "ORDER_STATUS_CANCELLED"));
    service.end().await;
}

/// 1,203 orders of the customer, in three pieces, among 20,000 of others.
const MANY: &str = "INSERT INTO orders (order_id, customer_id, status, currency_code, total_minor)
    SELECT lpad(to_hex(n), 32, '0')::uuid, CASE WHEN n <= 1203 THEN 'kowalczyk-4711' ELSE 'other' END, 'CONFIRMED', 'EUR', 1
    FROM generate_series(1, 21203) AS n";

#[tokio::test]
async fn a_killed_command_has_erased_whole_pieces_and_its_record_and_the_next_does_the_rest() {
    let service = Service::start().await;
    service.execute(MANY).await;
    service.execute("ANALYZE orders").await;
    let mut held = service.pool.begin().await.unwrap();
    let hold = "SELECT 1 FROM orders WHERE order_id = '00000000-0000-0000-0000-0000000002bc' FOR UPDATE";
    sqlx::query(hold).execute(&mut *held).await.unwrap();
    let url = service.database.url_as("orders_owner");
    let mut killed = order_service(&arguments(&url)).stdout(Stdio::null()).spawn().unwrap();
    waits(&service).await;
    killed.kill().await.unwrap();
    assert_eq!(record(&service).await, [run_of(500, 0, false)]);
    held.rollback().await.unwrap();

    erase_all(&service).await;
    assert_eq!(record(&service).await, [run_of(500, 0, false), run_of(703, 0, true)]);
    assert_eq!(service.database.tables_that_hold(CUSTOMER).await, [""; 0]);
    service.end().await;
}

#[tokio::test]
async fn the_command_reads_no_whole_table_of_orders() {
    let service = Service::start().await;
    service.execute(MANY).await;
    service.execute("ANALYZE orders").await;
    erase_all(&service).await;
    let scans = "SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relname = 'orders'";
    let mut whole: i64 = 0;
    // Sessions report what they have done when they end, and not all versions of PostgreSQL at once.
    eventually("the command's scans are counted", async || {
        let by_index: i64;
        (whole, by_index) = sqlx::query_as(scans).fetch_one(&service.pool).await.unwrap();
        by_index > 3
    })
    .await;
    assert_eq!(whole, 0);
    service.end().await;
}

#[tokio::test]
async fn a_record_that_would_name_the_customer_and_a_bad_id_are_refused() {
    let service = Service::start().await;
    let placed = place_settled(&service).await;
    let url = service.database.url_as("orders_owner");
    let naming = format!("{CUSTOMER} asked");
    let output = run(&["erase-customer", CUSTOMER, "--by", "bob", "--reason", &naming, "--database-url", &url]).await;
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("--reason") && !stderr.contains("--by") && !stderr.contains(CUSTOMER), "{stderr}");
    let output = run(&["erase-customer", ERASED, "--by", "bob", "--reason", "a", "--database-url", &url]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!((record(&service).await, service.get(&placed.order_id).await), (vec![], placed));
    service.end().await;
}

/// What serves callers can neither erase unrecorded nor change the record.
#[tokio::test]
async fn only_the_owner_has_the_record() {
    let service = Service::start().await;
    for role in ["order_service", "outbox_relay"] {
        let url = service.database.url_as(role);
        let pool = PgPool::connect(&url).await.unwrap();
        let read: Result<Vec<OffsetDateTime>, _> =
            sqlx::query_scalar("SELECT begun_at FROM order_erasures").fetch_all(&pool).await;
        let denied = read.unwrap_err();
        assert_eq!(denied.as_database_error().and_then(DatabaseError::code).as_deref(), Some("42501"), "{denied}");
    }
    let output = run(&arguments(&service.database.url_as("order_service"))).await;
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("run the command as the role that owns the database"), "{stderr}");
    service.end().await;
}

/// It may have read an order that is erased before it enqueues the event.
#[tokio::test]
async fn an_erasure_and_a_resend_refuse_to_run_at_the_same_time() {
    let service = Service::start().await;
    let placed = place_settled(&service).await;
    let refuses = |output: Output| {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("repeat the command when it has ended"), "{stderr}");
    };
    // A receiver that answers nobody holds up the resend, which has begun by then.
    let receiver = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = format!("http://{}", receiver.local_addr().unwrap());
    let resender = service.database.url_as("order_service");
    let resend = ["resend", "--subscription", "inventory", "--receiver", &at, "--by", "ann", "--reason", "a test"];
    let resend = [&resend[..], &["--database-url", &resender, "--orders", &placed.order_id]].concat();
    service
        .execute("INSERT INTO outbox_subscriptions (name, pattern, created_by) VALUES ('inventory', 'orders.v1.*', 'a test')")
        .await;
    let resending = order_service(&resend).kill_on_drop(true).spawn().unwrap();
    let (held, _) = receiver.accept().await.unwrap();
    refuses(erase(&service).await);
    drop((held, resending));
    let is_free = async || erase(&service).await.status.success();
    eventually("the lock of the killed resend is free", is_free).await;
    assert_eq!(service.get(&placed.order_id).await.customer_id, ERASED);

    place_settled(&service).await;
    let mut held = service.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM orders FOR UPDATE").execute(&mut *held).await.unwrap();
    let erasing = tokio::spawn(order_service(&arguments(&service.database.url_as("orders_owner"))).output());
    waits(&service).await;
    refuses(run(&resend).await);
    refuses(erase(&service).await);
    held.rollback().await.unwrap();
    assert!(erasing.await.unwrap().unwrap().status.success());
    service.end().await;
}
