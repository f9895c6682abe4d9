//! Aggregates with many events: a lease takes a run of them. It delivers one after the other, or several in a call if the
//! receiver applies them in order.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::events::v1::Event;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    operator::Operator,
    outbox::{NewEvent, Outbox},
    receiver::{Log, Receiver, Reply, applied, id_of, rejected, retry},
    relay::Relay,
    wait::until,
};

/// Longer than thousands of calls, one after the other, take on a busy machine.
const LONG: Duration = Duration::from_secs(300);

async fn insert_line(outbox: &Outbox, events: i32) -> Vec<Uuid> {
    let aggregate_id = Uuid::new_v4();
    let line: Vec<_> = (1..=events).map(|sequence| NewEvent::of(aggregate_id, sequence)).collect();
    outbox.insert(&line).await;
    line.iter().map(|event| event.event_id).collect()
}

fn subjects(events: &[Event]) -> usize {
    events.iter().map(|event| &event.subject).collect::<HashSet<_>>().len()
}

/// With a lease for each event, this would take thousands of leases, and minutes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_events_of_one_aggregate_are_delivered_in_sequence_with_few_leases() {
    let outbox = Outbox::create().await;
    outbox.count_leases().await;
    let line = insert_line(&outbox, 6000).await;
    let receiver = Receiver::start(|events| {
        assert_eq!(subjects(events), events.len(), "two events of an aggregate in one batch");
        Reply::apply(events)
    })
    .await;
    // Others would look in vain meanwhile, again and again.
    let relay = Relay::start(&outbox, receiver.address, &["--batch", "500", "--workers", "1"]).await;
    outbox.wait_until_empty_within(LONG).await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), line);
    let leases = outbox.leases().await;
    assert!(leases < 60, "{leases} leases");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_applies_in_order_gets_a_line_in_full_batches() {
    let outbox = Outbox::create().await;
    let line = insert_line(&outbox, 6000).await;
    let receiver = Receiver::start(Reply::apply).await;
    receiver.is_ordered();
    let relay = Relay::start(&outbox, receiver.address, &["--batch", "500"]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), line);
    assert_eq!(receiver.read(|log| log.disorders.clone()), Vec::<String>::new());
    // Each lease is a batch, but for what other workers take between a settlement and the next lease.
    let calls = receiver.read(|log| log.deliveries.len());
    assert!(calls < 6000 / 100, "{calls} calls");
}

#[tokio::test]
async fn an_event_that_nothing_follows_shares_no_call_with_a_line() {
    let outbox = Outbox::create().await;
    insert_line(&outbox, 40).await;
    let lone = outbox.insert_unrelated(3).await;
    let receiver = Receiver::start(Reply::apply).await;
    receiver.is_ordered();
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    let beside = |events: &[Event]| events.iter().any(|event| lone.contains(&id_of(event)));
    let later = |events: &[Event]| events.iter().any(|event| event.sequence > 1);
    receiver.read(|log| assert!(!log.deliveries.iter().any(|call| beside(&call.events) && later(&call.events))));
}

/// Many lines at once, and receivers that now and then fail an event: each line arrives in sequence, without gaps.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_event_is_taken_before_its_predecessor_whatever_fails() {
    for ordered in [false, true] {
        deliver_lines(ordered).await;
    }
}

