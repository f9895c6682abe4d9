//! Answers that no gRPC server would send, and what they cost the events. What each of them means is tested beside
//! `deliver.rs`.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use chassis::RunError;
use prost::Message;
use proto::{
    events::v1::{DeliverRequest, DeliverResponse, DescribeResponse},
    relay::v1::{GetStatusRequest, relay_admin_client::RelayAdminClient},
};
use tonic::{codec::CompressionEncoding, transport::Endpoint};

use crate::{
    http_stub::{HttpReply, HttpStub},
    operator::Operator,
    outbox::Outbox,
    receiver::applied,
    relay::Relay,
    wait::until,
};

/// A single attempt kills an event, so that it shows.
const ONE_ATTEMPT: [&str; 2] = ["--attempts", "1"];

fn description(sources: &[&str]) -> DescribeResponse {
    let retention = Some(Duration::from_secs(7 * 24 * 3600).try_into().unwrap());
    let sources = sources.iter().map(|source| (*source).to_owned()).collect();
    DescribeResponse { retention, sources, types: vec!["test.v1.Happened".into()], ordered: false }
}

type Script = Box<dyn FnMut(DeliverRequest) -> HttpReply + Send>;

/// A receiver behind a proxy.
struct Proxied {
    address: SocketAddr,
    description: Arc<Mutex<DescribeResponse>>,
    script: Arc<Mutex<Script>>,
    /// Number of calls of Describe.
    described: Arc<AtomicUsize>,
    _stub: HttpStub,
}

impl Proxied {
    async fn start(
        description: DescribeResponse,
        script: impl FnMut(DeliverRequest) -> HttpReply + Send + 'static,
    ) -> Self {
        let description = Arc::new(Mutex::new(description));
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(script)));
        let described = Arc::new(AtomicUsize::new(0));
        let (described_as, scripted, count) = (description.clone(), script.clone(), described.clone());
        let stub = HttpStub::start(true, move |path, message| {
            if path.ends_with("/Describe") {
                count.fetch_add(1, Ordering::Relaxed);
                return answer(&*described_as.lock().unwrap());
            }
            (scripted.lock().unwrap())(DeliverRequest::decode(message).unwrap())
        })
        .await;
        Self { address: stub.address, description, script, described, _stub: stub }
    }

    /// Replies by this script from the next delivery on.
    fn follow(&self, script: impl FnMut(DeliverRequest) -> HttpReply + Send + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
    }
}

fn answer(message: &impl Message) -> HttpReply {
    HttpReply::grpc(&[]).message(false, &message.encode_to_vec()).trailers(&[("grpc-status", "0")])
}

fn apply(request: DeliverRequest) -> HttpReply {
    answer(&DeliverResponse { results: request.events.into_iter().map(|event| applied(&event)).collect() })
}

#[tokio::test]
async fn the_page_of_a_proxy_costs_no_attempt() {
    let outbox = Outbox::create().await;
    let proxied = Proxied::start(description(&[]), apply).await;
    let relay = Relay::start(&outbox, proxied.address, &ONE_ATTEMPT).await;
    for (status, body) in [(502, "<html>"), (503, "<html>"), (504, "")] {
        outbox.wait_for_route_state("OPEN").await;
        proxied.follow(move |_| HttpReply::page(status, &[("content-type", "text/html")], body));
        outbox.insert_unrelated(30).await;
        outbox.wait_for_route_state("DOWN").await;
        let rows = outbox.rows().await;
        assert!(rows.iter().all(|row| row.attempts == 0 && !row.dead), "{status}: {rows:?}");
        proxied.follow(apply);
        outbox.wait_until_empty().await;
    }
    relay.stop().await;
}

#[tokio::test]
async fn an_error_of_64_kib_leaves_the_route_open() {
    let outbox = Outbox::create().await;
    let proxied = Proxied::start(description(&[]), apply).await;
    let relay = Relay::start(&outbox, proxied.address, &ONE_ATTEMPT).await;
    outbox.wait_for_a_later_event().await;
    let described = proxied.described.load(Ordering::Relaxed);
    let long = "x".repeat(64 * 1024);
    proxied.follow(move |_| HttpReply::grpc(&[("grpc-status", "13"), ("grpc-message", &long)]));
    let event_id = outbox.insert_one().await;
    until("it has failed", async || outbox.row(event_id).await.unwrap().failures > 0).await;
    let row = outbox.row(event_id).await.unwrap();
    assert!(row.last_error.as_ref().unwrap().starts_with("Internal: xxx"), "{row:?}");
    proxied.follow(apply);
    outbox.wait_for_a_later_event().await;
    assert_eq!(proxied.described.load(Ordering::Relaxed), described, "a route that is down is probed");
    relay.stop().await;
}

