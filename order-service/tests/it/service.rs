//! The service under test, the requests that callers send, and functions that read its answers.

use std::{fmt::Debug, net::SocketAddr, time::Duration};

use clap::Parser;
use order_service::{MIGRATORS, Settings};
use prost::{Message, Name};
use proto::{
    events::v1::{DeliverRequest, Event, EventResult, event_receiver_client::EventReceiverClient},
    inventory::v1::{Shortage, ShortageReason, StockRejected, StockReleased, StockReserved},
    orders::v1::{
        CancelOrderRequest, CreateOrderRequest, GetOrderRequest, ListOrdersRequest, Order, OrderItem,
        order_service_client::OrderServiceClient, order_service_server::SERVICE_NAME,
    },
};
use sqlx::{PgPool, Postgres, Transaction};
use testkit::TestDatabase;
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;
use uuid::Uuid;

/// The timeout for anything that must happen. PostgreSQL ends a forgotten transaction of the service's role later, after
/// 10 s, so no test passes because of that.
pub(crate) const LIMIT: Duration = Duration::from_secs(8);
/// On a busy machine fifty calls at once wait longer for their connections than by default.
const PATIENT: [&str; 2] = ["--database-acquire-ms", "8000"];
/// As with many replicas: only the database keeps batches of replies apart. Nobody has to be told of the end.
const ALWAYS: [&str; 4] = ["--batches-at-once", "100", "--lame-duck-seconds", "0"];

#[derive(Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
}

pub(crate) fn settings(database: &TestDatabase, flags: &[&str]) -> Settings {
    let url = database.url_as("order_service");
    let given = ["order-service", "--database-url", &url];
    Cli::parse_from(given.iter().chain(&ALWAYS).chain(flags)).settings
}

/// For callers, and for relays.
pub(crate) async fn sockets() -> [TcpListener; 2] {
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    [bind().await, bind().await]
}

/// The service, served by this process, with a database of its own.
pub(crate) struct Service {
    pub(crate) database: TestDatabase,
    /// The database, as the superuser.
    pub(crate) pool: PgPool,
    pub(crate) address: SocketAddr,
    /// To what callers use.
    pub(crate) channel: Channel,
    /// To what relays use.
    pub(crate) events: Channel,
    shutdown: CancellationToken,
    running: JoinHandle<Result<(), chassis::RunError>>,
}

impl Service {
    pub(crate) async fn start() -> Self {
        Self::start_with(&PATIENT).await
    }

    pub(crate) async fn start_with(flags: &[&str]) -> Self {
        Self::start_on(TestDatabase::create("orders_owner", &MIGRATORS).await, flags).await
    }

    /// Returns once the service serves.
    pub(crate) async fn start_on(database: TestDatabase, flags: &[&str]) -> Self {
        let sockets = sockets().await;
        let [address, events] = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(order_service::run(sockets, settings(&database, flags), shutdown.clone()));
        let channel = |address| Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        let (channel, events) = (channel(address), channel(events));
        let pool = database.pool().await;
        let service = Self { database, pool, address, channel, events, shutdown, running };
        service.becomes(ServingStatus::Serving).await;
        service
    }

    /// A second instance on the same database; the database sees another process. It ends with this one.
    pub(crate) async fn start_another(&self) -> OrderServiceClient<Channel> {
        let sockets = sockets().await;
        let address = sockets[0].local_addr().unwrap();
        tokio::spawn(order_service::run(sockets, settings(&self.database, &PATIENT), self.shutdown.clone()));
        OrderServiceClient::connect(format!("http://{address}")).await.unwrap()
    }

    pub(crate) fn orders(&self) -> OrderServiceClient<Channel> {
        OrderServiceClient::new(self.channel.clone())
    }

    pub(crate) async fn place(&self, request: CreateOrderRequest) -> Order {
        self.orders().create_order(request).await.unwrap().into_inner()
    }

    pub(crate) async fn get(&self, order_id: &str) -> Order {
        self.orders().get_order(GetOrderRequest { order_id: order_id.into() }).await.unwrap().into_inner()
    }

    /// The newest order in the customer's list.
    pub(crate) async fn newest_of(&self, customer_id: &str) -> Option<Order> {
        let request = ListOrdersRequest { customer_id: customer_id.into(), page_size: 1, page_token: String::new() };
        self.orders().list_orders(request).await.unwrap().into_inner().orders.pop()
    }

    pub(crate) async fn cancel(&self, order_id: &str, request_id: &str) -> Result<Response<Order>, Status> {
        let request = CancelOrderRequest { request_id: request_id.into(), order_id: order_id.into() };
        self.orders().cancel_order(request).await
    }

    /// Delivers replies of inventory as one batch. Returns the outcome of each: `APPLIED`, `DUPLICATE`, or `REJECTED` with the
    /// reason.
    pub(crate) async fn deliver(&self, events: &[Event]) -> Vec<String> {
        let request = DeliverRequest { events: events.to_vec() };
        let response = EventReceiverClient::new(self.events.clone()).deliver(request).await.unwrap();
        let outcome = |result: &EventResult| {
            let outcome = result.outcome().as_str_name().trim_start_matches("OUTCOME_");
            format!("{outcome} {}", result.reason).trim_end().to_owned()
        };
        response.into_inner().results.iter().map(outcome).collect()
    }

    /// The types of an order's events that wait for a relay, in sequence.
    pub(crate) async fn events_of(&self, order_id: &str) -> Vec<String> {
        let sql = "SELECT event_type FROM outbox WHERE aggregate_id = $1::uuid ORDER BY sequence";
        sqlx::query_scalar(sql).bind(order_id).fetch_all(&self.pool).await.unwrap()
    }

