use std::{collections::BTreeMap, sync::Arc};

use fastrand::Rng;
use proto::events::v1::{DescribeRequest, Event, event_receiver_client::EventReceiverClient};
use tokio::sync::Barrier;
use tonic::Status;
use uuid::Uuid;

use crate::{
    client::{Client, refusal},
    failed_batch::FAIL_THE_STATEMENT,
    inventory::{Inventory, at_once},
    orders::{cancellation_of, order},
};

const CLIENTS: u64 = 8;
/// Limits longer than any test here blocks a batch.
const LONG_WORK: [&str; 4] = ["--database-work-ms", "60000", "--request-seconds", "60"];
const SKUS: [&str; 10] = ["J", "C", "H", "A", "F", "E", "B", "I", "D", "G"];

#[tokio::test(flavor = "multi_thread")]
async fn an_event_in_twenty_batches_at_once_is_applied_once() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 1000), ("KETTLE", 1000)]).await;
    for _ in 0..5 {
        let event = order(&[("MUG", 10)]);
        let calls = (0..20).map(|_| {
            let (client, event) = (inventory.client.clone(), event.clone());
            async move { client.deliver(&[order(&[("KETTLE", 1)]), event]).await.unwrap() }
        });
        let outcomes = at_once(calls).await;
        assert_eq!(outcomes.iter().filter(|outcomes| **outcomes == ["APPLIED", "APPLIED"]).count(), 1);
        assert_eq!(outcomes.iter().filter(|outcomes| **outcomes == ["APPLIED", "DUPLICATE"]).count(), 19);
    }
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 950);
    assert_eq!(inventory.client.get_stock("KETTLE").await.unwrap(), 900);
    inventory.stop().await;
}

/// Sends each batch in a call of its own while the one slot is taken, and returns their outcomes.
async fn deliver_waiting(inventory: &Inventory, batches: Vec<Vec<Event>>) -> Vec<Result<Vec<String>, Status>> {
    let blocking = inventory.lock_stock().await;
    let first = tokio::spawn({
        let client = inventory.client.clone();
        async move { client.deliver(&[order(&[("MUG", 1)])]).await }
    });
    inventory.wait_for_waiting_sessions(1).await;
    let client = inventory.client.clone();
    let call = move |batch: Vec<Event>| {
        let client = client.clone();
        async move { client.deliver(&batch).await }
    };
    let calls = tokio::spawn(at_once(batches.into_iter().map(call)));
    // Calls of one connection arrive in order, so those that are answered at once are behind the others.
    let mut describing = EventReceiverClient::new(inventory.client.events.clone());
    for _ in 0..10 {
        describing.describe(DescribeRequest {}).await.unwrap();
    }
    blocking.commit().await.unwrap();
    assert_eq!(first.await.unwrap().unwrap(), ["APPLIED"]);
    calls.await.unwrap()
}

const ONE_SLOT: [&str; 6] = ["--database-work-ms", "60000", "--request-seconds", "60", "--batches-at-once", "1"];

#[tokio::test]
async fn small_batches_that_wait_share_a_transaction_and_each_gets_its_own_answers() {
    let inventory = Inventory::serve(&ONE_SLOT).await;
    inventory.put_in(&[("MUG", 1000)]).await;
    let twice = order(&[("MUG", 1)]);
    let mut batches: Vec<_> = (0..38).map(|_| vec![order(&[("MUG", 1)])]).collect();
    batches.insert(0, vec![twice.clone(), Event::default(), order(&[("MUG", 1)])]);
    batches.push(vec![twice]);

    let mut outcomes: Vec<_> =
        deliver_waiting(&inventory, batches).await.into_iter().map(|outcomes| outcomes.unwrap()).collect();

    let (one, other) = (outcomes.remove(0), outcomes.pop().unwrap());
    assert_eq!([&one[1..], &[]].concat(), ["REJECTED UNDECODABLE", "APPLIED"]);
    let mut twice = [&*one[0], &*other[0]];
    twice.sort_unstable();
    assert_eq!((twice, other.len()), (["APPLIED", "DUPLICATE"], 1));
    assert_eq!(outcomes, vec![vec!["APPLIED"]; 38]);
    // xmin is the transaction that wrote a row. The first batch was alone.
    let transactions = inventory.count("SELECT count(DISTINCT xmin::text) FROM processed_messages").await;
    assert!(transactions <= 1 + 10, "{transactions} transactions for 40 calls");
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 1000 - 41);
    inventory.stop().await;
}

