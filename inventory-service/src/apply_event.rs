//! Applies the events of orders to the stock, and answers them.

use std::collections::{BTreeMap, HashMap};

use outbox::{ApplyError, Envelope, Handler, NewEvent, Notifier, Refusal, TraceContext};
use proto::orders::v1::{OrderCancelled, OrderCreated};
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    release_stock::release_stock, reservations::Reservations, reserve_stock::reserve_stock, stock::Stock,
    write_batch::write_batch,
};

const SKU_BYTES_MAX: usize = 64;
/// Ten times what an order may have. The answer names every item that is short, and has to fit into an event, which the
/// outbox takes up to 1 MiB: one that does not would fail the whole batch, over and over.
const ITEMS_MAX: usize = 1000;

/// An event of an order.
#[derive(Clone, Debug)]
pub(crate) struct OrderEvent {
    pub(crate) event_id: Uuid,
    pub(crate) order_id: Uuid,
    /// For the events that answer this one.
    pub(crate) trace: TraceContext,
    pub(crate) change: Change,
}

/// What has become of the order.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Created, with what it wants of each SKU: at least 1.
    Created(BTreeMap<String, i64>),
    Cancelled,
}

/// Applies events in batches: what a batch moves is decided in memory, under locks, and written with one statement; a SKU
/// that every order wants is updated once.
#[derive(Debug)]
pub(crate) struct StockKeeper {
    /// Tells the relay of the answers.
    pub(crate) relay: Notifier,
}

impl Handler for StockKeeper {
    type Event = OrderEvent;

    fn read(&self, envelope: &Envelope<'_>) -> Result<OrderEvent, Refusal> {
        let (order_id, change) = if envelope.carries::<OrderCreated>() {
            let created: OrderCreated = envelope.decode()?;
            (created.order_id.clone(), Change::Created(read_quantities(&created)?))
        } else if envelope.carries::<OrderCancelled>() {
            (envelope.decode::<OrderCancelled>()?.order_id, Change::Cancelled)
        } else {
            return Err(Refusal::unknown_type(envelope));
        };
        if Uuid::try_parse(&order_id) != Ok(envelope.subject) {
            return Err(Refusal::reject("INVALID_ORDER", "order_id is not the subject of the event"));
        }
        Ok(OrderEvent { event_id: envelope.id, order_id: envelope.subject, trace: envelope.trace(), change })
    }

    /// Locks are taken in one order by every batch: reservations by order, then stock by SKU (in no order, batches of
    /// 100 fell from 56,000 to 80 events a second, in deadlocks).
    async fn apply(&self, tx: &mut Transaction<'_, Postgres>, events: &[&OrderEvent]) -> Result<(), ApplyError> {
        let mut reservations = Reservations::lock_cancelled(tx, events).await?;
        let mut stock = Stock::lock(tx, reservations.skus().chain(wanted_skus(events))).await?;
        let (mut answers, mut refusals) = (Vec::new(), HashMap::new());
        for event in events {
            match decide(event, &mut reservations, &mut stock) {
                Ok(answer) => answers.extend(answer),
                Err(refusal) => drop(refusals.insert(event.event_id, refusal)),
            }
        }
        if !refusals.is_empty() {
            return Err(ApplyError::Refused(refusals));
        }
        write_batch(tx, &reservations, &stock, &answers).await
    }

    fn committed(&self) {
        self.relay.notify();
    }
}

fn decide(event: &OrderEvent, reservations: &mut Reservations, stock: &mut Stock) -> Result<Option<NewEvent>, Refusal> {
    match &event.change {
        Change::Created(quantities) => reserve_stock(event, quantities, reservations, stock).map(Some),
        Change::Cancelled => release_stock(event, reservations, stock),
    }
}

fn wanted_skus<'e>(events: &'e [&OrderEvent]) -> impl Iterator<Item = &'e String> {
    events
        .iter()
        .flat_map(|event| match &event.change {
            Change::Created(quantities) => Some(quantities.keys()),
            Change::Cancelled => None,
        })
        .flatten()
}

/// What an order takes of each SKU, which may stand in several of its items.
fn read_quantities(created: &OrderCreated) -> Result<BTreeMap<String, i64>, Refusal> {
    if !(1..=ITEMS_MAX).contains(&created.items.len()) {
        let detail = format!("the order must have 1 to {ITEMS_MAX} items, and has {}", created.items.len());
        return Err(Refusal::reject("INVALID_ORDER", detail));
    }
    let mut quantities = BTreeMap::new();
    for (line, item) in created.items.iter().enumerate() {
        // Postgres has no NUL in text; such a SKU would fail the whole batch.
        if item.quantity < 1 || !(1..=SKU_BYTES_MAX).contains(&item.sku.len()) || item.sku.contains('\0') {
            let detail = format!("items[{line}] has no sound SKU or no positive quantity");
            return Err(Refusal::reject("INVALID_ORDER", detail));
        }
        // A message holds too few 32-bit quantities for their sum to overflow 64 bits.
        *quantities.entry(item.sku.clone()).or_insert(0) += i64::from(item.quantity);
    }
    Ok(quantities)
}
