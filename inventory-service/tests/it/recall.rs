//! What the service remembers of the events that it has applied.

use proto::events::v1::{RecallRequest, RecalledEvent, event_receiver_client::EventReceiverClient};
use tonic::Status;
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{client::refusal, inventory::Inventory, orders::order};

async fn recall(inventory: &Inventory, ids: &[String]) -> Result<Vec<RecalledEvent>, Status> {
    let mut client = EventReceiverClient::new(inventory.client.events.clone());
    Ok(client.recall(RecallRequest { event_ids: ids.to_vec() }).await?.into_inner().events)
}

#[tokio::test]
async fn it_recalls_the_events_that_it_has_applied_in_the_order_of_the_question_and_no_others() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let (first, second, refused) = (order(&[("MUG", 1)]), order(&[("MUG", 1)]), order(&[]));
    let outcomes = inventory.client.deliver([&first, &second, &refused]).await.unwrap();
    assert_eq!(outcomes, ["APPLIED", "APPLIED", "REJECTED INVALID_ORDER"]);
    let before = inventory.contents().await;

    let unknown = Uuid::now_v7().to_string();
    let asked = [&second.id, &unknown, &first.id, &refused.id, &second.id].map(String::clone);
    let recalled = recall(&inventory, &asked).await.unwrap();
    assert_eq!(recalled.iter().map(|event| event.event_id.clone()).collect::<Vec<_>>(), asked);
    let known: Vec<bool> = recalled.iter().map(|event| event.apply_time.is_some()).collect();
    assert_eq!(known, [true, false, true, false, true]);
    assert_eq!(recall(&inventory, &[]).await.unwrap(), []);
    assert_eq!(inventory.contents().await, before, "it changes nothing");
    inventory.stop().await;
}

#[tokio::test]
async fn a_recall_names_its_bad_ids_and_is_bounded() {
    let inventory = Inventory::serve(&[]).await;
    let id = Uuid::now_v7().to_string();
    let bad = recall(&inventory, &["x".into(), id.clone(), String::new()]).await.unwrap_err();
    assert_eq!(refusal(&bad), "InvalidArgument INVALID_RECALL event_ids[0],event_ids[2]");
    assert_eq!(recall(&inventory, &vec![id.clone(); 1000]).await.unwrap().len(), 1000);
    let many = recall(&inventory, &vec![id; 1001]).await.unwrap_err();
    assert_eq!(refusal(&many), "InvalidArgument INVALID_RECALL event_ids");
    assert!(many.get_error_details().bad_request().is_some());
    inventory.stop().await;
}
