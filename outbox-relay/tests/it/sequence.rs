//! The sequence of an aggregate's events, and the events that wait for a dead one.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use proto::events::v1::Event;
use sqlx::Connection;
use uuid::Uuid;

use crate::{
    outbox::{NewEvent, Outbox},
    receiver::{Receiver, Reply, applied, id_of, rejected, retry},
    relay::Relay,
    wait::until,
};

/// Sequences by subject, in the order in which they were applied.
type Applied = HashMap<String, Vec<i64>>;

const AGGREGATES: usize = 200;
const EVENTS_EACH: i32 = 5;

/// The events of all aggregates, shuffled, with those of each aggregate in sequence.
fn mixed() -> Vec<NewEvent> {
    let ids: Vec<_> = (0..AGGREGATES).map(|_| Uuid::new_v4()).collect();
    let mut order: Vec<_> = (0..EVENTS_EACH).flat_map(|_| ids.clone()).collect();
    fastrand::shuffle(&mut order);
    let mut last = HashMap::new();
    order
        .into_iter()
        .map(|aggregate_id| {
            let sequence = last.entry(aggregate_id).and_modify(|sequence| *sequence += 1).or_insert(1);
            NewEvent::of(aggregate_id, *sequence)
        })
        .collect()
}

/// Commits one event after the other. The relay relies on this: event n is committed before event n+1.
async fn commit_one_by_one(outbox: &Outbox, events: &[NewEvent]) {
    let mut connection = outbox.pool.acquire().await.unwrap();
    sqlx::query("SET synchronous_commit = off").execute(&mut *connection).await.unwrap();
    for event in events {
        let mut tx = connection.begin().await.unwrap();
        sqlx::query(
            "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
            VALUES ($1, $2, $3, 'test.v1.Happened', '')",
        )
        .bind(event.aggregate_id)
        .bind(event.sequence)
        .bind(event.event_id)
        .execute(&mut *tx)
        .await
        .unwrap();
        tx.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_aggregates_events_are_applied_in_sequence_and_never_two_at_once() {
    let outbox = Outbox::create().await;
    let (mut seen, applications) = (HashSet::new(), Arc::new(Mutex::new(Applied::new())));
    let record = applications.clone();
    let receiver = Receiver::start(move |events| {
        let mut applications = record.lock().unwrap();
        Reply::each(events, |event: &Event| {
            // A third of all events fails the first time.
            if seen.insert(event.id.clone()) && id_of(event).as_u128().is_multiple_of(3) {
                return retry(event);
            }
            applications.entry(event.subject.clone()).or_default().push(event.sequence);
            applied(event)
        })
    })
    .await;
    let flags = ["--workers", "5", "--batch", "20", "--back-off-ms", "30"];
    let one = Relay::start(&outbox, receiver.address, &flags).await;
    let other = Relay::start(&outbox, receiver.address, &flags).await;
    commit_one_by_one(&outbox, &mixed()).await;
    outbox.wait_until_empty().await;
    one.stop().await;
    other.stop().await;

    assert_eq!(receiver.read(|log| log.disorders.clone()), [""; 0]);
    let applications = applications.lock().unwrap();
    assert_eq!(applications.len(), AGGREGATES);
    let in_order: Vec<i64> = (1..=EVENTS_EACH.into()).collect();
    let disordered: Vec<_> = applications.iter().filter(|(_, sequences)| **sequences != in_order).collect();
    assert!(disordered.is_empty(), "applied out of order: {disordered:?}");
    assert!(receiver.read(|log| log.ids().len()) > AGGREGATES * 5, "some were retried");
}

#[tokio::test]
async fn a_dead_event_holds_back_its_own_aggregate_only() {
    let outbox = Outbox::create().await;
    let aggregates: Vec<_> = (0..10).map(|_| Uuid::new_v4()).collect();
    let events: Vec<_> = (1..=3).flat_map(|n| aggregates.iter().map(move |id| NewEvent::of(*id, n))).collect();
    outbox.insert(&events).await;
    let unlucky = aggregates[4].to_string();
    let receiver = Receiver::start(move |events| {
        let dies = |event: &Event| event.subject == unlucky && event.sequence == 2;
        Reply::each(events, |event| if dies(event) { rejected(event) } else { applied(event) })
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_for_dead(1).await;
    until("all others are delivered", async || outbox.count().await == 2).await;
    outbox.wait_for_a_later_event().await;
    relay.stop().await;

    let of_unlucky: Vec<_> = events.iter().filter(|event| event.aggregate_id == aggregates[4]).collect();
    let (dead, waiting) = (of_unlucky[1].event_id, of_unlucky[2].event_id);
    let rows = outbox.rows().await;
    assert_eq!(rows.iter().map(|row| (row.event_id, row.dead)).collect::<Vec<_>>(), [(dead, true), (waiting, false)]);
    assert_eq!(rows[1].attempts, 0);
    assert_eq!(receiver.read(|log| (log.times(dead), log.times(waiting))), (1, 0));
    assert_eq!(receiver.read(|log| log.ids().len()), 30, "29 of the 30, and the later one");
}
