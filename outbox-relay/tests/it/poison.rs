//! Events that crash the receiver, or over which it hangs: each is found, spends its attempts, and ends dead. All
//! others arrive.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use sqlx::types::time::OffsetDateTime;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use uuid::Uuid;

use crate::{
    line::Line,
    operator::Operator,
    outbox::{NewEvent, Outbox},
    receiver::{Delivery, Receiver, Reply, id_of},
    relay::Relay,
    wait::{until, until_within},
};

/// Fills an outbox with events, of which those at the indices `fatal` make the receiver fail. Waits until these are
/// dead and all others delivered. Each fatal event must have spent two attempts, and no other event any.
async fn assert_only_fatal_events_spend_attempts(
    events: usize,
    fatal: &[usize],
    flags: &[&str],
    fail_over: impl AsyncFnOnce(&Receiver, Vec<Uuid>) -> SocketAddr,
) {
    let outbox = Outbox::create().await;
    outbox.record_charges().await;
    let ids = outbox.insert_unrelated(events).await;
    let fatal: Vec<_> = fatal.iter().map(|place| ids[*place]).collect();
    let receiver = Receiver::start(Reply::apply).await;
    let address = fail_over(&receiver, fatal.clone()).await;
    let flags: Vec<_> = ["--attempts", "2", "--back-off-ms", "50"].iter().chain(flags).copied().collect();
    let relay = Relay::start(&outbox, address, &flags).await;
    let dead = outbox.wait_for_dead_beside_others(fatal.len()).await;
    until("all others are delivered", async || outbox.rows().await.len() == fatal.len()).await;
    relay.stop().await;

    assert!(dead.iter().all(|row| !row.dead || fatal.contains(&row.event_id)));
    for row in outbox.rows().await {
        assert_eq!((row.dead, row.attempts, row.lease_token), (true, 2, None));
        assert!(row.last_error.as_ref().unwrap().starts_with("NO_REPLY: "), "{row:?}");
    }
    let mut charges = outbox.charges().await;
    charges.sort_unstable();
    let twice: Vec<_> = fatal.iter().flat_map(|event_id| [*event_id; 2]).collect();
    assert_eq!(charges, twice);
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) > 0)));
}

#[tokio::test]
async fn events_that_failed_before_are_delivered_one_by_one_after_the_others() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(6).await;
    let failed = [ids[1], ids[3]];
    sqlx::query("UPDATE outbox SET failures = 1 WHERE event_id = ANY ($1)")
        .bind(failed)
        .execute(&outbox.pool)
        .await
        .unwrap();
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "1"]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    let deliveries = receiver.read(|log| {
        let ids = |delivery: &Delivery| delivery.events.iter().map(id_of).collect::<Vec<_>>();
        log.deliveries.iter().map(ids).collect::<Vec<_>>()
    });
    assert_eq!(deliveries, [vec![ids[0], ids[2], ids[4], ids[5]], vec![ids[1]], vec![ids[3]]]);
}

/// Behind a backlog that never shrinks, the event at fault would never be found.
#[tokio::test]
async fn events_that_met_silence_are_delivered_first_when_the_receiver_is_back() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(10).await;
    outbox.insert_unrelated(40).await;
    let receiver = Receiver::start(Reply::apply).await;
    let line = Line::to("127.0.0.1", receiver.address.port()).await;
    line.break_over_the_first(1, &receiver);
    let relay = Relay::start(&outbox, line.address, &["--workers", "1", "--batch", "10"]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    let [silent, next] = receiver.read(|log| [0, 1].map(|number| log.deliveries[number].events.clone()));
    assert_eq!((silent.len(), next.len()), (10, 8));
    assert!(next.iter().all(|event| silent.contains(event)), "{next:?}");
}

