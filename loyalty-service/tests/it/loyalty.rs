//! Serves loyalty-service for one test, and calls it as relays and clients do.

use std::time::Duration;

use clap::Parser;
use loyalty_service::{MIGRATORS, Settings};
use prost::{Message, Name};
use prost_types::Timestamp;
use proto::{
    events::v1::{DeliverRequest, Event, event_receiver_client::EventReceiverClient},
    loyalty::v1::{GetBalanceRequest, loyalty_service_client::LoyaltyServiceClient},
    orders::v1::{OrderCancelled, OrderCreated},
};
use testkit::TestDatabase;
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

/// Far longer than the service takes to end: only one that hangs exceeds it.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
}

/// The running service and its database.
pub(crate) struct Loyalty {
    /// To what callers use.
    pub(crate) channel: Channel,
    /// To what relays use.
    pub(crate) events: Channel,
    pub(crate) database: TestDatabase,
    shutdown: CancellationToken,
    running: JoinHandle<Result<(), chassis::RunError>>,
}

impl Loyalty {
    /// Serves on a free port. The port is open at once, and calls wait until they are served.
    pub(crate) async fn serve(flags: &[&str]) -> Self {
        let database = TestDatabase::create("loyalty_owner", &MIGRATORS).await;
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let sockets = [bind().await, bind().await];
        let [api, events] = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
        let url = database.url_as("loyalty_service");
        let given = ["loyalty-service", "--database-url", &url, "--lame-duck-seconds", "0"];
        let settings = Cli::parse_from(given.iter().chain(flags)).settings;
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(loyalty_service::run(sockets, settings, shutdown.clone()));
        let connect =
            async |address| Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let (channel, events) = (connect(api).await, connect(events).await);
        Self { channel, events, database, shutdown, running }
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        timeout(LIMIT, self.running).await.expect("the service ends").unwrap().expect("it ends well");
    }

    /// Returns the outcome of each event: `APPLIED`, `DUPLICATE`, or `REJECTED` with the reason.
    pub(crate) async fn deliver<const N: usize>(&self, events: [&Event; N]) -> Result<Vec<String>, Status> {
        let request = DeliverRequest { events: events.into_iter().cloned().collect() };
        let response = EventReceiverClient::new(self.events.clone()).deliver(request).await?;
        let outcomes = response.into_inner().results.into_iter().map(|result| {
            let outcome = result.outcome().as_str_name().trim_start_matches("OUTCOME_");
            format!("{outcome} {}", result.reason).trim_end().to_owned()
        });
        Ok(outcomes.collect())
    }

    /// The customer's points, and the number of orders that earned them.
    pub(crate) async fn balance(&self, customer_id: &str) -> Result<(i64, i64), Status> {
        let request = GetBalanceRequest { customer_id: customer_id.into() };
        let balance = LoyaltyServiceClient::new(self.channel.clone()).get_balance(request).await?.into_inner();
        Ok((balance.points, balance.orders))
    }

    /// All rows of `points`, by their orders: points, the event that awarded, and the one that cancelled.
    pub(crate) async fn rows(&self) -> Vec<(Uuid, i64, Option<Uuid>, Option<Uuid>)> {
        let sql = "SELECT order_id, points, event_id, cancelled_by FROM points ORDER BY order_id";
        sqlx::query_as(sql).fetch_all(&self.database.pool().await).await.unwrap()
    }
}

/// The event of a new order of the customer.
pub(crate) fn created(customer_id: &str, total_minor: i64) -> Event {
    let order_id = Uuid::now_v7();
    let (order, customer_id) = (order_id.to_string(), customer_id.into());
    event(order_id, 1, &OrderCreated { order_id: order, customer_id, total_minor, ..OrderCreated::default() })
}

/// A new event that cancels the order of another event.
pub(crate) fn cancellation_of(created: &Event) -> Event {
    event(order_id_of(created), 2, &OrderCancelled { order_id: created.subject.clone() })
}

/// A new event about the order.
pub(crate) fn event<M: Message + Name>(order_id: Uuid, sequence: i64, message: &M) -> Event {
    let id = Uuid::now_v7();
    let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
    Event {
        id: id.to_string(),
        source: "order-service".into(),
        subject: order_id.to_string(),
        r#type: M::full_name(),
        sequence,
        time: Some(Timestamp { seconds: seconds.cast_signed(), nanos: nanos.cast_signed() }),
        data: message.encode_to_vec().into(),
        ..Event::default()
    }
}

pub(crate) fn id_of(event: &Event) -> Uuid {
    event.id.parse().unwrap()
}

pub(crate) fn order_id_of(event: &Event) -> Uuid {
    event.subject.parse().unwrap()
}
