use proto::orders::v1::GetOrderRequest;
use tonic::Code;
use uuid::Uuid;

use crate::service::{Service, order, refusal};

#[tokio::test]
async fn an_order_is_read_as_create_order_answered_it() {
    let service = Service::start().await;
    let placed = service.place(order()).await;
    service.place(order()).await;
    let request = GetOrderRequest { order_id: placed.order_id.clone() };
    assert_eq!(service.orders().get_order(request).await.unwrap().into_inner(), placed);
    service.end().await;
}

#[tokio::test]
async fn an_unknown_order_is_not_found_and_a_malformed_id_is_invalid() {
    let service = Service::start().await;
    let unknown = GetOrderRequest { order_id: Uuid::now_v7().to_string() };
    refusal(service.orders().get_order(unknown).await).is(Code::NotFound, "ORDER_NOT_FOUND");
    for order_id in ["", "17", "0192f0c1-2345-7abc-8def-0123456789ag"] {
        let refused = refusal(service.orders().get_order(GetOrderRequest { order_id: order_id.into() }).await);
        refused.is(Code::InvalidArgument, "INVALID_ORDER_ID");
        assert_eq!(refused.bad_fields, ["order_id"]);
    }
    service.end().await;
}
