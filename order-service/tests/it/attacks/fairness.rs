//! One customer's flood, and what it leaves to another.

use std::time::Duration;

use proto::orders::v1::CreateOrderRequest;
use tokio::{
    task::JoinSet,
    time::{interval, sleep, timeout},
};
use tonic::Code;
use tonic_types::StatusExt;

use super::{Attack, LIMIT, victim::Victim};
use crate::{
    intake::place_for,
    service::{Service, order, refusal},
};

/// Callers of the greedy customer.
const FLOOD: usize = 600;
/// Orders of the modest one, and the time between two of them.
const ORDERS: usize = 100;
const PACE: Duration = Duration::from_millis(20);

/// How many of its orders are placed, if the customer places them at its own pace, whatever becomes of each.
///
/// A caller that waits for each answer would measure the processor, which the attackers and the test use too.
async fn place_at_own_pace(victim: &Victim) -> usize {
    let caller = victim.connect();
    let mut calls = JoinSet::new();
    let mut ticks = interval(PACE);
    for _ in 0..ORDERS {
        ticks.tick().await;
        let mut caller = caller.clone();
        let request = CreateOrderRequest { customer_id: "modest".into(), ..order() };
        calls.spawn(async move { caller.create_order(request).await });
    }
    let answers = timeout(LIMIT, calls.join_all()).await.expect("answers");
    answers.into_iter().filter(Result::is_ok).count()
}

/// The flood is larger than the number of calls that may wait, and the greedy customer may have half of them. No call is
/// refused for its lateness: how fast the machine is does not matter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_one_customer_leaves_another_its_rate() {
    let patient = ["--database-acquire-ms", "60000", "--request-seconds", "60", "--concurrent-streams", "1000"];
    let victim = Victim::start(&patient).await;
    let alone = place_at_own_pace(&victim).await;
    assert_eq!(alone, ORDERS);

    let greedy = victim.connect();
    let attack = Attack::begin(FLOOD, move || {
        let mut greedy = greedy.clone();
        async move {
            let request = CreateOrderRequest { customer_id: "greedy".into(), ..order() };
            let answer = greedy.create_order(request).await;
            if answer.is_err() {
                sleep(PACE).await;
            }
            answer.map(drop).map_err(|refused| refused.code())
        }
    });
    attack.sheds(2 * FLOOD).await;
    let beside = place_at_own_pace(&victim).await;
    let answers = attack.sheds(3 * FLOOD).await;
    let refused = answers.iter().filter(|answer| **answer == Err(Code::ResourceExhausted)).count();
    assert!(refused >= FLOOD, "the flood was none: {refused} refusals");
    assert!(5 * beside >= 4 * alone, "{beside} orders beside the flood, and {alone} alone");
    drop(attack);
    victim.end().await;
}

/// Of however few, and however large a share is set. Orders that are in transactions count, too: those of a slow database may
/// be many.
#[tokio::test]
async fn a_flood_takes_half_of_the_places_even_if_nothing_is_answered() {
    const SHARE: usize = 32;
    let patient = ["--database-acquire-ms", "60000", "--database-work-ms", "60000", "--request-seconds", "60"];
    let service =
        Service::start_with(&[&patient[..], &["--concurrent-streams", "1000", "--calls", "64"]].concat()).await;
    let lock = service.lock_orders().await;
    let mut flood = JoinSet::new();
    (0..SHARE).for_each(|_| place_for(&service, &mut flood, "greedy"));
    service.waits_for_a_lock().await;
    (0..FLOOD).for_each(|_| place_for(&service, &mut flood, "greedy"));
    for _ in 0..FLOOD {
        let refused = timeout(LIMIT, flood.join_next()).await.expect("one is refused").unwrap().unwrap();
        refusal(refused).is(Code::ResourceExhausted, "OVERLOADED");
    }
    let mut others = JoinSet::new();
    (0..SHARE).for_each(|customer| place_for(&service, &mut others, &format!("modest-{customer}")));
    // It comes by the same connection, after them.
    service.health().await.unwrap();
    assert!(others.try_join_next().is_none(), "one of them is refused");
    lock.rollback().await.unwrap();
    for (answers, whose) in [(flood.join_all().await, "the flood's"), (others.join_all().await, "others'")] {
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), SHARE, "{whose}");
    }
    service.end().await;
}

#[tokio::test]
async fn a_customer_that_has_its_share_is_told_so() {
    let flags = ["--writers", "1", "--queue-per-customer", "1", "--database-acquire-ms", "8000"];
    let service = Service::start_with(&flags).await;
    let lock = service.lock_orders().await;
    let mut calls = JoinSet::new();
    place_for(&service, &mut calls, "first");
    service.waits_for_a_lock().await;
    for customer_id in ["greedy", "greedy", "modest"] {
        place_for(&service, &mut calls, customer_id);
    }
    let refused = calls.join_next().await.unwrap().unwrap();
    let details = refused.as_ref().unwrap_err().get_error_details();
    assert_eq!(details.quota_failure().unwrap().violations[0].subject, "greedy");
    refusal(refused).is(Code::ResourceExhausted, "OVERLOADED");
    lock.rollback().await.unwrap();
    assert!(calls.join_all().await.iter().all(Result::is_ok));
    service.end().await;
}
