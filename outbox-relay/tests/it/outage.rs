//! Outages: they say nothing about the events, and cost them no attempt.

use std::{net::SocketAddr, time::Duration};

use testkit::processes::free_port;
use tokio::time::{Instant, sleep};
use tonic::Code;
use uuid::Uuid;

use crate::{
    line::Line,
    outbox::Outbox,
    receiver::{Receiver, Reply},
    relay::Relay,
};

/// Generous, since a route that is down is probed at least every second.
const RECOVERY: Duration = Duration::from_secs(15);

/// The batch size that [`Relay::start`] sets.
const FULL_BATCH: usize = 100;

/// A single attempt kills an event, so that it shows.
const ONE_ATTEMPT: [&str; 2] = ["--attempts", "1"];

async fn assert_nothing_was_charged(outbox: &Outbox, during: &str) {
    let charged: Vec<_> = outbox.rows().await.into_iter().filter(|row| row.attempts > 0 || row.dead).collect();
    assert!(charged.is_empty(), "{during}: {charged:?}");
}

fn assert_all_arrived(receiver: &Receiver, ids: &[Uuid], after: &str) {
    let missing = receiver.read(|log| ids.iter().filter(|id| log.times(**id) == 0).count());
    assert_eq!(missing, 0, "{after}");
}

/// An address without a listener. A receiver may be started on it later.
fn unused_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()))
}

fn sizes(receiver: &Receiver) -> Vec<usize> {
    receiver.read(|log| log.deliveries.iter().map(|delivery| delivery.events.len()).collect())
}

#[tokio::test]
async fn an_unreachable_receiver_costs_events_no_attempt() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(50).await;
    let address = unused_address();
    let relay = Relay::start(&outbox, address, &ONE_ATTEMPT).await;
    outbox.wait_for_route_state("DOWN").await;
    assert_nothing_was_charged(&outbox, "nobody listens").await;

    let receiver = Receiver::start_at(address, Reply::apply).await;
    outbox.wait_until_empty_within(RECOVERY).await;
    relay.stop().await;
    assert_all_arrived(&receiver, &ids, "nobody listened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_under_load_costs_no_attempt_and_the_backlog_is_delivered_at_once_afterwards() {
    let outbox = Outbox::create().await;
    outbox.record_charges().await;
    let receiver = Receiver::start(Reply::apply).await;
    let address = receiver.address;
    let relay = Relay::start(&outbox, address, &ONE_ATTEMPT).await;
    outbox.insert_unrelated(300).await;
    receiver.wait_for_deliveries(1).await;
    drop(receiver);
    // Load goes on until the route has been down for two seconds.
    let since = "SELECT count(*) FROM outbox_routes WHERE state = 'DOWN' AND since < now() - interval '2 s'";
    while sqlx::query_scalar::<_, i64>(since).fetch_one(&outbox.pool).await.unwrap() == 0 {
        outbox.insert_unrelated(10).await;
        sleep(Duration::from_millis(10)).await;
    }
    assert!(outbox.count().await > 0);
    assert_nothing_was_charged(&outbox, "it is away").await;

    let receiver = Receiver::start_at(address, Reply::apply).await;
    let back = Instant::now();
    receiver.wait_for_deliveries(1).await;
    // A probe per second, a jitter of at most a second, and a busy machine.
    assert!(back.elapsed() < Duration::from_secs(4), "{:?}", back.elapsed());
    outbox.wait_until_empty_within(RECOVERY).await;
    relay.stop().await;
    assert_eq!(outbox.charges().await, Vec::<Uuid>::new());
    let until_full = receiver.read(|log| {
        let full = log.deliveries.iter().find(|delivery| delivery.events.len() == FULL_BATCH);
        full.expect("the backlog was longer than that").at - log.deliveries[0].at
    });
    assert!(until_full < Duration::from_secs(2), "{until_full:?}");
}

#[tokio::test]
async fn an_outage_status_costs_no_attempt() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &ONE_ATTEMPT).await;
    for code in [Code::Unavailable, Code::ResourceExhausted, Code::Aborted] {
        // RESOURCE_EXHAUSTED without a time to retry may mean the size of the message.
        receiver.follow(move |_| Reply::Postpone(code, Duration::ZERO));
        let before = receiver.read(|log| log.deliveries.len());
        let ids = outbox.insert_unrelated(30).await;
        receiver.wait_for_deliveries(before + 3).await;
        assert_nothing_was_charged(&outbox, &format!("{code:?}")).await;

        receiver.follow(Reply::apply);
        outbox.wait_until_empty_within(RECOVERY).await;
        assert_all_arrived(&receiver, &ids, &format!("{code:?}"));
    }
    relay.stop().await;
}

