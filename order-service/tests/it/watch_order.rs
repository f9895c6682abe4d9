use std::time::{Duration, Instant};

use proto::orders::v1::{Order, OrderStatus, WatchOrderRequest};
use tokio::time::timeout;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;

use crate::{
    service::{LIMIT, Service, order, refusal, rejected, reserved},
    wake_relays::{hear, listen},
};

async fn watch(service: &Service, order_id: &str) -> Streaming<Order> {
    service.orders().watch_order(WatchOrderRequest { order_id: order_id.into() }).await.unwrap().into_inner()
}

async fn next(stream: &mut Streaming<Order>) -> Result<Option<OrderStatus>, Status> {
    let next = timeout(LIMIT, stream.message()).await.expect("a message");
    next.map(|order| order.map(|order| order.status()))
}

#[tokio::test]
async fn a_watcher_sees_the_current_order_then_the_settled_order_then_the_end() {
    let service = Service::start().await;
    for (reply, becomes) in [(reserved as fn(&str) -> _, OrderStatus::Confirmed), (rejected, OrderStatus::Rejected)] {
        let order_id = service.place(order()).await.order_id;
        let mut stream = watch(&service, &order_id).await;
        assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Pending));
        service.deliver(&[reply(&order_id)]).await;
        assert_eq!(next(&mut stream).await.unwrap(), Some(becomes));
        assert_eq!(next(&mut stream).await.unwrap(), None);

        let mut late = watch(&service, &order_id).await;
        assert_eq!(next(&mut late).await.unwrap(), Some(becomes));
        assert_eq!(next(&mut late).await.unwrap(), None);
    }
    service.end().await;
}

#[tokio::test]
async fn a_change_by_another_process_is_seen() {
    let service = Service::start().await;
    let order_id = service.place(order()).await.order_id;
    let mut stream = watch(&service, &order_id).await;
    assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Pending));
    // No notification is sent, so only the poll can find it.
    service.execute("UPDATE orders SET status = 'CANCELLED'").await;
    assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Cancelled));
    service.end().await;
}

#[tokio::test]
async fn a_hundred_watchers_are_all_notified() {
    let service = Service::start().await;
    let mut streams = Vec::new();
    let mut order_ids = Vec::new();
    for _ in 0..100 {
        let order_id = service.place(order()).await.order_id;
        let mut stream = watch(&service, &order_id).await;
        assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Pending));
        streams.push(stream);
        order_ids.push(order_id);
    }
    let replies: Vec<_> = order_ids.iter().map(|order_id| reserved(order_id)).collect();
    assert_eq!(service.deliver(&replies).await, vec!["APPLIED"; 100]);
    for stream in &mut streams {
        assert_eq!(next(stream).await.unwrap(), Some(OrderStatus::Confirmed));
    }
    service.end().await;
}

/// With the poll alone they would wait for up to a second.
#[tokio::test]
async fn watching_processes_are_notified_of_a_reply_and_of_a_cancellation() {
    let service = Service::start().await;
    let order_ids = [service.place(order()).await.order_id, service.place(order()).await.order_id];
    let mut listener = listen(&service, "order_status").await;
    service.deliver(&[reserved(&order_ids[0])]).await;
    assert_eq!(hear(&mut listener).await, "");
    let mut of_relays = listen(&service, outbox::CHANNEL).await;
    service.cancel(&order_ids[1], "").await.unwrap();
    assert_eq!(hear(&mut listener).await, "");
    assert_eq!(hear(&mut of_relays).await, "");
    service.end().await;
}

/// Ten in a row: with the poll alone they would take five seconds on average.
#[tokio::test]
async fn a_watcher_is_notified_without_waiting_for_the_poll() {
    let service = Service::start().await;
    let started = Instant::now();
    for _ in 0..10 {
        let order_id = service.place(order()).await.order_id;
        let mut stream = watch(&service, &order_id).await;
        assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Pending));
        service.deliver(&[reserved(&order_id)]).await;
        assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Confirmed));
    }
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    service.end().await;
}

#[tokio::test]
async fn a_watch_outlives_the_time_a_call_may_take() {
    let service = Service::start_with(&["--database-acquire-ms", "8000", "--request-seconds", "1"]).await;
    let order_id = service.place(order()).await.order_id;
    let mut stream = watch(&service, &order_id).await;
    assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Pending));
    // This waits for nothing but the limit.
    assert!(timeout(Duration::from_millis(1500), stream.message()).await.is_err());
    service.cancel(&order_id, "").await.unwrap();
    assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Cancelled));
    service.end().await;
}

#[tokio::test]
async fn watchers_are_asked_to_retry_when_the_server_shuts_down() {
    let service = Service::start().await;
    let order_id = service.place(order()).await.order_id;
    let mut stream = watch(&service, &order_id).await;
    assert_eq!(next(&mut stream).await.unwrap(), Some(OrderStatus::Pending));
    service.shut_down();
    let ended = next(&mut stream).await.map(|_| tonic::Response::new(()));
    refusal(ended).is(Code::Unavailable, "SHUTTING_DOWN");
    drop(stream);
    service.end().await;
}

#[tokio::test]
async fn an_unknown_or_malformed_order_id_cannot_be_watched() {
    let service = Service::start().await;
    let watch = async |order_id: String| service.orders().watch_order(WatchOrderRequest { order_id }).await;
    refusal(watch("7".into()).await).is(Code::InvalidArgument, "INVALID_ORDER_ID");
    refusal(watch(Uuid::now_v7().into()).await).is(Code::NotFound, "ORDER_NOT_FOUND");
    service.end().await;
}
