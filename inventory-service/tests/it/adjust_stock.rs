use tonic::Code;
use uuid::Uuid;

use crate::{
    client::refusal,
    inventory::{Inventory, at_once},
};

fn request_id() -> String {
    Uuid::new_v4().to_string()
}

#[tokio::test]
async fn an_adjustment_adds_or_takes_and_creates_an_unknown_sku() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;

    assert_eq!(inventory.client.adjust_stock(&request_id(), "MUG", 5).await.unwrap(), 15);
    assert_eq!(inventory.client.adjust_stock(&request_id(), "MUG", -15).await.unwrap(), 0);
    let refused = inventory.client.get_stock("TEAPOT").await.unwrap_err();
    assert_eq!(refusal(&refused), "NotFound SKU_NOT_FOUND");
    assert_eq!(inventory.client.adjust_stock(&request_id(), "TEAPOT", 4).await.unwrap(), 4);

    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 0);
    assert_eq!(inventory.client.get_stock("TEAPOT").await.unwrap(), 4);
    assert_eq!(inventory.count("SELECT count(*) FROM stock_ledger WHERE kind = 'ADJUSTMENT'").await, 3);
    inventory.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_equal_adjustments_at_once_are_made_once() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    for (sku, delta, left) in [("MUG", -3, 7), ("TEAPOT", 4, 4)] {
        let id = request_id();
        let calls = (0..50).map(|_| {
            let (client, id) = (inventory.client.clone(), id.clone());
            async move { client.adjust_stock(&id, sku, delta).await.unwrap() }
        });
        assert_eq!(at_once(calls).await, [left; 50]);
        assert_eq!(inventory.client.adjust_stock(&id, sku, delta).await.unwrap(), left);
    }
    assert_eq!(inventory.count("SELECT count(*) FROM stock_ledger WHERE kind = 'ADJUSTMENT'").await, 2);
    inventory.stop().await;
}

#[tokio::test]
async fn a_request_id_with_other_content_is_refused_and_changes_nothing() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10), ("KETTLE", 10)]).await;
    let id = request_id();
    inventory.client.adjust_stock(&id, "MUG", 5).await.unwrap();
    let before = inventory.contents().await;

    for (sku, delta) in [("MUG", 6), ("MUG", -5), ("KETTLE", 5), ("TEAPOT", 5), ("TEAPOT", -5), ("MUG", -1000)] {
        let refused = inventory.client.adjust_stock(&id, sku, delta).await.unwrap_err();
        assert_eq!(refusal(&refused), "InvalidArgument REQUEST_ID_REUSED", "{sku} {delta}");
    }

    assert_eq!(inventory.contents().await, before);
    inventory.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_adjustments_racing_under_one_request_id_one_is_made_and_the_other_refused() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 100)]).await;
    for _ in 0..10 {
        let id = request_id();
        let calls = (0..10).map(|call| {
            let (client, id) = (inventory.client.clone(), id.clone());
            let sku = ["MUG", "TEAPOT"][call % 2];
            async move { client.adjust_stock(&id, sku, 1).await.map(|_| sku).map_err(|status| refusal(&status)) }
        });
        let answers = at_once(calls).await;
        let (made, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        assert_eq!((made.len(), refused.len()), (5, 5));
        assert!(made.iter().all(|answer| *answer == made[0]), "{made:?}");
        assert_eq!(refused, vec![Err("InvalidArgument REQUEST_ID_REUSED".to_owned()); 5]);
    }
    assert_eq!(inventory.count("SELECT count(*) FROM stock_ledger WHERE kind = 'ADJUSTMENT'").await, 10);
    inventory.stop().await;
}

#[tokio::test]
async fn taking_more_than_is_available_is_refused_until_there_is_enough() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let before = inventory.contents().await;
    let (of_known, of_unknown) = (request_id(), request_id());

    for _ in 0..2 {
        for (id, sku, delta) in [(&of_known, "MUG", -11), (&of_unknown, "TEAPOT", -1)] {
            let refused = inventory.client.adjust_stock(id, sku, delta).await.unwrap_err();
            assert_eq!(refusal(&refused), "FailedPrecondition INSUFFICIENT_STOCK");
            assert!(refused.message().contains(sku), "{refused:?}");
        }
    }
    assert_eq!(inventory.contents().await, before);

    // A refused adjustment does not use up its id.
    inventory.client.adjust_stock(&request_id(), "MUG", 1).await.unwrap();
    assert_eq!(inventory.client.adjust_stock(&of_known, "MUG", -11).await.unwrap(), 0);
    inventory.stop().await;
}

#[tokio::test]
async fn every_bad_field_of_an_adjustment_is_named() {
    let inventory = Inventory::serve(&[]).await;
    let before = inventory.contents().await;
    let (good, too_long) = (request_id(), "M".repeat(65));
    let bad = [
        ("", "", 0, "request_id,sku,delta"),
        ("17", "M U G", 1_000_000_001, "request_id,sku,delta"),
        (&good, "MUG", 0, "delta"),
        (&good, "MUG", -1_000_000_001, "delta"),
        (&good, "MUG", i64::MIN, "delta"),
        (&good, "MU\0G", 1, "sku"),
        (&good, &too_long, 1, "sku"),
        ("17", "MUG", 1, "request_id"),
        ("00000000-0000-0000-0000-000000000000", "MUG", 1, "request_id"),
    ];
    for (id, sku, delta, fields) in bad {
        let refused = inventory.client.adjust_stock(id, sku, delta).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert_eq!(refusal(&refused), format!("InvalidArgument INVALID_ADJUSTMENT {fields}"));
    }
    assert_eq!(inventory.contents().await, before);

    assert_eq!(inventory.client.adjust_stock(&good, "MUG", 1_000_000_000).await.unwrap(), 1_000_000_000);
    assert_eq!(inventory.client.adjust_stock(&request_id(), "MUG", -1_000_000_000).await.unwrap(), 0);
    inventory.stop().await;
}
