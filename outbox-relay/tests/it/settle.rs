//! Settlement: only by the holder of the lease, and right for every answer of the receiver.

use proto::events::v1::{Event, EventResult, Outcome};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use uuid::Uuid;

use crate::{
    outbox::{Outbox, Row},
    receiver::{Receiver, Reply, applied, id_of, rejected, result, retry},
    relay::Relay,
};

/// Lets another holder lease three events while a relay delivers them. Only then gives the relay its `answer`.
async fn take_over_during_a_delivery(answer: fn(&[Event]) -> Reply) {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let answered = CancellationToken::new();
    let held = answered.clone();
    let receiver = Receiver::start(move |events| answer(events).held(&held)).await;
    // One worker, so that it leases again only after it has settled.
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "1"]).await;
    receiver.wait_for_deliveries(1).await;

    let other = Uuid::new_v4();
    sqlx::query("UPDATE outbox SET lease_token = $1, visible_at = now() + interval '15 minutes'")
        .bind(other)
        .execute(&outbox.pool)
        .await
        .unwrap();
    receiver.follow(Reply::apply);
    let later = outbox.insert_one().await;
    answered.cancel();
    outbox.wait_until_gone(later).await;

    let untouched = |event_id: &Uuid| Row {
        event_id: *event_id,
        attempts: 0,
        failures: 0,
        lease_token: Some(other),
        last_error: None,
        visible: false,
        dead: false,
    };
    let expected: Vec<_> = ids.iter().map(untouched).collect();
    assert_eq!(outbox.rows().await, expected, "the holder of the lost lease has changed something");

    sqlx::query("UPDATE outbox SET visible_at = now() + interval '200 ms'").execute(&outbox.pool).await.unwrap();
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 2)), "delivered again, once");
}

#[tokio::test]
async fn an_expired_lease_is_taken_over_and_a_settlement_by_its_old_holder_changes_nothing() {
    take_over_during_a_delivery(|events| {
        Reply::Results(vec![applied(&events[0]), retry(&events[1]), rejected(&events[2])])
    })
    .await;
}

#[tokio::test]
async fn an_expired_lease_is_taken_over_and_a_release_by_its_old_holder_changes_nothing() {
    take_over_during_a_delivery(|_| Reply::Refuse(Code::Unavailable)).await;
}

#[tokio::test]
async fn a_probe_that_has_lost_its_lease_renews_nothing_and_delivers_no_more_of_it() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let receiver = Receiver::start(|_| Reply::never()).await;
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "1", "--lease-seconds", "8"]).await;
    // Once while the route was open, and once in the probe that follows. From then on it delivers one by one.
    receiver.wait_for_deliveries(2).await;
    sqlx::query("UPDATE outbox SET lease_token = gen_random_uuid(), visible_at = now() + interval '15 minutes'")
        .execute(&outbox.pool)
        .await
        .unwrap();
    let leased = outbox.rows().await;
    receiver.follow(Reply::apply);
    let later = outbox.insert_one().await;
    outbox.wait_until_gone(later).await;
    relay.stop().await;

    assert_eq!(outbox.rows().await, leased, "the holder of the lost lease has changed something");
    let renewed = "SELECT count(*) FROM outbox WHERE visible_at < now() + interval '10 minutes'";
    assert_eq!(sqlx::query_scalar::<_, i64>(renewed).fetch_one(&outbox.pool).await.unwrap(), 0);
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 2)), "delivered no more");
}

#[tokio::test]
async fn a_settlement_after_expiry_counts_if_no_other_worker_has_the_events() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let answered = CancellationToken::new();
    let held = answered.clone();
    let receiver = Receiver::start(move |events| Reply::apply(events).held(&held)).await;
    let relay = Relay::start(&outbox, receiver.address, &["--workers", "1"]).await;
    receiver.wait_for_deliveries(1).await;
    sqlx::query("UPDATE outbox SET visible_at = now() - interval '1 s'").execute(&outbox.pool).await.unwrap();
    answered.cancel();
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 1)));
}

/// Answers the first of three events with `answer`, or leaves it out if that is `None`; applies the others. Waits until
/// the first is dead. Returns its row, and the number of its deliveries.
async fn answer_one_of_three(attempts: &str, answer: fn(&Event) -> Option<EventResult>) -> (Row, usize) {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let first = ids[0];
    let receiver = Receiver::start(move |events| {
        let results =
            events.iter().filter_map(|event| if id_of(event) == first { answer(event) } else { Some(applied(event)) });
        Reply::Results(results.collect())
    })
    .await;
    let flags = ["--attempts", attempts, "--back-off-ms", "1", "--workers", "1"];
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    outbox.wait_for_dead_beside_others(1).await;
    outbox.wait_for_a_later_event().await;
    relay.stop().await;
    assert!(receiver.read(|log| ids[1..].iter().all(|id| log.times(*id) == 1)), "its neighbours come once");
    let mut rows = outbox.rows().await;
    let row = rows.pop().unwrap();
    assert_eq!((rows.len(), row.event_id, row.lease_token), (0, first, None));
    (row, receiver.read(|log| log.times(first)))
}

#[tokio::test]
async fn a_rejected_event_is_dead_at_once_and_kept_with_its_reason() {
    let (row, times) = answer_one_of_three("10", |event| Some(rejected(event))).await;
    assert_eq!((row.attempts, times), (1, 1));
    assert_eq!(row.last_error.as_deref(), Some("UNDECODABLE: no such type"));
}

#[tokio::test]
async fn a_reason_is_kept_without_its_nul_characters() {
    let rejected = |event: &Event| Some(result(event, Outcome::Rejected, "N\0UL", "\0in \0it\0"));
    let (row, _) = answer_one_of_three("10", rejected).await;
    assert_eq!(row.last_error.as_deref(), Some("NUL: in it"));

    let retried = |event: &Event| Some(result(event, Outcome::Retry, "N\0UL", "\0in \0it\0"));
    let (row, _) = answer_one_of_three("1", retried).await;
    assert_eq!(row.last_error.as_deref(), Some("NUL: in it"));
}

#[tokio::test]
async fn a_reason_of_ten_thousand_characters_is_cut() {
    let (row, _) = answer_one_of_three("10", |event| {
        // Each has two bytes, so that a cut within a character would fail.
        Some(result(event, Outcome::Rejected, "LONG", &"é".repeat(10_000)))
    })
    .await;
    let kept = row.last_error.unwrap();
    assert!(kept.starts_with("LONG: é") && (500..=2000).contains(&kept.chars().count()), "{kept}");
}

#[tokio::test]
async fn only_an_event_without_a_result_has_failed() {
    let (row, times) = answer_one_of_three("2", |_| None).await;
    assert!(row.attempts == 2 && times >= 2, "{row:?}, {times} times");
    assert!(row.last_error.as_ref().unwrap().starts_with("NO_RESULT"), "{row:?}");
}

#[tokio::test]
async fn only_an_event_with_an_unspecified_outcome_has_failed() {
    let (row, times) =
        answer_one_of_three("2", |event| Some(result(event, Outcome::Unspecified, "SHY", "says nothing"))).await;
    assert!(row.attempts == 2 && times >= 2, "{row:?}, {times} times");
    assert_eq!(row.last_error.as_deref(), Some("SHY: says nothing"));
}

#[tokio::test]
async fn only_an_event_with_an_outcome_of_a_later_contract_has_failed() {
    let later = |event: &Event| Some(EventResult { outcome: 99, ..retry(event) });
    let (row, times) = answer_one_of_three("2", later).await;
    assert!(row.attempts == 2 && times >= 2, "{row:?}, {times} times");
}
