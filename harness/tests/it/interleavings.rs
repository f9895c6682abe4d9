//! The creation of an order, its cancellation and the replies, in every sequence in which they can happen. There is no relay:
//! the test delivers the events one by one, in the sequence that it tests.

use harness::{
    audit::audit,
    replay::available,
    system::{Service, stop},
    target::Target,
};
use proto::{
    events::v1::{DeliverRequest, Event, Outcome, event_receiver_client::EventReceiverClient},
    orders::v1::{CancelOrderRequest, CreateOrderRequest, GetOrderRequest, OrderItem, OrderStatus},
};
use sqlx::{FromRow, PgPool, types::time::OffsetDateTime};
use testkit::processes::Process;
use tonic::{Code, transport::Channel};
use uuid::Uuid;

use crate::site::Site;

/// An item of the demo stock.
const SKU: &str = "LAST-OF-ITS-KIND";
const STOCK: i64 = 3;

/// A step that can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The customer cancels.
    Cancel,
    /// The next event of the order reaches inventory.
    Tell,
    /// The same, but the relay dies before it deletes the event.
    TellAndForget,
    /// The next reply reaches order-service.
    Answer,
    /// The same, but the relay dies before it deletes the reply.
    AnswerAndForget,
}

struct System {
    target: Target,
    orders: PgPool,
    inventory: PgPool,
    processes: Vec<Process>,
    _site: Site,
}

#[derive(FromRow)]
struct Row {
    event_id: Uuid,
    event_type: String,
    sequence: i32,
    payload: Vec<u8>,
    created_at: OffsetDateTime,
}

impl System {
    async fn start() -> Self {
        // On a busy machine it may take longer to connect than a call waits for a connection by default.
        let site = Site::prepare(&[("DATABASE_ACQUIRE_MS", "20000")]).await;
        let layout = &site.layout;
        let processes =
            vec![layout.start(Service::Inventory).await.unwrap(), layout.start(Service::Orders).await.unwrap()];
        Self {
            target: layout.target().unwrap(),
            orders: site.orders.pool().await,
            inventory: site.inventory.pool().await,
            processes,
            _site: site,
        }
    }

    async fn place(&self, quantity: i32) -> Uuid {
        let request = CreateOrderRequest {
            request_id: Uuid::new_v4().into(),
            customer_id: "ann".into(),
            currency_code: "EUR".into(),
            items: vec![OrderItem { sku: SKU.into(), quantity, unit_price_minor: 1 }],
        };
        self.target.orders().unwrap().create_order(request).await.unwrap().into_inner().order_id.parse().unwrap()
    }

    async fn status(&self, order_id: Uuid) -> OrderStatus {
        let request = GetOrderRequest { order_id: order_id.into() };
        self.target.orders().unwrap().get_order(request).await.unwrap().into_inner().status()
    }

    /// The steps that can happen next to the order; none after it was cancelled and everything is delivered.
    async fn possible(&self, order_id: Uuid, history: &[Step]) -> Vec<Step> {
        let mut steps = Vec::new();
        if !history.contains(&Step::Cancel) {
            steps.push(Step::Cancel);
        }
        // Once each: a third delivery is no different from a second one.
        for (outbox, once, twice) in
            [(&self.orders, Step::Tell, Step::TellAndForget), (&self.inventory, Step::Answer, Step::AnswerAndForget)]
        {
            if next_event(outbox, order_id).await.is_some() {
                steps.push(once);
                if !history.contains(&twice) {
                    steps.push(twice);
                }
            }
        }
        steps
    }

    async fn take(&self, step: Step, order_id: Uuid) {
        match step {
            Step::Cancel => self.cancel(order_id).await,
            Step::Tell => deliver(&self.orders, self.target.receiver().unwrap(), order_id, true).await,
            Step::TellAndForget => deliver(&self.orders, self.target.receiver().unwrap(), order_id, false).await,
            Step::Answer => deliver(&self.inventory, self.target.reply_receiver().unwrap(), order_id, true).await,
            Step::AnswerAndForget => {
                deliver(&self.inventory, self.target.reply_receiver().unwrap(), order_id, false).await;
            }
        }
    }

