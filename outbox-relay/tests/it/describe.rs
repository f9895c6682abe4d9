//! Describe before the first delivery, and the age limit of events.

use std::time::Duration;

use chassis::RunError;
use tokio::time::timeout;
use tonic::Code;

use crate::{
    binary::Binary,
    outbox::Outbox,
    receiver::{Receiver, Reply},
    relay::Relay,
    wait::{AMPLE, until},
};

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn no_event_is_delivered_before_the_receiver_has_answered_describe() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(30).await;
    let receiver = Receiver::start(Reply::apply).await;
    receiver.describe(|| Err(Code::Unavailable));
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    receiver.wait("it is asked again", |log| log.described >= 3).await;
    outbox.wait_for_route_state("DOWN").await;
    assert!(receiver.read(|log| log.deliveries.is_empty()));
    assert!(outbox.rows().await.iter().all(|row| row.lease_token.is_none() && row.visible), "nothing is leased");

    receiver.describe(|| Ok(Some(145 * HOUR)));
    outbox.wait_until_empty().await;
    outbox.wait_for_route_state("OPEN").await;
    relay.stop().await;
    assert_eq!(outbox.route_states().await, [], "it removes its rows");
}

/// The error of a relay whose receiver answers Describe like this.
async fn end_with(description: Result<Option<Duration>, Code>) -> String {
    let outbox = Outbox::create().await;
    outbox.insert_one().await;
    let receiver = Receiver::start(Reply::apply).await;
    receiver.describe(move || description);
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    let refusal = relay.end().await.unwrap_err();
    assert!(matches!(refusal, RunError::Unusable(_)), "{refusal:?}");
    assert!(receiver.read(|log| log.deliveries.is_empty()));
    refusal.to_string()
}

#[tokio::test]
async fn it_refuses_a_receiver_that_forgets_within_an_hour_and_says_what_to_do() {
    let message = end_with(Ok(Some(HOUR / 2))).await;
    for part in ["route all", "http://127.0.0.1:", "for 30 min only", "at least an hour"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[tokio::test]
async fn it_refuses_a_receiver_that_does_not_say_how_long_it_remembers() {
    assert!(end_with(Ok(None)).await.contains("route all: the receiver at http://127.0.0.1:"));
    assert!(end_with(Err(Code::Unimplemented)).await.contains("does not implement"));
}

#[tokio::test]
async fn a_receiver_that_returns_with_a_shorter_retention_is_refused_before_any_delivery() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    // One worker: another might be about to deliver when the first finds the receiver away.
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "1"]).await;
    outbox.wait_for_a_later_event().await;
    receiver.describe(|| Ok(Some(HOUR / 2)));
    receiver.follow(|_| Reply::Refuse(Code::Unavailable));
    let event_id = outbox.insert_one().await;
    outbox.wait_for_route_state("BARRED").await;
    relay.stop().await;
    let row = outbox.row(event_id).await.unwrap();
    assert!(row.attempts == 0 && row.lease_token.is_none(), "{row:?}");
    assert_eq!(receiver.read(|log| log.times(event_id)), 1, "the delivery that met the outage");
}

#[tokio::test]
async fn the_process_ends_with_code_1_and_one_line_when_it_may_not_deliver() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    receiver.describe(|| Ok(Some(HOUR / 2)));
    let mut binary = Binary::start(&outbox, &receiver, &[]);
    let status = timeout(AMPLE, binary.process.wait()).await.expect("it ends").unwrap();
    let last = binary.process.log_tail(1);
    assert_eq!(status.code(), Some(1), "{last}");
    assert!(last.starts_with("error: route all: the receiver at "), "{last}");
}

/// Six sevenths of the receiver's retention are the limit.
#[tokio::test]
async fn an_event_that_is_too_old_is_not_delivered_but_kept_as_dead_with_the_reason() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    sqlx::query("UPDATE outbox SET created_at = now() - interval '61 minutes' WHERE event_id = $1")
        .bind(ids[1])
        .execute(&outbox.pool)
        .await
        .unwrap();
    let receiver = Receiver::start(Reply::apply).await;
    receiver.describe(|| Ok(Some(HOUR / 6 * 7)));
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    let dead = outbox.wait_for_dead(1).await;
    until("the others are delivered", async || outbox.count().await == 1).await;
    relay.stop().await;
    let dead = dead.into_iter().find(|row| row.dead).unwrap();
    assert_eq!(dead.event_id, ids[1]);
    assert!(dead.last_error.as_ref().unwrap().starts_with("EXPIRED: older than 1 h"), "{dead:?}");
    assert_eq!(receiver.read(|log| log.times(ids[1])), 0);
}

/// Six sevenths of the longest time that the contract allows lie before all times that the database knows.
#[tokio::test]
async fn a_receiver_that_never_forgets_gets_its_events() {
    let outbox = Outbox::create().await;
    outbox.insert_one().await;
    let receiver = Receiver::start(Reply::apply).await;
    receiver.describe(|| Ok(Some(Duration::from_secs(315_576_000_000))));
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
}
