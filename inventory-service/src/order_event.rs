//! An order's event as this service reads it: decoded, and checked as far as its content allows.

use std::collections::BTreeMap;

use outbox::{AggregateId, Envelope, EventId, Refusal, TraceContext};
use proto::orders::v1::{OrderCancelled, OrderCreated};
use uuid::Uuid;

const SKU_BYTES_MAX: usize = 64;
/// Ten times the limit of order-service. An answer names every item that is short. Without this limit an answer could
/// be too large for the outbox, and would fail its whole batch at every delivery.
const ITEMS_MAX: usize = 1000;

outbox::id! {
    /// Names an order.
    pub(crate) struct OrderId
}

impl From<OrderId> for AggregateId {
    fn from(order_id: OrderId) -> Self {
        order_id.uuid().into()
    }
}

/// An event of an order.
#[derive(Clone, Debug)]
pub(crate) struct OrderEvent {
    pub(crate) event_id: EventId,
    pub(crate) order_id: OrderId,
    /// For the events that answer this one.
    pub(crate) trace: TraceContext,
    pub(crate) change: Change,
}

/// What happened to the order.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Created, with the quantity it orders of each SKU: at least 1.
    Created(BTreeMap<String, i64>),
    Cancelled,
}

impl OrderEvent {
    /// # Errors
    /// If this service can never apply the event.
    pub(crate) fn read(envelope: &Envelope<'_>) -> Result<Self, Refusal> {
        let (order_id, change) = if envelope.carries::<OrderCreated>() {
            let created: OrderCreated = envelope.decode()?;
            (created.order_id.clone(), Change::Created(read_quantities(&created)?))
        } else if envelope.carries::<OrderCancelled>() {
            (envelope.decode::<OrderCancelled>()?.order_id, Change::Cancelled)
        } else {
            return Err(Refusal::unknown_type(envelope));
        };
        let subject = envelope.subject.uuid();
        if Uuid::try_parse(&order_id) != Ok(subject) {
            return Err(Refusal::reject("INVALID_ORDER", "order_id is not the subject of the event"));
        }
        Ok(Self { event_id: envelope.id, order_id: subject.into(), trace: envelope.trace(), change })
    }
}

/// The quantity ordered of each SKU, summed over the items that name it.
fn read_quantities(created: &OrderCreated) -> Result<BTreeMap<String, i64>, Refusal> {
    if !(1..=ITEMS_MAX).contains(&created.items.len()) {
        let detail = format!("the order must have 1 to {ITEMS_MAX} items, and has {}", created.items.len());
        return Err(Refusal::reject("INVALID_ORDER", detail));
    }
    let mut quantities = BTreeMap::new();
    for (line, item) in created.items.iter().enumerate() {
        // Postgres has no NUL in text: such a SKU would fail the whole batch.
        if item.quantity < 1 || !(1..=SKU_BYTES_MAX).contains(&item.sku.len()) || item.sku.contains('\0') {
            let detail = format!(
                "items[{line}] must have a SKU of 1 to {SKU_BYTES_MAX} bytes without NUL, and a quantity of at least 1"
            );
            return Err(Refusal::reject("INVALID_ORDER", detail));
        }
        // The sum cannot overflow: a message holds too few quantities for that.
        *quantities.entry(item.sku.clone()).or_insert(0) += i64::from(item.quantity);
    }
    Ok(quantities)
}

#[cfg(test)]
impl OrderEvent {
    /// A new event that creates the order.
    pub(crate) fn created(order_id: OrderId, quantities: &[(&str, i64)]) -> Self {
        let quantities = quantities.iter().map(|(sku, quantity)| ((*sku).to_owned(), *quantity)).collect();
        Self::of(order_id, Change::Created(quantities))
    }

    /// A new event that cancels the order.
    pub(crate) fn cancelled(order_id: OrderId) -> Self {
        Self::of(order_id, Change::Cancelled)
    }

    fn of(order_id: OrderId, change: Change) -> Self {
        Self { event_id: EventId::new(), order_id, trace: TraceContext::default(), change }
    }
}

#[cfg(test)]
mod tests {
    use prost::{Message, Name};
    use proto::{events::v1::Event, orders::v1::OrderItem};

    use super::*;

    fn read<M: Message + Name>(subject: OrderId, message: &M) -> Result<OrderEvent, Refusal> {
        let event = Event {
            id: EventId::new().to_string(),
            subject: subject.to_string(),
            r#type: M::full_name(),
            sequence: 1,
            time: Some(prost_types::Timestamp::default()),
            data: message.encode_to_vec().into(),
            ..Event::default()
        };
        OrderEvent::read(&Envelope::read(&event).unwrap())
    }

    fn created(order_id: OrderId, items: &[(&str, i32)]) -> OrderCreated {
        let item = |&(sku, quantity): &(&str, i32)| OrderItem { sku: sku.into(), quantity, unit_price_minor: 1 };
        let items = items.iter().map(item).collect();
        OrderCreated { order_id: order_id.to_string(), items, ..OrderCreated::default() }
    }

    #[test]
    fn several_items_of_one_sku_are_summed() {
        let order_id = OrderId::new();
        let most = i32::MAX;
        let event = read(order_id, &created(order_id, &[("MUG", most), ("KETTLE", 1), ("MUG", most)])).unwrap();
        assert_eq!(event.order_id, order_id);
        let Change::Created(quantities) = event.change else { panic!("{event:?}") };
        let expected = [("KETTLE".to_owned(), 1), ("MUG".to_owned(), 2 * i64::from(most))];
        assert_eq!(quantities, BTreeMap::from(expected));
    }

    #[test]
    fn a_cancellation_is_read() {
        let order_id = OrderId::new();
        let event = read(order_id, &OrderCancelled { order_id: order_id.to_string() }).unwrap();
        assert_eq!(event.order_id, order_id);
        assert!(matches!(event.change, Change::Cancelled), "{event:?}");
    }

    #[test]
    fn an_order_that_can_never_be_applied_is_refused() {
        let order_id = OrderId::new();
        let too_long = "M".repeat(SKU_BYTES_MAX + 1);
        let bad: [&[(&str, i32)]; 6] =
            [&[], &[("MUG", 0)], &[("MUG", 1), ("MUG", -1)], &[("", 1)], &[("MU\0G", 1)], &[(&too_long, 1)]];
        for items in bad {
            let refusal = read(order_id, &created(order_id, items)).unwrap_err();
            assert!(format!("{refusal:?}").contains("INVALID_ORDER"), "{items:?}: {refusal:?}");
        }
        let too_many = vec![("MUG", 1); ITEMS_MAX + 1];
        read(order_id, &created(order_id, &too_many)).unwrap_err();
        read(order_id, &created(order_id, &too_many[1..])).unwrap();
    }

    #[test]
    fn an_event_about_another_order_than_its_subject_is_refused() {
        let (subject, order_id) = (OrderId::new(), OrderId::new());
        read(subject, &created(order_id, &[("MUG", 1)])).unwrap_err();
        read(subject, &OrderCancelled { order_id: order_id.to_string() }).unwrap_err();
    }
}
