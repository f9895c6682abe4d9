use prost::Message;
use proto::orders::v1::{OrderCreated, OrderItem, OrderStatus};
use tonic::Request;
use uuid::Uuid;

use crate::service::{ONE_ORDER, Service, Written, order};

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[derive(sqlx::FromRow)]
struct Event {
    aggregate_id: Uuid,
    event_id: Uuid,
    sequence: i32,
    event_type: String,
    payload: Vec<u8>,
    traceparent: Option<String>,
    tracestate: Option<String>,
    may_be_taken: bool,
}

async fn only_event(service: &Service) -> Event {
    sqlx::query_as(
        "SELECT aggregate_id, event_id, sequence, event_type, payload, traceparent, tracestate,
            visible_at <= now() AND lease_token IS NULL AND attempts = 0 AS may_be_taken
        FROM outbox",
    )
    .fetch_one(&service.pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn an_order_its_items_and_its_event_are_written_together() {
    let service = Service::start().await;
    let mut request = Request::new(order());
    request.metadata_mut().insert("traceparent", TRACEPARENT.parse().unwrap());
    request.metadata_mut().insert("tracestate", "vendor=7".parse().unwrap());
    let placed = service.orders().create_order(request).await.unwrap().into_inner();

    assert_eq!(placed.status(), OrderStatus::Pending);
    assert_eq!(placed.total_minor, 3 * 250 + 2 * 1100);
    assert_eq!(placed.items, order().items);
    assert_eq!(service.written().await, ONE_ORDER);

    let event = only_event(&service).await;
    assert_eq!(event.aggregate_id.to_string(), placed.order_id);
    assert_eq!(event.event_id.get_version_num(), 8);
    assert_eq!((event.sequence, event.event_type.as_str()), (1, "orders.v1.OrderCreated"));
    assert_eq!(event.traceparent.as_deref(), Some(TRACEPARENT));
    assert_eq!(event.tracestate.as_deref(), Some("vendor=7"));
    assert!(event.may_be_taken);
    let told = OrderCreated {
        order_id: placed.order_id,
        customer_id: placed.customer_id,
        currency_code: placed.currency_code,
        items: placed.items,
        total_minor: placed.total_minor,
    };
    assert_eq!(OrderCreated::decode(event.payload.as_slice()).unwrap(), told);
    service.end().await;
}

#[tokio::test]
async fn an_order_without_trace_headers_has_an_event_without() {
    let service = Service::start().await;
    service.place(order()).await;
    let event = only_event(&service).await;
    assert_eq!((event.traceparent, event.tracestate), (None, None));
    service.end().await;
}

#[tokio::test]
async fn the_largest_allowed_order_is_placed() {
    let service = Service::start().await;
    let mut request = order();
    request.items =
        (1..=100).map(|n| OrderItem { sku: format!("{n:064}"), quantity: 1_000_000, unit_price_minor: n }).collect();
    let placed = service.place(request.clone()).await;
    assert_eq!(placed.items, request.items);
    assert_eq!(placed.total_minor, 5050 * 1_000_000);
    assert_eq!(service.written().await, Written { orders: 1, items: 100, events: 1 });
    service.end().await;
}
