//! What the service says of itself, and whose events it accepts.

use proto::events::v1::{DescribeRequest, DescribeResponse, Event, event_receiver_client::EventReceiverClient};
use tonic::Code;

use crate::{client::refusal, inventory::Inventory, orders::order};

async fn describe(inventory: &Inventory) -> DescribeResponse {
    let mut client = EventReceiverClient::new(inventory.client.events.clone());
    client.describe(DescribeRequest {}).await.unwrap().into_inner()
}

fn of_source(source: &str) -> Event {
    Event { source: source.into(), ..order(&[("MUG", 1)]) }
}

#[tokio::test]
async fn it_names_the_types_that_it_handles_and_applies_events_of_any_source() {
    // A variable that is set to nothing is as one that is not set.
    for flags in [&[][..], &["--accept-sources", ""]] {
        let inventory = Inventory::serve(flags).await;
        inventory.put_in(&[("MUG", 10)]).await;
        let DescribeResponse { types, sources, .. } = describe(&inventory).await;
        assert_eq!(types, ["orders.v1.OrderCreated", "orders.v1.OrderCancelled"]);
        assert_eq!(sources, Vec::<String>::new());
        let events = [of_source("anyone"), of_source("")];
        assert_eq!(inventory.client.deliver(&events).await.unwrap(), ["APPLIED", "APPLIED"]);
        inventory.stop().await;
    }
}

#[tokio::test]
async fn a_batch_with_an_event_of_a_source_that_is_not_accepted_is_refused_and_changes_nothing() {
    let inventory = Inventory::serve(&["--accept-sources", "orders, shop"]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    assert_eq!(describe(&inventory).await.sources, ["orders", "shop"]);
    let accepted = [of_source("shop"), of_source("orders")];
    assert_eq!(inventory.client.deliver(&accepted).await.unwrap(), ["APPLIED", "APPLIED"]);

    let before = inventory.contents().await;
    for source in ["loyalty", "Orders", "", &"x".repeat(1 << 20)] {
        let refused = inventory.client.deliver(&[of_source("orders"), of_source(source)]).await.unwrap_err();
        assert_eq!(refusal(&refused), "PermissionDenied SOURCE_NOT_ACCEPTED");
        let named = format!("{:?}", source.chars().take(100).collect::<String>());
        for part in [&named, "orders, shop", "--source", "ACCEPT_SOURCES"] {
            assert!(refused.message().contains(part), "{part}: {refused:?}");
        }
        assert!(refused.message().len() < 1000);
        assert_eq!(refused.code(), Code::PermissionDenied);
    }
    assert_eq!(inventory.contents().await, before);
    inventory.stop().await;
}
