//! Returns to stock what was reserved for an order that is cancelled. No I/O.

use outbox::{NewEvent, Refusal};
use proto::inventory::v1::StockReleased;

use crate::{
    order_event::OrderEvent,
    reservations::{Reservation, Reservations},
    stock::{Movement, Stock},
};

/// Follows the answer to the order itself.
pub(crate) const SEQUENCE: i32 = 2;

/// Releases all that is reserved for the order, and returns the answer. There is no answer if nothing was reserved.
///
/// A relay delivers an order's cancellation after its creation, or behind it in one batch. The creation may still be
/// missing here: it died, and an operator discarded it. Then the cancellation is recorded alone, and refuses the creation if that
/// ever arrives.
pub(crate) fn release_stock(
    event: &OrderEvent,
    reservations: &mut Reservations,
    stock: &mut Stock,
) -> Result<Option<NewEvent>, Refusal> {
    let Some(reservation) = reservations.get_mut(event.order_id) else {
        reservations.add(event.order_id, Reservation::cancelled_unseen(event.event_id))?;
        return Ok(None);
    };
    if reservation.is_cancelled() {
        let detail = format!("another event has already cancelled order {}", event.order_id);
        return Err(Refusal::reject("ALREADY_CANCELLED", detail));
    }
    let Some(quantities) = reservation.cancel(event.event_id) else { return Ok(None) };
    for (sku, reserved) in quantities {
        stock.move_by(event.order_id, Movement::Release, sku, *reserved);
    }
    let released = StockReleased { order_id: event.order_id.to_string() };
    Ok(Some(NewEvent::of(event.order_id, SEQUENCE, &released, &event.trace)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        order_event::OrderId,
        reservations::{CancelledRows, NewRows, Status},
    };

    /// One MUG available, and a stored reservation of two.
    fn reserved_earlier(order_id: OrderId, status: Status) -> (Reservations, Stock) {
        let quantities = if status == Status::Rejected { vec![] } else { vec![("MUG".to_owned(), 2)] };
        let reservation = Reservation::stored(status, quantities.into_iter().collect(), None);
        (Reservations::of([(order_id, reservation)]), Stock::of(BTreeMap::from([("MUG".to_owned(), 1)])))
    }

    #[test]
    fn a_cancellation_releases_all_that_was_reserved() {
        let order_id = OrderId::new();
        let (mut reservations, mut stock) = reserved_earlier(order_id, Status::Reserved);
        let event = OrderEvent::cancelled(order_id);
        let answer = release_stock(&event, &mut reservations, &mut stock).unwrap().unwrap();

        assert_eq!(outbox::Rows::of([&answer]).event_types, ["inventory.v1.StockReleased"]);
        assert_eq!(stock.available("MUG"), Some(3));
        let ledger = stock.ledger();
        assert_eq!((ledger.kinds, ledger.deltas), (vec!["RELEASE"], vec![2]));
        let cancelled = CancelledRows::of(&reservations);
        assert_eq!((cancelled.order_ids, cancelled.statuses), (vec![order_id.uuid().into()], vec!["RELEASED"]));
        assert_eq!(cancelled.cancelled_by, [event.event_id.uuid().into()]);
        assert!(NewRows::of(&reservations).order_ids.is_empty());
    }

    #[test]
    fn a_cancellation_of_a_rejected_order_releases_nothing_and_is_not_answered() {
        let order_id = OrderId::new();
        let (mut reservations, mut stock) = reserved_earlier(order_id, Status::Rejected);
        let answer = release_stock(&OrderEvent::cancelled(order_id), &mut reservations, &mut stock).unwrap();

        assert!(answer.is_none());
        assert_eq!(stock.available("MUG"), Some(1));
        assert_eq!(CancelledRows::of(&reservations).statuses, ["REJECTED"]);
    }

    #[test]
    fn an_order_cancelled_before_its_creation_is_recorded_and_not_answered() {
        let (mut reservations, mut stock) = (Reservations::default(), Stock::of(BTreeMap::new()));
        let event = OrderEvent::cancelled(OrderId::new());
        let answer = release_stock(&event, &mut reservations, &mut stock).unwrap();

        assert!(answer.is_none());
        let new = NewRows::of(&reservations);
        assert_eq!((new.event_ids, new.statuses), (vec![None], vec!["RELEASED"]));
        assert_eq!(new.cancelled_by, [Some(event.event_id.uuid().into())]);
    }

    #[test]
    fn a_second_cancellation_is_refused_and_releases_nothing() {
        let order_id = OrderId::new();
        let (mut reservations, mut stock) = reserved_earlier(order_id, Status::Reserved);
        release_stock(&OrderEvent::cancelled(order_id), &mut reservations, &mut stock).unwrap();
        let refusal = release_stock(&OrderEvent::cancelled(order_id), &mut reservations, &mut stock).unwrap_err();

        assert!(format!("{refusal:?}").contains("ALREADY_CANCELLED"), "{refusal:?}");
        assert_eq!(stock.available("MUG"), Some(3));
    }
}
