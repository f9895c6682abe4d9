//! Resuming slowly.

use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::{
    operator::Operator,
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::until,
};

/// Two relays share the pace. Time counts from before it is set, so this holds however slow the machine is.
#[tokio::test]
async fn relays_together_deliver_no_more_than_the_pace_until_it_ends() {
    const PER_SECOND: u32 = 40;
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    operator.does(&["pause", "--reason", "the receiver is mended"]).await;
    let events = outbox.insert_unrelated(1000).await.len();
    let receiver = Receiver::start(Reply::apply).await;
    let relays =
        [Relay::start(&outbox, receiver.address, &[]).await, Relay::start(&outbox, receiver.address, &[]).await];
    outbox.wait_for_route_state("OPEN").await;
    let pace = PER_SECOND.to_string();
    // Before the pace is set, so that time passes in favour of the relays.
    let began = Instant::now();
    let said = operator.does(&["resume", "--per-second", &pace, "--reason", "it is slow"]).await;
    assert_eq!(said, "resumed slowly: 40 events per second at most for each subscription (deed 2)\n");
    // Two relays may have a quarter of a second's saved up, each of its share.
    let burst = f64::from(PER_SECOND) / 2.0;
    while began.elapsed() < Duration::from_secs(6) {
        let delivered = receiver.read(Log::ids).len();
        let may = f64::from(PER_SECOND) * began.elapsed().as_secs_f64() + burst;
        assert!(f64::from(u32::try_from(delivered).unwrap()) <= may, "{delivered} of {may}");
        sleep(Duration::from_millis(100)).await;
    }
    until("it delivers all the same", async || receiver.read(Log::ids).len() > 20).await;

    let status = operator.reads(&["status", "--json"]).await;
    let slowed = &status["pace"];
    assert_eq!(
        (&slowed["events_per_second"], &slowed["set_by"], &slowed["reason"]),
        (&json!(40), &json!("ann"), &json!("it is slow"))
    );
    assert!(operator.does(&["status"]).await.contains("SLOWED to 40 events per second since 20"));
    let waiting = outbox.rows().await.last().unwrap().event_id.to_string();
    let why = operator.does(&["why", &waiting]).await;
    assert!(why.contains("all subscriptions are slowed to 40 events per second"), "{why}");

    let said = operator.does(&["resume"]).await;
    assert_eq!(said, "delivers as fast as its relays can again (deed 3)\n");
    outbox.wait_until_empty().await;
    assert_eq!(receiver.read(Log::ids).len(), events);
    for relay in relays {
        relay.stop().await;
    }
}

#[tokio::test]
async fn a_pace_needs_a_pause_or_a_pace_and_a_pause_ends_it() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let slowly = ["resume", "--subscription", "all", "--per-second", "7"];
    let line = operator.is_refused(&slowly).await;
    assert!(line.contains("not paused"), "{line}");
    operator.is_misused(&["resume", "--per-second", "0"]).await;
    operator.does(&["pause", "--subscription", "all", "--reason", "moving"]).await;
    assert_eq!(operator.does(&slowly).await, "resumed all slowly: 7 events per second at most (deed 2)\n");
    let said = operator.does(&["resume", "--subscription", "all", "--per-second", "9"]).await;
    assert_eq!(said, "all delivers 9 events per second at most from now on (deed 3)\n");
    let line = operator.is_refused(&["undo", "3"]).await;
    assert!(line.contains("has ended or set a pace"), "{line}");
    let pace = async || operator.reads(&["status", "--json"]).await["subscriptions"][0]["pace"].clone();
    assert_eq!(pace().await["events_per_second"], 9);
    operator.does(&["pause", "--subscription", "all", "--reason", "again"]).await;
    operator.does(&["resume", "--subscription", "all"]).await;
    assert_eq!(pace().await, json!(null));
    // An undo brings the pause back, and no pace.
    operator.does(&["undo", "5"]).await;
    assert!(operator.does(&["status"]).await.contains("PAUSED"));
}

/// A relay that starts, and one whose receiver comes back, must not begin with a burst.
#[tokio::test]
async fn a_pace_holds_from_the_start_of_a_relay_and_while_a_route_opens_again() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    outbox.insert_unrelated(2000).await;
    operator.does(&["pause", "--reason", "moving"]).await;
    operator.does(&["resume", "--per-second", "20"]).await;
    let began = Instant::now();
    let up = CancellationToken::new();
    let is_up = up.clone();
    let receiver =
        Receiver::start(
            move |events| {
                if is_up.is_cancelled() { Reply::apply(events) } else { Reply::Refuse(Code::Unavailable) }
            },
        )
        .await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_for_route_state("DOWN").await;
    up.cancel();
    until("some are delivered", async || outbox.count().await < 2000).await;
    while began.elapsed() < Duration::from_secs(8) {
        let delivered = 2000.0 - outbox.count().await as f64;
        let may = 20.0 * began.elapsed().as_secs_f64() + 10.0;
        assert!(delivered <= may, "{delivered} of {may}");
        sleep(Duration::from_millis(200)).await;
    }
    relay.stop().await;
}

/// It would deliver as fast as it can.
#[tokio::test]
async fn a_relay_that_does_not_know_paces_keeps_the_pause_from_ending() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    operator.does(&["pause", "--reason", "moving"]).await;
    sqlx::query("INSERT INTO outbox_routes (relay_id, route, receiver, state, seen_at) VALUES (gen_random_uuid(), 'all', 'http://x:1', 'OPEN', now() + interval '30 s')")
        .execute(&outbox.pool)
        .await
        .unwrap();
    let line = operator.is_refused(&["resume", "--per-second", "5"]).await;
    assert!(line.contains("a relay has not read the pace, so the pause goes on"), "{line}");
    assert!(operator.does(&["status"]).await.contains("PAUSED"));
}