async fn deliver_lines(ordered: bool) {
    let outbox = Outbox::create().await;
    let mut lines = Vec::new();
    for events in [1, 2, 3, 7, 40, 400] {
        lines.push(insert_line(&outbox, events).await);
        lines.push(insert_line(&outbox, events).await);
    }
    let taken: Arc<Mutex<HashMap<String, Vec<Uuid>>>> = Arc::default();
    let log = taken.clone();
    let receiver = Receiver::start(move |events| {
        let mut refused = HashSet::new();
        Reply::each(events, |event| {
            if refused.contains(&event.subject) || fastrand::u8(..100) < 3 {
                refused.insert(event.subject.clone());
                return retry(event);
            }
            log.lock().unwrap().entry(event.subject.clone()).or_default().push(id_of(event));
            applied(event)
        })
    })
    .await;
    if ordered {
        receiver.is_ordered();
    }
    let relay = Relay::start(&outbox, receiver.address, &["--back-off-ms", "20", "--attempts", "1000"]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(
        receiver.read(|log| log.deliveries.iter().any(|call| subjects(&call.events) < call.events.len())),
        ordered
    );
    let taken: HashSet<Vec<Uuid>> = taken.lock().unwrap().values().cloned().collect();
    assert_eq!(taken, lines.into_iter().collect());
}

/// The receiver answers RETRY for the events behind one that it refuses. They have not failed.
#[tokio::test]
async fn events_behind_one_that_fails_in_the_same_batch_are_charged_nothing() {
    let outbox = Outbox::create().await;
    outbox.record_charges().await;
    let line = insert_line(&outbox, 20).await;
    let bad = line[9];
    let receiver = Receiver::start(move |events| {
        let mut refused = None;
        Reply::each(events, |event| {
            if id_of(event) == bad {
                refused = Some(event.subject.clone());
            }
            if refused.as_ref() == Some(&event.subject) { retry(event) } else { applied(event) }
        })
    })
    .await;
    receiver.is_ordered();
    let relay = Relay::start(&outbox, receiver.address, &["--back-off-ms", "1", "--attempts", "3"]).await;
    let dead = outbox.wait_for_dead_beside_others(1).await;
    relay.stop().await;
    assert_eq!(dead.iter().map(|row| row.event_id).collect::<Vec<_>>(), [bad]);
    assert_eq!(outbox.charges().await, [bad; 3]);
    let behind: Vec<_> = outbox.rows().await.into_iter().filter(|row| line[10..].contains(&row.event_id)).collect();
    assert_eq!(behind.len(), 10);
    assert!(behind.iter().all(|row| row.failures == 0 && row.last_error.is_none()), "{behind:?}");
}

#[tokio::test]
async fn an_event_that_dies_in_the_middle_of_a_run_holds_back_the_rest() {
    let outbox = Outbox::create().await;
    let line = insert_line(&outbox, 20).await;
    let (bad, sound) = (line[9], CancellationToken::new());
    let repaired = sound.clone();
    let receiver = Receiver::start(move |events| {
        Reply::each(events, |event| {
            if id_of(event) == bad && !repaired.is_cancelled() { rejected(event) } else { applied(event) }
        })
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_for_dead(1).await;
    outbox.wait_for_a_later_event().await;
    assert_eq!(receiver.read(Log::ids)[..10], line[..10]);
    assert_eq!(outbox.count().await, 11);
    sound.cancel();
    Operator::of(&outbox).does(&["dead", "requeue", &bad.to_string()]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    let after = receiver.read(|log| log.ids().into_iter().filter(|id| line[9..].contains(id)).collect::<Vec<_>>());
    assert_eq!(after[1..], line[9..]);
}

/// The line fills the front of the outbox, and its first event hangs. New events of others go past it, and so do later
/// events of others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_line_delays_no_other_aggregate_and_goes_on_at_once_when_its_first_event_is_taken() {
    let outbox = Outbox::create().await;
    let line = insert_line(&outbox, 8000).await;
    let (first, go_on) = (line[0], CancellationToken::new());
    let held = go_on.clone();
    let receiver = Receiver::start(move |events| {
        let reply = Reply::apply(events);
        if events.iter().any(|event| id_of(event) == first) { reply.held(&held) } else { reply }
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &["--lease-seconds", "3600"]).await;
    receiver.wait("the first event is in flight", |log| log.ids().contains(&first)).await;
    let parked = "SELECT count(*) FROM outbox WHERE sequence > 1001 AND visible_at > now()";
    let parked = async || sqlx::query_scalar::<_, i64>(parked).fetch_one(&outbox.pool).await.unwrap();
    until("the far events are parked", async || parked().await >= 6900).await;
    let began = Instant::now();
    let short = insert_line(&outbox, 3).await;
    until("a short line is delivered", async || receiver.read(|log| short.iter().all(|id| log.times(*id) == 1))).await;
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());

    go_on.cancel();
    // The lease of its first event would have expired only later.
    outbox.wait_until_empty_within(LONG).await;
    relay.stop().await;
    let of_line: HashSet<Uuid> = line.iter().copied().collect();
    let delivered = receiver.read(|log| log.ids().into_iter().filter(|id| of_line.contains(id)).collect::<Vec<_>>());
    assert_eq!(delivered, line);
}

/// The first events of 500 aggregates hang in one lease, and their successors fill the front. They are too near to be
/// parked. An aggregate behind them is found all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn later_events_behind_thousands_that_wait_for_a_lease_are_delivered() {
    let outbox = Outbox::create().await;
    let go_on = CancellationToken::new();
    let held = go_on.clone();
    let receiver = Receiver::start(move |events| {
        let reply = Reply::apply(events);
        if events[0].r#type == "slow.v1.Happened" { reply.held(&held) } else { reply }
    })
    .await;
    sqlx::query(
        "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
        SELECT md5(aggregate::text)::uuid, sequence, gen_random_uuid(), 'slow.v1.Happened', '', at, at
        FROM generate_series(1, 500) AS aggregate, generate_series(1, 6) AS sequence,
            (SELECT now() - interval '1 minute') AS enqueued (at)",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    let relay = Relay::start(&outbox, receiver.address, &["--batch", "500", "--workers", "2"]).await;
    receiver.wait("the first events are in flight", |log| log.ids().len() >= 500).await;
    // Its first event was delivered before.
    let second = NewEvent::of(Uuid::new_v4(), 2);
    outbox.insert(&[second]).await;
    outbox.wait_until_gone(second.event_id).await;
    go_on.cancel();
    outbox.wait_until_empty().await;
    relay.stop().await;
}
