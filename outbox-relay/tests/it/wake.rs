//! When the relay leases: on a notification, and at the latest when the poll is due.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    outbox::{NewEvent, Outbox},
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::until,
};

/// So long that no poll happens within a test.
const NEVER_POLL: [&str; 2] = ["--poll-ms", "600000"];

/// Process ids of the sessions that listen.
async fn listeners(outbox: &Outbox) -> Vec<i32> {
    sqlx::query_scalar::<_, i32>(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%' AND state = 'idle'",
    )
    .fetch_all(&outbox.pool)
    .await
    .unwrap()
}

async fn terminate(outbox: &Outbox, session: i32) {
    let terminated = sqlx::query_scalar::<_, bool>("SELECT pg_terminate_backend($1)").bind(session);
    assert!(terminated.fetch_one(&outbox.pool).await.unwrap());
}

/// Waits until the relay listens, and its first leases are over. Whatever it delivers from then on, a notification has
/// woken it.
async fn wait_until_it_sleeps(outbox: &Outbox) {
    until("it listens", async || !listeners(outbox).await.is_empty()).await;
    let quiet = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = 'outbox_relay'
        AND (state <> 'idle' OR state_change > clock_timestamp() - interval '300 ms')";
    until("it is idle", async || sqlx::query_scalar::<_, i64>(quiet).fetch_one(&outbox.pool).await.unwrap() == 0).await;
}

#[tokio::test]
async fn a_notification_wakes_it_long_before_the_poll() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &NEVER_POLL).await;
    wait_until_it_sleeps(&outbox).await;
    let event_id = outbox.insert_one().await;
    outbox.notify().await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), [event_id]);
}

/// After a lease that took all there was, a worker waits for the next notification. It does not look once more.
#[tokio::test]
async fn an_event_that_comes_alone_costs_one_lease() {
    const EVENTS: i64 = 40;
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &NEVER_POLL).await;
    wait_until_it_sleeps(&outbox).await;
    outbox.count_leases().await;
    for _ in 0..EVENTS {
        outbox.insert_one().await;
        outbox.notify().await;
        outbox.wait_until_empty().await;
    }
    wait_until_it_sleeps(&outbox).await;
    let leases = outbox.leases().await;
    // A lease that did not scan everything is followed by one that does, within a second.
    assert!((EVENTS..EVENTS * 3 / 2).contains(&leases), "{leases} for {EVENTS} events");
    relay.stop().await;
}

/// Inserts the event, and waits until a worker was woken for it and has looked.
async fn wake_the_other_worker(outbox: &Outbox, event: NewEvent) {
    outbox.insert(&[event]).await;
    let before = outbox.leases().await;
    outbox.notify().await;
    until("the other worker has looked", async || outbox.leases().await > before).await;
}

/// The notification for the second event wakes the other worker while the first is in flight. So only the worker that
/// settles the first can know that the second is free.
#[tokio::test]
async fn an_event_that_came_while_its_predecessor_was_in_flight_follows_at_once() {
    let outbox = Outbox::create().await;
    let settled = CancellationToken::new();
    let held = settled.clone();
    let receiver = Receiver::start(move |events| Reply::apply(events).held(&held)).await;
    let relay = Relay::start(&outbox, receiver.address, &NEVER_POLL).await;
    wait_until_it_sleeps(&outbox).await;
    let aggregate_id = Uuid::new_v4();
    outbox.count_leases().await;
    outbox.insert(&[NewEvent::of(aggregate_id, 1)]).await;
    outbox.notify().await;
    receiver.wait_for_deliveries(1).await;
    wake_the_other_worker(&outbox, NewEvent::of(aggregate_id, 2)).await;
    let began = Instant::now();
    settled.cancel();
    receiver.wait_for_deliveries(2).await;
    // A worker that has looked in vain looks again within a second.
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    relay.stop().await;
}

