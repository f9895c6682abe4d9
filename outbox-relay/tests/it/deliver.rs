//! Delivery: the content of an event, the deadline, and which result belongs to which event.

use std::time::Duration;

use outbox::{Envelope, NewEvent, TraceContext};
use proto::{events::v1::Outcome, orders::v1::OrderCreated};
use sqlx::types::time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    outbox::Outbox,
    receiver::{Receiver, Reply, applied, id_of, result, retry},
    relay::Relay,
};

#[tokio::test]
async fn an_event_arrives_as_it_was_enqueued() {
    let fixture = Outbox::create().await;
    let order_id = Uuid::new_v4();
    let message = OrderCreated { order_id: order_id.to_string(), total_minor: 12_345, ..OrderCreated::default() };
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let trace = TraceContext::from_headers(Some(parent), Some("vendor=state"));
    let mut tx = fixture.pool.begin().await.unwrap();
    let events =
        [NewEvent::of(order_id, 1, &message, &trace), NewEvent::of(order_id, 2, &message, &TraceContext::default())];
    outbox::enqueue(&mut tx, &events).await.unwrap();
    let ids = sqlx::query_scalar::<_, Uuid>("SELECT event_id FROM outbox ORDER BY sequence");
    let ids = ids.fetch_all(&mut *tx).await.unwrap();
    let created_at = sqlx::query_scalar::<_, OffsetDateTime>("SELECT now()").fetch_one(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();

    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&fixture, receiver.address, &["--source", "order-service"]).await;
    fixture.wait_until_empty().await;
    relay.stop().await;

    let events =
        receiver.read(|log| log.deliveries.iter().flat_map(|delivery| delivery.events.clone()).collect::<Vec<_>>());
    assert_eq!(events.iter().map(id_of).collect::<Vec<_>>(), ids);
    let event = &events[0];
    assert_eq!(event.source, "order-service");
    assert_eq!(event.r#type, "orders.v1.OrderCreated");
    assert_eq!((event.subject.as_str(), event.sequence), (order_id.to_string().as_str(), 1));
    assert_eq!(event.time, Some(outbox::timestamp(created_at)));
    assert_eq!((event.traceparent.as_str(), event.tracestate.as_str()), (parent, "vendor=state"));
    assert_eq!(Envelope::read(event).unwrap().decode::<OrderCreated>().unwrap(), message);
    assert_eq!((events[1].sequence, events[1].traceparent.as_str(), events[1].tracestate.as_str()), (2, "", ""));
}

#[tokio::test]
async fn a_delivery_that_hangs_is_cancelled_within_its_lease_and_costs_no_attempt() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let receiver = Receiver::start(|_| Reply::never()).await;
    // One worker: if it did not give up, it would deliver nothing else.
    let flags = ["--workers", "1", "--lease-seconds", "8", "--attempts", "1"];
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    receiver.wait_for_deliveries(2).await;
    receiver.follow(Reply::apply);
    outbox.wait_until_empty().await;
    relay.stop().await;

    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) >= 2)));
    let (first, second) = receiver.read(|log| (log.deliveries[0].clone(), log.deliveries[1].clone()));
    let held = second.at - first.at;
    assert!(held > Duration::from_secs(5) && held < Duration::from_secs(8), "{held:?}");
    assert!(first.has_deadline, "the receiver learns the deadline");
}

#[tokio::test]
async fn a_result_belongs_to_the_event_it_names_whatever_its_position() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let last = ids[2];
    let receiver = Receiver::start(move |events| {
        let mut results: Vec<_> =
            events.iter().map(|event| if id_of(event) == last { retry(event) } else { applied(event) }).collect();
        results.reverse();
        Reply::Results(results)
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "1"]).await;
    let dead = outbox.wait_for_dead(1).await;
    relay.stop().await;
    assert_eq!((outbox.count().await, dead[0].event_id), (1, last));
}

#[tokio::test]
async fn a_duplicate_is_deleted() {
    let outbox = Outbox::create().await;
    let event_id = outbox.insert_one().await;
    let receiver =
        Receiver::start(|events| Reply::each(events, |event| result(event, Outcome::Duplicate, "", ""))).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(|log| log.times(event_id)), 1);
}

/// By default a gRPC server refuses messages of more than 4 MiB.
#[tokio::test]
async fn events_too_large_for_one_message_are_delivered_in_several() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(60).await;
    let enlarge = "UPDATE outbox SET payload = decode(repeat('00', 100000), 'hex')";
    sqlx::query(enlarge).execute(&outbox.pool).await.unwrap();
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "1"]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    let sizes = receiver.read(|log| log.deliveries.iter().map(|delivery| delivery.events.len()).collect::<Vec<_>>());
    assert_eq!(sizes, [31, 29]);
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 1)));
}
