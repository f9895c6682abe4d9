//! Rows that the database's clock has hidden while it ran ahead, before it was set right.

use std::time::Duration;

use proto::events::v1::Event;
use uuid::Uuid;

use crate::{
    outbox::{NewEvent, Outbox},
    receiver::{Receiver, Reply},
    relay::Relay,
    wait::until,
};

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Two events of one aggregate, as a clock leaves them that was ahead.
async fn insert_hidden_line(outbox: &Outbox, ahead: &str, sql: &'static str) -> [Uuid; 2] {
    let aggregate_id = Uuid::new_v4();
    let line = [1, 2].map(|sequence| NewEvent::of(aggregate_id, sequence));
    outbox.insert(&line).await;
    sqlx::query(sql).bind(aggregate_id).bind(ahead).execute(&outbox.pool).await.unwrap();
    line.map(|event| event.event_id)
}

const ENQUEUED: &str =
    "UPDATE outbox SET created_at = now() + $2::text::interval, visible_at = now() + $2::text::interval
    WHERE aggregate_id = $1";
/// The first was leased, and the second was enqueued later.
const LEASED: &str = "UPDATE outbox SET visible_at = now() + $2::text::interval + interval '30 s',
        lease_token = CASE sequence WHEN 1 THEN gen_random_uuid() END,
        created_at = CASE sequence WHEN 1 THEN created_at ELSE now() + $2::text::interval END
    WHERE aggregate_id = $1";
/// The first backs off, and the second is parked.
const BACKS_OFF: &str = "UPDATE outbox SET visible_at = now() + $2::text::interval + interval '5 s',
        attempts = CASE sequence WHEN 1 THEN 1 ELSE 0 END
    WHERE aggregate_id = $1";

#[tokio::test]
async fn events_that_a_clock_ahead_has_hidden_are_delivered_at_once_and_in_sequence() {
    let outbox = Outbox::create().await;
    let mut lines = Vec::new();
    for ahead in ["1 hour", "1 year"] {
        for sql in [ENQUEUED, LEASED, BACKS_OFF] {
            lines.push(insert_hidden_line(&outbox, ahead, sql).await);
        }
    }
    let dead = outbox.insert_one().await;
    let kill = "UPDATE outbox SET visible_at = 'infinity', last_error = 'gone' WHERE event_id = $1";
    sqlx::query(kill).bind(dead).execute(&outbox.pool).await.unwrap();
    outbox.record_charges().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    until("only the dead event is left", async || outbox.count().await == 1).await;
    assert!(outbox.row(dead).await.unwrap().dead);
    assert_eq!(outbox.charges().await.len(), 0);
    let now = outbox.clock().await.unix_timestamp();
    relay.stop().await;

    receiver.read(|log| {
        assert_eq!(log.disorders, [""; 0]);
        assert!(lines.iter().flatten().all(|event_id| log.times(*event_id) == 1));
        let events = log.deliveries.iter().flat_map(|delivery| &delivery.events);
        let seconds = |event: &Event| event.time.unwrap().seconds;
        assert!(events.map(seconds).all(|time| time <= now), "an event is dated ahead");
    });
}

/// Its settings allow it to hide a row for that long, and other relays respect that.
#[tokio::test]
async fn an_event_that_another_relay_may_hide_for_so_long_stays_hidden() {
    let outbox = Outbox::create().await;
    let hidden = outbox.insert_hidden(Some(Uuid::new_v4()), Duration::from_secs(7000)).await;
    let receiver = Receiver::start(Reply::apply).await;
    // Each relay looks for such rows when it starts, and frees this one.
    let witness = outbox.insert_hidden(None, YEAR).await;
    let relay = Relay::start(&outbox, receiver.address, &["--lease-seconds", "3600"]).await;
    outbox.wait_until_gone(witness).await;
    let announced = "SELECT count(*) FROM outbox_routes WHERE hidden_seconds_max BETWEEN 3600 AND 3700";
    let told = async || sqlx::query_scalar::<_, i64>(announced).fetch_one(&outbox.pool).await.unwrap() == 1;
    until("it has told how long it hides rows", told).await;
    let witness = outbox.insert_hidden(None, YEAR).await;
    let other = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_gone(witness).await;
    assert!(!outbox.row(hidden).await.unwrap().visible);
    relay.stop().await;
    other.stop().await;
}