/// The same, while the first is being settled.
#[tokio::test]
async fn an_event_that_came_while_its_predecessor_was_settled_follows_at_once() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &NEVER_POLL).await;
    wait_until_it_sleeps(&outbox).await;
    outbox.count_leases().await;
    let slow_settlement = "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_advisory_xact_lock(7); RETURN OLD; END';
        CREATE TRIGGER wait BEFORE DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION wait()";
    sqlx::raw_sql(slow_settlement).execute(&outbox.pool).await.unwrap();
    let mut settling = outbox.pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(7)").execute(&mut *settling).await.unwrap();
    let aggregate_id = Uuid::new_v4();
    outbox.insert(&[NewEvent::of(aggregate_id, 1)]).await;
    outbox.notify().await;
    let waits = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event = 'advisory' AND query LIKE '%relay: settle%'";
    let waits = async || sqlx::query_scalar::<_, i64>(waits).fetch_one(&outbox.pool).await.unwrap();
    until("the settlement waits", async || waits().await == 1).await;
    wake_the_other_worker(&outbox, NewEvent::of(aggregate_id, 2)).await;
    let began = Instant::now();
    settling.commit().await.unwrap();
    receiver.wait_for_deliveries(2).await;
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    relay.stop().await;
}

#[tokio::test]
async fn one_notification_wakes_as_many_workers_as_a_backlog_needs() {
    let outbox = Outbox::create().await;
    let all = CancellationToken::new();
    let held = all.clone();
    let receiver = Receiver::start(move |events| Reply::apply(events).held(&held)).await;
    let flags: Vec<_> = NEVER_POLL.into_iter().chain(["--workers", "3", "--batch", "10"]).collect();
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    wait_until_it_sleeps(&outbox).await;
    outbox.insert_unrelated(25).await;
    outbox.notify().await;
    // None is answered yet, so each is from another worker.
    receiver.wait_for_deliveries(3).await;
    all.cancel();
    outbox.wait_until_empty().await;
    relay.stop().await;
}

#[tokio::test]
async fn single_events_wake_at_most_two_workers() {
    let outbox = Outbox::create().await;
    let all = CancellationToken::new();
    let held = all.clone();
    let receiver = Receiver::start(move |events| Reply::apply(events).held(&held)).await;
    let flags: Vec<_> = NEVER_POLL.into_iter().chain(["--workers", "5", "--batch", "10"]).collect();
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    wait_until_it_sleeps(&outbox).await;
    for deliveries in [1, 2, 2] {
        outbox.insert_one().await;
        outbox.notify().await;
        receiver.wait_for_deliveries(deliveries).await;
    }
    wait_until_it_sleeps(&outbox).await;
    assert_eq!(receiver.read(|log| log.deliveries.len()), 2);
    // The third event is delivered as well.
    all.cancel();
    outbox.wait_until_empty().await;
    relay.stop().await;
}

#[tokio::test]
async fn without_a_notification_the_poll_finds_an_event() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &["--poll-ms", "100"]).await;
    // Hidden at first, so that no lease finds them that is running while they are inserted.
    let time = Duration::from_millis(300);
    for _ in 0..3 {
        let event_id = outbox.insert_hidden(None, time).await;
        outbox.wait_until_gone(event_id).await;
    }
    relay.stop().await;
}

#[tokio::test]
async fn it_listens_again_after_its_listening_connection_was_killed() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &NEVER_POLL).await;
    wait_until_it_sleeps(&outbox).await;
    let killed = listeners(&outbox).await;
    assert_eq!(killed.len(), 1);
    terminate(&outbox, killed[0]).await;
    until("another connection listens", async || {
        let listening = listeners(&outbox).await;
        !listening.is_empty() && !listening.contains(&killed[0])
    })
    .await;

    wait_until_it_sleeps(&outbox).await;
    let event_id = outbox.insert_one().await;
    outbox.notify().await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), [event_id]);
}

#[tokio::test]
async fn an_event_notified_while_no_connection_listened_is_found_when_one_listens_again() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &NEVER_POLL).await;
    wait_until_it_sleeps(&outbox).await;
    outbox.allow_connections(false).await;
    terminate(&outbox, listeners(&outbox).await[0]).await;
    until("nobody listens", async || listeners(&outbox).await.is_empty()).await;
    outbox.insert_one().await;
    outbox.notify().await;
    outbox.allow_connections(true).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
}
