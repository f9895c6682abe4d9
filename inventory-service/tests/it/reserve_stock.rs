use uuid::Uuid;

use crate::{
    inventory::{Inventory, at_once},
    orders::{event_of, order, order_id_of},
};

#[tokio::test]
async fn an_order_that_is_short_of_stock_is_rejected_whole_and_names_each_shortage() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10), ("KETTLE", 1), ("GRINDER", 0)]).await;
    let event = order(&[("MUG", 2), ("KETTLE", 1), ("UNHEARD-OF", 4), ("KETTLE", 2), ("GRINDER", 1)]);

    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["APPLIED"]);

    let rejection = "REJECTED INSUFFICIENT_STOCK GRINDER: 1 wanted, 0 available; \
        INSUFFICIENT_STOCK KETTLE: 3 wanted, 1 available; UNKNOWN_SKU UNHEARD-OF";
    assert_eq!(inventory.reservation(&event).await, (rejection.to_owned(), true));
    assert!(inventory.is_in_inbox(&event).await);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 10);
    assert_eq!(inventory.client.get_stock("KETTLE").await.unwrap(), 1);
    assert_eq!(inventory.count("SELECT count(*) FROM stock").await, 3);
    inventory.stop().await;
}

#[tokio::test]
async fn orders_of_a_batch_are_decided_in_order_and_a_later_one_that_fits_is_reserved() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10), ("KETTLE", 10)]).await;
    let events = [
        order(&[("MUG", 7)]),
        order(&[("KETTLE", 5), ("MUG", 4)]),
        order(&[("MUG", 3)]),
        order(&[("MUG", 1)]),
        order(&[("KETTLE", 10)]),
    ];

    assert_eq!(inventory.client.deliver(&events).await.unwrap(), ["APPLIED"; 5]);

    let expected = [
        "RESERVED",
        "REJECTED INSUFFICIENT_STOCK MUG: 4 wanted, 3 available",
        "RESERVED",
        "REJECTED INSUFFICIENT_STOCK MUG: 1 wanted, 0 available",
        "RESERVED",
    ];
    for (event, expected) in events.iter().zip(expected) {
        assert_eq!(inventory.reservation(event).await, (expected.to_owned(), true));
    }
    inventory.stop().await;
}

#[tokio::test]
async fn a_rejected_order_stays_rejected_when_stock_is_added() {
    let inventory = Inventory::serve(&[]).await;
    let event = order(&[("MUG", 1)]);
    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["APPLIED"]);
    inventory.client.adjust_stock(&Uuid::new_v4().to_string(), "MUG", 10).await.unwrap();

    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["DUPLICATE"]);

    assert_eq!(inventory.reservation(&event).await, ("REJECTED UNKNOWN_SKU MUG".to_owned(), true));
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 10);
    inventory.stop().await;
}

/// An answer that names every item of the larger order would exceed the size limit of an event.
#[tokio::test]
async fn an_order_of_too_many_items_is_rejected_and_one_of_the_most_items_answered() {
    let inventory = Inventory::serve(&[]).await;
    let skus: Vec<String> = (0..20_000).map(|number| format!("{number:064}")).collect();
    let items: Vec<(&str, i32)> = skus.iter().map(|sku| (sku.as_str(), i32::MAX)).collect();
    let (too_many, most) = (order(&items), order(&items[..1000]));

    let outcomes = inventory.client.deliver(&[too_many.clone(), most.clone()]).await.unwrap();

    assert_eq!(outcomes, ["REJECTED INVALID_ORDER", "APPLIED"]);
    assert!(!inventory.is_in_inbox(&too_many).await);
    assert_eq!(inventory.answers(&most).await, ["inventory.v1.StockRejected"]);
    inventory.stop().await;
}

#[tokio::test]
async fn another_event_for_an_order_in_the_same_batch_is_rejected() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 100)]).await;
    let first = order(&[("MUG", 1)]);
    let second = event_of(order_id_of(&first), &[("MUG", 20)]);
    let third = event_of(order_id_of(&first), &[("MUG", 30)]);
    let other = order(&[("MUG", 5)]);

    let batch = [first.clone(), second.clone(), other, third.clone(), second.clone()];
    let outcomes = inventory.client.deliver(&batch).await.unwrap();

    let rejected = "REJECTED ALREADY_DECIDED";
    assert_eq!(outcomes, ["APPLIED", rejected, "APPLIED", rejected, rejected]);
    assert_eq!(inventory.reservation(&first).await, ("RESERVED".to_owned(), true));
    assert!(!inventory.is_in_inbox(&second).await && !inventory.is_in_inbox(&third).await);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 94);
    inventory.stop().await;
}

#[tokio::test]
async fn another_event_for_an_order_in_a_later_batch_is_rejected_and_the_rest_of_that_batch_applied() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 100)]).await;
    let (reserved, rejected) = (order(&[("MUG", 1)]), order(&[("KETTLE", 1)]));
    assert_eq!(inventory.client.deliver(&[reserved.clone(), rejected.clone()]).await.unwrap(), ["APPLIED"; 2]);

    let of_reserved = event_of(order_id_of(&reserved), &[("MUG", 20)]);
    let of_rejected = event_of(order_id_of(&rejected), &[("MUG", 30)]);
    let (new, new_too) = (order(&[("MUG", 2)]), order(&[("MUG", 3)]));
    let batch = [new.clone(), of_reserved.clone(), reserved, of_rejected.clone(), new_too];
    let outcomes = inventory.client.deliver(&batch).await.unwrap();

    let already = "REJECTED ALREADY_DECIDED";
    assert_eq!(outcomes, ["APPLIED", already, "DUPLICATE", already, "APPLIED"]);
    assert!(!inventory.is_in_inbox(&of_reserved).await && !inventory.is_in_inbox(&of_rejected).await);
    assert_eq!(inventory.reservation(&of_reserved).await, ("RESERVED".to_owned(), false));
    assert_eq!(inventory.reservation(&of_rejected).await, ("REJECTED UNKNOWN_SKU KETTLE".to_owned(), false));
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 94);
    inventory.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_events_for_one_order_at_once_exactly_one_is_applied() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 1000), ("KETTLE", 1000)]).await;
    let order_id = Uuid::now_v7();

    let calls = (0..20).map(|call| {
        let client = inventory.client.clone();
        // Alternating SKUs, so that the calls do not queue for the locks on stock.
        let event = event_of(order_id, &[(["MUG", "KETTLE"][call % 2], 1)]);
        async move { client.deliver(&[event, order(&[("MUG", 1)])]).await.unwrap() }
    });
    let outcomes = at_once(calls).await;

    assert_eq!(outcomes.iter().filter(|outcomes| **outcomes == ["APPLIED", "APPLIED"]).count(), 1);
    let rejected = outcomes.iter().filter(|outcomes| **outcomes == ["REJECTED ALREADY_DECIDED", "APPLIED"]);
    assert_eq!(rejected.count(), 19);
    assert_eq!(inventory.count("SELECT count(*) FROM reservations").await, 21);
    inventory.stop().await;
}
