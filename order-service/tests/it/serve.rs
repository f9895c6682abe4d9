use std::time::{Duration, Instant};

use chassis::TlsFiles;
use proto::{
    events::v1::{DeliverRequest, event_receiver_client::EventReceiverClient},
    orders::v1::{OrderStatus, order_service_client::OrderServiceClient, order_service_server::SERVICE_NAME},
};
use tokio::{net::TcpStream, time::timeout};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::service::{LIMIT, ONE_ORDER, Service, order, reserved};

#[tokio::test]
async fn health_knows_the_server_and_the_service_and_no_other_name() {
    let service = Service::start().await;
    let mut health = HealthClient::new(service.channel.clone());
    for name in ["", "orders.v1.OrderService"] {
        let answer = health.check(HealthCheckRequest { service: name.into() }).await.unwrap();
        assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
    }
    for other in ["orders.v2.OrderService", "events.v1.EventReceiver"] {
        let unknown = health.check(HealthCheckRequest { service: other.into() }).await.unwrap_err();
        assert_eq!(unknown.code(), Code::NotFound);
    }
    service.end().await;
}

/// Whoever may place orders cannot confirm them, as if their stock were reserved.
#[tokio::test]
async fn a_forged_answer_of_inventory_is_refused_where_callers_are_served() {
    let service = Service::start().await;
    let placed = service.place(order()).await;
    let request = DeliverRequest { events: vec![reserved(&placed.order_id)] };
    let forged = EventReceiverClient::new(service.channel.clone()).deliver(request).await.unwrap_err();
    assert_eq!(forged.code(), Code::Unimplemented, "{forged:?}");
    assert_eq!(service.get(&placed.order_id).await.status(), OrderStatus::Pending);
    let by_relay = OrderServiceClient::new(service.events.clone()).create_order(order()).await;
    assert_eq!(by_relay.unwrap_err().code(), Code::Unimplemented);
    service.end().await;
}

async fn reflect(service: &Service, asked: MessageRequest) -> MessageResponse {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(asked) };
    let mut reflection = ServerReflectionClient::new(service.channel.clone());
    let answers = reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap();
    answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap()
}

#[tokio::test]
async fn reflection_lists_the_services_and_describes_them() {
    let service = Service::start().await;
    let MessageResponse::ListServicesResponse(list) =
        reflect(&service, MessageRequest::ListServices(String::new())).await
    else {
        panic!("no list of services");
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in [SERVICE_NAME, "grpc.health.v1.Health"] {
        assert!(names.iter().any(|listed| listed == name), "{name} in {names:?}");
    }
    for symbol in [SERVICE_NAME, "google.protobuf.Timestamp", "google.rpc.ErrorInfo"] {
        let answer = reflect(&service, MessageRequest::FileContainingSymbol(symbol.into())).await;
        assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{symbol}: {answer:?}");
    }
    service.end().await;
}

#[tokio::test]
async fn a_client_that_is_connected_and_idle_does_not_delay_the_end() {
    let service = Service::start_with(&["--drain-seconds", "600"]).await;
    service.place(order()).await;
    service.end().await;
}

#[tokio::test]
async fn a_silent_client_delays_the_end_for_no_longer_than_the_drain_time() {
    let service = Service::start_with(&["--drain-seconds", "1"]).await;
    let silent = TcpStream::connect(service.address).await.unwrap();
    // Connections are accepted in sequence, so a call on a later one shows that the silent one was accepted.
    chassis::healthcheck(service.address, &TlsFiles::default()).await.unwrap();
    let begin = Instant::now();
    service.end().await;
    // Without the deadline it would never end. The bound is generous, for dropping the database on a busy machine.
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    drop(silent);
}

#[tokio::test]
async fn health_watchers_are_notified_before_the_server_ends() {
    let service = Service::start_with(&["--drain-seconds", "1"]).await;
    let mut health = HealthClient::new(service.channel.clone());
    let request = HealthCheckRequest { service: SERVICE_NAME.into() };
    let mut watched = health.watch(request).await.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    service.shut_down();
    let told = timeout(LIMIT, watched.message()).await.expect("news").unwrap().unwrap();
    assert_eq!(told.status(), ServingStatus::NotServing);
    service.end().await;
}

#[tokio::test]
async fn a_call_in_flight_is_answered_before_the_end() {
    let service = Service::start_with(&["--drain-seconds", "600"]).await;
    let lock = service.lock_orders().await;
    let mut orders = service.orders();
    let call = tokio::spawn(async move { orders.create_order(order()).await });
    service.waits_for_a_lock().await;
    service.shut_down();
    lock.rollback().await.unwrap();
    call.await.unwrap().unwrap();
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}
