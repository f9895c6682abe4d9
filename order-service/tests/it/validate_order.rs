use proto::orders::v1::{CreateOrderRequest, OrderItem};
use tonic::Code;
use uuid::Uuid;

use crate::service::{NOTHING, Service, order, refusal};

async fn refused_fields(service: &Service, request: CreateOrderRequest) -> Vec<String> {
    let refused = refusal(service.orders().create_order(request).await);
    refused.is(Code::InvalidArgument, "INVALID_ORDER");
    refused.bad_fields
}

#[tokio::test]
async fn one_answer_names_every_bad_field_and_nothing_is_written() {
    let service = Service::start().await;
    let bad = CreateOrderRequest {
        request_id: "7".into(),
        customer_id: "a b".into(),
        currency_code: "EURO".into(),
        items: vec![
            OrderItem { sku: "TEA".into(), quantity: 1, unit_price_minor: 0 },
            OrderItem { sku: String::new(), quantity: 0, unit_price_minor: -1 },
        ],
    };
    let all = [
        "request_id",
        "customer_id",
        "currency_code",
        "items[1].sku",
        "items[1].quantity",
        "items[1].unit_price_minor",
    ];
    assert_eq!(refused_fields(&service, bad).await, all);
    let empty = ["customer_id", "currency_code", "items"];
    assert_eq!(refused_fields(&service, CreateOrderRequest::default()).await, empty);
    assert_eq!(service.written().await, NOTHING);
    service.end().await;
}

#[tokio::test]
async fn the_nil_uuid_is_no_request_id_that_anybody_has_chosen() {
    let service = Service::start().await;
    let nil = CreateOrderRequest { request_id: Uuid::nil().into(), customer_id: "a b".into(), ..order() };
    assert_eq!(refused_fields(&service, nil).await, ["request_id", "customer_id"]);
    assert_eq!(service.written().await, NOTHING);
    service.end().await;
}

#[tokio::test]
async fn an_order_with_too_many_items_or_too_large_a_total_is_refused() {
    let service = Service::start().await;
    let item = OrderItem { sku: "TEA".into(), quantity: 1, unit_price_minor: i64::MAX };
    for items in [vec![item.clone(); 2], vec![OrderItem { unit_price_minor: 0, ..item }; 101]] {
        assert_eq!(refused_fields(&service, CreateOrderRequest { items, ..order() }).await, ["items"]);
    }
    assert_eq!(service.written().await, NOTHING);
    service.end().await;
}
