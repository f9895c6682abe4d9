use std::time::Duration;

use fastrand::Rng;
use proto::events::v1::{DeliverRequest, Event};
use tokio::time::timeout;
use tonic::{Code, Request};

use crate::{
    client::Client,
    inventory::{Inventory, at_once, eventually},
    orders::order,
};

const CLIENTS: u64 = 4;
const CALLS: usize = 20;
const ROUNDS: u64 = 8;

/// Delivers random events and gives up on nearly every call, at a random moment: by a deadline that the server knows,
/// or by dropping the call. Returns the number of calls given up.
async fn give_up(client: Client, events: Vec<Event>, seed: u64) -> usize {
    let mut rng = Rng::with_seed(seed);
    let mut given_up = 0;
    for call in 0..CALLS {
        let batch: Vec<Event> = rng.choose_multiple(&events, 4).into_iter().cloned().collect();
        let patience = Duration::from_micros(rng.u64(100..3000));
        if call % 2 == 0 {
            given_up += usize::from(timeout(patience, client.deliver(&batch)).await.is_err());
            continue;
        }
        let mut request = Request::new(DeliverRequest { events: batch });
        request.set_timeout(patience);
        if let Err(status) = client.deliver_request(request).await {
            let expected = [Code::Cancelled, Code::DeadlineExceeded, Code::Unavailable];
            assert!(expected.contains(&status.code()), "{status:?}");
            given_up += 1;
        }
    }
    given_up
}

/// Retries as a relay does, as long as no connection is free.
async fn redeliver(client: &Client, events: &[Event]) -> Vec<String> {
    timeout(Duration::from_secs(10), async {
        loop {
            match client.deliver(events).await {
                Ok(outcomes) => return outcomes,
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
            }
        }
    })
    .await
    .expect("the service finishes the calls that were given up")
}

async fn assert_no_transaction_is_left_open(inventory: &Inventory) {
    let busy = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND usename = 'inventory_service' AND state <> 'idle'";
    let all_idle = eventually("all sessions are idle", async || inventory.count(busy).await == 0);
    // Shorter than the 10 s after which PostgreSQL itself ends a session that stays inside a transaction.
    timeout(Duration::from_secs(5), all_idle).await.expect("no session is left inside a transaction");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_give_up_leave_no_transaction_open_and_each_event_is_applied_once() {
    give_up_and_deliver_again("100").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_give_up_while_they_wait_for_other_batches_make_room_for_the_next() {
    give_up_and_deliver_again("1").await;
}

async fn give_up_and_deliver_again(batches: &str) {
    let flags = ["--batches-at-once", batches, "--database-connections", "2", "--database-acquire-ms", "1000"];
    let inventory = Inventory::serve(&flags).await;
    inventory.put_in(&[("MUG", 1000), ("KETTLE", 1000)]).await;
    let events: Vec<Event> = (0..120).map(|_| order(&[("MUG", 2), ("KETTLE", 1)])).collect();

    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Client::connect(inventory.addresses).await);
    }
    let mut given_up = 0;
    // In rounds, since a later call on the same connection may end a transaction that was left open.
    for round in 0..ROUNDS {
        let calls = clients.iter().zip(round * CLIENTS..);
        let calls = calls.map(|(client, seed)| give_up(client.clone(), events.clone(), seed));
        given_up += at_once(calls).await.into_iter().sum::<usize>();
        assert_no_transaction_is_left_open(&inventory).await;
    }
    assert!(given_up > 120, "only {given_up} calls were given up: too few to test anything");

    let mut outcomes = Vec::new();
    for batch in events.chunks(20) {
        outcomes.extend(redeliver(&inventory.client, batch).await);
    }
    assert!(outcomes.iter().all(|outcome| outcome == "APPLIED" || outcome == "DUPLICATE"), "{outcomes:?}");
    assert!(outcomes.iter().any(|outcome| outcome == "DUPLICATE"), "no work continued without its caller");
    assert_eq!(inventory.count("SELECT count(*) FROM processed_messages").await, 120);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 760);
    assert_eq!(inventory.client.get_stock("KETTLE").await.unwrap(), 880);
    inventory.stop().await;
}

/// The server's own time limit ends the call, so its answer proves that the handler was dropped while it worked.
#[tokio::test]
async fn work_continues_to_its_commit_when_its_call_times_out() {
    let inventory = Inventory::serve(&["--request-seconds", "1"]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 1)]);
    let lock = inventory.lock_stock().await;

    let cut = inventory.client.deliver([&event]).await.unwrap_err();
    assert_eq!(cut.code(), Code::Cancelled, "{cut:?}");
    inventory.wait_for_waiting_sessions(1).await;
    lock.rollback().await.unwrap();

    eventually("the event is applied", async || inventory.is_in_inbox(&event).await).await;
    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["DUPLICATE"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 9);
    inventory.stop().await;
}
