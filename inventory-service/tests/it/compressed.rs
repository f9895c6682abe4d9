//! Requests that a client has compressed, as grpcio does on request.

use proto::{
    events::v1::{DeliverRequest, Event, event_receiver_client::EventReceiverClient},
    inventory::v1::{GetStockRequest, inventory_service_client::InventoryServiceClient},
};
use tonic::{Code, codec::CompressionEncoding};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{inventory::Inventory, orders::order};

#[tokio::test]
async fn compressed_requests_are_read() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let channel = || inventory.client.channel.clone();
    let deliver = DeliverRequest { events: vec![order(&[("MUG", 3)])] };
    let mut receiver =
        EventReceiverClient::new(inventory.client.events.clone()).send_compressed(CompressionEncoding::Gzip);
    assert_eq!(receiver.deliver(deliver).await.unwrap().into_inner().results.len(), 1);
    let mut stock = InventoryServiceClient::new(channel()).send_compressed(CompressionEncoding::Gzip);
    let level = stock.get_stock(GetStockRequest { sku: "MUG".into() }).await.unwrap().into_inner();
    assert_eq!(level.available, 7);
    // A client that compresses does so in all of its calls.
    let mut health = HealthClient::new(channel()).send_compressed(CompressionEncoding::Gzip);
    health.check(HealthCheckRequest::default()).await.unwrap();
    inventory.stop().await;
}

/// A thousandth of it is sent. Without a limit, one such batch after another would fill the memory.
#[tokio::test]
async fn a_batch_that_is_too_large_once_decompressed_is_refused_and_leaves_the_connection_usable() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 1)]);
    let oversized = Event { data: vec![0; 17 << 20].into(), ..event.clone() };
    let mut client =
        EventReceiverClient::new(inventory.client.events.clone()).send_compressed(CompressionEncoding::Gzip);

    let refused = client.deliver(DeliverRequest { events: vec![oversized] }).await.unwrap_err();

    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert_eq!(inventory.client.deliver(&[event]).await.unwrap(), ["APPLIED"]);
    inventory.stop().await;
}
