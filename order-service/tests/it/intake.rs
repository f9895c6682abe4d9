//! Calls that arrive at the same time share transactions, and nothing else.

use std::time::Duration;

use proto::orders::v1::{CreateOrderRequest, Order};
use sqlx::{Postgres, Transaction};
use tokio::{task::JoinSet, time::timeout};
use tonic::{Code, Response, Status};
use uuid::Uuid;

use crate::service::{Service, order, refusal};

type Answer = Result<Response<Order>, Status>;

/// Orders that wait behind the one in the transaction.
const QUEUE: usize = 8;
const ONE_WRITER: [&str; 6] = ["--writers", "1", "--queue", "9", "--database-acquire-ms", "8000"];

pub(crate) fn place_for(service: &Service, calls: &mut JoinSet<Answer>, customer_id: &str) {
    let mut orders = service.orders();
    let request = CreateOrderRequest { customer_id: customer_id.into(), ..order() };
    calls.spawn(async move { orders.create_order(request).await });
}

/// Fills the queue behind an order that holds up the only writer; the waiting orders are of these customers, in rotation.
/// Further orders are refused at once. Then frees the writer, and returns the answers of all that were not refused.
async fn place_behind_one(service: &Service, customer_ids: &[&str], queue: usize) -> Vec<Answer> {
    let lock = service.lock_orders().await;
    let mut calls = JoinSet::new();
    place_for(service, &mut calls, "first");
    service.waits_for_a_lock().await;
    for customer_id in customer_ids.iter().cycle().take(3 * queue) {
        place_for(service, &mut calls, customer_id);
    }
    refuses_the_others(&mut calls, 2 * queue).await;
    lock.rollback().await.unwrap();
    calls.join_all().await
}

/// Returns once so many calls are refused. The queue then has no room left, so the others wait in it.
pub(crate) async fn refuses_the_others(calls: &mut JoinSet<Answer>, others: usize) {
    for _ in 0..others {
        let refused = refusal(calls.join_next().await.unwrap().unwrap());
        refused.is(Code::ResourceExhausted, "OVERLOADED");
        assert!(refused.retry_after.is_some_and(|after| !after.is_zero()), "{refused:?}");
    }
}

async fn transactions(service: &Service) -> i64 {
    sqlx::query_scalar("SELECT count(DISTINCT xmin::text) FROM orders").fetch_one(&service.pool).await.unwrap()
}

#[tokio::test]
async fn calls_that_wait_for_a_busy_writer_share_one_transaction_and_calls_beyond_the_queue_are_refused_at_once() {
    let service = Service::start_with(&ONE_WRITER).await;
    let answers = place_behind_one(&service, &["ann", "bob"], QUEUE).await;
    assert_eq!(answers.len(), 1 + QUEUE);
    for answer in answers {
        let order = answer.unwrap().into_inner();
        assert_eq!(service.get(&order.order_id).await, order);
        assert_eq!(service.events_of(&order.order_id).await, ["orders.v1.OrderCreated"]);
    }
    assert_eq!(transactions(&service).await, 2);
    service.end().await;
}

/// Half of these calls are worth a group, and so is half of the rest. Yet the second group takes all of the rest: calls that
/// were just answered count too, although they are not repeated here.
#[tokio::test]
async fn half_of_many_waiting_calls_share_a_transaction_and_the_other_half_the_next() {
    let flags = ["--writers", "1", "--queue", "63", "--concurrent-streams", "200", "--database-acquire-ms", "8000"];
    let service = Service::start_with(&flags).await;
    let answers = place_behind_one(&service, &["ann"], 62).await;
    assert_eq!(answers.into_iter().filter(Result::is_ok).count(), 1 + 62);
    assert_eq!(transactions(&service).await, 3);
    service.end().await;
}

#[tokio::test]
async fn an_order_that_the_database_rejects_fails_no_other_order_of_its_group() {
    let service = Service::start_with(&ONE_WRITER).await;
    service
        .execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
            CREATE TRIGGER t AFTER INSERT ON orders FOR EACH ROW WHEN (NEW.customer_id = 'bad')
                EXECUTE FUNCTION refuse()",
        )
        .await;
    let (placed, failed): (Vec<_>, Vec<_>) =
        place_behind_one(&service, &["bad", "good"], QUEUE).await.into_iter().partition(Result::is_ok);
    assert_eq!((placed.len(), failed.len()), (1 + QUEUE / 2, QUEUE / 2));
    for answer in failed {
        refusal(answer).is(Code::Internal, "INTERNAL");
    }
    for answer in placed {
        let order = answer.unwrap().into_inner();
        assert_ne!(order.customer_id, "bad");
        assert_eq!(service.get(&order.order_id).await, order);
    }
    service.end().await;
}

#[tokio::test]
async fn an_order_that_gets_no_transaction_in_time_is_refused_and_never_placed() {
    let service = Service::start_with(&["--writers", "1", "--database-acquire-ms", "1000"]).await;
    let lock = service.lock_orders().await;
    let mut calls = JoinSet::new();
    place_for(&service, &mut calls, "first");
    service.waits_for_a_lock().await;
    refusal(service.orders().create_order(order()).await).asks_to_retry();
    lock.rollback().await.unwrap();
    assert_eq!(calls.join_all().await[0].as_ref().unwrap().get_ref().customer_id, "first");

    let behind = service.place(order()).await;
    let placed: Vec<String> =
        sqlx::query_scalar("SELECT order_id::text FROM orders").fetch_all(&service.pool).await.unwrap();
    assert_eq!(placed.len(), 2);
    assert!(placed.contains(&behind.order_id));
    service.end().await;
}

