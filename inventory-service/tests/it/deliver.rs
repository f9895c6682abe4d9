use prost::Message;
use proto::{events::v1::Event, inventory::v1::StockLevel};
use tonic::Code;
use uuid::Uuid;

use crate::{
    client::refusal,
    inventory::Inventory,
    orders::{cancellation_of, event_of, hours_ago, id_of, order, order_created, order_id_of},
};

#[tokio::test]
async fn an_event_is_applied_in_one_transaction() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10), ("KETTLE", 5), ("GRINDER", 7)]).await;
    let event = order(&[("MUG", 2), ("KETTLE", 1), ("MUG", 3)]);

    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["APPLIED"]);

    let levels = inventory.client.list_stock(0, "").await.unwrap().levels;
    let level = |sku: &str, available| StockLevel { sku: sku.into(), available };
    assert_eq!(levels, [level("GRINDER", 7), level("KETTLE", 4), level("MUG", 5)]);
    let sql = "SELECT sku, delta FROM stock_ledger WHERE reference = $1 AND kind = 'RESERVATION' ORDER BY sku";
    let query = sqlx::query_as::<_, (String, i64)>(sql).bind(order_id_of(&event));
    let movements = query.fetch_all(&inventory.pool).await.unwrap();
    assert_eq!(movements, [("KETTLE".to_owned(), -1), ("MUG".to_owned(), -5)]);
    assert_eq!(inventory.reservation(&event).await, ("RESERVED".to_owned(), true));
    assert!(inventory.is_in_inbox(&event).await);

    // xmin is the transaction that wrote a row.
    let transactions = "SELECT count(DISTINCT transaction::text) FROM (
            SELECT xmin FROM processed_messages UNION ALL
            SELECT xmin FROM reservations UNION ALL
            SELECT xmin FROM stock_ledger WHERE kind = 'RESERVATION' UNION ALL
            SELECT xmin FROM outbox UNION ALL
            SELECT xmin FROM stock WHERE sku <> 'GRINDER'
        ) AS written (transaction)";
    assert_eq!(inventory.count(transactions).await, 1);
    inventory.stop().await;
}

#[tokio::test]
async fn the_same_event_again_is_a_duplicate_and_changes_nothing() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 2)]);
    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["APPLIED"]);
    let before = inventory.contents().await;

    for _ in 0..3 {
        assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["DUPLICATE"]);
    }

    assert_eq!(inventory.contents().await, before);
    inventory.stop().await;
}

#[tokio::test]
async fn an_event_that_is_twice_in_a_batch_is_applied_then_a_duplicate() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let (event, other) = (order(&[("MUG", 2)]), order(&[("MUG", 3)]));

    let outcomes = inventory.client.deliver([&event, &other, &event]).await.unwrap();

    assert_eq!(outcomes, ["APPLIED", "APPLIED", "DUPLICATE"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 5);
    inventory.stop().await;
}

/// It is refused here by what it carries, by its age, which only the database knows, or by the handler.
#[tokio::test]
async fn no_event_is_applied_before_an_earlier_one_of_its_subject_in_the_batch() {
    let inventory = Inventory::serve(&["--retention-hours", "24"]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let unreadable = Event { data: vec![255].into(), ..order(&[("MUG", 1)]) };
    let shouting = Event { subject: unreadable.subject.to_uppercase(), ..unreadable.clone() };
    let old = hours_ago(&order(&[("MUG", 1)]), 25);
    let (twice, sound) = (order(&[("MUG", 1)]), order(&[("MUG", 2)]));
    let again = Event { sequence: 2, ..event_of(order_id_of(&twice), &[("MUG", 1)]) };
    let undecodable = "REJECTED UNDECODABLE";
    for (first, refused) in [(&unreadable, undecodable), (&shouting, undecodable), (&old, "REJECTED STALE")] {
        let behind = Event { subject: first.subject.to_lowercase(), ..cancellation_of(first) };
        let outcomes = inventory.client.deliver([first, &sound, &behind]).await.unwrap();
        assert_eq!([&*outcomes[0], &*outcomes[2]], [refused, "RETRY BEHIND_REFUSED"]);
        assert!(!inventory.is_in_inbox(&behind).await);
    }
    // The handler refuses this one.
    let behind = Event { sequence: 3, ..cancellation_of(&twice) };
    let outcomes = inventory.client.deliver([&twice, &again, &behind]).await.unwrap();
    assert_eq!(outcomes, ["APPLIED", "REJECTED ALREADY_DECIDED", "RETRY BEHIND_REFUSED"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 7, "the others of the batches are applied");
    assert_eq!(inventory.client.deliver([&behind]).await.unwrap(), ["APPLIED"]);
    inventory.stop().await;
}

#[tokio::test]
async fn a_batch_has_from_no_event_to_a_thousand() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 5000)]).await;
    assert_eq!(inventory.client.deliver([]).await.unwrap(), Vec::<String>::new());
    let mut events: Vec<Event> = (0..1001).map(|_| order(&[("MUG", 1)])).collect();

    let refused = inventory.client.deliver(&events).await.unwrap_err();
    assert_eq!(refusal(&refused), "InvalidArgument INVALID_BATCH events");
    assert_eq!(inventory.count("SELECT count(*) FROM processed_messages").await, 0);

    events.pop();
    assert_eq!(inventory.client.deliver(&events).await.unwrap(), vec!["APPLIED"; 1000]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 4000);
    inventory.stop().await;
}

