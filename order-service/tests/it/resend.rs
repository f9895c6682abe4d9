//! The command `resend` against a receiver that cannot recall, and against one that remembers nothing.

use std::net::SocketAddr;

use clap::Parser;
use outbox::{ResendArguments, ResendError};
use proto::events::v1::{
    DeliverRequest, DeliverResponse, DescribeRequest, DescribeResponse, RecallRequest, RecallResponse, RecalledEvent,
    event_receiver_server::{EventReceiver, EventReceiverServer},
};
use sqlx::{FromRow, types::time::OffsetDateTime};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status, async_trait,
    transport::{Server, server::TcpIncoming},
};
use uuid::Uuid;

use crate::service::{Service, order};

const DAY: i64 = 24 * 3600;

/// A receiver that remembers for seven days, and has applied nothing.
struct Receiver {
    can_recall: bool,
}

#[async_trait]
impl EventReceiver for Receiver {
    async fn deliver(&self, _: Request<DeliverRequest>) -> Result<Response<DeliverResponse>, Status> {
        Err(Status::unavailable("this receiver is only asked"))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let retention = Some(prost_types::Duration { seconds: 7 * DAY, nanos: 0 });
        Ok(Response::new(DescribeResponse { retention, ..DescribeResponse::default() }))
    }

    async fn recall(&self, request: Request<RecallRequest>) -> Result<Response<RecallResponse>, Status> {
        if !self.can_recall {
            return Err(Status::unimplemented("an older receiver"));
        }
        let unknown = |event_id| RecalledEvent { event_id, apply_time: None };
        Ok(Response::new(RecallResponse { events: request.into_inner().event_ids.into_iter().map(unknown).collect() }))
    }
}

/// Runs until the test ends.
async fn serve(receiver: Receiver) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(EventReceiverServer::new(receiver));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    address
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    arguments: ResendArguments,
}

async fn resend(service: &Service, receiver: SocketAddr, flags: &[&str]) -> Result<(), ResendError> {
    let url = format!("http://{receiver}");
    let always = ["resend", "--subscription", "inventory", "--receiver", &url, "--by", "ann", "--reason", "a test"];
    let arguments = Cli::parse_from(always.iter().chain(flags)).arguments;
    let database = service.database.url_as("order_service").parse().unwrap();
    order_service::resend(&database, arguments).await
}

/// Makes the subscription as if it were old, before any order.
async fn subscribe(service: &Service) {
    execute(
        service,
        "INSERT INTO outbox_subscriptions (name, pattern, created_by, created_at)
        VALUES ('inventory', 'orders.v1.*', 'a test', now() - interval '30 days')",
    )
    .await;
}

async fn execute(service: &Service, sql: &'static str) {
    sqlx::query(sql).execute(&service.pool).await.unwrap();
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, FromRow)]
struct Row {
    sequence: i32,
    aggregate_id: Uuid,
    event_id: Uuid,
    event_type: String,
    payload: Vec<u8>,
    created_at: OffsetDateTime,
    subscription_id: i16,
}

async fn rows(service: &Service) -> Vec<Row> {
    let rows = "SELECT sequence, aggregate_id, event_id, event_type, payload, created_at, subscription_id FROM outbox";
    let mut rows: Vec<Row> = sqlx::query_as(rows).fetch_all(&service.pool).await.unwrap();
    rows.sort();
    rows
}

async fn resent(service: &Service) -> Vec<(String, String)> {
    let resent = "SELECT DISTINCT resent_by, reason FROM outbox_resent";
    sqlx::query_as(resent).fetch_all(&service.pool).await.unwrap()
}

#[tokio::test]
async fn lost_events_are_enqueued_again_just_as_they_were_and_none_twice() {
    let service = Service::start().await;
    subscribe(&service).await;
    let receiver = serve(Receiver { can_recall: true }).await;
    let order_ids: Vec<String> = [service.place(order()).await.order_id, service.place(order()).await.order_id].into();
    service.cancel(&order_ids[1], "").await.unwrap();
    let sent = rows(&service).await;
    assert_eq!(sent.len(), 3);

    let since = ["--since", "2020-01-01T00:00:00Z"];
    resend(&service, receiver, &since).await.unwrap();
    assert_eq!((rows(&service).await == sent, resent(&service).await), (true, vec![]), "they wait");
    execute(&service, "UPDATE outbox SET visible_at = 'infinity', last_error = 'dead' WHERE sequence = 2").await;
    execute(&service, "DELETE FROM outbox WHERE sequence = 1").await;
    resend(&service, receiver, &["--since", "2020-01-01T00:00:00Z", "--dry-run"]).await.unwrap();
    assert_eq!(rows(&service).await.len(), 1, "a dry run changes nothing");
    for _ in 0..2 {
        resend(&service, receiver, &since).await.unwrap();
        assert_eq!(rows(&service).await, sent);
    }
    assert_eq!(resent(&service).await, [("ann".to_owned(), "a test".to_owned())]);

    execute(&service, "DELETE FROM outbox").await;
    resend(&service, receiver, &["--since", "2999-01-01T00:00:00Z"]).await.unwrap();
    assert_eq!(rows(&service).await, []);
    resend(&service, receiver, &["--orders", &order_ids[1]]).await.unwrap();
    assert_eq!(rows(&service).await.len(), 2);
    service.end().await;
}

