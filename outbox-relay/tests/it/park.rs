//! Parking of events that wait for a predecessor.

use sqlx::types::time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    outbox::{NewEvent, Outbox},
    receiver::{Log, Receiver, Reply, applied, id_of, rejected},
    relay::Relay,
    wait::until,
};

/// Hides an event: dead, leased, or until a minute or ten from now.
async fn hide(outbox: &Outbox, event_id: Uuid, when: &str) {
    let hide = match when {
        "infinity" => "UPDATE outbox SET visible_at = 'infinity', last_error = 'dead' WHERE event_id = $1",
        "leased" => {
            "UPDATE outbox SET visible_at = now() + interval '10 minutes', lease_token = gen_random_uuid() WHERE event_id = $1"
        }
        "minute" => "UPDATE outbox SET visible_at = now() + interval '1 minute' WHERE event_id = $1",
        "minutes" => "UPDATE outbox SET visible_at = now() + interval '10 minutes' WHERE event_id = $1",
        other => panic!("{other}"),
    };
    sqlx::query(hide).bind(event_id).execute(&outbox.pool).await.unwrap();
}

/// Seconds until it is visible, and whether it is visible when its predecessor is.
async fn waits(outbox: &Outbox, event: &NewEvent) -> (f64, bool) {
    sqlx::query_as::<_, (f64, bool)>(
        "SELECT extract(epoch FROM least(row.visible_at, now() + interval '1 day') - now())::float8,
            row.visible_at = (SELECT visible_at FROM outbox WHERE aggregate_id = $1 AND sequence = $2 - 1)
        FROM outbox AS row WHERE aggregate_id = $1 AND sequence = $2",
    )
    .bind(event.aggregate_id)
    .bind(event.sequence)
    .fetch_one(&outbox.pool)
    .await
    .unwrap()
}

fn chain(length: i32) -> Vec<NewEvent> {
    let aggregate_id = Uuid::new_v4();
    (1..=length).map(|sequence| NewEvent::of(aggregate_id, sequence)).collect()
}

#[tokio::test]
async fn successors_of_dead_events_and_of_events_that_back_off_are_parked_but_not_those_of_leased_ones() {
    let outbox = Outbox::create().await;
    let chains: Vec<_> = ["minute", "minutes", "infinity", "leased"].into_iter().map(|when| (when, chain(3))).collect();
    for (when, events) in &chains {
        outbox.insert(events).await;
        hide(&outbox, events[0].event_id, when).await;
    }
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    let hidden = async || outbox.rows().await.iter().filter(|row| !row.visible).count();
    until("they are parked", async || hidden().await == 4 + 6).await;
    relay.stop().await;

    for (when, events) in &chains {
        for event in &events[1..] {
            let (seconds, with_predecessor) = waits(&outbox, event).await;
            match *when {
                "minute" => assert!(with_predecessor && seconds < 60.0, "{seconds}"),
                "leased" => assert!(seconds <= 0.0, "{seconds}"),
                // With jitter, less the time since; and never for ever.
                _ => assert!((150.0..=300.0).contains(&seconds), "{when}: {seconds}"),
            }
        }
    }
    assert!(outbox.rows().await.iter().all(|row| row.attempts == 0));
    assert_eq!(receiver.read(Log::ids), Vec::<Uuid>::new());
}

#[tokio::test]
async fn parked_events_become_visible_by_time_and_are_delivered_in_sequence() {
    let outbox = Outbox::create().await;
    let events = chain(4);
    outbox.insert(&events).await;
    let first = events[0].event_id;
    let visible_at = "UPDATE outbox SET visible_at = now() + interval '2 s' WHERE event_id = $1 RETURNING visible_at";
    let at = sqlx::query_scalar::<_, OffsetDateTime>(visible_at).bind(first).fetch_one(&outbox.pool).await.unwrap();
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    until("all are parked", async || outbox.rows().await.iter().all(|row| !row.visible)).await;
    outbox.wait_until_empty().await;
    assert!(outbox.clock().await >= at);
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), events.iter().map(|event| event.event_id).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_successor_of_a_dead_event_is_delivered_once_both_are_made_visible() {
    let outbox = Outbox::create().await;
    let events = chain(2);
    outbox.insert(&events).await;
    let first = events[0].event_id;
    let receiver = Receiver::start(move |events| {
        Reply::each(events, |event| if id_of(event) == first { rejected(event) } else { applied(event) })
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_for_dead(1).await;
    until("its successor is parked", async || outbox.rows().await.iter().all(|row| !row.visible)).await;
    receiver.follow(Reply::apply);
    // As an operator's requeue does.
    sqlx::query("UPDATE outbox SET visible_at = now(), attempts_before_requeue = attempts")
        .execute(&outbox.pool)
        .await
        .unwrap();
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), [first, first, events[1].event_id]);
}
