//! Batches that a receiver refuses whole while it is up: one of the events may be the cause.

use tonic::Code;
use uuid::Uuid;

use crate::{
    outbox::{NewEvent, Outbox},
    receiver::{Receiver, Reply, id_of},
    relay::Relay,
    wait::until,
};

/// Codes of a receiver that is up and refuses the batch.
const REFUSALS: [Code; 8] = [
    Code::Unknown,
    Code::InvalidArgument,
    Code::NotFound,
    Code::AlreadyExists,
    Code::FailedPrecondition,
    Code::OutOfRange,
    Code::Internal,
    Code::DataLoss,
];

fn refuse_batches_with(receiver: &Receiver, culprit: Uuid, code: Code) {
    receiver.follow(move |events| {
        if events.iter().any(|event| id_of(event) == culprit) { Reply::Refuse(code) } else { Reply::apply(events) }
    });
}

#[tokio::test]
async fn only_the_event_that_a_batch_is_refused_for_spends_attempts_and_dies_after_its_last() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let flags = ["--attempts", "2", "--back-off-ms", "1"];
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    for (number, code) in (1..).zip(REFUSALS) {
        // Its id is known before it is enqueued, so that every batch with it is refused.
        let culprit = NewEvent::of(Uuid::new_v4(), 1);
        refuse_batches_with(&receiver, culprit.event_id, code);
        let mut batch: Vec<_> = (0..6).map(|_| NewEvent::of(Uuid::new_v4(), 1)).collect();
        batch.insert(3, culprit);
        outbox.insert(&batch).await;

        outbox.wait_for_dead_beside_others(number).await;
        let dead = outbox.row(culprit.event_id).await.unwrap();
        assert_eq!((dead.dead, dead.attempts, dead.lease_token), (true, 2, None), "{code:?}");
        assert_eq!(dead.last_error, Some(format!("{code:?}: as the test wants it")));
        until("the others are delivered", async || outbox.count().await == i64::try_from(number).unwrap()).await;
        let others = batch.iter().filter(|event| event.event_id != culprit.event_id);
        let answered = receiver.read(|log| {
            let alone = log
                .deliveries
                .iter()
                .filter(|delivery| delivery.events.iter().all(|event| id_of(event) != culprit.event_id));
            alone.flat_map(|delivery| delivery.events.iter().map(id_of)).collect::<Vec<_>>()
        });
        for other in others {
            assert_eq!(answered.iter().filter(|id| **id == other.event_id).count(), 1, "{code:?}: applied once");
        }
    }
    relay.stop().await;
}

#[tokio::test]
async fn a_refused_batch_costs_the_culprits_neighbours_no_attempt() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(10).await;
    let receiver = Receiver::start(Reply::apply).await;
    refuse_batches_with(&receiver, ids[5], Code::InvalidArgument);
    // A single attempt kills an event.
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "1"]).await;
    outbox.wait_for_dead(1).await;
    outbox.wait_for_a_later_event().await;
    relay.stop().await;
    assert_eq!(outbox.rows().await.iter().map(|row| row.event_id).collect::<Vec<_>>(), [ids[5]]);
}

#[tokio::test]
async fn an_outage_during_single_deliveries_costs_no_attempt() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(5).await;
    let receiver = Receiver::start(Reply::apply).await;
    let (culprit, last) = (ids[1], ids[4]);
    receiver.follow(move |events| match events {
        [event] if id_of(event) == culprit => Reply::Refuse(Code::Internal),
        [event] if id_of(event) == last => Reply::Refuse(Code::Unavailable),
        [_] => Reply::apply(events),
        _ => Reply::Refuse(Code::Internal),
    });
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "1"]).await;
    outbox.wait_for_dead(1).await;
    receiver.wait("the outage", |log| log.times(last) >= 3).await;
    let row = outbox.row(last).await.unwrap();
    assert_eq!((row.attempts, row.dead), (0, false));
    receiver.follow(Reply::apply);
    outbox.wait_until_gone(last).await;
    relay.stop().await;
    assert_eq!(outbox.rows().await.iter().map(|row| row.event_id).collect::<Vec<_>>(), [culprit]);
}
