//! Keeps what became of each order here.

use std::collections::{BTreeMap, HashMap, HashSet, hash_map::Entry};

use outbox::{ApplyError, Refusal};
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
    /// When the batch has one for this order already; one that only the table has is found by [`Self::write`].
    pub(crate) fn add(&mut self, order_id: Uuid, reservation: Reservation) -> Result<(), Refusal> {
        match self.0.entry(order_id) {
            Entry::Occupied(_) => Err(already_decided(order_id)),
            Entry::Vacant(vacant) => {
                vacant.insert(reservation);
                Ok(())
            }
        }
    }

    /// # Errors
    /// [`ApplyError::Refused`] when orders are reserved by other events: nothing of the batch may be committed.
    pub(crate) async fn write(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), ApplyError> {
        self.insert_new(tx).await?;
        self.update_cancelled(tx).await?;
        Ok(())
    }

    /// Ordered by key, as every insert that may wait for another transaction's.
    async fn insert_new(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), ApplyError> {
        let new: Vec<(&Uuid, &Reservation)> = self.0.iter().filter(|(_, reservation)| !reservation.stored).collect();
        if new.is_empty() {
            return Ok(());
        }
        let order_ids: Vec<Uuid> = new.iter().map(|(order_id, _)| **order_id).collect();
        let event_ids: Vec<Option<Uuid>> = new.iter().map(|(_, reservation)| reservation.event_id).collect();
        let statuses: Vec<String> = new.iter().map(|(_, reservation)| reservation.status.name().to_owned()).collect();
        let rejections: Vec<Option<String>> =
            new.iter().map(|(_, reservation)| reservation.rejection.clone()).collect();
        let cancelled_by: Vec<Option<Uuid>> = new.iter().map(|(_, reservation)| reservation.cancelled_by).collect();
        let inserted = sqlx::query_scalar!(
            "-- inventory: insert reservations
            INSERT INTO reservations (order_id, event_id, status, rejection, cancelled_by, cancelled_at)
            SELECT order_id, event_id, status, rejection, cancelled_by, CASE WHEN cancelled_by IS NOT NULL THEN now() END
            FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::uuid[])
                AS decided (order_id, event_id, status, rejection, cancelled_by)
            ORDER BY order_id
            ON CONFLICT DO NOTHING
            RETURNING order_id",
            &order_ids,
            &event_ids as &[Option<Uuid>],
            &statuses,
            &rejections as &[Option<String>],
            &cancelled_by as &[Option<Uuid>],
        )
        .fetch_all(&mut **tx)
        .await?;
        let inserted: HashSet<Uuid> = inserted.into_iter().collect();
        let conflicting = new.iter().filter(|(order_id, _)| !inserted.contains(order_id));
        let refusals: HashMap<Uuid, Refusal> =
            conflicting.flat_map(|(order_id, reservation)| refuse(**order_id, reservation)).collect();
        if refusals.is_empty() { Ok(()) } else { Err(ApplyError::Refused(refusals)) }
    }

    async fn update_cancelled(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), sqlx::Error> {
        let stored: Vec<(&Uuid, &Reservation)> = self.0.iter().filter(|(_, reservation)| reservation.stored).collect();
        if stored.is_empty() {
            return Ok(());
        }
        let order_ids: Vec<Uuid> = stored.iter().map(|(order_id, _)| **order_id).collect();
        let statuses: Vec<String> =
            stored.iter().map(|(_, reservation)| reservation.status.name().to_owned()).collect();
        let cancelled_by: Vec<Option<Uuid>> = stored.iter().map(|(_, reservation)| reservation.cancelled_by).collect();
        sqlx::query!(
            "-- inventory: cancel reservations
            UPDATE reservations
            SET status = cancelled.status, cancelled_by = cancelled.cancelled_by, cancelled_at = now()
            FROM unnest($1::uuid[], $2::text[], $3::uuid[]) AS cancelled (order_id, status, cancelled_by)
            WHERE reservations.order_id = cancelled.order_id",
            &order_ids,
            &statuses,
            &cancelled_by as &[Option<Uuid>],
        )
        .execute(&mut **tx)
        .await?;
        Ok(())
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
