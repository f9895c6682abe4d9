//! Reserves stock for an order: all its items, or none. No I/O.

use std::collections::BTreeMap;

use outbox::{NewEvent, Refusal};
use proto::inventory::v1::{Shortage, ShortageReason, StockRejected, StockReserved};

use crate::{
    order_event::OrderEvent,
    reservations::{Reservation, Reservations},
    stock::{Movement, Stock},
};

/// The answer is inventory's first event about an order.
pub(crate) const SEQUENCE: i32 = 1;

/// Takes all quantities of the order from stock, or none, and returns the answer.
///
/// Orders are served in the order of their events. One that is rejected does not hold back a later one that fits.
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

/// Reads the shortages of a stored rejection, as `describe` has written them. The quantity that an order wanted of an
/// unknown SKU is not stored, and is 0.
pub(crate) fn read_shortages(rejection: &str) -> Vec<Shortage> {
    rejection.split("; ").map(|text| read_shortage(text).unwrap_or_else(|| unreadable(text))).collect()
}

fn read_shortage(text: &str) -> Option<Shortage> {
    if let Some(sku) = text.strip_prefix("UNKNOWN_SKU ") {
        let reason = ShortageReason::UnknownSku.into();
        return Some(Shortage { sku: sku.to_owned(), reason, wanted: 0, available: 0 });
    }
    let (sku, quantities) = text.strip_prefix("INSUFFICIENT_STOCK ")?.rsplit_once(": ")?;
    let (wanted, available) = quantities.strip_suffix(" available")?.split_once(" wanted, ")?;
    let (wanted, available) = (wanted.parse().ok()?, available.parse().ok()?);
    let reason = ShortageReason::InsufficientStock.into();
    Some(Shortage { sku: sku.to_owned(), reason, wanted, available })
}

/// Of a SKU whose name looks like the text around it. The order's status does not depend on it.
fn unreadable(text: &str) -> Shortage {
    Shortage { sku: text.to_owned(), reason: ShortageReason::Unspecified.into(), wanted: 0, available: 0 }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::{
        order_event::{Change, OrderId},
        reservations::NewRows,
    };

    fn stock(available: &[(&str, i64)]) -> Stock {
        Stock::of(available.iter().map(|(sku, available)| ((*sku).to_owned(), *available)).collect())
    }

    /// Has an order reserve these quantities, and returns its answer.
    fn reserve(wanted: &[(&str, i64)], reservations: &mut Reservations, stock: &mut Stock) -> NewEvent {
        let event = OrderEvent::created(OrderId::new(), wanted);
        let Change::Created(quantities) = &event.change else { unreachable!() };
        reserve_stock(&event, quantities, reservations, stock).unwrap()
    }

    fn shortage(sku: &str, reason: ShortageReason, wanted: i64, available: i64) -> Shortage {
        Shortage { sku: sku.into(), reason: reason.into(), wanted, available }
    }

    #[test]
    fn an_order_that_fits_is_reserved_to_the_last_piece() {
        let (mut reservations, mut stock) = (Reservations::default(), stock(&[("KETTLE", 5), ("MUG", 2)]));
        let answer = reserve(&[("KETTLE", 1), ("MUG", 2)], &mut reservations, &mut stock);

        assert_eq!(outbox::Rows::of([&answer]).event_types, ["inventory.v1.StockReserved"]);
        assert_eq!((stock.available("KETTLE"), stock.available("MUG")), (Some(4), Some(0)));
        let ledger = stock.ledger();
        assert_eq!(ledger.kinds, ["RESERVATION"; 2]);
        assert_eq!((ledger.skus, ledger.deltas), (vec!["KETTLE", "MUG"], vec![-1, -2]));
        let new = NewRows::of(&reservations);
        assert_eq!((new.statuses, new.rejections), (vec!["RESERVED"], vec![None]));
    }

    #[test]
    fn an_order_short_of_one_sku_takes_nothing_of_the_others() {
        let (mut reservations, mut stock) = (Reservations::default(), stock(&[("KETTLE", 5), ("MUG", 1)]));
        let answer = reserve(&[("KETTLE", 1), ("MUG", 2)], &mut reservations, &mut stock);

        let answers = outbox::Rows::of([&answer]);
        assert_eq!(answers.event_types, ["inventory.v1.StockRejected"]);
        let rejected = StockRejected::decode(answers.payloads[0]).unwrap();
        assert_eq!(rejected.shortages, [shortage("MUG", ShortageReason::InsufficientStock, 2, 1)]);
        assert_eq!((stock.available("KETTLE"), stock.available("MUG")), (Some(5), Some(1)));
        assert!(stock.ledger().deltas.is_empty());
        let new = NewRows::of(&reservations);
        let why = "INSUFFICIENT_STOCK MUG: 2 wanted, 1 available";
        assert_eq!((new.statuses, new.rejections), (vec!["REJECTED"], vec![Some(why)]));
    }

    #[test]
    fn stored_shortages_are_read_as_they_were_but_for_what_was_wanted_of_an_unknown_sku() {
        let shortages = [
            shortage("MUG: big", ShortageReason::InsufficientStock, 2, 1),
            shortage("TEAPOT", ShortageReason::UnknownSku, 0, 0),
            shortage("KETTLE", ShortageReason::InsufficientStock, 9_000_000_000, 0),
        ];
        let stored = shortages.iter().map(describe).collect::<Vec<_>>().join("; ");
        assert_eq!(read_shortages(&stored), shortages);
        assert_eq!(read_shortages("OUT OF SPACE"), [shortage("OUT OF SPACE", ShortageReason::Unspecified, 0, 0)]);
    }

    #[test]
    fn an_order_of_an_unknown_sku_is_rejected_naming_each_shortage() {
        let (mut reservations, mut stock) = (Reservations::default(), stock(&[("MUG", 0)]));
        let answer = reserve(&[("MUG", 1), ("TEAPOT", 3)], &mut reservations, &mut stock);

        let rejected = StockRejected::decode(outbox::Rows::of([&answer]).payloads[0]).unwrap();
        let expected = [
            shortage("MUG", ShortageReason::InsufficientStock, 1, 0),
            shortage("TEAPOT", ShortageReason::UnknownSku, 3, 0),
        ];
        assert_eq!(rejected.shortages, expected);
        assert_eq!(stock.available("TEAPOT"), None);
        let why = "INSUFFICIENT_STOCK MUG: 1 wanted, 0 available; UNKNOWN_SKU TEAPOT";
        assert_eq!(NewRows::of(&reservations).rejections, [Some(why)]);
    }
}