#[tokio::test]
async fn it_refuses_a_receiver_that_does_not_accept_its_source_and_says_what_to_do() {
    let outbox = Outbox::create().await;
    outbox.insert_one().await;
    let proxied = Proxied::start(description(&["shop", "loyalty"]), |_| panic!("a delivery")).await;
    let relay = Relay::start(&outbox, proxied.address, &[]).await;
    let refusal = relay.end().await.unwrap_err();
    assert!(matches!(refusal, RunError::Unusable(_)), "{refusal:?}");
    for part in ["route all", "http://127.0.0.1:", "of shop, loyalty only", "orders", "RELAY_SOURCE", "ACCEPT_SOURCES"]
    {
        assert!(refusal.to_string().contains(part), "{part}: {refusal}");
    }
}

#[tokio::test]
async fn a_receiver_that_accepts_the_source_gets_its_events() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(3).await;
    let proxied = Proxied::start(description(&["shop", "orders"]), apply).await;
    let relay = Relay::start(&outbox, proxied.address, &[]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
}

#[tokio::test]
async fn a_receiver_that_no_longer_accepts_the_source_is_barred_at_no_cost() {
    let outbox = Outbox::create().await;
    let proxied = Proxied::start(description(&[]), apply).await;
    let relay = Relay::start(&outbox, proxied.address, &ONE_ATTEMPT).await;
    outbox.wait_for_a_later_event().await;
    *proxied.description.lock().unwrap() = description(&["shop"]);
    proxied.follow(|_| HttpReply::page(503, &[], ""));
    let event_id = outbox.insert_one().await;
    until("the route is barred", async || outbox.route_states().await == [("all".into(), "BARRED".into())]).await;
    relay.stop().await;
    let row = outbox.row(event_id).await.unwrap();
    assert!(row.attempts == 0 && row.lease_token.is_none(), "{row:?}");
}

/// As a grpcio client does on request.
#[tokio::test]
async fn compressed_requests_of_operators_are_read() {
    let outbox = Outbox::create().await;
    let proxied = Proxied::start(description(&[]), apply).await;
    let relay = Relay::start(&outbox, proxied.address, &[]).await;
    relay.serves().await;
    let channel = Endpoint::from_shared(format!("http://{}", relay.address)).unwrap().connect_lazy();
    let mut client = RelayAdminClient::new(channel).send_compressed(CompressionEncoding::Gzip);
    client.get_status(GetStatusRequest::default()).await.unwrap();
    relay.stop().await;
}

/// Such as a receiver that is not upgraded yet. Nothing dies meanwhile.
#[tokio::test]
async fn events_of_a_type_that_the_receiver_does_not_list_wait_with_that_reason_until_it_does() {
    let outbox = Outbox::create().await;
    let proxied = Proxied::start(description(&[]), apply).await;
    let unknown = outbox.insert_of_type("test.v2.Happened", 5).await;
    let relay = Relay::start(&outbox, proxied.address, &ONE_ATTEMPT).await;
    outbox.wait_for_a_later_event().await;
    let reason = Some("UNKNOWN_TYPE: the receiver does not know test.v2.Happened".to_owned());
    let rows = outbox.rows().await;
    let held = rows.iter().filter(|row| unknown.contains(&row.event_id)).collect::<Vec<_>>();
    assert_eq!(held.len(), 5, "none is delivered, none is dead");
    assert!(held.iter().all(|row| row.last_error == reason && !row.visible && !row.dead), "{held:?}");
    assert!(held.iter().all(|row| (row.attempts, row.failures, row.lease_token) == (0, 0, None)), "{held:?}");
    let status = Operator::of(&outbox).reads(&["status", "--json"]).await;
    assert_eq!(status["failing"][0]["reason"].as_str(), reason.as_deref());

    proxied.description.lock().unwrap().types.push("test.v2.Happened".into());
    // Instead of the wait.
    sqlx::query("UPDATE outbox SET visible_at = now()").execute(&outbox.pool).await.unwrap();
    outbox.wait_until_empty().await;
    relay.stop().await;
}
