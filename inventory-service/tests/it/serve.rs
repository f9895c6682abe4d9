use chassis::{RunError, TlsFiles};
use testkit::TestDatabase;
use tokio::{net::TcpStream, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use uuid::Uuid;

use crate::{
    client::{Client, refusal},
    inventory::{Inventory, LIMIT, SERVICES, eventually, settings, sockets},
    orders::order,
};

#[tokio::test]
async fn health_and_reflection_of_each_listener_name_its_service() {
    let inventory = Inventory::serve(&[]).await;
    for service in SERVICES {
        assert_eq!(inventory.health(service).await, Some(ServingStatus::Serving), "{service:?}");
    }
    assert_eq!(inventory.health("orders.v1.OrderService").await, None);
    chassis::healthcheck(inventory.address, &TlsFiles::default()).await.unwrap();

    for service in &SERVICES[1..] {
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new(inventory.client.to(service));
        let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let answer = answers.message().await.unwrap().unwrap().message_response;
        let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
        let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
        let of_ours: Vec<_> = SERVICES[1..].iter().filter(|service| names.contains(service)).collect();
        assert_eq!(of_ours, [service], "{names:?}");
    }
    inventory.stop().await;
}

/// Whoever may ask for stock cannot reserve it as if an order had been placed.
#[tokio::test]
async fn callers_cannot_deliver_events_and_relays_cannot_adjust_stock() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let Client { channel, events } = inventory.client.clone();
    let crossed = Client { channel: events, events: channel };
    let refused = crossed.deliver([&order(&[("MUG", 3)])]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused:?}");
    let refused = crossed.adjust_stock(&Uuid::new_v4().to_string(), "MUG", 5).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused:?}");
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 10);
    inventory.stop().await;
}

#[tokio::test]
async fn while_the_database_is_down_calls_are_told_to_retry_and_health_reports_it() {
    let inventory = Inventory::serve(&["--database-acquire-ms", "1000"]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 1)]);
    let request_id = Uuid::new_v4().to_string();
    let (client, unavailable) = (inventory.client.clone(), "Unavailable DATABASE_UNAVAILABLE");

    inventory.cut_database().await;
    assert_eq!(refusal(&client.deliver([&event]).await.unwrap_err()), unavailable);
    assert_eq!(refusal(&client.get_stock("MUG").await.unwrap_err()), unavailable);
    assert_eq!(refusal(&client.list_stock(0, "").await.unwrap_err()), unavailable);
    assert_eq!(refusal(&client.adjust_stock(&request_id, "MUG", 1).await.unwrap_err()), unavailable);
    for service in SERVICES {
        let not_serving = async || inventory.health(service).await == Some(ServingStatus::NotServing);
        eventually("health reports that the database is down", not_serving).await;
    }
    chassis::healthcheck(inventory.address, &TlsFiles::default()).await.unwrap_err();

    inventory.restore_database().await;
    assert_eq!(client.deliver(&[event]).await.unwrap(), ["APPLIED"]);
    assert_eq!(client.adjust_stock(&request_id, "MUG", 1).await.unwrap(), 10);
    for service in SERVICES {
        let serving = async || inventory.health(service).await == Some(ServingStatus::Serving);
        eventually("health reports that the database is back", serving).await;
    }
    inventory.stop().await;
}

#[tokio::test]
async fn a_call_in_flight_at_shutdown_is_answered() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let lock = inventory.lock_stock().await;
    let client = inventory.client.clone();
    let call = tokio::spawn(async move { client.deliver(&[order(&[("MUG", 1)])]).await });
    inventory.wait_for_waiting_sessions(1).await;

    inventory.shutdown.cancel();
    eventually("no more connections are accepted", async || TcpStream::connect(inventory.address).await.is_err()).await;
    lock.rollback().await.unwrap();

    assert_eq!(call.await.unwrap().unwrap(), ["APPLIED"]);
    inventory.stop().await;
}

#[tokio::test]
async fn a_client_that_stays_silent_does_not_hold_the_shutdown() {
    let inventory = Inventory::serve(&["--drain-seconds", "1"]).await;
    let silent = TcpStream::connect(inventory.address).await.unwrap();
    inventory.shutdown.cancel();
    eventually("the drain time is over", async || inventory.has_ended()).await;
    drop(silent);
    inventory.stop().await;
}

#[tokio::test]
async fn a_database_without_the_schema_is_refused() {
    let database = TestDatabase::create("inventory_owner", &[&outbox::MIGRATOR]).await;
    let pool = database.pool().await;
    sqlx::query("GRANT SELECT ON ALL TABLES IN SCHEMA public TO inventory_service").execute(&pool).await.unwrap();

    let run = inventory_service::run(sockets().await, settings(&database, &[]), CancellationToken::new());
    let error = timeout(LIMIT, run).await.expect("it does not serve").unwrap_err();

    assert!(matches!(error, RunError::Schema(_)), "{error:?}");
    assert!(error.to_string().contains("migrate"), "{error}");
    pool.close().await;
}
