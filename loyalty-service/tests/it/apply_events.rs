use proto::{
    events::v1::Event,
    orders::v1::{OrderCancelled, OrderCreated, OrderItem},
};
use uuid::Uuid;

use crate::loyalty::{Loyalty, cancellation_of, created, event, id_of, order_id_of};

#[tokio::test]
async fn an_event_that_is_applied_twice_awards_once() {
    let loyalty = Loyalty::serve(&[]).await;
    let (first, second, small) = (created("ann", 1250), created("ann", 399), created("bob", 99));

    assert_eq!(loyalty.deliver([&first, &first]).await.unwrap(), ["APPLIED", "DUPLICATE"]);
    assert_eq!(loyalty.deliver([&second, &first, &small]).await.unwrap(), ["APPLIED", "DUPLICATE", "APPLIED"]);

    assert_eq!(loyalty.balance("ann").await.unwrap(), (12 + 3, 2), "each order is rounded down by itself");
    assert_eq!(loyalty.balance("bob").await.unwrap(), (0, 1));
    let expected = [(&first, 12), (&second, 3), (&small, 0)];
    let expected = expected.map(|(event, points)| (order_id_of(event), points, Some(id_of(event)), None));
    assert_eq!(loyalty.rows().await, expected);
    loyalty.stop().await;
}

#[tokio::test]
async fn a_cancellation_takes_the_points_back_in_one_batch_with_the_creation_and_in_two() {
    let loyalty = Loyalty::serve(&[]).await;
    let (kept, together, apart) = (created("ann", 500), created("ann", 700), created("ann", 900));
    let cancellations = [cancellation_of(&together), cancellation_of(&apart)];

    let outcomes = loyalty.deliver([&kept, &together, &cancellations[0], &apart]).await.unwrap();
    assert_eq!(outcomes, ["APPLIED"; 4]);
    assert_eq!(loyalty.balance("ann").await.unwrap(), (5 + 9, 2));
    assert_eq!(loyalty.deliver([&cancellations[1]]).await.unwrap(), ["APPLIED"]);
    assert_eq!(loyalty.balance("ann").await.unwrap(), (5, 1));

    // The award stays on record.
    let row = |event: &Event, points, cancelled_by: Option<&Event>| {
        (order_id_of(event), points, Some(id_of(event)), cancelled_by.map(id_of))
    };
    let expected =
        [row(&kept, 5, None), row(&together, 7, Some(&cancellations[0])), row(&apart, 9, Some(&cancellations[1]))];
    assert_eq!(loyalty.rows().await, expected);
    loyalty.stop().await;
}

#[tokio::test]
async fn an_order_whose_cancellation_came_first_earns_nothing() {
    let loyalty = Loyalty::serve(&[]).await;
    let (apart, together) = (created("ann", 500), created("ann", 700));
    let cancellations = [cancellation_of(&apart), cancellation_of(&together)];

    assert_eq!(loyalty.deliver([&cancellations[0]]).await.unwrap(), ["APPLIED"]);
    assert_eq!(loyalty.deliver([&apart, &cancellations[1], &together]).await.unwrap(), ["APPLIED"; 3]);
    // What cancelled an order first stays on record.
    assert_eq!(loyalty.deliver([&cancellation_of(&apart)]).await.unwrap(), ["APPLIED"]);

    assert_eq!(loyalty.balance("ann").await.unwrap(), (0, 0));
    let row = |cancellation| (order_id_of(cancellation), 0, None, Some(id_of(cancellation)));
    assert_eq!(loyalty.rows().await, cancellations.each_ref().map(row));
    loyalty.stop().await;
}

#[tokio::test]
async fn an_event_that_can_never_be_applied_is_rejected_and_the_rest_of_its_batch_applied() {
    let loyalty = Loyalty::serve(&[]).await;
    let order_id = Uuid::now_v7();
    let other = OrderCreated { order_id: Uuid::now_v7().to_string(), ..OrderCreated::default() };
    let bad = [
        created("an\0n", 500),
        created("", 500),
        // A row of an index cannot hold it.
        created(&"x".repeat(1 << 16), 500),
        created("ann", -1),
        event(order_id, 1, &OrderCreated { customer_id: "ann".into(), ..other }),
        event(order_id, 2, &OrderCancelled { order_id: Uuid::now_v7().to_string() }),
    ];
    for bad in &bad {
        let good = [created("bob", 100), created("bob", 200)];
        let outcomes = loyalty.deliver([&good[0], bad, &good[1]]).await.unwrap();
        assert_eq!(outcomes, ["APPLIED", "REJECTED INVALID_ORDER", "APPLIED"]);
    }
    let unknown = event(order_id, 1, &OrderItem::default());
    assert_eq!(loyalty.deliver([&unknown]).await.unwrap(), ["REJECTED UNKNOWN_TYPE"]);

    let orders = i64::try_from(2 * bad.len()).unwrap();
    assert_eq!(loyalty.balance("bob").await.unwrap(), (3 * orders / 2, orders));
    assert_eq!(loyalty.balance("ann").await.unwrap(), (0, 0));
    loyalty.stop().await;
}