/// A sound event stands behind a batch that the database refuses, and that is too large to share its transaction.
#[tokio::test]
async fn the_failure_of_a_large_batch_is_no_answer_to_a_small_one() {
    let inventory = Inventory::serve(&ONE_SLOT).await;
    inventory.put_in(&[("MUG", 1000), ("CURSED", 10)]).await;
    sqlx::raw_sql(FAIL_THE_STATEMENT).execute(&inventory.pool).await.unwrap();
    let mut poisoned: Vec<_> = (0..99).map(|_| order(&[("MUG", 1)])).collect();
    poisoned.push(order(&[("CURSED", 1)]));
    let batches = vec![vec![order(&[("MUG", 1)])], poisoned, vec![order(&[("MUG", 1)])]];

    let mut outcomes = deliver_waiting(&inventory, batches).await;

    assert_eq!(refusal(&outcomes.remove(1).unwrap_err()), "Internal INTERNAL");
    assert_eq!(outcomes.into_iter().map(|outcomes| outcomes.unwrap()).collect::<Vec<_>>(), [["APPLIED"]; 2]);
    inventory.stop().await;
}

/// Subjects of two sources may be equal: inventory's answers are about orders too.
#[tokio::test]
async fn an_event_is_not_held_back_by_a_refused_one_of_another_source() {
    let inventory = Inventory::serve(&ONE_SLOT).await;
    inventory.put_in(&[("MUG", 1000)]).await;
    let sound = order(&[("MUG", 1)]);
    let of_another = Event { source: "another".into(), r#type: "another.v1.Event".into(), ..sound.clone() };
    let of_another = Event { id: Uuid::now_v7().to_string(), ..of_another };
    let outcomes = deliver_waiting(&inventory, vec![vec![of_another], vec![cancellation_of(&sound)]]).await;
    let outcomes: Vec<_> = outcomes.into_iter().map(|outcomes| outcomes.unwrap()).collect();
    assert_eq!(outcomes, [["REJECTED UNKNOWN_TYPE"], ["APPLIED"]]);
    inventory.stop().await;
}

#[tokio::test]
async fn a_caller_that_gives_up_while_it_waits_takes_no_other_along() {
    let inventory = Inventory::serve(&ONE_SLOT).await;
    inventory.put_in(&[("MUG", 1000)]).await;
    let blocking = inventory.lock_stock().await;
    let call = |event: Event| {
        let client = inventory.client.clone();
        tokio::spawn(async move { client.deliver(&[event]).await })
    };
    let first = call(order(&[("MUG", 1)]));
    inventory.wait_for_waiting_sessions(1).await;
    let abandoned = order(&[("MUG", 1)]);
    let (gone, waiting) = (call(abandoned.clone()), call(order(&[("MUG", 1)])));
    let mut describing = EventReceiverClient::new(inventory.client.events.clone());
    for round in 0..20 {
        if round == 10 {
            gone.abort();
        }
        describing.describe(DescribeRequest {}).await.unwrap();
    }
    blocking.commit().await.unwrap();
    for call in [first, waiting] {
        assert_eq!(call.await.unwrap().unwrap(), ["APPLIED"]);
    }
    assert!(!inventory.is_in_inbox(&abandoned).await, "nobody waits for it");
    inventory.stop().await;
}

#[tokio::test]
async fn a_small_batch_that_waits_for_a_lock_holds_up_no_other() {
    let inventory = Inventory::serve(&LONG_WORK).await;
    inventory.put_in(&[("MUG", 10), ("KETTLE", 10)]).await;
    let mut blocking = inventory.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM stock WHERE sku = 'MUG' FOR UPDATE").execute(&mut *blocking).await.unwrap();
    let waiting = tokio::spawn({
        let client = inventory.client.clone();
        async move { client.deliver(&[order(&[("MUG", 1)])]).await }
    });
    inventory.wait_for_waiting_sessions(1).await;
    for _ in 0..3 {
        assert_eq!(inventory.client.deliver(&[order(&[("KETTLE", 1)])]).await.unwrap(), ["APPLIED"]);
    }
    blocking.commit().await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), ["APPLIED"]);
    inventory.stop().await;
}

