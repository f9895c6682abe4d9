use uuid::Uuid;

use crate::{
    inventory::{Inventory, at_once},
    orders::{cancellation_of, event_of, order, order_id_of},
};

const RESERVED: &str = "inventory.v1.StockReserved";
const REJECTED: &str = "inventory.v1.StockRejected";
const RELEASED: &str = "inventory.v1.StockReleased";

#[tokio::test]
async fn a_cancellation_releases_all_that_was_reserved_once() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10), ("KETTLE", 5)]).await;
    let created = order(&[("MUG", 2), ("KETTLE", 1), ("MUG", 3)]);
    let cancelled = cancellation_of(&created);
    assert_eq!(inventory.client.deliver([&created]).await.unwrap(), ["APPLIED"]);

    assert_eq!(inventory.client.deliver([&cancelled]).await.unwrap(), ["APPLIED"]);
    assert_eq!(inventory.client.deliver([&cancelled, &created]).await.unwrap(), ["DUPLICATE", "DUPLICATE"]);

    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 10);
    assert_eq!(inventory.client.get_stock("KETTLE").await.unwrap(), 5);
    assert_eq!(inventory.answers(&created).await, [RESERVED, RELEASED]);
    inventory.stop().await;
}

#[tokio::test]
async fn an_order_created_and_cancelled_in_one_batch_leaves_its_stock_to_the_next() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 5)]).await;
    let created = order(&[("MUG", 5)]);
    let next = order(&[("MUG", 5)]);

    // Stock that the cancellation releases is available to the next order of the same batch.
    let outcomes = inventory.client.deliver([&created, &cancellation_of(&created), &next]).await.unwrap();

    assert_eq!(outcomes, ["APPLIED"; 3]);
    assert_eq!(inventory.answers(&created).await, [RESERVED, RELEASED]);
    assert_eq!(inventory.answers(&next).await, [RESERVED]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 0);
    inventory.stop().await;
}

#[tokio::test]
async fn a_cancellation_of_a_rejected_order_releases_nothing() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 1)]).await;
    let created = order(&[("MUG", 2)]);
    assert_eq!(inventory.client.deliver([&created]).await.unwrap(), ["APPLIED"]);

    assert_eq!(inventory.client.deliver([&cancellation_of(&created)]).await.unwrap(), ["APPLIED"]);

    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 1);
    assert_eq!(inventory.answers(&created).await, [REJECTED]);
    inventory.stop().await;
}

#[tokio::test]
async fn an_order_cancelled_before_its_creation_is_never_reserved() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let created = order(&[("MUG", 2)]);

    let outcomes = inventory.client.deliver([&cancellation_of(&created), &created]).await.unwrap();
    assert_eq!(outcomes, ["APPLIED", "REJECTED ALREADY_DECIDED"]);
    assert_eq!(inventory.client.deliver([&created]).await.unwrap(), ["REJECTED ALREADY_DECIDED"]);

    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 10);
    assert_eq!(inventory.answers(&created).await, [""; 0]);
    inventory.stop().await;
}

#[tokio::test]
async fn a_second_cancellation_of_an_order_is_rejected_and_the_rest_of_its_batch_applied() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let created = order(&[("MUG", 2)]);
    let (first, second) = (cancellation_of(&created), cancellation_of(&created));
    assert_eq!(inventory.client.deliver([&created, &first]).await.unwrap(), ["APPLIED", "APPLIED"]);

    let outcomes = inventory.client.deliver([&second, &order(&[("MUG", 1)])]).await.unwrap();

    assert_eq!(outcomes, ["REJECTED ALREADY_CANCELLED", "APPLIED"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 9);
    inventory.stop().await;
}

/// Our relay never does this, since only one batch with an order's events is in flight. Stock must be conserved all the
/// same (`stop` audits it), and a cancelled order must keep nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_creation_and_its_cancellation_at_once_leave_nothing_reserved() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 1000)]).await;
    for _ in 0..20 {
        let created = event_of(Uuid::now_v7(), &[("MUG", 1)]);
        let cancelled = cancellation_of(&created);
        let calls = [created.clone(), cancelled.clone()].map(|event| {
            let client = inventory.client.clone();
            async move { client.deliver([&event]).await.unwrap().remove(0) }
        });
        let outcomes = at_once(calls).await;
        if outcomes[1] == "RETRY RESERVED_MEANWHILE" {
            assert_eq!(inventory.client.deliver([&cancelled]).await.unwrap(), ["APPLIED"]);
        }
        let sql = "SELECT status FROM reservations WHERE order_id = $1";
        let status: String =
            sqlx::query_scalar(sql).bind(order_id_of(&created)).fetch_one(&inventory.pool).await.unwrap();
        assert_eq!(status, "RELEASED", "{outcomes:?}");
    }
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 1000);
    inventory.stop().await;
}
