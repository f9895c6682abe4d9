use crate::{client::refusal, inventory::Inventory};

#[tokio::test]
async fn stock_is_listed_by_sku_in_pages() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("a.b", 7), ("9", 3), ("Z", 5), ("-", 1), ("_", 6), ("10", 2), ("A-1", 4)]).await;

    let (mut pages, mut token) = (Vec::new(), String::new());
    loop {
        let page = inventory.client.list_stock(3, &token).await.unwrap();
        pages.push(page.levels.into_iter().map(|level| (level.sku, level.available)).collect::<Vec<_>>());
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }

    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 1]);
    let by_byte = ["-", "10", "9", "A-1", "Z", "_", "a.b"];
    let expected: Vec<_> = by_byte.iter().map(ToString::to_string).zip(1..).collect();
    assert_eq!(pages.concat(), expected);
    inventory.stop().await;
}

#[tokio::test]
async fn a_full_last_page_gives_no_token_and_neither_does_an_empty_list() {
    let inventory = Inventory::serve(&[]).await;
    let empty = inventory.client.list_stock(3, "").await.unwrap();
    assert_eq!((empty.levels.len(), empty.next_page_token.as_str()), (0, ""));

    inventory.put_in(&[("A", 1), ("B", 2), ("C", 3), ("D", 4)]).await;
    let first = inventory.client.list_stock(2, "").await.unwrap();
    let last = inventory.client.list_stock(2, &first.next_page_token).await.unwrap();
    assert_eq!((first.levels.len(), last.levels.len(), last.next_page_token.as_str()), (2, 2, ""));
    inventory.stop().await;
}

#[tokio::test]
async fn the_next_page_starts_after_the_last_sku_whatever_was_added_meanwhile() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("B", 1), ("D", 1), ("F", 1)]).await;
    let first = inventory.client.list_stock(2, "").await.unwrap();
    inventory.put_in(&[("A", 1), ("E", 1)]).await;

    let second = inventory.client.list_stock(2, &first.next_page_token).await.unwrap();

    let skus: Vec<&str> = first.levels.iter().chain(&second.levels).map(|level| level.sku.as_str()).collect();
    assert_eq!(skus, ["B", "D", "E", "F"]);
    inventory.stop().await;
}

#[tokio::test]
async fn a_page_holds_50_unless_asked_and_never_more_than_500() {
    let inventory = Inventory::serve(&[]).await;
    let sql = "INSERT INTO stock SELECT 'SKU-' || number, 0 FROM generate_series(1, 501) AS number";
    sqlx::query(sql).execute(&inventory.pool).await.unwrap();
    for (asked, answered) in [(0, 50), (499, 499), (500, 500), (501, 500), (i32::MAX, 500)] {
        let page = inventory.client.list_stock(asked, "").await.unwrap();
        assert_eq!(page.levels.len(), answered, "{asked}");
        assert!(!page.next_page_token.is_empty(), "{asked}");
    }
    inventory.stop().await;
}

#[tokio::test]
async fn a_bad_page_is_refused_naming_every_bad_field() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("A", 1), ("B", 2)]).await;
    let of_another_list = chassis::encode_page_token("orders of ann", "A");
    let with_nul = chassis::encode_page_token("stock", "A\0");
    let bad = [
        (-1, "", "page_size"),
        (1, "not a token", "page_token"),
        (1, &of_another_list, "page_token"),
        (1, &with_nul, "page_token"),
        (i32::MIN, "A", "page_size,page_token"),
    ];
    for (size, token, fields) in bad {
        let refused = inventory.client.list_stock(size, token).await.unwrap_err();
        assert_eq!(refusal(&refused), format!("InvalidArgument INVALID_PAGE {fields}"));
    }
    inventory.stop().await;
}

#[tokio::test]
async fn get_stock_answers_the_level_or_the_reason_of_a_refusal() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 3)]).await;

    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 3);
    let unknown = inventory.client.get_stock("mug").await.unwrap_err();
    assert_eq!(refusal(&unknown), "NotFound SKU_NOT_FOUND");
    for bad in ["", "M U G", "MU\0G", "' OR 1=1 --", "Tassé"] {
        let refused = inventory.client.get_stock(bad).await.unwrap_err();
        assert_eq!(refusal(&refused), "InvalidArgument INVALID_SKU sku", "{bad:?}");
    }
    inventory.stop().await;
}