#[tokio::test]
async fn an_event_that_the_database_refuses_fails_no_batch_that_shares_its_transaction() {
    let inventory = Inventory::serve(&ONE_SLOT).await;
    inventory.put_in(&[("MUG", 1000), ("CURSED", 10)]).await;
    sqlx::raw_sql(FAIL_THE_STATEMENT).execute(&inventory.pool).await.unwrap();
    let batches = (0..20).map(|number| vec![order(&[(if number == 7 { "CURSED" } else { "MUG" }, 1)])]).collect();

    let outcomes = deliver_waiting(&inventory, batches).await;

    for (number, outcome) in outcomes.into_iter().enumerate() {
        if number == 7 {
            assert_eq!(refusal(&outcome.unwrap_err()), "Internal INTERNAL");
        } else {
            assert_eq!(outcome.unwrap(), ["APPLIED"], "{number}");
        }
    }
    assert_eq!(inventory.client.get_stock("CURSED").await.unwrap(), 10);
    inventory.stop().await;
}

/// Random events of one to four items, and the quantity that all of them take of each SKU.
fn random_orders(rng: &mut Rng, orders: usize) -> (Vec<Event>, BTreeMap<&'static str, i64>) {
    let mut taken = BTreeMap::new();
    let events = (0..orders).map(|_| {
        let items: Vec<(&str, i32)> = (0..rng.usize(1..=4)).map(|_| (SKUS[rng.usize(..10)], rng.i32(1..=5))).collect();
        for (sku, quantity) in &items {
            *taken.entry(*sku).or_insert(0) += i64::from(*quantity);
        }
        order(&items)
    });
    (events.collect(), taken)
}

/// Delivers all events in batches of 50, in a random order of its own. Returns the number applied.
async fn deliver_shuffled(client: Client, mut events: Vec<Event>, seed: u64, start: Arc<Barrier>) -> usize {
    Rng::with_seed(seed).shuffle(&mut events);
    let mut applied = 0;
    start.wait().await;
    for batch in events.chunks(50) {
        let outcomes = client.deliver(batch).await.expect("no batch fails");
        assert!(outcomes.iter().all(|outcome| outcome == "APPLIED" || outcome == "DUPLICATE"), "{outcomes:?}");
        applied += outcomes.iter().filter(|outcome| *outcome == "APPLIED").count();
    }
    applied
}

async fn connect_all(inventory: &Inventory) -> Vec<Client> {
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Client::connect(inventory.addresses).await);
    }
    clients
}

/// Has all clients deliver all events at once, each in an order of its own. Returns the number applied in total.
async fn deliver_overlapping(clients: &[Client], events: &[Event], round: u64) -> usize {
    let start = Arc::new(Barrier::new(clients.len()));
    let calls = clients.iter().zip(0..).map(|(client, number)| {
        deliver_shuffled(client.clone(), events.to_vec(), round * CLIENTS + number, start.clone())
    });
    at_once(calls).await.into_iter().sum()
}

