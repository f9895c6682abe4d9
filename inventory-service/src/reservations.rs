//! Keeps what became of each order here.

use std::collections::{BTreeMap, HashMap, HashSet, hash_map::Entry};

use outbox::Refusal;
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::apply_event::{Change, OrderEvent};

/// What became of an order.
#[derive(Debug)]
pub(crate) struct Reservation {
    /// The event that asked for stock.
    event_id: Option<Uuid>,
    pub(crate) status: Status,
    /// Why nothing was reserved, item by item.
    rejection: Option<String>,
    /// What was reserved, by SKU.
    pub(crate) quantities: BTreeMap<String, i64>,
    /// The event that cancelled the order.
    pub(crate) cancelled_by: Option<Uuid>,
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
    /// As `reservations_status_known` has it.
    fn name(self) -> &'static str {
        match self {
            Self::Reserved => "RESERVED",
            Self::Rejected => "REJECTED",
            Self::Released => "RELEASED",
        }
    }
}

impl Reservation {
    pub(crate) fn reserved(event_id: Uuid, quantities: BTreeMap<String, i64>) -> Self {
        Self { quantities, ..Self::new(Some(event_id), Status::Reserved) }
    }

    pub(crate) fn rejected(event_id: Uuid, rejection: String) -> Self {
        Self { rejection: Some(rejection), ..Self::new(Some(event_id), Status::Rejected) }
    }

    /// Of an order that was cancelled before anything was known of it.
    pub(crate) fn cancelled_unseen(cancelled_by: Uuid) -> Self {
        Self { cancelled_by: Some(cancelled_by), ..Self::new(None, Status::Released) }
    }

    fn new(event_id: Option<Uuid>, status: Status) -> Self {
        Self { event_id, status, rejection: None, quantities: BTreeMap::new(), cancelled_by: None, stored: false }
    }
}

/// The reservations a batch is about: those it makes, and those of the orders it cancels, under lock.
#[derive(Debug, Default)]
pub(crate) struct Reservations(HashMap<Uuid, Reservation>);

impl Reservations {
    /// Reads what is known of the orders that the events cancel. It does not change until the transaction ends.
    pub(crate) async fn lock_cancelled(
        tx: &mut Transaction<'_, Postgres>,
        events: &[&OrderEvent],
    ) -> Result<Self, sqlx::Error> {
        let cancelled = events.iter().filter(|event| matches!(event.change, Change::Cancelled));
        let order_ids: Vec<Uuid> = cancelled.map(|event| event.order_id).collect();
        if order_ids.is_empty() {
            return Ok(Self::default());
        }
        let rows = sqlx::query!(
            "-- inventory: lock reservations
            SELECT order_id, status, cancelled_by FROM reservations
            WHERE order_id = ANY ($1) ORDER BY order_id FOR NO KEY UPDATE",
            &order_ids,
        )
        .fetch_all(&mut **tx)
        .await?;
        let mut quantities = read_quantities(tx, &order_ids).await?;
        let reservations = rows.into_iter().map(|row| {
            let status = match row.status.as_str() {
                "RESERVED" => Status::Reserved,
                "REJECTED" => Status::Rejected,
                _ => Status::Released,
            };
            let quantities = quantities.remove(&row.order_id).unwrap_or_default();
            let cancelled_by = row.cancelled_by;
            (row.order_id, Reservation { quantities, cancelled_by, stored: true, ..Reservation::new(None, status) })
        });
        Ok(Self(reservations.collect()))
    }

    /// Of what is reserved for the orders that are cancelled.
    pub(crate) fn skus(&self) -> impl Iterator<Item = &String> {
        self.0.values().flat_map(|reservation| reservation.quantities.keys())
    }

    pub(crate) fn get_mut(&mut self, order_id: Uuid) -> Option<&mut Reservation> {
        self.0.get_mut(&order_id)
    }

    /// # Errors
    /// When the batch has one for this order already; one that only the table has is found by `write_batch`.
    pub(crate) fn add(&mut self, order_id: Uuid, reservation: Reservation) -> Result<(), Refusal> {
        match self.0.entry(order_id) {
            Entry::Occupied(_) => Err(already_decided(order_id)),
            Entry::Vacant(vacant) => {
                vacant.insert(reservation);
                Ok(())
            }
        }
    }

    /// Why the events cannot be applied whose reservations are new, and were not inserted: others have made them.
    pub(crate) fn refuse_all_but(&self, inserted: &HashSet<Uuid>) -> HashMap<Uuid, Refusal> {
        let new = self.0.iter().filter(|(_, reservation)| !reservation.stored);
        let conflicting = new.filter(|(order_id, _)| !inserted.contains(order_id));
        conflicting.flat_map(|(order_id, reservation)| refuse(*order_id, reservation)).collect()
    }
}

/// Reservations that the table does not have, as the arrays a statement takes.
#[derive(Debug, Default)]
pub(crate) struct NewRows<'r> {
    pub(crate) order_ids: Vec<Uuid>,
    pub(crate) event_ids: Vec<Option<Uuid>>,
    pub(crate) statuses: Vec<&'static str>,
    pub(crate) rejections: Vec<Option<&'r str>>,
    pub(crate) cancelled_by: Vec<Option<Uuid>>,
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

/// Those that it has, and that are cancelled now, likewise.
#[derive(Debug, Default)]
pub(crate) struct CancelledRows {
    pub(crate) order_ids: Vec<Uuid>,
    pub(crate) statuses: Vec<&'static str>,
    pub(crate) cancelled_by: Vec<Option<Uuid>>,
}

impl CancelledRows {
    pub(crate) fn of(reservations: &Reservations) -> Self {
        let mut rows = Self::default();
        for (order_id, reservation) in reservations.0.iter().filter(|(_, reservation)| reservation.stored) {
            rows.order_ids.push(*order_id);
            rows.statuses.push(reservation.status.name());
            rows.cancelled_by.push(reservation.cancelled_by);
        }
        rows
    }
}

/// The events behind a reservation that another event has made: the creation will never be applied, while a cancellation
/// that came to a reservation unseen finds it the next time.
fn refuse(order_id: Uuid, reservation: &Reservation) -> Vec<(Uuid, Refusal)> {
    match (reservation.event_id, reservation.cancelled_by) {
        (Some(event_id), _) => vec![(event_id, already_decided(order_id))],
        (None, Some(event_id)) => {
            let detail = format!("order {order_id} was reserved at the same moment");
            vec![(event_id, Refusal::retry("RESERVED_MEANWHILE", detail))]
        }
        (None, None) => vec![],
    }
}

fn already_decided(order_id: Uuid) -> Refusal {
    Refusal::reject("ALREADY_DECIDED", format!("another event has decided on order {order_id}"))
}

/// What the ledger says was reserved; it never changes.
async fn read_quantities(
    tx: &mut Transaction<'_, Postgres>,
    order_ids: &[Uuid],
) -> Result<HashMap<Uuid, BTreeMap<String, i64>>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"-- inventory: read reserved quantities
        SELECT reference AS order_id, sku, -delta AS "quantity!" FROM stock_ledger
        WHERE reference = ANY ($1) AND kind = 'RESERVATION'"#,
        order_ids,
    )
    .fetch_all(&mut **tx)
    .await?;
    let mut quantities: HashMap<Uuid, BTreeMap<String, i64>> = HashMap::new();
    for row in rows {
        quantities.entry(row.order_id).or_default().insert(row.sku, row.quantity);
    }
    Ok(quantities)
}
