use proto::orders::v1::OrderStatus;
use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;

use crate::service::{Service, order, refusal, rejected, reserved};

const CREATED: &str = "orders.v1.OrderCreated";
const CANCELLED: &str = "orders.v1.OrderCancelled";

#[tokio::test]
async fn a_pending_order_and_a_confirmed_one_are_cancelled_together_with_their_event() {
    let service = Service::start().await;
    for confirmed in [false, true] {
        let order_id = service.place(order()).await.order_id;
        if confirmed {
            service.deliver(&[reserved(&order_id)]).await;
        }
        let answered = service.cancel(&order_id, "").await.unwrap().into_inner();
        assert_eq!(answered.status(), OrderStatus::Cancelled);
        assert_eq!(answered, service.get(&order_id).await);
        assert_eq!(service.events_of(&order_id).await, [CREATED, CANCELLED]);
    }
    service.end().await;
}

#[tokio::test]
async fn an_order_that_cannot_be_cancelled_stays_as_it_is_and_the_error_says_why() {
    let service = Service::start().await;
    let unknown = Uuid::now_v7().to_string();
    refusal(service.cancel(&unknown, "").await).is(Code::NotFound, "ORDER_NOT_FOUND");

    let order_id = service.place(order()).await.order_id;
    service.deliver(&[rejected(&order_id)]).await;
    refusal(service.cancel(&order_id, "").await).is(Code::FailedPrecondition, "ORDER_REJECTED");
    assert_eq!(service.get(&order_id).await.status(), OrderStatus::Rejected);
    assert_eq!(service.events_of(&order_id).await, [CREATED]);

    let order_id = service.place(order()).await.order_id;
    let nil = refusal(service.cancel(&order_id, &Uuid::nil().to_string()).await);
    nil.is(Code::InvalidArgument, "INVALID_CANCELLATION");
    assert_eq!(
        (nil.bad_fields, service.events_of(&order_id).await),
        (vec!["request_id".to_owned()], vec![CREATED.to_owned()])
    );
    service.cancel(&order_id, "").await.unwrap();
    for request_id in [String::new(), Uuid::new_v4().to_string()] {
        refusal(service.cancel(&order_id, &request_id).await).is(Code::FailedPrecondition, "ORDER_CANCELLED");
    }
    assert_eq!(service.events_of(&order_id).await, [CREATED, CANCELLED]);
    service.end().await;
}

#[tokio::test]
async fn fifty_equal_cancellations_at_once_write_one_event_and_all_succeed() {
    let service = Service::start().await;
    let (order_id, request_id) = (service.place(order()).await.order_id, Uuid::new_v4().to_string());
    let service = std::sync::Arc::new(service);
    let mut calls = JoinSet::new();
    for _ in 0..50 {
        let (service, order_id, request_id) = (service.clone(), order_id.clone(), request_id.clone());
        calls.spawn(async move { service.cancel(&order_id, &request_id).await.unwrap().into_inner() });
    }
    let answers = calls.join_all().await;
    assert!(answers.iter().all(|answer| answer.status() == OrderStatus::Cancelled), "{answers:?}");
    assert_eq!(service.events_of(&order_id).await, [CREATED, CANCELLED]);
    std::sync::Arc::into_inner(service).unwrap().end().await;
}

#[tokio::test]
async fn a_request_id_cancels_one_order_only() {
    let service = Service::start().await;
    let (first, second) = (service.place(order()).await.order_id, service.place(order()).await.order_id);
    let request_id = Uuid::new_v4().to_string();
    service.cancel(&first, &request_id).await.unwrap();
    refusal(service.cancel(&second, &request_id).await).is(Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(service.get(&second).await.status(), OrderStatus::Pending);
    assert_eq!(service.events_of(&second).await, [CREATED]);
    service.end().await;
}

#[tokio::test]
async fn every_bad_field_of_a_cancellation_is_named() {
    let service = Service::start().await;
    let refused = refusal(service.cancel("7", "8").await);
    refused.is(Code::InvalidArgument, "INVALID_CANCELLATION");
    assert_eq!(refused.bad_fields, ["request_id", "order_id"]);
    service.end().await;
}

/// The cancellation and the reply lock the order's row, in either sequence.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancellation_that_crosses_the_reply_ends_cancelled_or_finds_the_order_rejected() {
    let service = Service::start().await;
    for round in 0..40 {
        let order_id = service.place(order()).await.order_id;
        let reply = if round % 2 == 0 { reserved(&order_id) } else { rejected(&order_id) };
        let replies = [reply];
        let (cancelled, outcomes) = tokio::join!(service.cancel(&order_id, ""), service.deliver(&replies));
        assert_eq!(outcomes, ["APPLIED"]);
        let order = service.get(&order_id).await;
        if cancelled.is_ok() {
            assert_eq!((order.status(), order.rejection.as_str()), (OrderStatus::Cancelled, ""));
            assert_eq!(service.events_of(&order_id).await, [CREATED, CANCELLED]);
        } else {
            refusal(cancelled).is(Code::FailedPrecondition, "ORDER_REJECTED");
            assert_eq!(order.status(), OrderStatus::Rejected);
            assert_eq!(service.events_of(&order_id).await, [CREATED]);
        }
    }
    service.end().await;
}
