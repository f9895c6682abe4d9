//! Gives back what was reserved for an order that was cancelled.

use outbox::{NewEvent, Refusal};
use proto::inventory::v1::StockReleased;

use crate::{
    apply_event::OrderEvent,
    reservations::{Reservation, Reservations, Status},
    stock::{Movement, Stock},
};

/// Follows the answer to the order itself.
const SEQUENCE: i32 = 2;

/// Puts everything that is reserved for the order back, and returns the answer; there is none when nothing was reserved.
///
/// A relay delivers an order's cancellation after its creation is settled. Should the creation have been given up (a
/// dead event that an operator discarded), the cancellation is recorded alone, and the creation refused if it comes yet.
pub(crate) fn release_stock(
    event: &OrderEvent,
    reservations: &mut Reservations,
    stock: &mut Stock,
) -> Result<Option<NewEvent>, Refusal> {
    let Some(reservation) = reservations.get_mut(event.order_id) else {
        reservations.add(event.order_id, Reservation::cancelled_unseen(event.event_id))?;
        return Ok(None);
    };
    if reservation.cancelled_by.is_some() {
        return Err(Refusal::reject(
            "ALREADY_CANCELLED",
            format!("another event has cancelled order {}", event.order_id),
        ));
    }
    reservation.cancelled_by = Some(event.event_id);
    if reservation.status != Status::Reserved {
        return Ok(None);
    }
    reservation.status = Status::Released;
    for (sku, reserved) in &reservation.quantities {
        stock.move_by(event.order_id, Movement::Release, sku, *reserved);
    }
    let released = StockReleased { order_id: event.order_id.to_string() };
    Ok(Some(NewEvent::of(event.order_id, SEQUENCE, &released, &event.trace)))
}
