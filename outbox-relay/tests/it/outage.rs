//! Failures that say nothing about the events, and cost them nothing.

use std::{net::SocketAddr, time::Duration};

use harness::processes::free_port;
use tonic::Code;
use uuid::Uuid;

use crate::{
    line::Line,
    outbox::Outbox,
    receiver::{Receiver, Reply, id_of},
    relay::Relay,
    wait::until,
};

/// Generous: a route that is down is probed at least every second.
const RECOVERY: Duration = Duration::from_secs(15);

/// Any attempt that is counted would be the last, and seen for good.
const NO_SECOND_CHANCE: [&str; 2] = ["--attempts", "1"];

async fn assert_nothing_was_charged(outbox: &Outbox, during: &str) {
    let charged: Vec<_> = outbox.rows().await.into_iter().filter(|row| row.attempts > 0 || row.dead).collect();
    assert!(charged.is_empty(), "{during}: {charged:?}");
}

fn assert_all_arrived(receiver: &Receiver, ids: &[Uuid], after: &str) {
    let missing = receiver.read(|log| ids.iter().filter(|id| log.times(**id) == 0).count());
    assert_eq!(missing, 0, "{after}");
}

#[tokio::test]
async fn events_wait_unharmed_for_a_receiver_that_is_not_there() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(50).await;
    let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let relay = Relay::start(&outbox, address, &NO_SECOND_CHANCE).await;
    // A release moves them to the end of the line.
    let released = "SELECT count(*) FROM outbox WHERE visible_at > created_at AND lease_token IS NULL";
    until("every event was tried", async || {
        sqlx::query_scalar::<_, i64>(released).fetch_one(&outbox.pool).await.unwrap() == 50
    })
    .await;
    assert_nothing_was_charged(&outbox, "nobody listens").await;

    let receiver = Receiver::start_at(address, Reply::apply).await;
    outbox.wait_until_empty_within(RECOVERY).await;
    relay.stop().await;
    assert_all_arrived(&receiver, &ids, "nobody listened");
}

#[tokio::test]
async fn a_status_that_tells_of_an_outage_costs_nothing() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &NO_SECOND_CHANCE).await;
    for code in [
        Code::Unavailable,
        Code::Cancelled,
        Code::DeadlineExceeded,
        Code::ResourceExhausted,
        Code::Aborted,
        Code::Unimplemented,
        Code::PermissionDenied,
        Code::Unauthenticated,
    ] {
        receiver.follow(move |_| Reply::Refuse(code));
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

#[tokio::test]
async fn a_connection_that_breaks_during_the_call_costs_nothing() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(30).await;
    let receiver = Receiver::start(|_| Reply::never()).await;
    let line = Line::to("127.0.0.1", receiver.address.port()).await;
    let cut = line.cutter();
    receiver.follow(move |_| {
        cut();
        Reply::never()
    });
    let relay = Relay::start(&outbox, line.address, &NO_SECOND_CHANCE).await;
    receiver.wait_for_deliveries(4).await;
    assert_nothing_was_charged(&outbox, "the connection breaks").await;

    receiver.follow(Reply::apply);
    outbox.wait_until_empty_within(RECOVERY).await;
    relay.stop().await;
    assert_all_arrived(&receiver, &ids, "the connection broke");
}

#[tokio::test]
async fn a_receiver_that_is_down_is_probed_by_one_worker_with_a_small_batch() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(300).await;
    let receiver = Receiver::start(|_| Reply::Refuse(Code::Unavailable)).await;
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "5"]).await;
    receiver.wait_for_deliveries(5 + 4).await;
    relay.stop().await;
    let sizes = receiver.read(|log| log.deliveries.iter().map(|delivery| delivery.events.len()).collect::<Vec<_>>());
    // Every worker may have had a batch of its own under way when the first of them failed, and be slow to send it.
    assert!(sizes.iter().filter(|size| **size > 8).count() <= 5, "{sizes:?}");
}

/// Six events, one of which the receiver does not survive: `through` programs it so, and says where to reach it.
async fn one_fatal_event_holds_back_no_other(through: impl AsyncFnOnce(&Receiver, Uuid) -> SocketAddr) {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(6).await;
    let receiver = Receiver::start(Reply::apply).await;
    let address = through(&receiver, ids[2]).await;
    let relay = Relay::start(&outbox, address, &["--lease-seconds", "1"]).await;
    until("all others are delivered", async || outbox.count().await == 1).await;
    relay.stop().await;
    assert_nothing_was_charged(&outbox, "a receiver that dies of an event looks like one that is away").await;
}

#[tokio::test]
async fn an_event_on_which_the_receiver_breaks_off_holds_back_no_other() {
    one_fatal_event_holds_back_no_other(async |receiver, fatal| {
        let line = Line::to("127.0.0.1", receiver.address.port()).await;
        let cut = line.cutter();
        let address = line.address;
        receiver.follow(move |events| {
            // Holds the line for as long as it may be called, and so to the end of the test.
            let _ = &line;
            if events.iter().any(|event| id_of(event) == fatal) {
                cut();
                return Reply::never();
            }
            Reply::apply(events)
        });
        address
    })
    .await;
}

#[tokio::test]
async fn an_event_over_which_the_receiver_hangs_holds_back_no_other() {
    one_fatal_event_holds_back_no_other(async |receiver, fatal| {
        receiver.follow(move |events| match events.iter().any(|event| id_of(event) == fatal) {
            true => Reply::never(),
            false => Reply::apply(events),
        });
        receiver.address
    })
    .await;
}
