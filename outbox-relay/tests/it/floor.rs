//! Events below the floor of the leases, which must still be found.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    outbox::{NewEvent, Outbox},
    receiver::{Log, Receiver, Reply, id_of},
    relay::Relay,
};

#[tokio::test]
async fn an_event_committed_long_after_it_was_enqueued_is_delivered_within_seconds() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    for _ in 0..3 {
        outbox.wait_for_a_later_event().await;
        let late = outbox.insert_late().await;
        let began = Instant::now();
        outbox.wait_until_gone(late).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
    relay.stop().await;
}

/// The event of a notification may lie below the floor, where the first lease does not scan.
#[tokio::test]
async fn a_notified_event_below_the_floor_is_delivered_within_seconds_whatever_the_poll_interval() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &["--poll-ms", "600000", "--workers", "1"]).await;
    outbox.wait_for_route_state("OPEN").await;
    for _ in 0..3 {
        // Raises the floor to now.
        let later = outbox.insert_one().await;
        outbox.notify().await;
        outbox.wait_until_gone(later).await;
        let late = outbox.insert_late().await;
        outbox.notify().await;
        let began = Instant::now();
        outbox.wait_until_gone(late).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
    relay.stop().await;
}

/// Later events have been delivered meanwhile, so the successor lies below the floor.
#[tokio::test]
async fn the_successor_of_a_slow_delivery_follows_at_once() {
    let outbox = Outbox::create().await;
    let aggregate_id = Uuid::new_v4();
    let line = [1, 2].map(|sequence| NewEvent::of(aggregate_id, sequence));
    let answered = CancellationToken::new();
    let (slow, held) = (line[0].event_id, answered.clone());
    let receiver = Receiver::start(move |events| match id_of(&events[0]) == slow {
        true => Reply::apply(events).held(&held),
        false => Reply::apply(events),
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &["--poll-ms", "600000", "--workers", "2"]).await;
    outbox.wait_for_route_state("OPEN").await;
    outbox.insert(&line).await;
    outbox.notify().await;
    receiver.wait_for_deliveries(1).await;
    sleep(Duration::from_millis(1500)).await;
    let later = outbox.insert_one().await;
    outbox.notify().await;
    outbox.wait_until_gone(later).await;
    answered.cancel();
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), [slow, later, line[1].event_id]);
}
