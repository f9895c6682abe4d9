//! What the service says of itself, and whose events it accepts.

use proto::events::v1::{DescribeRequest, Event, event_receiver_client::EventReceiverClient};
use tonic::Code;

use crate::loyalty::{Loyalty, created};

#[tokio::test]
async fn it_names_its_types_and_sources_and_refuses_events_of_other_sources() {
    let loyalty = Loyalty::serve(&["--accept-sources", "order-service"]).await;
    let mut client = EventReceiverClient::new(loyalty.events.clone());
    let described = client.describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!(described.types, ["orders.v1.OrderCreated", "orders.v1.OrderCancelled"]);
    assert_eq!(described.sources, ["order-service"]);

    let event = created("ann", 100);
    let other = Event { source: "shop".into(), ..event.clone() };
    assert_eq!(loyalty.deliver([&other]).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(loyalty.deliver([&event]).await.unwrap(), ["APPLIED"]);
    loyalty.stop().await;
}
