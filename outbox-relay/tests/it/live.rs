//! Relays that die, and relays that only seem to.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    binary::Binary,
    outbox::Outbox,
    receiver::{Receiver, Reply},
    relay::Relay,
    wait::until,
};

/// Far below the lease, which lasts for 30 s.
const AT_ONCE: Duration = Duration::from_secs(8);

/// Starts a relay over a receiver that never answers. Returns both once the relay has leased all of 20 events, and has
/// announced that it holds its lock.
async fn relay_with_leased_rows(outbox: &Outbox) -> (Binary, Receiver, Vec<Uuid>) {
    let ids = outbox.insert_unrelated(20).await;
    let silent = Receiver::start(|_| Reply::never()).await;
    let relay = Binary::start(outbox, &silent, &["--workers", "1", "--lease-seconds", "30"]);
    silent.wait_for_deliveries(1).await;
    wait_for_locks(outbox, 1).await;
    (relay, silent, ids)
}

async fn wait_for_locks(outbox: &Outbox, count: i64) {
    let held = "SELECT count(*) FROM outbox_routes WHERE holds_lock";
    let held = async || sqlx::query_scalar::<_, i64>(held).fetch_one(&outbox.pool).await.unwrap();
    until("relays have announced their locks", async || held().await == count).await;
}

async fn count_leased(outbox: &Outbox) -> usize {
    outbox.rows().await.into_iter().filter(|row| row.lease_token.is_some() && !row.visible).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rows_of_a_relay_that_is_killed_are_delivered_at_once_by_another() {
    let outbox = Outbox::create().await;
    let (mut dead, receiver, ids) = relay_with_leased_rows(&outbox).await;
    receiver.follow(Reply::apply);
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    wait_for_locks(&outbox, 2).await;
    outbox.wait_for_a_later_event().await;
    assert_eq!(count_leased(&outbox).await, 20, "another relay has these");

    let killed = Instant::now();
    dead.process.kill().await.unwrap();
    outbox.wait_until_empty().await;
    assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
    wait_for_locks(&outbox, 1).await;
    relay.stop().await;
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 2)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_takes_the_place_of_a_killed_one_need_not_wait_for_its_leases() {
    let outbox = Outbox::create().await;
    let (mut dead, receiver, _) = relay_with_leased_rows(&outbox).await;
    dead.process.kill().await.unwrap();
    receiver.follow(Reply::apply);
    let started = Instant::now();
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_empty().await;
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    relay.stop().await;
}

/// Its session may live on while it does nothing. Then its leases must expire.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_stopped_keeps_its_rows_until_they_expire() {
    let outbox = Outbox::create().await;
    let (stopped, receiver, _) = relay_with_leased_rows(&outbox).await;
    stopped.process.suspend().await.unwrap();
    receiver.follow(Reply::apply);
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    // Each announcement comes with a look for dead relays.
    let announced = "SELECT count(*) FROM outbox_routes WHERE seen_at > since + interval '5 s' AND state = 'OPEN'";
    let announced = async || sqlx::query_scalar::<_, i64>(announced).fetch_one(&outbox.pool).await.unwrap();
    until("the other has looked twice", async || announced().await > 0).await;
    assert_eq!(count_leased(&outbox).await, 20);
    relay.stop().await;
}

/// As if the machine had slept and its connections were gone. The relay lives, and goes on later with what it had leased.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_lost_only_its_session_takes_a_new_lock_when_it_goes_on() {
    let outbox = Outbox::create().await;
    let (living, receiver, ids) = relay_with_leased_rows(&outbox).await;
    let relay_id = id_of_relay(&outbox).await;
    receiver.follow(Reply::apply);
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    wait_for_locks(&outbox, 2).await;
    // It is stopped first. Otherwise it might have a new session before the other looks.
    living.process.suspend().await.unwrap();
    end_session_with_lock(&outbox, relay_id).await;

    outbox.wait_until_empty().await;
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 2)));
    living.process.signal(Signal::CONT).unwrap();
    wait_for_locks(&outbox, 2).await;
    relay.stop().await;
}

async fn id_of_relay(outbox: &Outbox) -> Uuid {
    sqlx::query_scalar("SELECT relay_id FROM outbox_routes").fetch_one(&outbox.pool).await.unwrap()
}

/// The halves of the key of a relay's lock, as the database shows them.
fn key_of(relay_id: Uuid) -> [i64; 2] {
    let key = relay_id.as_u64_pair().0;
    [key >> 32, key & 0xffff_ffff].map(|half| i64::try_from(half).unwrap())
}

/// Ends the session that holds the relay's lock, and returns its process.
async fn end_session_with_lock(outbox: &Outbox, relay_id: Uuid) -> i32 {
    let [high, low] = key_of(relay_id);
    let ended = sqlx::query_scalar(
        "SELECT pid FROM pg_locks, pg_terminate_backend(pid)
        WHERE locktype = 'advisory' AND granted AND classid::bigint = $1 AND objid::bigint = $2",
    );
    ended.bind(high).bind(low).fetch_one(&outbox.pool).await.unwrap()
}

/// As a crash leaves it that loses the deletion of events, and keeps their lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_whose_settlement_the_database_has_lost_are_delivered_once_the_relay_has_a_new_session() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    wait_for_locks(&outbox, 1).await;
    let relay_id = id_of_relay(&outbox).await;
    let ids: Vec<_> = (0..20).map(|_| Uuid::new_v4()).collect();
    let leased = sqlx::query(
        "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, lease_token, visible_at)
        SELECT gen_random_uuid(), 1, event_id, 'test.v1.Happened', '', $2, now() + interval '30 s'
        FROM unnest($1::uuid[]) AS leased (event_id)",
    );
    let token = Uuid::from_u64_pair(relay_id.as_u64_pair().0, 1);
    leased.bind(&ids).bind(token).execute(&outbox.pool).await.unwrap();
    outbox.wait_for_a_later_event().await;
    assert_eq!(count_leased(&outbox).await, 20);

    let begun = Instant::now();
    end_session_with_lock(&outbox, relay_id).await;
    outbox.wait_until_empty().await;
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 1)));
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_a_worker_delivers_stay_leased_when_the_relay_gets_a_new_session() {
    let outbox = Outbox::create().await;
    let (_living, _silent, _) = relay_with_leased_rows(&outbox).await;
    let relay_id = id_of_relay(&outbox).await;
    let before = end_session_with_lock(&outbox, relay_id).await;
    let [high, low] = key_of(relay_id);
    let others = async || {
        let held = sqlx::query_scalar::<_, i64>(
            "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
            WHERE locktype = 'advisory' AND granted AND classid::bigint = $1 AND objid::bigint = $2 AND pid <> $3
                AND query LIKE '%check that it holds its lock%' AND query_start > backend_start + interval '900 ms'",
        );
        held.bind(high).bind(low).bind(before).fetch_one(&outbox.pool).await.unwrap()
    };
    // The second look comes after the rows that are left were freed.
    until("the new session has looked twice", async || others().await > 0).await;
    assert_eq!(count_leased(&outbox).await, 20);
}
