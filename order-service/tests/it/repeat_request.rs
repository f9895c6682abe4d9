use std::collections::HashSet;

use proto::orders::v1::CreateOrderRequest;
use tokio::task::JoinSet;
use tonic::Code;

use crate::service::{ONE_ORDER, Service, Written, order, order_once, refusal};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_equal_requests_at_once_place_one_order_and_are_all_answered_with_it() {
    let service = Service::start().await;
    let request = order_once();
    let mut calls = JoinSet::new();
    for _ in 0..50 {
        let (mut orders, request) = (service.orders(), request.clone());
        calls.spawn(async move { orders.create_order(request).await.unwrap().into_inner() });
    }
    let answers = calls.join_all().await;
    assert_eq!(answers.len(), 50);
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

#[tokio::test]
async fn a_request_id_with_different_content_is_refused_and_changes_nothing() {
    let service = Service::start().await;
    let request = order_once();
    service.place(request.clone()).await;

    let mut other_item = request.clone();
    other_item.items[1].quantity += 1;
    let mut other_order_of_items = request.clone();
    other_order_of_items.items.reverse();
    let mut fewer_items = request.clone();
    fewer_items.items.pop();
    for other in [
        CreateOrderRequest { customer_id: "bob".into(), ..request.clone() },
        CreateOrderRequest { currency_code: "USD".into(), ..request.clone() },
        other_item,
        other_order_of_items,
        fewer_items,
    ] {
        let refused = refusal(service.orders().create_order(other).await);
        refused.is(Code::InvalidArgument, "REQUEST_ID_REUSED");
        assert!(!refused.text.contains("orders_request_id_key"), "{refused:?}");
    }
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

#[tokio::test]
async fn of_two_calls_at_once_with_one_request_id_and_different_content_one_places_its_order() {
    let service = Service::start().await;
    let request = order_once();
    let other = CreateOrderRequest { customer_id: "bob".into(), ..request.clone() };
    let (mut orders, mut others) = (service.orders(), service.orders());
    let (first, second) = tokio::join!(orders.create_order(request), others.create_order(other));
    let (placed, refused) = if first.is_ok() { (first, second) } else { (second, first) };
    refusal(refused).is(Code::InvalidArgument, "REQUEST_ID_REUSED");
    let placed = placed.unwrap().into_inner();
    assert_eq!(service.get(&placed.order_id).await, placed);
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

#[tokio::test]
async fn a_repeated_request_is_answered_with_the_current_order() {
    let service = Service::start().await;
    let request = order_once();
    let mut placed = service.place(request.clone()).await;
    service.execute("UPDATE orders SET status = 'CONFIRMED'").await;
    placed.set_status(proto::orders::v1::OrderStatus::Confirmed);
    assert_eq!(service.place(request).await, placed);
    service.end().await;
}

#[tokio::test]
async fn a_request_id_is_the_same_in_upper_case_and_without_hyphens() {
    let service = Service::start().await;
    let request = order_once();
    let placed = service.place(request.clone()).await;
    for request_id in [request.request_id.to_uppercase(), request.request_id.replace('-', "")] {
        assert_eq!(service.place(CreateOrderRequest { request_id, ..request.clone() }).await, placed);
    }
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

#[tokio::test]
async fn requests_without_an_id_place_an_order_each() {
    let service = Service::start().await;
    let mut order_ids = HashSet::new();
    for _ in 0..3 {
        order_ids.insert(service.place(order()).await.order_id);
    }
    assert_eq!(order_ids.len(), 3);
    assert_eq!(service.written().await, Written { orders: 3, items: 6, events: 3 });
    service.end().await;
}