    /// Only an order whose rejection is known cannot be cancelled.
    async fn cancel(&self, order_id: Uuid) {
        let before = self.status(order_id).await;
        let request = CancelOrderRequest { request_id: String::new(), order_id: order_id.into() };
        let cancelled = self.target.orders().unwrap().cancel_order(request).await;
        match before {
            OrderStatus::Rejected => assert_eq!(cancelled.unwrap_err().code(), Code::FailedPrecondition),
            _ => assert_eq!(cancelled.unwrap().into_inner().status(), OrderStatus::Cancelled),
        }
    }
}

/// The only event of the order that a relay may deliver: the first one left.
async fn next_event(outbox: &PgPool, order_id: Uuid) -> Option<Row> {
    sqlx::query_as(
        "SELECT event_id, event_type, sequence, payload, created_at FROM outbox
        WHERE aggregate_id = $1 ORDER BY sequence LIMIT 1",
    )
    .bind(order_id)
    .fetch_optional(outbox)
    .await
    .unwrap()
}

async fn deliver(outbox: &PgPool, mut receiver: EventReceiverClient<Channel>, order_id: Uuid, delete: bool) {
    let row = next_event(outbox, order_id).await.expect("an event to be delivered");
    let event = Event {
        id: row.event_id.into(),
        r#type: row.event_type,
        subject: order_id.into(),
        sequence: row.sequence.into(),
        time: Some(prost_types::Timestamp { seconds: row.created_at.unix_timestamp(), nanos: 0 }),
        data: row.payload.into(),
        ..Event::default()
    };
    let request = DeliverRequest { events: vec![event] };
    let outcome = receiver.deliver(request).await.unwrap().into_inner().results[0].outcome();
    assert!(matches!(outcome, Outcome::Applied | Outcome::Duplicate), "{outcome:?}");
    if delete {
        sqlx::query("DELETE FROM outbox WHERE event_id = $1").bind(row.event_id).execute(outbox).await.unwrap();
    }
}

/// Runs through every history of an order of this size, and returns how many there are.
async fn every_history(system: &System, quantity: i32) -> usize {
    let mut histories = 0;
    let mut unfinished: Vec<Vec<Step>> = vec![Vec::new()];
    while let Some(prefix) = unfinished.pop() {
        let order_id = system.place(quantity).await;
        let mut history = Vec::new();
        for step in &prefix {
            system.take(*step, order_id).await;
            history.push(*step);
        }
        // Follows the first branch to its end, and keeps the others for later.
        loop {
            let mut possible = system.possible(order_id, &history).await.into_iter();
            let Some(step) = possible.next() else { break };
            unfinished.extend(possible.map(|other| [history.as_slice(), &[other]].concat()));
            system.take(step, order_id).await;
            history.push(step);
        }
        assert_eq!(available(&system.target, SKU).await.unwrap(), STOCK, "the stock is back after {history:?}");
        let at = |steps: &[Step]| history.iter().position(|step| steps.contains(step));
        let answered_first = at(&[Step::Answer, Step::AnswerAndForget]) < at(&[Step::Cancel]);
        let too_late = i64::from(quantity) > STOCK && answered_first;
        let expected = if too_late { OrderStatus::Rejected } else { OrderStatus::Cancelled };
        assert_eq!(system.status(order_id).await, expected, "{history:?}");
        histories += 1;
    }
    histories
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_that_crosses_anything_ends_cancelled_with_the_stock_back() {
    let system = System::start().await;
    let of_reserved = every_history(&system, 2).await;
    let of_rejected = every_history(&system, 4).await;
    println!("{of_reserved} histories of an order that is reserved, {of_rejected} of one that is not");
    assert!(of_reserved > 50 && of_rejected > 20, "{of_reserved}, {of_rejected}");
    let audit = audit(&system.target.databases).await.unwrap();
    assert_eq!(audit.findings, [""; 0]);
    assert_eq!(audit.orders, of_reserved + of_rejected);
    stop(system.processes).await.unwrap();
}
