//! Applies a batch of delivered events: each once, and each only whole.

use std::collections::{BTreeMap, HashSet};

use outbox::{Envelope, Malformed};
use proto::{
    events::v1::{Event, EventResult, Outcome},
    orders::v1::OrderCreated,
};
use sqlx::{Connection, PgConnection};
use tracing::{info, warn};
use uuid::Uuid;

use crate::reserve_stock::{OrderToReserve, ReserveError, reserve_stock};

const SKU_BYTES_MAX: usize = 64;

/// Why an event will never be applied here.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Rejection {
    #[error("{0}")]
    Malformed(String),
    #[error("this service does not know events of type {0}")]
    UnknownType(String),
    #[error("{0}")]
    InvalidOrder(String),
    #[error("another event has reserved stock for order {0}")]
    AlreadyReserved(Uuid),
}

impl Rejection {
    fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "UNDECODABLE",
            Self::UnknownType(_) => "UNKNOWN_TYPE",
            Self::InvalidOrder(_) => "INVALID_ORDER",
            Self::AlreadyReserved(_) => "ALREADY_RESERVED",
        }
    }
}

impl From<Malformed> for Rejection {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed.to_string())
    }
}

/// Answers one result per event, in order, once their effects are committed. An event that can never be applied is
/// rejected and leaves no trace in the inbox, so it is applied if it comes again to a version that knows it.
///
/// The batch is one transaction. An event whose order turns out to be reserved by another event undoes it; then the rest
/// is applied without that event. Each such round rejects at least one event, so there are at most as many as events.
pub(crate) async fn apply_events(
    connection: &mut PgConnection,
    events: &[Event],
) -> Result<Vec<EventResult>, sqlx::Error> {
    let mut read: Vec<Result<OrderToReserve, Rejection>> = events.iter().map(read_event).collect();
    let mut applied = loop {
        match apply_once(connection, read.iter().flatten()).await {
            Ok(applied) => break applied,
            Err(ReserveError::AlreadyReserved(event_ids)) => reject_reserved(&mut read, &event_ids),
            Err(ReserveError::Database(error)) => return Err(error),
        }
    };
    let results = events.iter().zip(read).map(|(event, read)| match read {
        Err(rejection) => rejected(event, &rejection),
        // Taken out, so that an event which stands twice in one batch is a duplicate the second time.
        Ok(order) if applied.remove(&order.event_id) => result(event, Outcome::Applied),
        Ok(order) => {
            info!(event_id = %order.event_id, order_id = %order.order_id, "duplicate skipped");
            result(event, Outcome::Duplicate)
        }
    });
    Ok(results.collect())
}

/// Applies those of the orders whose event is new, and returns the ids of these events.
async fn apply_once(
    connection: &mut PgConnection,
    orders: impl Iterator<Item = &OrderToReserve>,
) -> Result<HashSet<Uuid>, ReserveError> {
    // The first of each id: the same event may stand twice in a batch.
    let mut seen = HashSet::new();
    let mut in_order: Vec<&OrderToReserve> = orders.filter(|order| seen.insert(order.event_id)).collect();
    if in_order.is_empty() {
        return Ok(HashSet::new());
    }
    let event_ids: Vec<Uuid> = in_order.iter().map(|order| order.event_id).collect();

    let mut tx = connection.begin().await?;
    let fresh = outbox::accept(&mut tx, &event_ids).await?;
    in_order.retain(|order| fresh.contains(&order.event_id));
    reserve_stock(&mut tx, &in_order).await?;
    tx.commit().await?;
    Ok(fresh)
}

fn reject_reserved(read: &mut [Result<OrderToReserve, Rejection>], event_ids: &HashSet<Uuid>) {
    for entry in read {
        if let Ok(order) = entry
            && event_ids.contains(&order.event_id)
        {
            *entry = Err(Rejection::AlreadyReserved(order.order_id));
        }
    }
}

fn read_event(event: &Event) -> Result<OrderToReserve, Rejection> {
    let envelope = Envelope::read(event)?;
    if !envelope.carries::<OrderCreated>() {
        return Err(Rejection::UnknownType(event.r#type.clone()));
    }
    read_order(&envelope, &envelope.decode()?)
}

/// What an order takes of each SKU, which may stand in several of its items.
fn read_order(envelope: &Envelope, created: &OrderCreated) -> Result<OrderToReserve, Rejection> {
    if Uuid::try_parse(&created.order_id) != Ok(envelope.subject) {
        return Err(Rejection::InvalidOrder("order_id is not the subject of the event".into()));
    }
    if created.items.is_empty() {
        return Err(Rejection::InvalidOrder("the order has no items".into()));
    }
    let mut quantities = BTreeMap::new();
    for (line, item) in created.items.iter().enumerate() {
        // Postgres has no NUL in text; such a SKU would fail the whole batch.
        if item.quantity < 1 || !(1..=SKU_BYTES_MAX).contains(&item.sku.len()) || item.sku.contains('\0') {
            return Err(Rejection::InvalidOrder(format!("items[{line}] has no sound SKU or no positive quantity")));
        }
        // A message holds too few 32-bit quantities for their sum to overflow 64 bits.
        *quantities.entry(item.sku.clone()).or_insert(0) += i64::from(item.quantity);
    }
    Ok(OrderToReserve { event_id: envelope.id, order_id: envelope.subject, quantities })
}

fn rejected(event: &Event, rejection: &Rejection) -> EventResult {
    warn!(event_id = event.id, event_type = event.r#type, %rejection, "event rejected");
    let (reason, detail) = (rejection.reason().into(), rejection.to_string());
    EventResult { reason, detail, ..result(event, Outcome::Rejected) }
}

fn result(event: &Event, outcome: Outcome) -> EventResult {
    EventResult { event_id: event.id.clone(), outcome: outcome.into(), ..EventResult::default() }
}