/// Tests a receiver that bars the relay with this code at first, and allows it later.
async fn bar_with(code: Code) {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(30).await;
    let receiver = Receiver::start(move |_| Reply::Refuse(code)).await;
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "1", "--workers", "1"]).await;
    outbox.wait_for_route_state("BARRED").await;
    assert_nothing_was_charged(&outbox, &format!("{code:?}")).await;
    // The batch was split until nothing showed that events were at fault. From then on there are probes only.
    let before = receiver.read(|log| log.deliveries.len());
    receiver.wait_for_deliveries(before + 1).await;
    let probed = receiver.read(|log| log.deliveries[before].at - log.deliveries[before - 1].at);
    assert!(probed >= Duration::from_secs(5), "{probed:?}");

    receiver.follow(Reply::apply);
    outbox.wait_until_empty_within(RECOVERY).await;
    relay.stop().await;
    assert_all_arrived(&receiver, &ids, &format!("{code:?}"));
}

#[tokio::test]
async fn a_receiver_that_bars_the_relay_is_probed_rarely_and_costs_no_attempt() {
    tokio::join!(bar_with(Code::Unimplemented), bar_with(Code::PermissionDenied), bar_with(Code::Unauthenticated));
}

/// Cuts the line during the first `cuts` deliveries.
async fn break_connections(events: usize, cuts: usize) {
    let outbox = Outbox::create().await;
    outbox.record_charges().await;
    let ids = outbox.insert_unrelated(events).await;
    let receiver = Receiver::start(Reply::apply).await;
    let line = Line::to("127.0.0.1", receiver.address.port()).await;
    line.break_over_the_first(cuts, &receiver);
    let relay = Relay::start(&outbox, line.address, &["--attempts", "1", "--workers", "1"]).await;
    outbox.wait_until_empty_within(RECOVERY).await;
    relay.stop().await;
    assert_all_arrived(&receiver, &ids, "the connection broke");
    assert_eq!(outbox.charges().await, Vec::<Uuid>::new());
}

#[tokio::test]
async fn a_broken_connection_costs_a_batch_no_attempt() {
    // Once while the route is open, and once in the probe that follows.
    break_connections(30, 2).await;
}

#[tokio::test]
async fn a_broken_connection_costs_a_single_event_no_attempt_while_the_route_is_open() {
    break_connections(1, 1).await;
}

#[tokio::test]
async fn a_receiver_that_is_down_is_probed_by_one_worker_with_a_small_batch() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(300).await;
    let receiver = Receiver::start(|_| Reply::Refuse(Code::Unavailable)).await;
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "5"]).await;
    receiver.wait_for_deliveries(5 + 4).await;
    relay.stop().await;
    let sizes = sizes(&receiver);
    // When the first worker failed, every other worker may have leased a batch already, and may send it late.
    assert!(sizes.iter().filter(|size| **size > 8).count() <= 5, "{sizes:?}");
}

#[tokio::test]
async fn a_receiver_that_returns_gets_its_load_step_by_step() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(1000).await;
    let receiver = Receiver::start(Reply::apply).await;
    // Unavailable at first. A receiver that was never unavailable gets its full load at once.
    receiver.describe(|| Err(Code::Unavailable));
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "5"]).await;
    outbox.wait_for_route_state("DOWN").await;
    receiver.describe(|| Ok(Some(Duration::from_secs(7 * 24 * 3600))));
    outbox.wait_until_empty_within(RECOVERY).await;
    relay.stop().await;
    assert_eq!(sizes(&receiver)[..5], [8, 16, 32, 64, 100]);
}

#[tokio::test]
async fn a_receiver_gets_the_time_it_asks_for() {
    const TIME: Duration = Duration::from_secs(2);
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(30).await;
    let mut asked = false;
    let receiver = Receiver::start(move |events| match std::mem::replace(&mut asked, true) {
        false => Reply::Postpone(Code::ResourceExhausted, TIME),
        true => Reply::apply(events),
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "1", "--workers", "1"]).await;
    outbox.wait_until_empty_within(RECOVERY).await;
    relay.stop().await;
    let waited = receiver.read(|log| log.deliveries[1].at - log.deliveries[0].at);
    assert!(waited >= TIME, "{waited:?}");
}
