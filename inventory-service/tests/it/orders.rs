//! Makes events as order-service does.

use prost::Message;
use proto::{
    events::v1::Event,
    orders::v1::{OrderCreated, OrderItem},
};
use uuid::Uuid;

/// The event of a new order.
pub(crate) fn order(items: &[(&str, i32)]) -> Event {
    event_of(Uuid::now_v7(), items)
}

/// Another event of an order, under an id of its own.
pub(crate) fn event_of(order_id: Uuid, items: &[(&str, i32)]) -> Event {
    let created = order_created(order_id, items);
    Event {
        id: Uuid::now_v7().to_string(),
        source: "order-service".into(),
        r#type: "orders.v1.OrderCreated".into(),
        subject: order_id.to_string(),
        sequence: 1,
        data: created.encode_to_vec().into(),
        ..Event::default()
    }
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