/// These deadlock within the first round if batches do not insert their ids in one order. `stop` looks for deadlocks.
#[tokio::test(flavor = "multi_thread")]
async fn overlapping_batches_in_any_order_apply_each_event_once_without_deadlock() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&SKUS.map(|sku| (sku, 1_000_000))).await;
    let clients = connect_all(&inventory).await;
    let mut taken = BTreeMap::<&str, i64>::new();
    for round in 0..5 {
        let (events, taken_now) = random_orders(&mut Rng::with_seed(round), 200);
        for (sku, quantity) in taken_now {
            *taken.entry(sku).or_default() += quantity;
        }
        assert_eq!(deliver_overlapping(&clients, &events, round).await, 200);
    }
    assert_eq!(inventory.count("SELECT count(*) FROM processed_messages").await, 1000);
    assert_eq!(inventory.count("SELECT count(*) FROM reservations WHERE status = 'RESERVED'").await, 1000);
    for sku in SKUS {
        assert_eq!(inventory.client.get_stock(sku).await.unwrap(), 1_000_000 - taken[sku], "{sku}");
    }
    inventory.stop().await;
}

/// Batches of cancellations and new orders, so that reservations are locked too.
#[tokio::test(flavor = "multi_thread")]
async fn overlapping_batches_of_cancellations_release_everything_once_without_deadlock() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&SKUS.map(|sku| (sku, 1_000_000))).await;
    let clients = connect_all(&inventory).await;
    let mut taken = BTreeMap::<&str, i64>::new();
    for round in 0..3 {
        let (created, _) = random_orders(&mut Rng::with_seed(round), 100);
        assert_eq!(inventory.client.deliver(&created).await.unwrap(), vec!["APPLIED"; 100]);
        let (mut events, taken_now) = random_orders(&mut Rng::with_seed(1000 + round), 100);
        for (sku, quantity) in taken_now {
            *taken.entry(sku).or_default() += quantity;
        }
        events.extend(created.iter().map(cancellation_of));
        assert_eq!(deliver_overlapping(&clients, &events, round).await, 200);
    }
    assert_eq!(inventory.count("SELECT count(*) FROM reservations WHERE status = 'RELEASED'").await, 300);
    for sku in SKUS {
        assert_eq!(inventory.client.get_stock(sku).await.unwrap(), 1_000_000 - taken[sku], "{sku}");
    }
    inventory.stop().await;
}

/// No two batches share an event, so they meet only at the locks on stock.
#[tokio::test(flavor = "multi_thread")]
async fn batches_of_different_events_over_the_same_skus_do_not_deadlock() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&SKUS.map(|sku| (sku, 1_000_000))).await;
    let calls = (0..CLIENTS).map(|seed| {
        let client = inventory.client.clone();
        async move {
            let mut rng = Rng::with_seed(seed);
            for _ in 0..25 {
                let (events, _) = random_orders(&mut rng, 4);
                assert_eq!(client.deliver(&events).await.expect("no batch fails"), ["APPLIED"; 4]);
            }
        }
    });
    at_once(calls).await;
    assert_eq!(inventory.count("SELECT count(*) FROM reservations WHERE status = 'RESERVED'").await, 800);
    inventory.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_orders_at_once_for_the_last_thirty_pieces_reserve_thirty() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("LAST", 30), ("PLENTY", 1000)]).await;

    let calls = (0..100).map(|_| {
        let client = inventory.client.clone();
        async move { client.deliver(&[order(&[("PLENTY", 1), ("LAST", 1)])]).await.unwrap() }
    });
    assert!(at_once(calls).await.iter().all(|outcomes| *outcomes == ["APPLIED"]));

    assert_eq!(inventory.count("SELECT count(*) FROM reservations WHERE status = 'RESERVED'").await, 30);
    let rejected = "SELECT count(*) FROM reservations
        WHERE rejection = 'INSUFFICIENT_STOCK LAST: 1 wanted, 0 available'";
    assert_eq!(inventory.count(rejected).await, 70);
    assert_eq!(inventory.client.get_stock("LAST").await.unwrap(), 0);
    assert_eq!(inventory.client.get_stock("PLENTY").await.unwrap(), 970);
    inventory.stop().await;
}

