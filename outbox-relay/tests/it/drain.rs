//! Shutdown: the relay settles or releases the events in flight, leases no more, and ends in time.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    binary::Binary,
    outbox::{Outbox, Row},
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::until,
};

const DRAIN: Duration = Duration::from_secs(2);
const DRAIN_FLAGS: [&str; 2] = ["--drain-seconds", "2"];

async fn assert_released(outbox: &Outbox, ids: &[Uuid]) {
    let released = |event_id: &Uuid| Row {
        event_id: *event_id,
        attempts: 0,
        failures: 0,
        lease_token: None,
        last_error: None,
        visible: true,
        dead: false,
    };
    assert_eq!(outbox.rows().await, ids.iter().map(released).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_delivery_that_finishes_during_shutdown_is_settled_and_no_more_events_are_leased() {
    let outbox = Outbox::create().await;
    let in_flight = outbox.insert_unrelated(3).await;
    let answered = CancellationToken::new();
    let held = answered.clone();
    let receiver = Receiver::start(move |events| Reply::apply(events).held(&held)).await;
    // One worker, which is busy. Another worker might be about to lease at the moment of the shutdown.
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "1"]).await;
    receiver.wait_for_deliveries(1).await;

    relay.shut_down();
    let late = outbox.insert_unrelated(2).await;
    outbox.notify().await;
    answered.cancel();
    relay.end().await.unwrap();
    assert_released(&outbox, &late).await;
    assert_eq!(receiver.read(Log::ids), in_flight);
}

#[tokio::test]
async fn a_delivery_that_hangs_during_shutdown_is_released_within_the_drain_time() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(25).await;
    let receiver = Receiver::start(|_| Reply::never()).await;
    let flags: Vec<_> = DRAIN_FLAGS.into_iter().chain(["--batch", "10"]).collect();
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    // In three calls or more: workers that lease at the same moment may share what is there in other ways.
    receiver.wait("all are in flight", |log| log.ids().len() == ids.len()).await;

    let asked = Instant::now();
    relay.shut_down();
    relay.end().await.unwrap();
    // As much again for a busy machine. Without the deadline it would end with the lease, much later.
    assert!(asked.elapsed() <= DRAIN * 2, "{:?}", asked.elapsed());
    assert_released(&outbox, &ids).await;
    let sorted = |mut ids: Vec<Uuid>| {
        ids.sort_unstable();
        ids
    };
    assert_eq!(sorted(receiver.read(Log::ids)), sorted(ids));
}

#[tokio::test]
async fn a_relay_with_nothing_in_flight_ends_at_once() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &["--poll-ms", "60000", "--drain-seconds", "60"]).await;
    outbox.wait_for_a_later_event().await;
    let asked = Instant::now();
    relay.stop().await;
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

/// The grace time is longer than the drain time, so that a late end differs from a kill.
async fn assert_ends_in_time(binary: &mut Binary) {
    let asked = Instant::now();
    let exit = binary.process.terminate(DRAIN * 2).await.unwrap();
    let took = asked.elapsed();
    let log = binary.process.log_tail(20);
    assert_eq!((exit.status.code(), exit.killed), (Some(0), false), "{log}");
    assert!(took <= DRAIN, "{took:?}: {log}");
}

#[tokio::test]
async fn sigterm_ends_the_process_in_time_with_code_0_while_the_receiver_hangs() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let receiver = Receiver::start(|_| Reply::never()).await;
    let mut binary = Binary::start(&outbox, &receiver, &DRAIN_FLAGS);
    receiver.wait_for_deliveries(1).await;
    assert_ends_in_time(&mut binary).await;
    assert_released(&outbox, &ids).await;
}

#[tokio::test]
async fn after_sigterm_the_process_settles_a_delivery_that_is_answered() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(3).await;
    let answered = CancellationToken::new();
    let held = answered.clone();
    let receiver = Receiver::start(move |events| Reply::apply(events).held(&held)).await;
    let mut binary = Binary::start(&outbox, &receiver, &DRAIN_FLAGS);
    receiver.wait_for_deliveries(1).await;
    let log = binary.log_file();
    let answer_after_the_signal = async {
        let heard = async || std::fs::read_to_string(&log).unwrap().contains("SIGTERM");
        until("the signal is heard", heard).await;
        answered.cancel();
    };
    tokio::join!(assert_ends_in_time(&mut binary), answer_after_the_signal);
    assert_eq!(outbox.count().await, 0);
}
