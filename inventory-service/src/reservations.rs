//! Reservations in memory: the decisions on the orders of a batch.

use std::collections::{BTreeMap, HashMap, HashSet, hash_map::Entry};

use outbox::{EventId, Refusal};

use crate::order_event::OrderId;

outbox::id! {
    /// The event that cancelled an order.
    pub(crate) struct CancellationId
}

outbox::id! {
    /// An order whose reservation the table has, and the batch has under lock.
    pub(crate) struct LockedOrderId
}

/// The decision on an order.
#[derive(Debug)]
pub(crate) struct Reservation {
    /// The event that asked for stock; `None` if the order was cancelled first. Not read back from the table.
    event_id: Option<EventId>,
    status: Status,
    /// Why nothing was reserved, item by item.
    rejection: Option<String>,
    /// What was reserved, by SKU.
    quantities: BTreeMap<String, i64>,
    cancelled_by: Option<CancellationId>,
    /// Whether the table has it already.
    stored: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Reserved,
    Rejected,
    Released,
}

impl Status {
    /// The name that `reservations_status_known` allows.
    fn name(self) -> &'static str {
        match self {
            Self::Reserved => "RESERVED",
            Self::Rejected => "REJECTED",
            Self::Released => "RELEASED",
        }
    }

    /// The status of this name.
    pub(crate) fn of(name: &str) -> Self {
        match name {
            "RESERVED" => Self::Reserved,
            "REJECTED" => Self::Rejected,
            _ => Self::Released,
        }
    }
}

impl Reservation {
    pub(crate) fn reserved(event_id: EventId, quantities: BTreeMap<String, i64>) -> Self {
        Self { quantities, ..Self::new(Some(event_id), Status::Reserved) }
    }

    pub(crate) fn rejected(event_id: EventId, rejection: String) -> Self {
        Self { rejection: Some(rejection), ..Self::new(Some(event_id), Status::Rejected) }
    }

    /// Of an order that is cancelled before its creation is known here.
    pub(crate) fn cancelled_unseen(cancelled_by: EventId) -> Self {
        Self { cancelled_by: Some(cancelled_by.uuid().into()), ..Self::new(None, Status::Released) }
    }

    /// As the table has it.
    pub(crate) fn stored(
        status: Status,
        quantities: BTreeMap<String, i64>,
        cancelled_by: Option<CancellationId>,
    ) -> Self {
        Self { quantities, cancelled_by, stored: true, ..Self::new(None, status) }
    }

    fn new(event_id: Option<EventId>, status: Status) -> Self {
        Self { event_id, status, rejection: None, quantities: BTreeMap::new(), cancelled_by: None, stored: false }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled_by.is_some()
    }

    /// Cancels, and returns the quantities to release, by SKU: none if nothing was reserved.
    pub(crate) fn cancel(&mut self, cancelled_by: EventId) -> Option<&BTreeMap<String, i64>> {
        self.cancelled_by = Some(cancelled_by.uuid().into());
        if self.status != Status::Reserved {
            return None;
        }
        self.status = Status::Released;
        Some(&self.quantities)
    }
}

/// The reservations of a batch: those that it makes, and those of the orders that it cancels.
#[derive(Debug, Default)]
pub(crate) struct Reservations(HashMap<OrderId, Reservation>);

impl Reservations {
    /// The reservations under lock.
    pub(crate) fn of(stored: impl IntoIterator<Item = (OrderId, Reservation)>) -> Self {
        Self(stored.into_iter().collect())
    }

    /// The SKUs of all quantities reserved.
    pub(crate) fn skus(&self) -> impl Iterator<Item = &String> {
        self.0.values().flat_map(|reservation| reservation.quantities.keys())
    }

    pub(crate) fn get_mut(&mut self, order_id: OrderId) -> Option<&mut Reservation> {
        self.0.get_mut(&order_id)
    }

    /// # Errors
    /// If the batch has one for this order already. One that only the table has is found by `write_batch`.
    pub(crate) fn add(&mut self, order_id: OrderId, reservation: Reservation) -> Result<(), Refusal> {
        match self.0.entry(order_id) {
            Entry::Occupied(_) => Err(already_decided(order_id)),
            Entry::Vacant(vacant) => {
                vacant.insert(reservation);
                Ok(())
            }
        }
    }

    /// Refusals of the events whose reservations are new, but not among the inserted: other transactions have made
    /// reservations for these orders.
    pub(crate) fn refuse_all_but(&self, inserted: &HashSet<OrderId>) -> HashMap<EventId, Refusal> {
        let new = self.0.iter().filter(|(_, reservation)| !reservation.stored);
        let conflicting = new.filter(|(order_id, _)| !inserted.contains(order_id));
        conflicting.flat_map(|(order_id, reservation)| refuse(*order_id, reservation)).collect()
    }
}

/// The reservations that the table does not have yet, as the arrays that a statement takes.
#[derive(Debug, Default)]
pub(crate) struct NewRows<'r> {
    pub(crate) order_ids: Vec<OrderId>,
    pub(crate) event_ids: Vec<Option<EventId>>,
    pub(crate) statuses: Vec<&'static str>,
    pub(crate) rejections: Vec<Option<&'r str>>,
    pub(crate) cancelled_by: Vec<Option<CancellationId>>,
}

impl<'r> NewRows<'r> {
    pub(crate) fn of(reservations: &'r Reservations) -> Self {
        let mut rows = Self::default();
        for (order_id, reservation) in reservations.0.iter().filter(|(_, reservation)| !reservation.stored) {
            rows.order_ids.push(*order_id);
            rows.event_ids.push(reservation.event_id);
            rows.statuses.push(reservation.status.name());
            rows.rejections.push(reservation.rejection.as_deref());
            rows.cancelled_by.push(reservation.cancelled_by);
        }
        rows
    }
}

/// The reservations that the table has and the batch cancels, likewise.
#[derive(Debug, Default)]
pub(crate) struct CancelledRows {
    pub(crate) order_ids: Vec<LockedOrderId>,
    pub(crate) statuses: Vec<&'static str>,
    pub(crate) cancelled_by: Vec<CancellationId>,
}

impl CancelledRows {
    pub(crate) fn of(reservations: &Reservations) -> Self {
        let mut rows = Self::default();
        for (order_id, reservation) in reservations.0.iter().filter(|(_, reservation)| reservation.stored) {
            if let Some(cancelled_by) = reservation.cancelled_by {
                rows.order_ids.push(order_id.uuid().into());
                rows.statuses.push(reservation.status.name());
                rows.cancelled_by.push(cancelled_by);
            }
        }
        rows
    }
}

/// Refuses the events behind a reservation of an order that another event has decided. The creation can never be
/// applied. A cancellation that did not see the reservation will find it at its next delivery.
fn refuse(order_id: OrderId, reservation: &Reservation) -> Vec<(EventId, Refusal)> {
    match (reservation.event_id, reservation.cancelled_by) {
        (Some(event_id), _) => vec![(event_id, already_decided(order_id))],
        (None, Some(cancelled_by)) => {
            let detail = format!("order {order_id} was reserved at the same time: deliver this cancellation again");
            vec![(cancelled_by.uuid().into(), Refusal::retry("RESERVED_MEANWHILE", detail))]
        }
        (None, None) => vec![],
    }
}

fn already_decided(order_id: OrderId) -> Refusal {
    Refusal::reject("ALREADY_DECIDED", format!("another event has already decided order {order_id}"))
}