/// Adjusts stock or delivers orders, at random. Returns the sum of the adjustments made, by SKU.
async fn sell_and_adjust(client: Client, seed: u64) -> BTreeMap<&'static str, i64> {
    let mut rng = Rng::with_seed(seed);
    let mut adjusted = BTreeMap::new();
    for _ in 0..40 {
        if rng.bool() {
            let (events, _) = random_orders(&mut rng, 5);
            assert_eq!(client.deliver(&events).await.unwrap(), ["APPLIED"; 5]);
            continue;
        }
        let (sku, delta) = (SKUS[rng.usize(..10)], [-10, -5, 3, 8][rng.usize(..4)]);
        match client.adjust_stock(&Uuid::new_v4().to_string(), sku, delta).await {
            Ok(_) => *adjusted.entry(sku).or_insert(0) += delta,
            Err(status) => assert_eq!(refusal(&status), "FailedPrecondition INSUFFICIENT_STOCK"),
        }
    }
    adjusted
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_is_conserved_under_orders_and_adjustments_at_once() {
    let inventory = Inventory::serve(&[]).await;
    // So little that some orders and some adjustments are refused.
    inventory.put_in(&SKUS.map(|sku| (sku, 50))).await;
    let mut calls = Vec::new();
    for seed in 0..CLIENTS {
        calls.push(sell_and_adjust(Client::connect(inventory.addresses).await, seed));
    }
    let adjusted = at_once(calls).await;

    for sku in SKUS {
        let adjusted: i64 = adjusted.iter().filter_map(|by_sku| by_sku.get(sku)).sum();
        let sql = "SELECT coalesce(sum(delta), 0)::bigint FROM stock_ledger
            JOIN reservations ON order_id = reference AND status = 'RESERVED' WHERE kind = 'RESERVATION' AND sku = $1";
        let reserved: i64 = sqlx::query_scalar(sql).bind(sku).fetch_one(&inventory.pool).await.unwrap();
        assert_eq!(inventory.client.get_stock(sku).await.unwrap(), 50 + adjusted + reserved, "{sku}");
    }
    let rejected = inventory.count("SELECT count(*) FROM reservations WHERE status = 'REJECTED'").await;
    assert!(rejected > 0, "no order was rejected: too much stock to test anything");
    inventory.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_wait_for_each_other_leave_connections_to_other_calls() {
    let mut flags = vec!["--batches-at-once", "2", "--database-connections", "3", "--database-acquire-ms", "2000"];
    flags.extend(LONG_WORK);
    let inventory = Inventory::serve(&flags).await;
    inventory.put_in(&[("MUG", 100)]).await;
    let lock = inventory.lock_stock().await;
    let deliveries: Vec<_> = (0..6)
        .map(|_| {
            let client = inventory.client.clone();
            tokio::spawn(async move { client.deliver(&[order(&[("MUG", 1)])]).await.unwrap() })
        })
        .collect();
    inventory.wait_for_waiting_sessions(2).await;
    // These calls usually run after all deliveries, since they come later on the same connection. They would be refused
    // if the deliveries held all connections to the database.
    for _ in 0..20 {
        assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 100);
    }
    assert!(deliveries.iter().all(|delivery| !delivery.is_finished()));

    lock.rollback().await.unwrap();
    for delivery in deliveries {
        assert_eq!(delivery.await.unwrap(), ["APPLIED"]);
    }
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 94);
    inventory.stop().await;
}

#[tokio::test]
async fn a_batch_that_waits_too_long_for_others_is_told_to_retry() {
    let inventory = Inventory::serve(&[&["--batches-at-once", "1"], &LONG_WORK[..]].concat()).await;
    inventory.put_in(&[("MUG", 100)]).await;
    let lock = inventory.lock_stock().await;
    let (client, events) = (inventory.client.clone(), [order(&[("MUG", 1)]), order(&[("MUG", 1)])]);
    let first = tokio::spawn({
        let (client, event) = (client.clone(), events[0].clone());
        async move { client.deliver(&[event]).await.unwrap() }
    });
    inventory.wait_for_waiting_sessions(1).await;
    assert_eq!(refusal(&client.deliver([&events[1]]).await.unwrap_err()), "Unavailable BUSY");

    lock.rollback().await.unwrap();
    assert_eq!(first.await.unwrap(), ["APPLIED"]);
    assert_eq!(client.deliver([&events[1]]).await.unwrap(), ["APPLIED"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 98);
    inventory.stop().await;
}