    /// The service's health by its name, if the server answers.
    pub(crate) async fn health(&self) -> Option<ServingStatus> {
        let request = HealthCheckRequest { service: SERVICE_NAME.to_owned() };
        let answer = HealthClient::new(self.channel.clone()).check(request).await;
        answer.ok().map(|answer| answer.into_inner().status())
    }

    pub(crate) async fn becomes(&self, status: ServingStatus) {
        eventually(&format!("health is {status:?}"), async || self.health().await == Some(status)).await;
    }

    /// How many orders, items and events are committed.
    pub(crate) async fn written(&self) -> Written {
        let (orders, items, events) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM order_items), (SELECT count(*) FROM outbox)",
        )
        .fetch_one(&self.pool)
        .await
        .unwrap();
        Written { orders, items, events }
    }

    pub(crate) async fn execute(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&self.pool).await.unwrap();
    }

    /// Holds up every call that reads or writes orders until the returned transaction ends.
    pub(crate) async fn lock_orders(&self) -> Transaction<'static, Postgres> {
        let mut lock = self.pool.begin().await.unwrap();
        sqlx::raw_sql("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
        lock
    }

    /// Returns once a session of the service waits for a lock.
    pub(crate) async fn waits_for_a_lock(&self) {
        eventually("a session of the service waits for a lock", async || {
            let waiting: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM pg_stat_activity
                WHERE datname = current_database() AND usename = 'order_service' AND wait_event_type = 'Lock'",
            )
            .fetch_one(&self.pool)
            .await
            .unwrap();
            waiting > 0
        })
        .await;
    }

    pub(crate) fn shut_down(&self) {
        self.shutdown.cancel();
    }

    /// Shuts down, and returns once the service has ended without an error.
    pub(crate) async fn end(self) {
        self.shut_down();
        timeout(LIMIT, self.running).await.expect("the service ends").unwrap().unwrap();
    }
}

#[derive(Debug, PartialEq)]
pub(crate) struct Written {
    pub(crate) orders: i64,
    pub(crate) items: i64,
    pub(crate) events: i64,
}

pub(crate) const NOTHING: Written = Written { orders: 0, items: 0, events: 0 };
/// What placing [`order`] once writes.
pub(crate) const ONE_ORDER: Written = Written { orders: 1, items: 2, events: 1 };

/// A valid order of two items.
pub(crate) fn order() -> CreateOrderRequest {
    CreateOrderRequest {
        request_id: String::new(),
        customer_id: "ann".into(),
        currency_code: "EUR".into(),
        items: vec![
            OrderItem { sku: "TEA".into(), quantity: 3, unit_price_minor: 250 },
            OrderItem { sku: "CUP".into(), quantity: 2, unit_price_minor: 1100 },
        ],
    }
}

/// The same order with a request id, so that repeated calls place it once.
pub(crate) fn order_once() -> CreateOrderRequest {
    CreateOrderRequest { request_id: Uuid::new_v4().into(), ..order() }
}

/// Inventory has reserved the whole order.
pub(crate) fn reserved(order_id: &str) -> Event {
    event(order_id, 1, &StockReserved { order_id: order_id.into() })
}

/// Inventory lacks an item of the order.
pub(crate) fn rejected(order_id: &str) -> Event {
    rejected_for(order_id, &["TEA"])
}

/// Inventory reports that it lacks these items of the order.
pub(crate) fn rejected_for(order_id: &str, skus: &[&str]) -> Event {
    let reason = ShortageReason::InsufficientStock.into();
    let shortage = |sku: &&str| Shortage { sku: (*sku).into(), reason, wanted: 3, available: 1 };
    let shortages = skus.iter().map(shortage).collect();
    event(order_id, 1, &StockRejected { order_id: order_id.into(), shortages })
}

/// Inventory has put the reserved stock back.
pub(crate) fn released(order_id: &str) -> Event {
    event(order_id, 2, &StockReleased { order_id: order_id.into() })
}

fn event<M: Message + Name>(order_id: &str, sequence: i64, message: &M) -> Event {
    let id = Uuid::now_v7();
    let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
    Event {
        id: id.into(),
        source: "inventory-service".into(),
        r#type: M::full_name(),
        subject: order_id.into(),
        sequence,
        time: Some(prost_types::Timestamp { seconds: seconds.cast_signed(), nanos: nanos.cast_signed() }),
        data: message.encode_to_vec().into(),
        ..Event::default()
    }
}

/// A refusal as a caller can act on it.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    pub(crate) reason: String,
    pub(crate) bad_fields: Vec<String>,
    pub(crate) retry_after: Option<Duration>,
    /// Message and details, as sent to the caller.
    pub(crate) text: String,
}

/// Reads a refusal, and checks that it has an `ErrorInfo` with this service as its domain.
pub(crate) fn refusal<T: Debug>(answer: Result<Response<T>, Status>) -> Refusal {
    let status = answer.expect_err("a refusal");
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "order-service");
    let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    Refusal {
        code: status.code(),
        reason: info.reason.clone(),
        bad_fields: violations.iter().map(|violation| violation.field.clone()).collect(),
        retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
        text: format!("{} {}", status.message(), String::from_utf8_lossy(status.details())),
    }
}

impl Refusal {
    pub(crate) fn is(&self, code: Code, reason: &str) {
        assert_eq!((self.code, self.reason.as_str()), (code, reason), "{self:?}");
    }

    /// The database was unavailable, and the caller is asked to retry.
    pub(crate) fn asks_to_retry(&self) {
        self.is(Code::Unavailable, "DATABASE_UNAVAILABLE");
        assert!(self.retry_after.is_some_and(|after| !after.is_zero()), "{self:?}");
    }
}

/// Returns once the condition holds. Panics if that takes longer than [`LIMIT`].
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, holds).await.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"));
}
