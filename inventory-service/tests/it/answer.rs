use prost::Message;
use proto::inventory::v1::{Shortage, ShortageReason, StockRejected, StockReserved};
use tokio::time::timeout;

use crate::{
    inventory::{Inventory, LIMIT},
    orders::{order, order_id_of},
};

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[tokio::test]
async fn an_order_that_is_reserved_is_answered_in_the_trace_of_its_event() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let mut event = order(&[("MUG", 2)]);
    event.traceparent = TRACEPARENT.into();

    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["APPLIED"]);

    assert_eq!(inventory.answers(&event).await, ["inventory.v1.StockReserved"]);
    let sql = "SELECT payload, traceparent FROM outbox WHERE aggregate_id = $1";
    let query = sqlx::query_as::<_, (Vec<u8>, String)>(sql).bind(order_id_of(&event));
    let (payload, traceparent) = query.fetch_one(&inventory.pool).await.unwrap();
    assert_eq!(StockReserved::decode(payload.as_slice()).unwrap(), StockReserved { order_id: event.subject });
    assert_eq!(traceparent, TRACEPARENT);
    inventory.stop().await;
}

#[tokio::test]
async fn an_order_that_is_rejected_is_answered_with_the_reason_of_each_item() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 1), ("KETTLE", 5)]).await;
    let event = order(&[("MUG", 2), ("KETTLE", 1), ("TEAPOT", 3)]);

    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["APPLIED"]);

    let sql = "SELECT payload FROM outbox WHERE aggregate_id = $1 AND event_type = 'inventory.v1.StockRejected'";
    let query = sqlx::query_scalar::<_, Vec<u8>>(sql).bind(order_id_of(&event));
    let payload = query.fetch_one(&inventory.pool).await.unwrap();
    let shortage = |sku: &str, reason: ShortageReason, wanted, available| Shortage {
        sku: sku.into(),
        reason: reason.into(),
        wanted,
        available,
    };
    let expected = StockRejected {
        order_id: event.subject,
        shortages: vec![
            shortage("MUG", ShortageReason::InsufficientStock, 2, 1),
            shortage("TEAPOT", ShortageReason::UnknownSku, 3, 0),
        ],
    };
    assert_eq!(StockRejected::decode(payload.as_slice()).unwrap(), expected);
    inventory.stop().await;
}

#[tokio::test]
async fn an_answer_wakes_the_relay() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let mut listener = sqlx::postgres::PgListener::connect_with(&inventory.pool).await.unwrap();
    listener.listen("outbox").await.unwrap();
    inventory.client.deliver([&order(&[("MUG", 2)])]).await.unwrap();
    timeout(LIMIT, listener.recv()).await.expect("a notification").unwrap();
    drop(listener);
    inventory.stop().await;
}
