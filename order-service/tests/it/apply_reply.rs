use proto::{events::v1::Event, orders::v1::OrderStatus};
use uuid::Uuid;

use crate::service::{Service, order, rejected, rejected_for, released, reserved};

#[tokio::test]
async fn a_reserved_order_is_confirmed_and_a_rejected_one_keeps_its_reason() {
    let service = Service::start().await;
    let (first, second) = (service.place(order()).await.order_id, service.place(order()).await.order_id);

    assert_eq!(service.deliver(&[reserved(&first), rejected(&second)]).await, ["APPLIED", "APPLIED"]);

    let (first, second) = (service.get(&first).await, service.get(&second).await);
    assert_eq!((first.status(), first.rejection.as_str()), (OrderStatus::Confirmed, ""));
    assert_eq!((second.status(), second.rejection.as_str()), (OrderStatus::Rejected, "TEA: 3 wanted, 1 available"));
    service.end().await;
}

/// With the full reason, the answer would be too large for a client, and a page would have room for no order.
#[tokio::test]
async fn an_order_rejected_for_many_items_or_for_long_skus_is_still_answered_and_listed() {
    let service = Service::start().await;
    let (long, many) = ("x".repeat(5 * 1024 * 1024), vec!["TEA"; 20_000]);
    for (skus, rejection) in [
        (&["TEA", &long, "CUP"][..], "TEA: 3 wanted, 1 available; and 2 more"),
        (&many, "TEA: 3 wanted, 1 available; TEA: 3 wanted, 1 available; TEA:"),
        (&vec!["TEA"; 100], "TEA: 3 wanted, 1 available; TEA: 3 wanted, 1 available; TEA:"),
    ] {
        let order_id = service.place(order()).await.order_id;
        assert_eq!(service.deliver(&[rejected_for(&order_id, skus)]).await, ["APPLIED"]);
        let order = service.get(&order_id).await;
        assert!(order.rejection.starts_with(rejection), "{}", order.rejection);
        assert_eq!(order.rejection.contains(" more"), skus.len() != 100);
        assert_eq!(service.newest_of(&order.customer_id).await, Some(order));
    }
    service.end().await;
}

#[tokio::test]
async fn a_repeated_reply_is_a_duplicate() {
    let service = Service::start().await;
    let order_id = service.place(order()).await.order_id;
    let reply = reserved(&order_id);
    assert_eq!(service.deliver(&[reply.clone(), reply.clone()]).await, ["APPLIED", "DUPLICATE"]);
    assert_eq!(service.deliver(&[reply]).await, ["DUPLICATE"]);
    assert_eq!(service.get(&order_id).await.status(), OrderStatus::Confirmed);
    service.end().await;
}

#[tokio::test]
async fn a_settled_or_cancelled_order_is_changed_by_no_reply() {
    let service = Service::start().await;
    let order_id = service.place(order()).await.order_id;
    service.cancel(&order_id, "").await.unwrap();
    for reply in [reserved(&order_id), rejected(&order_id), released(&order_id)] {
        assert_eq!(service.deliver(&[reply]).await, ["APPLIED"]);
        let order = service.get(&order_id).await;
        assert_eq!((order.status(), order.rejection.as_str()), (OrderStatus::Cancelled, ""));
    }
    // Inventory does not contradict itself. Even if it did, the status that a customer has seen must stay.
    for (first, second, stays) in [
        (reserved as fn(&str) -> Event, rejected as fn(&str) -> Event, OrderStatus::Confirmed),
        (rejected, reserved, OrderStatus::Rejected),
    ] {
        let order_id = service.place(order()).await.order_id;
        assert_eq!(service.deliver(&[first(&order_id), second(&order_id)]).await, ["APPLIED", "APPLIED"]);
        assert_eq!(service.deliver(&[second(&order_id)]).await, ["APPLIED"]);
        assert_eq!(service.get(&order_id).await.status(), stays);
    }
    service.end().await;
}

#[tokio::test]
async fn invalid_replies_are_rejected_and_the_rest_of_their_batch_is_applied() {
    let service = Service::start().await;
    let order_id = service.place(order()).await.order_id;
    let of_unknown = reserved(&Uuid::now_v7().to_string());
    let of_another = Event { subject: order_id.clone(), ..of_unknown.clone() };
    let of_another_type = Event { r#type: "inventory.v1.StockCounted".into(), ..reserved(&order_id) };

    let outcomes = service.deliver(&[of_unknown.clone(), of_another, of_another_type, reserved(&order_id)]).await;

    let expected = ["REJECTED UNKNOWN_ORDER", "REJECTED INVALID_REPLY", "REJECTED UNKNOWN_TYPE", "APPLIED"];
    assert_eq!(outcomes, expected);
    let recorded: i64 =
        sqlx::query_scalar("SELECT count(*) FROM processed_messages").fetch_one(&service.pool).await.unwrap();
    assert_eq!(recorded, 1);
    service.end().await;
}
