//! The subcommand `replay`: delivers an event a second time, like a relay that did not receive the first reply.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use prost::{Message, Name};
use proto::{
    events::v1::{DeliverRequest, Event, Outcome},
    inventory::v1::GetStockRequest,
    orders::v1::{CreateOrderRequest, GetOrderRequest, OrderCreated, OrderItem},
};
use tokio::time::sleep;
use uuid::Uuid;

use crate::target::Target;

/// How long the relay may take to deliver.
const DELIVERY_LIMIT: Duration = Duration::from_secs(15);
const QUANTITY: i32 = 2;

/// Deliver one event twice, and check that stock is deducted once
///
/// Places an order and lets the relay deliver its event. Then delivers the same event again, and checks that the answer is
/// DUPLICATE and that the stock stays the same.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// SKU to order
    #[arg(long, default_value = "MUG")]
    sku: String,
    #[command(flatten)]
    target: Target,
}

/// The result of a replay.
#[derive(Clone, Debug)]
pub struct Replay {
    /// Id of the event that was delivered twice.
    pub event_id: Uuid,
    /// SKU of the order.
    pub sku: String,
    /// Stock before the order, after the relay's delivery, and after the second one.
    pub stock: [i64; 3],
    /// Outcome of the second delivery.
    pub second: Outcome,
}

impl Replay {
    /// # Errors
    /// If the second delivery was no duplicate, or if stock was not deducted exactly once.
    pub fn check(&self) -> Result<()> {
        let [before, after_first, after_second] = self.stock;
        ensure!(
            self.second == Outcome::Duplicate,
            "the outcome of the second delivery is {}",
            self.second.as_str_name()
        );
        ensure!(
            before - after_first == i64::from(QUANTITY) && after_second == after_first,
            "stock of {} went {before} → {after_first} → {after_second} for an order of {QUANTITY}",
            self.sku
        );
        Ok(())
    }
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    let replay = replay(&arguments.target, &arguments.sku).await?;
    replay.check()?;
    let [before, after_first, after_second] = replay.stock;
    println!(
        "replay: event {} delivered by the relay: APPLIED, {} {before} → {after_first}",
        replay.event_id, replay.sku
    );
    println!(
        "replay: the same event delivered again:  {}, {} {after_first} → {after_second}",
        name(replay.second),
        replay.sku
    );
    println!("replay: stock deducted once");
    Ok(ExitCode::SUCCESS)
}

/// The outcome without its prefix.
pub fn name(outcome: Outcome) -> &'static str {
    outcome.as_str_name().trim_start_matches("OUTCOME_")
}

/// Orders, waits for the relay's delivery, and delivers again. The stock is exact if nobody else orders this SKU meanwhile.
pub async fn replay(target: &Target, sku: &str) -> Result<Replay> {
    let before = available(target, sku).await?;
    let request = CreateOrderRequest {
        request_id: Uuid::new_v4().into(),
        customer_id: "replay".into(),
        currency_code: "EUR".into(),
        items: vec![OrderItem { sku: sku.into(), quantity: QUANTITY, unit_price_minor: 1250 }],
    };
    let order_id = target.orders()?.create_order(request).await?.into_inner().order_id;
    let event_id = wait_until_applied(target, order_id.parse()?).await?;
    let after_first = available(target, sku).await?;
    let second = deliver_again(target, &order_id, event_id).await?;
    let stock = [before, after_first, available(target, sku).await?];
    Ok(Replay { event_id, sku: sku.into(), stock, second })
}

/// Waits until the order's event is applied, and returns the event's id.
///
/// # Errors
/// If it takes too long.
pub async fn wait_until_applied(target: &Target, order_id: Uuid) -> Result<Uuid> {
    let mut inventory = target.databases.inventory().await?;
    let started = Instant::now();
    loop {
        let event_id = sqlx::query_scalar!(
            r#"-- replay: find effect
            SELECT event_id AS "event_id!" FROM reservations WHERE order_id = $1 AND event_id IS NOT NULL"#,
            order_id
        )
        .fetch_optional(&mut inventory)
        .await?;
        if let Some(event_id) = event_id {
            return Ok(event_id);
        }
        ensure!(started.elapsed() < DELIVERY_LIMIT, "order {order_id} was not delivered within {DELIVERY_LIMIT:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The outbox has deleted the event, so it is rebuilt from the order, with the same id.
async fn deliver_again(target: &Target, order_id: &str, event_id: Uuid) -> Result<Outcome> {
    let event = event_again(target, order_id, event_id).await?;
    let response = target.receiver()?.deliver(DeliverRequest { events: vec![event] }).await?.into_inner();
    Ok(response.results.first().context("the delivery of one event has no result")?.outcome())
}

/// The event of an order as it was delivered.
pub async fn event_again(target: &Target, order_id: &str, event_id: Uuid) -> Result<Event> {
    let order = target.orders()?.get_order(GetOrderRequest { order_id: order_id.into() }).await?.into_inner();
    let created = OrderCreated {
        order_id: order.order_id,
        customer_id: order.customer_id,
        currency_code: order.currency_code,
        items: order.items,
        total_minor: order.total_minor,
    };
    Ok(Event {
        id: event_id.into(),
        source: "order-service".into(),
        r#type: OrderCreated::full_name(),
        subject: order_id.into(),
        sequence: 1,
        time: order.create_time,
        data: created.encode_to_vec().into(),
        ..Event::default()
    })
}

/// The available stock of a SKU.
pub async fn available(target: &Target, sku: &str) -> Result<i64> {
    Ok(target.inventory()?.get_stock(GetStockRequest { sku: sku.into() }).await?.into_inner().available)
}