/// Cuts the line during each batch with a fatal event.
async fn break_connection(receiver: &Receiver, fatal: Vec<Uuid>) -> SocketAddr {
    let line = Line::to("127.0.0.1", receiver.address.port()).await;
    let cut = line.cutter();
    let address = line.address;
    receiver.follow(move |events| {
        // Keeps the line alive to the end of the test.
        let _ = &line;
        if events.iter().any(|event| fatal.contains(&id_of(event))) {
            cut();
            return Reply::never();
        }
        Reply::apply(events)
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_breaks_the_connection_ends_dead_and_all_others_arrive() {
    assert_only_fatal_events_spend_attempts(300, &[137], &[], break_connection).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_events_that_break_the_connection_end_dead_and_all_others_arrive() {
    assert_only_fatal_events_spend_attempts(300, &[0, 1, 2, 150, 299], &[], break_connection).await;
}

/// A run shares a call, if the receiver applies events in order. A probe takes runs as well: otherwise it would find the
/// fatal event only once that is the first, after a crash for each event before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_a_run_that_breaks_the_connection_is_found_at_once() {
    let outbox = Outbox::create().await;
    let aggregate_id = Uuid::new_v4();
    let line: Vec<_> = (1..=60).map(|sequence| NewEvent::of(aggregate_id, sequence)).collect();
    outbox.insert(&line).await;
    let receiver = Receiver::start(Reply::apply).await;
    receiver.is_ordered();
    let fatal = line[40].event_id;
    let address = break_connection(&receiver, vec![fatal]).await;
    let relay = Relay::start(&outbox, address, &[]).await;
    until("all before it are delivered", async || outbox.count().await <= 20).await;
    relay.stop().await;
    let crashes = receiver.read(|log| log.times(fatal));
    assert!(crashes <= 4, "{crashes} crashes");
}

/// New events come as fast as others are delivered. So there are always more events before the fatal one than a probe
/// delivers before the route is open again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_breaks_the_connection_is_found_under_endless_load() {
    const BEHIND: i64 = 2000;
    let outbox = Outbox::create().await;
    outbox.record_charges().await;
    outbox.insert_unrelated(2000).await;
    let fatal = outbox.insert_one().await;
    let receiver = Receiver::start(Reply::apply).await;
    let address = break_connection(&receiver, vec![fatal]).await;
    let relay = Relay::start(&outbox, address, &["--attempts", "2", "--back-off-ms", "50"]).await;
    let mut arrived = 0;
    until("it is dead", async || {
        if outbox.count().await < BEHIND {
            arrived += outbox.insert_unrelated(500).await.len();
        }
        outbox.row(fatal).await.unwrap().dead
    })
    .await;
    outbox.wait_for_a_later_event().await;
    relay.stop().await;
    assert!(arrived >= 500, "{arrived} events are no load");
    assert_eq!(outbox.charges().await, [fatal; 2]);
}

/// If the probe released the events meanwhile, all that it knows about them would be lost. The receiver would crash
/// again and again, and no event would spend an attempt.
#[tokio::test]
async fn an_event_that_breaks_the_connection_ends_dead_though_the_receiver_is_away_for_longer_than_a_lease() {
    const LEASE: Duration = Duration::from_secs(1);
    assert_only_fatal_events_spend_attempts(8, &[5], &["--lease-seconds", "1"], async |receiver, fatal| {
        let line = Line::to("127.0.0.1", receiver.address.port()).await;
        let (cut, address) = (line.cutter(), line.address);
        let back_at = Arc::new(Mutex::new(Instant::now()));
        let is_back = back_at.clone();
        receiver.describe(move || match Instant::now() < *is_back.lock().unwrap() {
            true => Err(Code::Unavailable),
            false => Ok(Some(Duration::from_secs(7 * 24 * 3600))),
        });
        receiver.follow(move |events| {
            let _ = &line;
            if events.iter().any(|event| fatal.contains(&id_of(event))) {
                *back_at.lock().unwrap() = Instant::now() + 2 * LEASE;
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
async fn a_probe_that_waits_with_leased_events_releases_them_when_the_outbox_is_paused() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let receiver = Receiver::start(|_| Reply::Refuse(Code::Unavailable)).await;
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "1", "--lease-seconds", "2"]).await;
    // The second delivery was a probe's. From now on the probe waits, with its events leased.
    receiver.wait_for_deliveries(2).await;
    receiver.describe(|| Err(Code::Unavailable));
    let expiry = "SELECT min(visible_at) FROM outbox WHERE lease_token IS NOT NULL HAVING count(*) = 3";
    let expiry = async || sqlx::query_scalar::<_, OffsetDateTime>(expiry).fetch_optional(&outbox.pool).await.unwrap();
    let first = expiry().await.expect("they are leased");
    until("the lease is renewed", async || expiry().await.is_some_and(|expiry| expiry > first)).await;
    Operator::of(&outbox).does(&["pause", "--reason", "as the test wants it"]).await;
    until("nothing is leased", async || outbox.rows().await.iter().all(|row| row.lease_token.is_none())).await;

    receiver.follow(Reply::apply);
    receiver.describe(|| Ok(Some(Duration::from_secs(7 * 24 * 3600))));
    outbox.wait_for_route_state("OPEN").await;
    assert_eq!(outbox.count().await, 3, "paused is paused");
    Operator::of(&outbox).does(&["resume"]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) > 0)));
}

/// Such as a message that is too large for this receiver, one over which a proxy loses patience, or one of a type that
/// the receiver does not implement.
#[tokio::test]
async fn an_event_that_is_always_refused_like_in_an_outage_is_charged_with_its_reason_and_all_others_arrive() {
    let codes = [Code::ResourceExhausted, Code::Unavailable, Code::PermissionDenied, Code::Unimplemented];
    for (code, (events, culprit)) in codes.into_iter().zip([(30, 0), (30, 29), (300, 137), (30, 7)]) {
        let outbox = Outbox::create().await;
        let ids = outbox.insert_unrelated(events).await;
        let refused = ids[culprit];
        let receiver = Receiver::start(move |events| match events.iter().any(|event| id_of(event) == refused) {
            true => Reply::Refuse(code),
            false => Reply::apply(events),
        })
        .await;
        let relay = Relay::start(&outbox, receiver.address, &["--attempts", "3", "--back-off-ms", "50"]).await;
        outbox.wait_for_dead_beside_others(1).await;
        until("all others are delivered", async || outbox.rows().await.len() == 1).await;
        until("the route is open for others", async || {
            outbox.wait_for_a_later_event().await;
            outbox.route_states().await == [("all".into(), "OPEN".into())]
        })
        .await;
        relay.stop().await;
        let row = outbox.row(refused).await.unwrap();
        assert_eq!((row.attempts, row.dead), (3, true), "{code:?}");
        assert_eq!(row.last_error, Some(format!("{code:?}: as the test wants it")));
    }
}

/// Such as events of a type for which the receiver lacks a right. They are more than the first batch of a probe.
#[tokio::test]
async fn many_events_that_are_always_refused_like_in_an_outage_do_not_block_others() {
    for flags in [&["--attempts", "3"][..], &["--attempts", "3", "--batch", "1"]] {
        let outbox = Outbox::create().await;
        let refused = outbox.insert_of_type("test.v1.Refused", 9).await;
        outbox.insert_unrelated(10).await;
        let receiver = Receiver::start(|events| match events.iter().any(|event| event.r#type == "test.v1.Refused") {
            true => Reply::Refuse(Code::Unavailable),
            false => Reply::apply(events),
        })
        .await;
        let relay = Relay::start(&outbox, receiver.address, flags).await;
        // Each of them is delivered alone, after a back-off of up to a second.
        let others = async || outbox.rows().await.len() == refused.len();
        until_within(Duration::from_secs(60), "all others are delivered", others).await;
        relay.stop().await;
        let reasons = outbox.rows().await.into_iter().filter_map(|row| row.last_error).count();
        assert!(reasons > 0, "what fails is shown with its reason");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_over_which_the_receiver_hangs_ends_dead_and_all_others_arrive() {
    assert_only_fatal_events_spend_attempts(300, &[137], &["--lease-seconds", "4"], async |receiver, fatal| {
        receiver.follow(move |events| match events.iter().any(|event| fatal.contains(&id_of(event))) {
            true => Reply::never(),
            false => Reply::apply(events),
        });
        receiver.address
    })
    .await;
}

#[tokio::test]
async fn a_slow_event_is_not_charged_for_a_neighbour_over_which_the_receiver_hangs() {
    let outbox = Outbox::create().await;
    outbox.record_charges().await;
    let ids = outbox.insert_unrelated(2).await;
    let (slow, fatal) = (ids[0], ids[1]);
    let receiver = Receiver::start(move |events| {
        if events.iter().any(|event| id_of(event) == fatal) {
            return Reply::never();
        }
        if events.iter().all(|event| id_of(event) != slow) {
            return Reply::apply(events);
        }
        // Longer than the rest of the lease, once half of it was spent on the batch of both events.
        let done = CancellationToken::new();
        let reply = Reply::apply(events).held(&done);
        tokio::spawn(async move {
            sleep(Duration::from_millis(800)).await;
            done.cancel();
        });
        reply
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &["--lease-seconds", "2", "--attempts", "1"]).await;
    outbox.wait_for_dead(1).await;
    outbox.wait_for_a_later_event().await;
    relay.stop().await;
    assert_eq!(outbox.charges().await, [fatal]);
    assert_eq!(outbox.rows().await.len(), 1);
}

#[tokio::test]
async fn an_event_for_which_the_receiver_cancels_the_call_ends_dead_and_all_others_arrive() {
    for code in [Code::Cancelled, Code::DeadlineExceeded] {
        assert_only_fatal_events_spend_attempts(30, &[7], &[], async |receiver, fatal| {
            receiver.follow(move |events| match events.iter().any(|event| fatal.contains(&id_of(event))) {
                true => Reply::Refuse(code),
                false => Reply::apply(events),
            });
            receiver.address
        })
        .await;
    }
}
