//! Decides what a batch of events does to reservations and stock. No I/O: the caller has read both under locks.

use std::collections::HashMap;

use outbox::{EventId, NewEvent, Refusal};

use crate::{
    order_event::{Change, OrderEvent},
    release_stock::release_stock,
    reservations::Reservations,
    reserve_stock::reserve_stock,
    stock::Stock,
};

/// Decides the events in order, each on the state after the events before it, and returns the answers.
///
/// # Errors
/// The events that cannot be applied. Nothing of the batch may be written then: reservations and stock hold the effects
/// of the other events.
pub(crate) fn decide(
    events: &[&OrderEvent],
    reservations: &mut Reservations,
    stock: &mut Stock,
) -> Result<Vec<NewEvent>, HashMap<EventId, Refusal>> {
    let (mut answers, mut refusals) = (Vec::new(), HashMap::new());
    for event in events {
        match decide_event(event, reservations, stock) {
            Ok(answer) => answers.extend(answer),
            Err(refusal) => drop(refusals.insert(event.event_id, refusal)),
        }
    }
    if refusals.is_empty() { Ok(answers) } else { Err(refusals) }
}

fn decide_event(
    event: &OrderEvent,
    reservations: &mut Reservations,
    stock: &mut Stock,
) -> Result<Option<NewEvent>, Refusal> {
    match &event.change {
        Change::Created(quantities) => reserve_stock(event, quantities, reservations, stock).map(Some),
        Change::Cancelled => release_stock(event, reservations, stock),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::{
        order_event::OrderId,
        reservations::{CancellationId, CancelledRows, NewRows, Reservation, Status},
    };

    const RESERVED: &str = "inventory.v1.StockReserved";
    const REJECTED: &str = "inventory.v1.StockRejected";
    const RELEASED: &str = "inventory.v1.StockReleased";

    fn stock(available: &[(&str, i64)]) -> Stock {
        Stock::of(available.iter().map(|(sku, available)| ((*sku).to_owned(), *available)).collect())
    }

    /// Decides on events about orders unknown so far, and returns the types of the answers.
    fn decide_new(events: &[OrderEvent], stock: &mut Stock) -> Result<Vec<String>, HashMap<EventId, Refusal>> {
        let events: Vec<&OrderEvent> = events.iter().collect();
        let answers = decide(&events, &mut Reservations::default(), stock)?;
        Ok(outbox::Rows::of(&answers).event_types.iter().map(ToString::to_string).collect())
    }

    fn assert_only_refused(refusals: &HashMap<EventId, Refusal>, event: &OrderEvent, reason: &str) {
        assert_eq!(refusals.keys().collect::<Vec<_>>(), [&event.event_id]);
        assert!(format!("{refusals:?}").contains(reason), "{refusals:?}");
    }

    #[test]
    fn a_hot_sku_is_reserved_in_the_order_of_events_until_it_is_short_and_changed_once() {
        let mut stock = stock(&[("MUG", 10)]);
        let events: Vec<_> = [7, 4, 3, 1].map(|wanted| OrderEvent::created(OrderId::new(), &[("MUG", wanted)])).into();
        assert_eq!(decide_new(&events, &mut stock).unwrap(), [RESERVED, REJECTED, RESERVED, REJECTED]);
        assert_eq!(stock.available("MUG"), Some(0));
        assert_eq!(stock.ledger().deltas, [-7, -3]);
        assert_eq!((stock.totals().skus, stock.totals().deltas), (vec!["MUG"], vec![-10]));
    }

    #[test]
    fn stock_that_a_cancellation_releases_is_there_for_the_next_order_of_the_batch() {
        let mut stock = stock(&[("MUG", 5)]);
        let (first, next) = (OrderId::new(), OrderId::new());
        let wanted = [("MUG", 5)];
        let events =
            [OrderEvent::created(first, &wanted), OrderEvent::cancelled(first), OrderEvent::created(next, &wanted)];
        assert_eq!(decide_new(&events, &mut stock).unwrap(), [RESERVED, RELEASED, RESERVED]);
        assert_eq!((stock.available("MUG"), stock.totals().deltas), (Some(0), vec![-5]));
    }

    #[test]
    fn a_second_creation_of_an_order_in_a_batch_is_refused() {
        let order_id = OrderId::new();
        let events = [OrderEvent::created(order_id, &[("MUG", 1)]), OrderEvent::created(order_id, &[("MUG", 20)])];
        for available in [100, 0] {
            let refusals = decide_new(&events, &mut stock(&[("MUG", available)])).unwrap_err();
            assert_only_refused(&refusals, &events[1], "ALREADY_DECIDED");
        }
    }

    #[test]
    fn a_creation_after_its_cancellation_is_refused() {
        let order_id = OrderId::new();
        let events = [OrderEvent::cancelled(order_id), OrderEvent::created(order_id, &[("MUG", 1)])];
        let refusals = decide_new(&events, &mut stock(&[("MUG", 1)])).unwrap_err();
        assert_only_refused(&refusals, &events[1], "ALREADY_DECIDED");
    }

    #[test]
    fn a_second_cancellation_of_an_order_in_a_batch_is_refused() {
        let order_id = OrderId::new();
        let creation = OrderEvent::created(order_id, &[("MUG", 1)]);
        let events = [creation, OrderEvent::cancelled(order_id), OrderEvent::cancelled(order_id)];
        let refusals = decide_new(&events, &mut stock(&[("MUG", 1)])).unwrap_err();
        assert_only_refused(&refusals, &events[2], "ALREADY_CANCELLED");
        let refusals = decide_new(&events[1..], &mut stock(&[])).unwrap_err();
        assert_only_refused(&refusals, &events[2], "ALREADY_CANCELLED");
    }

    #[test]
    fn reservations_that_the_table_has_already_refuse_their_events() {
        let (created, cancelled) = (OrderId::new(), OrderId::new());
        let events = [OrderEvent::created(created, &[("MUG", 1)]), OrderEvent::cancelled(cancelled)];
        let mut reservations = Reservations::default();
        decide(&[&events[0], &events[1]], &mut reservations, &mut stock(&[("MUG", 1)])).unwrap();

        let refusals = reservations.refuse_all_but(&HashSet::from([cancelled]));
        assert_only_refused(&refusals, &events[0], "ALREADY_DECIDED");
        let refusals = reservations.refuse_all_but(&HashSet::from([created]));
        assert_only_refused(&refusals, &events[1], "RESERVED_MEANWHILE");
        assert!(reservations.refuse_all_but(&HashSet::from([created, cancelled])).is_empty());
    }

    /// The tables, as `lock_batch` reads them and `write_batch` changes them.
    #[derive(Debug, Default)]
    struct Tables {
        stock: BTreeMap<String, i64>,
        /// Reference, kind, SKU and delta.
        ledger: Vec<(Uuid, &'static str, String, i64)>,
        reservations: BTreeMap<OrderId, Row>,
        /// Aggregate and sequence of every answer.
        answers: Vec<(Uuid, i32)>,
    }

    #[derive(Debug)]
    struct Row {
        event_id: Option<EventId>,
        status: &'static str,
        cancelled_by: Option<Uuid>,
    }

    impl Tables {
        /// What was reserved for the order, whether or not it was released since.
        fn reserved(&self, order_id: OrderId) -> BTreeMap<String, i64> {
            let entries = self
                .ledger
                .iter()
                .filter(|(reference, kind, ..)| *reference == order_id.uuid() && *kind == "RESERVATION");
            entries.map(|(.., sku, delta)| (sku.clone(), -delta)).collect()
        }

        fn read(&self, events: &[&OrderEvent]) -> (Reservations, Stock) {
            let cancelled = events.iter().filter(|event| matches!(event.change, Change::Cancelled));
            let stored = cancelled.filter_map(|event| {
                let row = self.reservations.get(&event.order_id)?;
                let (status, cancelled_by) = (Status::of(row.status), row.cancelled_by.map(Into::into));
                Some((event.order_id, Reservation::stored(status, self.reserved(event.order_id), cancelled_by)))
            });
            (Reservations::of(stored), Stock::of(self.stock.clone()))
        }

        /// Writes a batch, or returns the events that must leave it first.
        fn write(&mut self, events: &[&OrderEvent]) -> HashMap<EventId, Refusal> {
            let (mut reservations, mut stock) = self.read(events);
            let answers = match decide(events, &mut reservations, &mut stock) {
                Ok(answers) => answers,
                Err(refusals) => return refusals,
            };
            let new = NewRows::of(&reservations);
            let absent = new.order_ids.iter().filter(|order_id| !self.reservations.contains_key(*order_id));
            let refusals = reservations.refuse_all_but(&absent.copied().collect());
            if !refusals.is_empty() {
                return refusals;
            }
            for (at, order_id) in new.order_ids.iter().enumerate() {
                let cancelled_by = new.cancelled_by[at].map(CancellationId::uuid);
                let row = Row { event_id: new.event_ids[at], status: new.statuses[at], cancelled_by };
                self.reservations.insert(*order_id, row);
            }
            let cancelled = CancelledRows::of(&reservations);
            for (at, order_id) in cancelled.order_ids.iter().enumerate() {
                let row = self.reservations.get_mut(&order_id.uuid().into()).unwrap();
                (row.status, row.cancelled_by) = (cancelled.statuses[at], Some(cancelled.cancelled_by[at].uuid()));
            }
            let ledger = stock.ledger();
            for (at, reference) in ledger.references.iter().enumerate() {
                self.ledger.push((reference.uuid(), ledger.kinds[at], ledger.skus[at].to_owned(), ledger.deltas[at]));
            }
            let totals = stock.totals();
            for (sku, delta) in totals.skus.iter().zip(totals.deltas) {
                *self.stock.get_mut(*sku).unwrap() += delta;
            }
            let answers = outbox::Rows::of(&answers);
            self.answers.extend(answers.aggregate_ids.iter().map(|id| id.uuid()).zip(answers.sequences));
            HashMap::new()
        }

        /// Applies a batch as the receiver does: without the events that are refused. Returns these.
        fn apply(&mut self, events: &[OrderEvent]) -> HashSet<EventId> {
            let (mut left, mut refused): (Vec<_>, _) = (events.iter().collect(), HashSet::new());
            loop {
                let refusals = self.write(&left);
                if refusals.is_empty() {
                    return refused;
                }
                let before = left.len();
                left.retain(|event| !refusals.contains_key(&event.event_id));
                assert_eq!(left.len() + refusals.len(), before, "each refusal is of an event in the batch");
                refused.extend(refusals.into_keys());
            }
        }
    }

    /// A new event about one of few orders, so that orders meet several events.
    fn event() -> impl Strategy<Value = OrderEvent> {
        let sku = prop_oneof![4 => Just("KETTLE"), 4 => Just("MUG"), 1 => Just("UNKNOWN")];
        let quantities = prop::collection::btree_map(sku, 1..6_i64, 1..=2);
        let created = (order(), quantities).prop_map(|(order_id, quantities)| {
            OrderEvent::created(order_id, &quantities.into_iter().collect::<Vec<_>>())
        });
        prop_oneof![2 => created, 1 => order().prop_map(OrderEvent::cancelled)]
    }

    fn order() -> impl Strategy<Value = OrderId> {
        (1..9_u128).prop_map(|number| Uuid::from_u128(number).into())
    }

    proptest! {
        #[test]
        fn whatever_events_arrive_stock_is_conserved_and_each_event_decided_once(
            opening in (0..20_i64, 0..20_i64),
            batches in prop::collection::vec(prop::collection::vec(event(), 0..6), 0..12),
        ) {
            let opening = BTreeMap::from([("KETTLE".to_owned(), opening.0), ("MUG".to_owned(), opening.1)]);
            let mut tables = Tables { stock: opening.clone(), ..Tables::default() };
            let mut refused = HashSet::new();
            for batch in &batches {
                refused.extend(tables.apply(batch));
                for (sku, available) in &tables.stock {
                    prop_assert!(*available >= 0, "{sku}: {available}");
                    let held = tables.reservations.iter().filter(|(_, row)| row.status == "RESERVED");
                    let reserved: i64 = held.filter_map(|(id, _)| tables.reserved(*id).remove(sku)).sum();
                    prop_assert_eq!(available + reserved, opening[sku], "{}", sku);
                    let moved: i64 = tables.ledger.iter().filter(|(.., of, _)| of == sku).map(|(.., delta)| delta).sum();
                    prop_assert_eq!(opening[sku] + moved, *available, "{}", sku);
                }
            }
            let rows = tables.reservations.values();
            let effects = rows.flat_map(|row| [row.event_id.map(EventId::uuid), row.cancelled_by]).flatten();
            let mut decided: Vec<Uuid> = effects.chain(refused.iter().map(|id| id.uuid())).collect();
            let mut arrived: Vec<Uuid> = batches.iter().flatten().map(|event| event.event_id.uuid()).collect();
            decided.sort_unstable();
            arrived.sort_unstable();
            prop_assert_eq!(decided, arrived);
            let created = tables.reservations.iter().filter(|(_, row)| row.event_id.is_some());
            let mut due: Vec<_> = created.clone().map(|(id, _)| (id.uuid(), 1)).collect();
            due.extend(created.filter(|(_, row)| row.status == "RELEASED").map(|(id, _)| (id.uuid(), 2)));
            due.sort_unstable();
            tables.answers.sort_unstable();
            prop_assert_eq!(due, tables.answers, "a decision on a creation is answered, and so is a release");
        }
    }
}
