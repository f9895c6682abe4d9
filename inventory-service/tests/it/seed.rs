use chassis::DatabaseUrl;

use crate::{
    inventory::{Inventory, at_once},
    orders::order,
};

const DEMO_SKUS: [&str; 6] = ["COFFEE-BEANS", "FILTER-PAPER", "GRINDER", "KETTLE", "LAST-OF-ITS-KIND", "MUG"];

#[tokio::test]
async fn demo_stock_is_added_once_and_sold_stock_is_not_restored() {
    let inventory = Inventory::serve(&[]).await;
    let url: DatabaseUrl = inventory.database.url_as("inventory_service").parse().unwrap();

    assert_eq!(inventory_service::seed(&url).await.unwrap(), 6);
    let levels = inventory.client.list_stock(0, "").await.unwrap().levels;
    assert_eq!(levels.iter().map(|level| level.sku.as_str()).collect::<Vec<_>>(), DEMO_SKUS);
    let openings = "SELECT count(*) FROM stock JOIN stock_ledger USING (sku)
        WHERE kind = 'OPENING' AND delta = available AND available > 0";
    assert_eq!(inventory.count(openings).await, 6);

    let events = [order(&[("MUG", 7)]), order(&[("LAST-OF-ITS-KIND", 3)])];
    assert_eq!(inventory.client.deliver(&events).await.unwrap(), ["APPLIED"; 2]);
    let before = inventory.contents().await;
    assert_eq!(inventory_service::seed(&url).await.unwrap(), 0);
    assert_eq!(inventory.contents().await, before);
    assert_eq!(inventory.client.get_stock("LAST-OF-ITS-KIND").await.unwrap(), 0);
    inventory.stop().await;
}

#[tokio::test]
async fn a_sku_that_exists_is_left_alone_and_the_others_are_added() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 2), ("TEAPOT", 1)]).await;
    let url: DatabaseUrl = inventory.database.url_as("inventory_service").parse().unwrap();

    assert_eq!(inventory_service::seed(&url).await.unwrap(), 5);

    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 2);
    assert_eq!(inventory.client.get_stock("TEAPOT").await.unwrap(), 1);
    inventory.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn seeds_at_once_add_each_sku_once() {
    let inventory = Inventory::serve(&[]).await;
    let url: DatabaseUrl = inventory.database.url_as("inventory_service").parse().unwrap();
    let seeds = (0..8).map(|_| {
        let url = url.clone();
        async move { inventory_service::seed(&url).await.unwrap() }
    });
    assert_eq!(at_once(seeds).await.into_iter().sum::<u64>(), 6);
    assert_eq!(inventory.count("SELECT count(*) FROM stock_ledger").await, 6);
    inventory.stop().await;
}