/// One event for each reason to reject an event for good, with its outcome.
fn bad_events() -> Vec<(Event, &'static str)> {
    let good = || order(&[("MUG", 1)]);
    let with_data = |data: Vec<u8>| Event { data: data.into(), ..good() };
    let sku_too_long = "M".repeat(65);
    let mut of_another_order = good();
    of_another_order.data = order_created(Uuid::now_v7(), &[("MUG", 1)]).encode_to_vec().into();
    vec![
        (with_data(vec![0xff, 0xff]), "REJECTED UNDECODABLE"),
        (Event { r#type: "orders.v1.OrderShipped".into(), ..good() }, "REJECTED UNKNOWN_TYPE"),
        (Event { r#type: String::new(), ..good() }, "REJECTED UNKNOWN_TYPE"),
        (Event { id: "17".into(), ..good() }, "REJECTED UNDECODABLE"),
        (Event { id: String::new(), ..good() }, "REJECTED UNDECODABLE"),
        (Event { subject: "17".into(), ..good() }, "REJECTED UNDECODABLE"),
        (Event { sequence: 0, ..good() }, "REJECTED UNDECODABLE"),
        (Event { time: None, ..good() }, "REJECTED UNDECODABLE"),
        (Event { sequence: -1, ..good() }, "REJECTED UNDECODABLE"),
        (with_data(Vec::new()), "REJECTED INVALID_ORDER"),
        (of_another_order, "REJECTED INVALID_ORDER"),
        (order(&[]), "REJECTED INVALID_ORDER"),
        (order(&[("MUG", 0)]), "REJECTED INVALID_ORDER"),
        (order(&[("MUG", 1), ("MUG", -1)]), "REJECTED INVALID_ORDER"),
        (order(&[("", 1)]), "REJECTED INVALID_ORDER"),
        (order(&[("MU\0G", 1)]), "REJECTED INVALID_ORDER"),
        (order(&[(&sku_too_long, 1)]), "REJECTED INVALID_ORDER"),
    ]
}

#[tokio::test]
async fn events_that_can_never_be_applied_are_rejected_and_all_others_applied() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 100)]).await;
    let bad = bad_events();
    let (mut events, mut expected) = (vec![order(&[("MUG", 1)])], vec!["APPLIED"]);
    for (event, outcome) in &bad {
        events.extend([event.clone(), order(&[("MUG", 1)])]);
        expected.extend([*outcome, "APPLIED"]);
    }

    assert_eq!(inventory.client.deliver(&events).await.unwrap(), expected);

    for (event, outcome) in events.iter().zip(&expected).filter(|(event, _)| Uuid::try_parse(&event.id).is_ok()) {
        assert_eq!(inventory.is_in_inbox(event).await, *outcome == "APPLIED", "{outcome}: {event:?}");
    }
    let left = 100 - i64::try_from(bad.len() + 1).unwrap();
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), left);
    inventory.stop().await;
}

#[tokio::test]
async fn a_rejected_event_is_applied_when_it_arrives_again_valid() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let sound = order(&[("MUG", 2)]);
    let of_unknown_type = Event { r#type: "orders.v1.OrderShipped".into(), ..sound.clone() };

    assert_eq!(inventory.client.deliver([&of_unknown_type]).await.unwrap(), ["REJECTED UNKNOWN_TYPE"]);
    let outcomes = inventory.client.deliver(&[of_unknown_type, sound.clone(), sound]).await.unwrap();

    assert_eq!(outcomes, ["REJECTED UNKNOWN_TYPE", "APPLIED", "DUPLICATE"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 8);
    inventory.stop().await;
}

#[tokio::test]
async fn a_batch_too_large_to_decode_is_refused_and_leaves_the_connection_usable() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 1)]);
    let oversized = Event { data: vec![0; 17 << 20].into(), ..event.clone() };

    let refused = inventory.client.deliver(&[oversized]).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange);
    assert_eq!(inventory.client.deliver(&[event]).await.unwrap(), ["APPLIED"]);
    inventory.stop().await;
}

#[tokio::test]
async fn an_id_in_another_spelling_is_the_same_id() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 1)]);
    let shouted = Event { id: event.id.to_uppercase(), ..event.clone() };
    assert_eq!(id_of(&shouted), id_of(&event));
    assert_ne!(shouted.id, event.id);

    assert_eq!(inventory.client.deliver(&[event, shouted]).await.unwrap(), ["APPLIED", "DUPLICATE"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 9);
    inventory.stop().await;
}
