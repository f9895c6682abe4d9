//! An operator refuses an order whose event is discarded: the function that `outbox-relay dead discard --refuse` calls.

use proto::orders::v1::{OrderStatus, WatchOrderRequest};
use sqlx::PgPool;
use uuid::Uuid;

use crate::service::{LIMIT, Service, order, reserved};

const CREATED: &str = "orders.v1.OrderCreated";
const CANCELLED: &str = "orders.v1.OrderCancelled";

/// As the relay's role, which may do no more to orders than this.
async fn refuse(service: &Service, order_id: &str, event_type: &str) -> Option<String> {
    let relay = PgPool::connect(&service.database.url_as("outbox_relay")).await.unwrap();
    let refused = sqlx::query_scalar("SELECT outbox_refuse($1, $2, 'we do not deliver there')");
    refused.bind(order_id.parse::<Uuid>().unwrap()).bind(event_type).fetch_one(&relay).await.unwrap()
}

#[tokio::test]
async fn a_refused_order_is_rejected_with_the_reason_and_its_watchers_are_told() {
    let service = Service::start().await;
    let order_id = service.place(order()).await.order_id;
    let request = WatchOrderRequest { order_id: order_id.clone() };
    let mut watch = service.orders().watch_order(request).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), OrderStatus::Pending);

    assert_eq!(refuse(&service, &order_id, CREATED).await, None);
    let told = tokio::time::timeout(LIMIT, watch.message()).await.unwrap().unwrap().unwrap();
    assert_eq!((told.status(), told.rejection.as_str()), (OrderStatus::Rejected, "we do not deliver there"));
    assert_eq!(service.get(&order_id).await, told);
    service.end().await;
}

#[tokio::test]
async fn only_the_creation_of_a_pending_order_can_be_refused_and_the_answer_says_why() {
    let service = Service::start().await;
    let order_id = service.place(order()).await.order_id;
    let why = refuse(&service, &order_id, CANCELLED).await.unwrap();
    assert!(why.contains(CANCELLED), "{why}");
    service.deliver(&[reserved(&order_id)]).await;
    let why = refuse(&service, &order_id, CREATED).await.unwrap();
    assert!(why.contains(&order_id) && why.contains("is CONFIRMED"), "{why}");
    assert_eq!(service.get(&order_id).await.status(), OrderStatus::Confirmed);
    let why = refuse(&service, &Uuid::now_v7().to_string(), CREATED).await.unwrap();
    assert!(why.contains("does not exist"), "{why}");
    service.end().await;
}

/// The event was discarded because nobody knew that it had been applied.
#[tokio::test]
async fn a_refused_order_that_inventory_has_reserved_nevertheless_is_cancelled_there_once() {
    let service = Service::start().await;
    let order_ids = [service.place(order()).await.order_id, service.place(order()).await.order_id];
    assert_eq!(refuse(&service, &order_ids[0], CREATED).await, None);
    let replies = [reserved(&order_ids[0]), reserved(&order_ids[1])];
    assert_eq!(service.deliver(&replies).await, ["APPLIED"; 2]);
    assert_eq!(service.deliver(&[reserved(&order_ids[0])]).await, ["APPLIED"]);

    assert_eq!(service.get(&order_ids[0]).await.status(), OrderStatus::Rejected);
    assert_eq!(service.events_of(&order_ids[0]).await, [CREATED, CANCELLED]);
    assert_eq!(service.get(&order_ids[1]).await.status(), OrderStatus::Confirmed);
    assert_eq!(service.events_of(&order_ids[1]).await, [CREATED]);
    service.end().await;
}