/// The orders behind a full group must not wait for it to begin: no writer becomes free.
#[tokio::test]
async fn more_orders_than_a_group_holds_are_all_refused_in_time_if_they_get_no_transaction() {
    const WAITING: usize = 1100;
    let flags = ["--writers", "1", "--queue", "1101", "--concurrent-streams", "2000", "--database-acquire-ms", "1000"];
    let patient =
        ["--database-work-ms", "60000", "--request-seconds", "60", "--queue-per-customer", "1100", "--calls", "2200"];
    let service = Service::start_with(&[&flags[..], &patient].concat()).await;
    let lock = service.lock_orders().await;
    let mut first = JoinSet::new();
    place_for(&service, &mut first, "first");
    service.waits_for_a_lock().await;
    let mut calls = JoinSet::new();
    (0..WAITING).for_each(|_| place_for(&service, &mut calls, "behind"));
    let refused = timeout(Duration::from_secs(30), calls.join_all()).await.expect("no call waits for the writer");
    refused.into_iter().for_each(|answer| refusal(answer).asks_to_retry());
    lock.rollback().await.unwrap();
    assert!(first.join_all().await[0].is_ok());
    assert_eq!(service.written().await.orders, 1);
    service.end().await;
}

fn place_with(service: &Service, calls: &mut JoinSet<Answer>, request_id: Uuid) {
    let mut orders = service.orders();
    let request = CreateOrderRequest { request_id: request_id.to_string(), ..order() };
    calls.spawn(async move { orders.create_order(request).await });
}

/// Another transaction that places an order with this request id and different content.
async fn hold(service: &Service, request_id: Uuid) -> Transaction<'static, Postgres> {
    let mut holder = service.pool.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
        VALUES (gen_random_uuid(), $1, 'holder', 'EUR', 0)",
    )
    .bind(request_id)
    .execute(&mut *holder)
    .await
    .unwrap();
    holder
}

#[tokio::test]
async fn an_order_that_another_transaction_is_placing_fails_no_other_order_of_its_group() {
    let service = Service::start_with(&ONE_WRITER).await;
    let (before, taken) = (Uuid::new_v4(), Uuid::new_v4());
    let (first, second) = (hold(&service, before).await, hold(&service, taken).await);
    let (mut alone, mut refused, mut calls) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
    place_with(&service, &mut alone, before);
    service.waits_for_a_lock().await;
    place_with(&service, &mut refused, taken);
    for _ in 1..3 * QUEUE {
        place_for(&service, &mut calls, "neighbour");
    }
    refuses_the_others(&mut calls, 2 * QUEUE).await;

    first.commit().await.unwrap();
    refusal(alone.join_next().await.unwrap().unwrap()).is(Code::InvalidArgument, "REQUEST_ID_REUSED");
    service.waits_for_a_lock().await;
    assert!(calls.try_join_next().is_none(), "all are in the group that waits");
    second.commit().await.unwrap();
    refusal(refused.join_next().await.unwrap().unwrap()).is(Code::InvalidArgument, "REQUEST_ID_REUSED");
    for answer in calls.join_all().await {
        let order = answer.unwrap().into_inner();
        assert_eq!(service.get(&order.order_id).await, order);
    }
    // The neighbours share one transaction; the two holders have one each.
    assert_eq!(transactions(&service).await, 3);
    service.end().await;
}

#[tokio::test]
async fn a_slow_transaction_holds_up_no_other_call() {
    let service = Service::start().await;
    let taken = Uuid::new_v4();
    let holder = hold(&service, taken).await;
    let mut calls = JoinSet::new();
    place_with(&service, &mut calls, taken);
    service.waits_for_a_lock().await;
    for _ in 0..3 {
        service.place(order()).await;
    }
    assert!(calls.try_join_next().is_none(), "it has to wait for the holder");
    holder.rollback().await.unwrap();
    calls.join_next().await.unwrap().unwrap().unwrap();
    service.end().await;
}

/// These groups deadlock unless every group inserts by request id.
#[tokio::test(flavor = "multi_thread")]
async fn groups_of_two_processes_that_share_request_ids_do_not_deadlock() {
    const IDS: usize = 20;
    const ROUNDS: usize = 5;
    let service = Service::start().await;
    let other = service.start_another().await;
    // So slow that no group ends before another begins.
    service
        .execute(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_sleep(0.005); RETURN NEW; END $$;
            CREATE TRIGGER t BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION dawdle()",
        )
        .await;
    for _ in 0..ROUNDS {
        let request_ids: Vec<_> = (0..IDS).map(|_| Uuid::new_v4()).collect();
        let there = request_ids.iter().map(|request_id| (service.orders(), request_id));
        let back = request_ids.iter().rev().map(|request_id| (other.clone(), request_id));
        let mut calls = JoinSet::new();
        for (mut orders, request_id) in there.chain(back) {
            let request = CreateOrderRequest { request_id: request_id.to_string(), ..order() };
            calls.spawn(async move { orders.create_order(request).await });
        }
        while let Some(answer) = calls.join_next().await {
            answer.unwrap().unwrap();
        }
    }
    assert_eq!(usize::try_from(service.written().await.orders).unwrap(), IDS * ROUNDS);
    let deadlocks: i64 =
        sqlx::query_scalar("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
            .fetch_one(&service.pool)
            .await
            .unwrap();
    assert_eq!(deadlocks, 0);
    service.end().await;
}
