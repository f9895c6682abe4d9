//! Reserves stock for an order: all its items, or none.

use std::collections::BTreeMap;

use outbox::{NewEvent, Refusal};
use proto::inventory::v1::{Shortage, ShortageReason, StockRejected, StockReserved};

use crate::{
    apply_event::OrderEvent,
    reservations::{Reservation, Reservations},
    stock::{Movement, Stock},
};

/// The answer is the first event of inventory about an order.
const SEQUENCE: i32 = 1;

/// Takes all of the order out of the stock, or nothing, and returns the answer. Orders are served as they come.
pub(crate) fn reserve_stock(
    event: &OrderEvent,
    quantities: &BTreeMap<String, i64>,
    reservations: &mut Reservations,
    stock: &mut Stock,
) -> Result<NewEvent, Refusal> {
    let order_id = event.order_id.to_string();
    let shortages = find_shortages(quantities, stock);
    if shortages.is_empty() {
        reservations.add(event.order_id, Reservation::reserved(event.event_id, quantities.clone()))?;
        for (sku, wanted) in quantities {
            stock.move_by(event.order_id, Movement::Reservation, sku, -wanted);
        }
        return Ok(NewEvent::of(event.order_id, SEQUENCE, &StockReserved { order_id }, &event.trace));
    }
    let rejection = shortages.iter().map(describe).collect::<Vec<_>>().join("; ");
    reservations.add(event.order_id, Reservation::rejected(event.event_id, rejection))?;
    Ok(NewEvent::of(event.order_id, SEQUENCE, &StockRejected { order_id, shortages }, &event.trace))
}

fn find_shortages(quantities: &BTreeMap<String, i64>, stock: &Stock) -> Vec<Shortage> {
    let shortages = quantities.iter().filter_map(|(sku, wanted)| {
        let (reason, available) = match stock.available(sku) {
            None => (ShortageReason::UnknownSku, 0),
            Some(available) if available < *wanted => (ShortageReason::InsufficientStock, available),
            Some(_) => return None,
        };
        Some(Shortage { sku: sku.clone(), reason: reason.into(), wanted: *wanted, available })
    });
    shortages.collect()
}

fn describe(shortage: &Shortage) -> String {
    let Shortage { sku, wanted, available, .. } = shortage;
    match shortage.reason() {
        ShortageReason::UnknownSku => format!("UNKNOWN_SKU {sku}"),
        _ => format!("INSUFFICIENT_STOCK {sku}: {wanted} wanted, {available} available"),
    }
}
