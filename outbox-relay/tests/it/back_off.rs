//! Attempts and back-off of events that fail for reasons of their own.

use std::time::Duration;

use proto::events::v1::Event;
use sqlx::types::time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use uuid::Uuid;

use crate::{
    outbox::Outbox,
    receiver::{Receiver, Reply, applied, id_of, retry},
    relay::Relay,
    wait::until,
};

const FAILING: usize = 20;

/// Fails 20 events together that have failed `attempts` times before. Returns the back-off of each, measured from a
/// moment before the settlement.
async fn back_off(attempts: i32, flags: &[&str]) -> Vec<Duration> {
    let outbox = Outbox::create().await;
    let failing = outbox.insert_unrelated(FAILING).await;
    // The receiver takes one in the same batch. Without a witness no event is charged.
    outbox.insert_one().await;
    sqlx::query("UPDATE outbox SET attempts = $1").bind(attempts).execute(&outbox.pool).await.unwrap();
    let answered = CancellationToken::new();
    let held = answered.clone();
    let result = move |event: &Event| if failing.contains(&id_of(event)) { retry(event) } else { applied(event) };
    let receiver = Receiver::start(move |events| Reply::each(events, &result).held(&held)).await;
    let flags: Vec<_> = ["--attempts", "1000", "--workers", "1"].iter().chain(flags).copied().collect();
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    receiver.wait_for_deliveries(1).await;
    // In shutdown it settles and leases nothing more, so the rows show the effect of the first settlement alone.
    relay.shut_down();
    let before = outbox.clock().await;
    answered.cancel();
    relay.end().await.unwrap();

    for row in outbox.rows().await {
        assert_eq!((row.attempts, row.lease_token), (attempts + 1, None));
        assert_eq!(row.last_error.as_deref(), Some("BUSY: later"));
    }
    let visible_at = sqlx::query_scalar::<_, OffsetDateTime>("SELECT DISTINCT visible_at FROM outbox");
    let back_offs = visible_at.fetch_all(&outbox.pool).await.unwrap();
    back_offs.into_iter().map(|at| (at - before).try_into().expect("visible before it failed")).collect()
}

/// Time between the reading of the clock and the settlement.
const SLACK: Duration = Duration::from_secs(2);

fn assert_spread_up_to(most: Duration, back_offs: &[Duration]) {
    assert!(back_offs.len() >= FAILING - 1, "events that failed together come back together: {back_offs:?}");
    let (least, longest) = (*back_offs.iter().min().unwrap(), *back_offs.iter().max().unwrap());
    assert!(longest <= most + SLACK, "{longest:?}");
    // That 20 random fractions all lie below a half, or all above nine tenths, is next to impossible.
    assert!(longest > most / 2 && least < most.mul_f32(0.9), "{least:?} to {longest:?} of {most:?}");
}

#[tokio::test]
async fn a_failed_event_waits_a_random_fraction_of_the_first_back_off() {
    let back_offs = back_off(0, &["--back-off-ms", "60000", "--back-off-max-ms", "600000"]).await;
    assert_spread_up_to(Duration::from_secs(60), &back_offs);
}

#[tokio::test]
async fn back_off_doubles_with_every_attempt() {
    let back_offs = back_off(3, &["--back-off-ms", "60000", "--back-off-max-ms", "6000000"]).await;
    assert_spread_up_to(Duration::from_secs(480), &back_offs);
}

#[tokio::test]
async fn back_off_ends_at_its_cap_however_many_attempts_there_were() {
    let back_offs = back_off(900, &["--back-off-ms", "60000", "--back-off-max-ms", "100000"]).await;
    assert_spread_up_to(Duration::from_secs(100), &back_offs);
}

/// Retries this event, and takes all others.
fn retry_only(event_id: Uuid) -> impl FnMut(&[Event]) -> Reply + Send + 'static {
    move |events| Reply::each(events, |event| if id_of(event) == event_id { retry(event) } else { applied(event) })
}

#[tokio::test]
async fn after_the_last_attempt_an_event_is_dead_and_kept_and_never_delivered_again() {
    let outbox = Outbox::create().await;
    let event_id = outbox.insert_one().await;
    let receiver = Receiver::start(retry_only(event_id)).await;
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "3", "--back-off-ms", "1"]).await;
    let dead = outbox.wait_for_dead_beside_others(1).await;
    let delivered = receiver.read(|log| log.times(event_id));
    receiver.follow(Reply::apply);
    outbox.wait_for_a_later_event().await;
    relay.stop().await;

    assert_eq!((dead[0].event_id, dead[0].attempts, dead[0].lease_token), (event_id, 3, None));
    assert_eq!(dead[0].last_error.as_deref(), Some("BUSY: later"));
    assert_eq!(outbox.rows().await, dead);
    assert!(delivered >= 3);
    assert_eq!(receiver.read(|log| log.times(event_id)), delivered);
}

#[tokio::test]
async fn an_event_that_is_refused_backs_off_for_as_long_as_the_receiver_has_asked() {
    let outbox = Outbox::create().await;
    let event_id = outbox.insert_one().await;
    let asked = Duration::from_secs(30);
    let receiver = Receiver::start(move |_| Reply::Postpone(Code::Internal, asked)).await;
    let before = outbox.clock().await;
    let relay = Relay::start(&outbox, receiver.address, &["--back-off-ms", "1"]).await;
    until("it has failed", async || outbox.row(event_id).await.unwrap().failures == 1).await;
    relay.stop().await;
    let visible_at = sqlx::query_scalar::<_, OffsetDateTime>("SELECT visible_at FROM outbox");
    assert!(visible_at.fetch_one(&outbox.pool).await.unwrap() - before >= asked);
}

#[tokio::test]
async fn attempts_from_before_a_requeue_stay_on_record_and_do_not_count() {
    let outbox = Outbox::create().await;
    let event_id = outbox.insert_one().await;
    sqlx::query("UPDATE outbox SET attempts = 7, attempts_before_requeue = 7").execute(&outbox.pool).await.unwrap();
    let receiver = Receiver::start(retry_only(event_id)).await;
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "3", "--back-off-ms", "1"]).await;
    let dead = outbox.wait_for_dead_beside_others(1).await;
    relay.stop().await;
    assert_eq!(dead[0].attempts, 10);
    assert!(receiver.read(|log| log.times(event_id)) >= 3);
}
