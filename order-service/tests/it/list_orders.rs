use proto::orders::v1::{CreateOrderRequest, ListOrdersRequest, ListOrdersResponse, Order};
use tonic::Code;

use crate::service::{Service, order, refusal};

fn page_of(customer_id: &str, page_size: i32, page_token: &str) -> ListOrdersRequest {
    ListOrdersRequest { customer_id: customer_id.into(), page_size, page_token: page_token.into() }
}

async fn list(service: &Service, request: ListOrdersRequest) -> ListOrdersResponse {
    service.orders().list_orders(request).await.unwrap().into_inner()
}

async fn place_for(service: &Service, customer_id: &str) -> Order {
    service.place(CreateOrderRequest { customer_id: customer_id.into(), ..order() }).await
}

#[tokio::test]
async fn pages_hold_all_orders_of_the_customer_once_and_newest_first() {
    let service = Service::start().await;
    let mut placed = Vec::new();
    for _ in 0..7 {
        placed.insert(0, place_for(&service, "ann").await);
        place_for(&service, "bob").await;
    }
    let (mut sizes, mut listed, mut token) = (Vec::new(), Vec::new(), String::new());
    loop {
        let page = list(&service, page_of("ann", 3, &token)).await;
        sizes.push(page.orders.len());
        listed.extend(page.orders);
        token = page.next_page_token;
        // One page too many is enough to show a list that does not end.
        if token.is_empty() || sizes.len() > 3 {
            break;
        }
    }
    assert_eq!(sizes, [3, 3, 1]);
    assert_eq!(listed, placed);
    service.end().await;
}

#[tokio::test]
async fn a_full_last_page_has_no_next_page_token() {
    let service = Service::start().await;
    for _ in 0..3 {
        place_for(&service, "ann").await;
    }
    let page = list(&service, page_of("ann", 3, "")).await;
    assert_eq!((page.orders.len(), page.next_page_token.as_str()), (3, ""));
    assert_eq!(list(&service, page_of("nobody", 3, "")).await, ListOrdersResponse::default());
    service.end().await;
}

/// Clients refuse messages over 4 MiB unless they are configured otherwise.
#[tokio::test]
async fn a_page_of_large_orders_fits_into_a_message_and_the_next_page_follows_it() {
    let service = Service::start().await;
    for _ in 0..5 {
        place_for(&service, "ann").await;
    }
    service.execute("UPDATE orders SET status = 'REJECTED', rejection = repeat('x', 1024 * 1024 - 1000)").await;
    let first = list(&service, page_of("ann", 500, "")).await;
    assert_eq!(first.orders.len(), 3);
    let second = list(&service, page_of("ann", 500, &first.next_page_token)).await;
    assert_eq!((second.orders.len(), second.next_page_token.as_str()), (2, ""));
    service.end().await;
}

#[tokio::test]
async fn orders_placed_while_paging_do_not_shift_the_pages() {
    let service = Service::start().await;
    let first = place_for(&service, "ann").await;
    let second = place_for(&service, "ann").await;
    let page = list(&service, page_of("ann", 1, "")).await;
    assert_eq!(page.orders, [second]);
    place_for(&service, "ann").await;
    assert_eq!(list(&service, page_of("ann", 1, &page.next_page_token)).await.orders, [first]);
    service.end().await;
}

#[tokio::test]
async fn page_sizes_have_a_default_and_a_cap() {
    let service = Service::start().await;
    service
        .execute(
            "INSERT INTO orders (order_id, customer_id, currency_code, total_minor)
            SELECT gen_random_uuid(), 'ann', 'EUR', 0 FROM generate_series(1, 501)",
        )
        .await;
    assert_eq!(list(&service, page_of("ann", 0, "")).await.orders.len(), 50);
    for above in [501, i32::MAX] {
        let page = list(&service, page_of("ann", above, "")).await;
        assert_eq!(page.orders.len(), 500);
        assert_eq!(list(&service, page_of("ann", above, &page.next_page_token)).await.orders.len(), 1);
    }
    service.end().await;
}

#[tokio::test]
async fn bad_pages_are_refused_by_field() {
    let service = Service::start().await;
    for _ in 0..2 {
        place_for(&service, "bob").await;
    }
    let of_bob = list(&service, page_of("bob", 1, "")).await.next_page_token;
    assert!(!of_bob.is_empty());
    // The last token is for the right list, but holds no id: "ann\nnot-an-id".
    for token in [of_bob.as_str(), "garbage", "%%%", "YW5uCm5vdC1hbi1pZA"] {
        let refused = refusal(service.orders().list_orders(page_of("ann", 1, token)).await);
        refused.is(Code::InvalidArgument, "INVALID_PAGE");
        assert_eq!(refused.bad_fields, ["page_token"]);
    }
    let refused = refusal(service.orders().list_orders(page_of("", -1, "garbage")).await);
    refused.is(Code::InvalidArgument, "INVALID_PAGE");
    assert_eq!(refused.bad_fields, ["customer_id", "page_size", "page_token"]);
    service.end().await;
}
