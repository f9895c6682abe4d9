//! What the service says of itself, and requests that a client has compressed.

use proto::{
    events::v1::{DescribeRequest, event_receiver_client::EventReceiverClient},
    orders::v1::order_service_client::OrderServiceClient,
};
use tonic::codec::CompressionEncoding;

use crate::service::{Service, order_once};

#[tokio::test]
async fn it_names_the_types_that_it_handles() {
    let service = Service::start().await;
    let mut client = EventReceiverClient::new(service.events.clone());
    let described = client.describe(DescribeRequest {}).await.unwrap().into_inner();
    let types = ["inventory.v1.StockReserved", "inventory.v1.StockRejected", "inventory.v1.StockReleased"];
    assert_eq!(described.types, types);
}

#[tokio::test]
async fn compressed_requests_are_read() {
    let service = Service::start().await;
    let mut client = OrderServiceClient::new(service.channel.clone()).send_compressed(CompressionEncoding::Gzip);
    client.create_order(order_once()).await.unwrap();
    let mut client = EventReceiverClient::new(service.events.clone()).send_compressed(CompressionEncoding::Gzip);
    client.describe(DescribeRequest {}).await.unwrap();
}
