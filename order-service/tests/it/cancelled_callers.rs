//! Callers that hang up or time out, at any moment. tonic then drops the handler at the point that it has reached. The
//! database must not notice.

use std::time::Duration;

use tokio::{task::JoinSet, time::timeout};
use tonic::Request;
use uuid::Uuid;

use crate::{
    intake::{place_for, refuses_the_others},
    service::{ONE_ORDER, Service, eventually, order, order_once},
    wake_relays::{hear, listen},
};

/// Sends many calls at once and gives up each after a different time, up to 30 ms. Every second call ends by its deadline,
/// which the server sees; the others are dropped. Returns the ids of the orders that were answered.
async fn give_up_calls(service: &Service, calls: u64) -> Vec<Uuid> {
    let mut waiting = JoinSet::new();
    for n in 0..calls {
        let mut orders = service.orders();
        // 7 and 31 have no common factor: neighbours differ, and every number of milliseconds occurs.
        let limit = Duration::from_millis(n * 7 % 31);
        waiting.spawn(async move {
            let mut request = Request::new(order());
            if n % 2 == 0 {
                request.set_timeout(limit);
                return orders.create_order(request).await.ok();
            }
            timeout(limit, orders.create_order(request)).await.ok()?.ok()
        });
    }
    let answers = waiting.join_all().await;
    answers.into_iter().flatten().map(|order| order.into_inner().order_id.parse().unwrap()).collect()
}

/// Returns once every session of the service is idle. Fails if a session stays in a transaction.
pub(crate) async fn sessions_are_idle(service: &Service) {
    eventually("no session of the service is in a transaction", async || {
        let busy: Vec<String> = sqlx::query_scalar(
            "SELECT state FROM pg_stat_activity
            WHERE datname = current_database() AND usename = 'order_service' AND state <> 'idle'",
        )
        .fetch_all(&service.pool)
        .await
        .unwrap();
        busy.is_empty()
    })
    .await;
}

/// How many orders lack their event or their items, and how many events lack their order.
async fn torn(service: &Service) -> i64 {
    sqlx::query_scalar(
        "SELECT count(*) FROM orders FULL JOIN outbox ON aggregate_id = order_id
        WHERE order_id IS NULL OR event_id IS NULL
            OR (SELECT count(*) FROM outbox WHERE aggregate_id = order_id) <> 1
            OR (SELECT count(*) FROM order_items WHERE order_items.order_id = orders.order_id) <> 2",
    )
    .fetch_one(&service.pool)
    .await
    .unwrap()
}

async fn committed(service: &Service, order_ids: &[Uuid]) -> usize {
    let found: Vec<Uuid> = sqlx::query_scalar("SELECT order_id FROM orders WHERE order_id = ANY ($1)")
        .bind(order_ids)
        .fetch_all(&service.pool)
        .await
        .unwrap();
    found.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_given_up_leave_no_transaction_open_and_no_order_torn() {
    let service = Service::start_with(&["--database-connections", "2"]).await;
    let mut answered = Vec::new();
    // Only the last call on a connection leaves a visible state there, hence many rounds instead of many calls.
    for _ in 0..20 {
        answered.extend(give_up_calls(&service, 31).await);
        sessions_are_idle(&service).await;
    }
    assert!(answered.len() < 20 * 31, "no call was given up");
    assert_eq!(committed(&service, &answered).await, answered.len());
    assert_eq!(torn(&service).await, 0);

    for _ in 0..6 {
        let order_id = service.place(order()).await.order_id.parse().unwrap();
        assert_eq!(committed(&service, &[order_id]).await, 1, "an answered order is durable");
    }
    assert_eq!(torn(&service).await, 0);
    service.end().await;
}

#[tokio::test]
async fn an_order_whose_caller_hangs_up_during_its_transaction_is_placed_and_relays_are_notified() {
    let service = Service::start().await;
    let mut listener = listen(&service, outbox::CHANNEL).await;
    let request = order_once();
    let lock = service.lock_orders().await;
    let mut orders = service.orders();
    let call = tokio::spawn(async move { orders.create_order(request).await });
    service.waits_for_a_lock().await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    // On the same connection: the server has read that the call was given up before it answers this.
    service.health().await.unwrap();
    lock.rollback().await.unwrap();

    hear(&mut listener).await;
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

#[tokio::test]
async fn an_order_whose_caller_hangs_up_before_its_transaction_is_never_placed() {
    let service = Service::start_with(&["--writers", "1", "--queue", "2", "--database-acquire-ms", "8000"]).await;
    let lock = service.lock_orders().await;
    let (mut first, mut others) = (JoinSet::new(), JoinSet::new());
    place_for(&service, &mut first, "first");
    service.waits_for_a_lock().await;
    place_for(&service, &mut others, "behind");
    place_for(&service, &mut others, "behind");
    refuses_the_others(&mut others, 1).await;
    others.abort_all();
    assert!(others.join_next().await.unwrap().unwrap_err().is_cancelled());
    // On the same connection: the server has read that the call was given up before it answers this.
    service.health().await.unwrap();
    lock.rollback().await.unwrap();

    assert!(first.join_all().await[0].is_ok());
    service.place(order()).await;
    assert_eq!(service.written().await.orders, 2);
    service.end().await;
}
