//! Makes events as order-service does.

use prost::Message;
use prost_types::Timestamp;
use proto::{
    events::v1::Event,
    orders::v1::{OrderCancelled, OrderCreated, OrderItem},
};
use uuid::Uuid;

/// The event of a new order.
pub(crate) fn order(items: &[(&str, i32)]) -> Event {
    event_of(Uuid::now_v7(), items)
}

/// Another event of an order, under an id of its own.
pub(crate) fn event_of(order_id: Uuid, items: &[(&str, i32)]) -> Event {
    let data = order_created(order_id, items).encode_to_vec().into();
    Event { r#type: "orders.v1.OrderCreated".into(), sequence: 1, data, ..event_about(order_id) }
}

/// A new event that cancels the order of another event.
pub(crate) fn cancellation_of(event: &Event) -> Event {
    let data = OrderCancelled { order_id: event.subject.clone() }.encode_to_vec().into();
    Event { r#type: "orders.v1.OrderCancelled".into(), sequence: 2, data, ..event_about(order_id_of(event)) }
}

fn event_about(order_id: Uuid) -> Event {
    let id = Uuid::now_v7();
    let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
    Event {
        id: id.to_string(),
        source: "order-service".into(),
        subject: order_id.to_string(),
        time: Some(Timestamp { seconds: seconds.cast_signed(), nanos: nanos.cast_signed() }),
        ..Event::default()
    }
}

/// The same event, committed this many hours earlier.
pub(crate) fn hours_ago(event: &Event, hours: i64) -> Event {
    let time = event.time.map(|time| Timestamp { seconds: time.seconds - hours * 3600, ..time });
    Event { time, ..event.clone() }
}

pub(crate) fn order_created(order_id: Uuid, items: &[(&str, i32)]) -> OrderCreated {
    let item = |&(sku, quantity): &(&str, i32)| OrderItem { sku: sku.to_owned(), quantity, unit_price_minor: 100 };
    OrderCreated {
        order_id: order_id.to_string(),
        customer_id: "ann".into(),
        currency_code: "EUR".into(),
        items: items.iter().map(item).collect(),
        total_minor: items.iter().map(|(_, quantity)| 100 * i64::from(*quantity)).sum(),
    }
}

pub(crate) fn id_of(event: &Event) -> Uuid {
    event.id.parse().unwrap()
}

pub(crate) fn order_id_of(event: &Event) -> Uuid {
    event.subject.parse().unwrap()
}
