//! Leases: each event is leased by one worker at a time, whatever other sessions do.

use std::{collections::HashSet, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::until,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_with_five_workers_each_deliver_5000_events_exactly_once_and_leave_nothing() {
    let outbox = Outbox::create().await;
    let inserted = outbox.insert_unrelated(5000).await;
    // No delivery is answered before both relays have sent one, so they certainly share the table.
    let (both, mut sources) = (CancellationToken::new(), HashSet::new());
    let receiver = Receiver::start(move |events| {
        sources.insert(events[0].source.clone());
        if sources.len() == 2 {
            both.cancel();
        }
        Reply::apply(events).held(&both)
    })
    .await;
    let one = Relay::start(&outbox, receiver.address, &["--workers", "5", "--source", "one"]).await;
    let other = Relay::start(&outbox, receiver.address, &["--workers", "5", "--source", "other"]).await;
    outbox.wait_until_empty().await;
    one.stop().await;
    other.stop().await;

    let mut delivered = receiver.read(Log::ids);
    delivered.sort_unstable();
    assert_eq!(delivered.len(), 5000, "deliveries");
    assert!(delivered == inserted, "each event once");
    assert_eq!(receiver.read(|log| log.deliveries.iter().map(|delivery| delivery.events.len()).max()), Some(100));
}

#[tokio::test]
async fn rows_locked_by_another_session_are_skipped_without_waiting() {
    let outbox = Outbox::create().await;
    // The older half, which the relay would lease first.
    let locked = outbox.insert_unrelated(50).await;
    let free: HashSet<_> = outbox.insert_unrelated(50).await.into_iter().collect();
    let mut other = outbox.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM outbox WHERE event_id = ANY ($1) FOR UPDATE")
        .bind(&locked)
        .execute(&mut *other)
        .await
        .unwrap();

    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &["--batch", "10"]).await;
    receiver.wait("the free half", |log| log.ids().len() >= free.len()).await;
    outbox.wait_for_a_later_event().await;
    until("only the locked half is left", async || outbox.count().await == 50).await;
    assert!(receiver.read(|log| locked.iter().all(|id| log.times(*id) == 0)));

    other.rollback().await.unwrap();
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert!(receiver.read(|log| free.iter().chain(&locked).all(|id| log.times(*id) == 1)));
}

#[tokio::test]
async fn an_unsettled_lease_expires_and_its_event_is_delivered_again_only_then() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_for_a_later_event().await;

    // As a relay leaves an event that was killed between delivery and delete.
    let leased_at = Instant::now();
    let event_id = outbox.insert_hidden(Some(Uuid::new_v4()), Duration::from_secs(1)).await;
    outbox.wait_for_a_later_event().await;
    outbox.wait_until_gone(event_id).await;
    relay.stop().await;

    let arrivals = receiver.read(|log| {
        let with_it = log.deliveries.iter().filter(|delivery| delivery.events[0].id == event_id.to_string());
        with_it.map(|delivery| delivery.at).collect::<Vec<_>>()
    });
    assert_eq!(arrivals.len(), 1);
    assert!(arrivals[0] - leased_at >= Duration::from_secs(1), "{:?}", arrivals[0] - leased_at);
}

#[tokio::test]
async fn an_event_too_large_to_be_delivered_is_refused_where_it_is_enqueued() {
    let outbox = Outbox::create().await;
    for (bytes, refused) in [(1024 * 1024, None), (1024 * 1024 + 1, Some("outbox_payload_deliverable"))] {
        let enqueued = sqlx::query(
            "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
            VALUES (gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', $1)",
        )
        .bind(vec![7_u8; bytes])
        .execute(&outbox.pool)
        .await;
        let constraint =
            enqueued.err().and_then(|refusal| refusal.into_database_error()?.constraint().map(str::to_owned));
        assert_eq!(constraint.as_deref(), refused);
    }
}

#[tokio::test]
async fn the_relays_role_cannot_enqueue() {
    let outbox = Outbox::create().await;
    let relay = sqlx::PgPool::connect(&outbox.relay_url()).await.unwrap();
    let inserted = sqlx::query(
        "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
        VALUES (gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '')",
    )
    .execute(&relay)
    .await;
    let refusal = inserted.unwrap_err();
    assert_eq!(refusal.as_database_error().unwrap().code().as_deref(), Some("42501"), "{refusal}");
}

/// A worker would hold all of them in memory. The worker that no notification wakes goes on at once all the same.
#[tokio::test]
async fn a_lease_of_large_events_is_bounded_by_their_bytes_and_followed_at_once_by_the_next() {
    let outbox = Outbox::create().await;
    sqlx::query(
        "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
        SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', convert_to(repeat('x', 600000), 'UTF8')
        FROM generate_series(1, 20)",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    let go_on = CancellationToken::new();
    let held = go_on.clone();
    let receiver = Receiver::start(move |events| Reply::apply(events).held(&held)).await;
    let flags = ["--workers", "1", "--lease-mib", "2", "--poll-ms", "60000"];
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    receiver.wait_for_deliveries(1).await;
    let leased = outbox.rows().await.iter().filter(|row| row.lease_token.is_some()).count();
    assert_eq!(leased, 4, "the event that reaches 2 MiB is the last");
    go_on.cancel();
    outbox.wait_until_empty().await;
    relay.stop().await;
}
