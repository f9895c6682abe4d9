use chassis::RunError;
use testkit::TestDatabase;
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use uuid::Uuid;

use crate::{
    client::refusal,
    inventory::{Inventory, LIMIT, SERVICES, eventually, settings},
    orders::order,
};

#[tokio::test]
async fn health_and_reflection_name_both_services() {
    let inventory = Inventory::serve(&[]).await;
    for service in SERVICES {
        assert_eq!(inventory.health(service).await, Some(ServingStatus::Serving), "{service:?}");
    }
    assert_eq!(inventory.health("orders.v1.OrderService").await, None);
    chassis::healthcheck(inventory.address).await.unwrap();

    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(inventory.client.channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in &SERVICES[1..] {
        assert!(names.contains(service), "{service} in {names:?}");
    }
    drop(answers);
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
    chassis::healthcheck(inventory.address).await.unwrap_err();

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
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();

    let run = inventory_service::run(listener, settings(&database, &[]), CancellationToken::new());
    let error = timeout(LIMIT, run).await.expect("it does not serve").unwrap_err();

    assert!(matches!(error, RunError::Schema(_)), "{error:?}");
    assert!(error.to_string().contains("migrate"), "{error}");
    pool.close().await;
}
