//! Relays that cannot settle: stopped for longer than their lease, or refused by the database.

use rustix::process::Signal;
use tokio_util::sync::CancellationToken;

use crate::{
    binary::Binary,
    outbox::Outbox,
    receiver::{Receiver, Reply},
    relay::Relay,
    wait::until,
};

#[tokio::test]
async fn a_relay_stopped_beyond_its_lease_changes_nothing_and_counts_its_lost_events() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    let (first, second) = (CancellationToken::new(), CancellationToken::new());
    let (first_held, second_held) = (first.clone(), second.clone());
    let mut deliveries = 0;
    let receiver = Receiver::start(move |events| {
        deliveries += 1;
        // The first is answered while its relay is stopped, so the relay finds the answer when it continues.
        Reply::apply(events).held(if deliveries == 1 { &first_held } else { &second_held })
    })
    .await;
    let stopped = Binary::start(&outbox, &receiver, &["--workers", "1", "--lease-seconds", "4", "--attempts", "1"]);
    receiver.wait_for_deliveries(1).await;
    stopped.process.suspend().await.unwrap();
    first.cancel();
    let other = Relay::start(&outbox, receiver.address, &["--workers", "1", "--attempts", "1"]).await;
    receiver.wait_for_deliveries(2).await;
    let leased = outbox.rows().await;
    assert!(leased.iter().all(|row| row.lease_token.is_some() && !row.visible));

    stopped.process.signal(Signal::CONT).unwrap();
    until("it counts what it lost", async || stopped.events("lost").await == 3).await;
    assert_eq!(outbox.rows().await, leased, "the relay that lost its lease has changed something");
    let log = std::fs::read_to_string(stopped.log_file()).unwrap();
    assert!(log.contains("lease lost: another relay has these events"), "{log}");
    let page = stopped.metrics().await;
    assert!(
        page.contains("outbox_relay_deliveries_total{") && page.contains("# HELP outbox_relay_events_total"),
        "{page}"
    );
    assert!(page.contains("outbox_relay_route_state{subscription=\"all\",state=\"OPEN\"}"), "{page}");
    for outcome in ["handled", "retried", "died", "released", "unsettled"] {
        assert_eq!(stopped.events(outcome).await, 0, "{outcome}");
    }

    second.cancel();
    outbox.wait_until_empty().await;
    other.stop().await;
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 2)), "delivered again, once");
}

/// Makes the database refuse deletes from the outbox, as long as the trigger exists.
async fn refuse_to_delete(outbox: &Outbox) {
    sqlx::raw_sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'as the test wants it'; END $$;
        CREATE TRIGGER refuse BEFORE DELETE ON outbox EXECUTE FUNCTION refuse()",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
}

async fn let_delete_again(outbox: &Outbox) {
    sqlx::query("DROP TRIGGER refuse ON outbox").execute(&outbox.pool).await.unwrap();
}

#[tokio::test]
async fn a_settlement_that_fails_is_repeated_while_the_lease_lasts() {
    let outbox = Outbox::create().await;
    refuse_to_delete(&outbox).await;
    let event_id = outbox.insert_one().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Binary::start(&outbox, &receiver, &["--workers", "1", "--lease-seconds", "60"]);
    let log = relay.log_file();
    until("it tries again", async || std::fs::read_to_string(&log).unwrap().contains("cannot settle")).await;
    let_delete_again(&outbox).await;
    outbox.wait_until_gone(event_id).await;
    assert_eq!(receiver.read(|log| log.times(event_id)), 1, "deliveries");
    until("it counts what it has handled", async || relay.events("handled").await == 1).await;
    assert_eq!((relay.events("lost").await, relay.events("unsettled").await), (0, 0));
}

#[tokio::test]
async fn events_not_settled_before_the_lease_expires_are_counted_and_delivered_again() {
    let outbox = Outbox::create().await;
    refuse_to_delete(&outbox).await;
    let event_id = outbox.insert_one().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Binary::start(&outbox, &receiver, &["--workers", "1", "--lease-seconds", "2"]);
    receiver.wait_for_deliveries(1).await;
    until("it counts what it could not settle", async || relay.events("unsettled").await > 0).await;
    let_delete_again(&outbox).await;
    outbox.wait_until_gone(event_id).await;
    until("it counts what it has handled", async || relay.events("handled").await == 1).await;
    assert!(receiver.read(|log| log.times(event_id) > 1), "delivered again");
}