#[tokio::test]
async fn what_was_given_up_what_is_too_old_and_what_has_an_unknown_id_is_not_sent_again() {
    let service = Service::start().await;
    subscribe(&service).await;
    let receiver = serve(Receiver { can_recall: true }).await;
    let order_id = service.place(order()).await.order_id;
    let named = ["--orders", &order_id];
    execute(
        &service,
        "WITH given_up AS (DELETE FROM outbox RETURNING *)
        INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type,
            payload, last_error, discarded_by, reason)
        SELECT event_id, subscription_id, aggregate_id, sequence, created_at, 1, event_type, payload, 'dead', 'a test', 'x'
        FROM given_up",
    )
    .await;
    resend(&service, receiver, &named).await.unwrap();
    assert_eq!(rows(&service).await, []);
    execute(&service, "DELETE FROM outbox_discarded").await;

    for spoil in [
        "UPDATE orders SET created_at = now() - interval '145 hours'",
        "UPDATE orders SET created_at = now(), derived_ids = 0",
    ] {
        execute(&service, spoil).await;
        let refused = resend(&service, receiver, &named).await.unwrap_err();
        assert!(matches!(refused, ResendError::Refused { refused: 1 }), "{refused}");
        assert_eq!(rows(&service).await, []);
    }
    execute(&service, "UPDATE orders SET created_at = now() - interval '143 hours', derived_ids = 1").await;
    resend(&service, receiver, &named).await.unwrap();
    assert_eq!(rows(&service).await.len(), 1);
    service.end().await;
}

#[tokio::test]
async fn what_was_sent_before_the_subscription_or_is_for_another_one_is_left_alone() {
    let service = Service::start().await;
    subscribe(&service).await;
    let receiver = serve(Receiver { can_recall: true }).await;
    let order_id = service.place(order()).await.order_id;
    service.cancel(&order_id, "").await.unwrap();
    for spoil in [
        "UPDATE outbox_subscriptions SET created_at = now()",
        "UPDATE outbox_subscriptions SET created_at = now() - interval '1 day', pattern = 'invoices.v1.*'",
    ] {
        execute(&service, "DELETE FROM outbox").await;
        execute(&service, spoil).await;
        resend(&service, receiver, &["--orders", &order_id]).await.unwrap();
        assert_eq!(rows(&service).await, [], "{spoil}");
    }
    execute(&service, "UPDATE outbox_subscriptions SET pattern = 'orders.v1.OrderCancelled'").await;
    resend(&service, receiver, &["--orders", &order_id]).await.unwrap();
    assert_eq!(rows(&service).await.iter().map(|row| row.sequence).collect::<Vec<_>>(), [2]);
    service.end().await;
}

#[tokio::test]
async fn a_receiver_that_cannot_recall_gets_what_an_operator_names_and_nothing_otherwise() {
    let service = Service::start().await;
    subscribe(&service).await;
    let receiver = serve(Receiver { can_recall: false }).await;
    let order_id = service.place(order()).await.order_id;
    execute(&service, "DELETE FROM outbox").await;
    let refused = resend(&service, receiver, &["--orders", &order_id]).await.unwrap_err().to_string();
    assert!(refused.contains(&receiver.to_string()) && refused.contains("--without-recall"), "{refused}");
    assert_eq!(rows(&service).await, []);
    resend(&service, receiver, &["--orders", &order_id, "--without-recall"]).await.unwrap();
    assert_eq!(rows(&service).await.len(), 1);
    service.end().await;
}

#[tokio::test]
async fn an_unknown_order_or_subscription_is_named_and_nothing_is_sent() {
    let service = Service::start().await;
    let receiver = serve(Receiver { can_recall: true }).await;
    let order_id = service.place(order()).await.order_id;
    execute(&service, "DELETE FROM outbox").await;
    let refused = resend(&service, receiver, &["--orders", &order_id]).await.unwrap_err().to_string();
    assert!(refused.contains("inventory is no subscription; there are none"), "{refused}");
    subscribe(&service).await;
    let unknown = Uuid::now_v7().to_string();
    let refused = resend(&service, receiver, &["--orders", &format!("{order_id},{unknown}")]).await.unwrap_err();
    assert!(refused.to_string().contains(&unknown), "{refused}");
    assert_eq!(rows(&service).await, []);
    service.end().await;
}
