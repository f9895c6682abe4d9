//! A database whose synchronous standby is away.

use inventory_service::MIGRATORS;
use testkit::OwnServer;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    inventory::{Inventory, eventually},
    orders::order,
};

/// After a crash the server shows an effect that no standby has. The relay is about to delete the event.
#[tokio::test]
async fn a_duplicate_is_not_acknowledged_before_the_standby_has_its_effect() {
    let Some(server) = OwnServer::start().await else { return };
    let database = server.database("inventory_owner", &MIGRATORS).await;
    let inventory = Inventory::serve_on(database, &["--database-work-ms", "1000"]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 2)]);
    assert_eq!(inventory.client.deliver(std::slice::from_ref(&event)).await.unwrap(), ["APPLIED"]);

    server.take_standby_away().await;
    let refused = inventory.client.deliver(std::slice::from_ref(&event)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    eventually("health is NOT_SERVING", async || inventory.health("").await == Some(ServingStatus::NotServing)).await;
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 8, "stock can be read all the time");

    server.need_no_standby().await;
    eventually("health is SERVING", async || inventory.health("").await == Some(ServingStatus::Serving)).await;
    assert_eq!(inventory.client.deliver(&[event]).await.unwrap(), ["DUPLICATE"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 8);
    inventory.stop().await;
}
