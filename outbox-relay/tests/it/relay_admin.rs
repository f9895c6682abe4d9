//! The operator's commands as gRPC.

use std::{fmt::Debug, net::SocketAddr};

use proto::relay::v1::{
    DiscardDeadEventRequest, DiscardDeadEventsRequest, GetBlastRadiusRequest, GetDeadEventRequest, GetStatusRequest,
    ListDeadEventsRequest, ListDeedsRequest, OutboxPause, PauseRequest, RequeueDeadEventsRequest,
    RestoreDiscardedEventRequest, ResumeRequest, UndoDeedRequest, dead_event_content::Payload,
    relay_admin_client::RelayAdminClient, relay_admin_server::SERVICE_NAME,
};
use testkit::{
    http::{ask, get},
    processes::free_port,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    operator::{
        Operator, count_dead, count_discarded, insert_dead, insert_dead_with_successors, insert_many_dead,
        kill_requeued, make_older,
    },
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::until,
};

/// A relay with its outbox, and a channel to its gRPC server.
struct Admin {
    outbox: Outbox,
    receiver: Receiver,
    relay: Relay,
    channel: Channel,
}

impl Admin {
    async fn start(outbox: Outbox) -> Self {
        let receiver = Receiver::start(Reply::apply).await;
        // A long limit: on a busy machine a connection may take longer than callers should wait.
        let relay = Relay::start(&outbox, receiver.address, &["--database-acquire-ms", "8000"]).await;
        relay.serves().await;
        let channel = Endpoint::from_shared(format!("http://{}", relay.address)).unwrap().connect_lazy();
        Self { outbox, receiver, relay, channel }
    }

    fn client(&self) -> RelayAdminClient<Channel> {
        RelayAdminClient::new(self.channel.clone())
    }

    async fn stop(self) {
        self.relay.stop().await;
    }
}

fn requeue_by_ann() -> RequeueDeadEventsRequest {
    RequeueDeadEventsRequest { requeued_by: "ann".into(), ..RequeueDeadEventsRequest::default() }
}

/// Checks the code of a refusal, its reason and its bad fields. Returns its message.
fn assert_refused<T: Debug>(answer: Result<Response<T>, Status>, code: Code, reason: &str, fields: &[&str]) -> String {
    let status = answer.expect_err("a refusal");
    let details = status.get_error_details();
    let info = details.error_info().expect("ErrorInfo");
    assert_eq!((status.code(), info.reason.as_str(), info.domain.as_str()), (code, reason, "outbox-relay"));
    let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    assert_eq!(violations.iter().map(|bad| bad.field.as_str()).collect::<Vec<_>>(), fields);
    status.message().to_owned()
}

#[tokio::test]
async fn grpc_and_the_command_line_give_the_same_status() {
    let outbox = Outbox::create().await;
    insert_dead_with_successors(&outbox).await;
    let admin = Admin::start(outbox).await;
    let status = admin.client().get_status(GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.dead, status.waiting, status.held_back, status.leased), (1, 2, 2, 0));
    assert!(status.pause.is_none() && status.oldest_seconds.is_some() && status.types.len() == 1);
    let said = Operator::of(&admin.outbox).reads(&["status", "--json"]).await;
    let counts = ["dead", "waiting", "held_back", "leased"].map(|key| said[key].as_i64().unwrap());
    assert_eq!(counts, [status.dead, status.waiting, status.held_back, status.leased]);
    assert_eq!(said["types"].as_array().unwrap().len(), 1);
    admin.stop().await;
}

#[tokio::test]
async fn dead_events_are_listed_in_pages_newest_first() {
    let outbox = Outbox::create().await;
    let mut dead = Vec::new();
    for _ in 0..5 {
        dead.push(insert_dead(&outbox).await.to_string());
    }
    dead.reverse();
    let admin = Admin::start(outbox).await;
    let (mut listed, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListDeadEventsRequest { page_size: 2, page_token, ..ListDeadEventsRequest::default() };
        let page = admin.client().list_dead_events(request).await.unwrap().into_inner();
        assert_eq!(page.total_size, 5);
        listed.extend(page.dead_events.into_iter().map(|event| event.event_id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
        let of_another_type = ListDeadEventsRequest {
            page_token: page_token.clone(),
            r#type: "a.B".into(),
            page_size: -1,
            ..ListDeadEventsRequest::default()
        };
        let refused = admin.client().list_dead_events(of_another_type).await;
        assert_refused(refused, Code::InvalidArgument, "INVALID_PAGE", &["page_size", "page_token"]);
    }
    assert_eq!(listed, dead);
    admin.stop().await;
}

#[tokio::test]
async fn a_dead_event_is_shown_with_its_payload_or_the_reason_why_it_cannot_be_decoded() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await;
    let admin = Admin::start(outbox).await;
    let request = || GetDeadEventRequest { event_id: event_id.to_string() };
    let shown = admin.client().get_dead_event(request()).await.unwrap().into_inner();
    let Some(Payload::Undecodable(why)) = shown.payload else { panic!("{shown:?}") };
    assert!(why.contains("no descriptor of test.v1.Happened"), "{why}");

    sqlx::query("UPDATE outbox SET event_type = 'orders.v1.OrderCancelled', payload = $1")
        .bind(b"\x0a\x01x")
        .execute(&admin.outbox.pool)
        .await
        .unwrap();
    let shown = admin.client().get_dead_event(request()).await.unwrap().into_inner();
    assert_eq!(shown.payload, Some(Payload::PayloadJson(r#"{"orderId":"x"}"#.into())));
    assert_eq!((&*shown.data, shown.event.unwrap().event_id), (&b"\x0a\x01x"[..], event_id.to_string()));
    admin.stop().await;
}

#[tokio::test]
async fn requeued_events_and_their_successors_are_delivered_at_once() {
    let outbox = Outbox::create().await;
    let line = insert_dead_with_successors(&outbox).await;
    let admin = Admin::start(outbox).await;
    let event_ids = vec![line[0].event_id.to_string(); 2];
    let request = RequeueDeadEventsRequest { event_ids, ..requeue_by_ann() };
    let done = admin.client().requeue_dead_events(request).await.unwrap().into_inner();
    assert_eq!((done.requeued, done.freed, done.too_old), (1, 2, 0));
    admin.outbox.wait_until_empty().await;
    assert_eq!(admin.receiver.read(Log::ids), line.map(|event| event.event_id));

    let old = insert_dead(&admin.outbox).await;
    make_older(&admin.outbox, old, 200).await;
    insert_dead(&admin.outbox).await;
    let all = RequeueDeadEventsRequest { all: true, r#type: "test.v1.Happened".into(), ..requeue_by_ann() };
    let done = admin.client().requeue_dead_events(all).await.unwrap().into_inner();
    assert_eq!((done.requeued, done.freed, done.too_old), (1, 0, 1));
    assert_eq!((done.remaining, done.next_token.as_str()), (0, ""));
    until("only the old one is left", async || admin.outbox.count().await == 1).await;
    admin.stop().await;
}

#[tokio::test]
async fn a_requeue_that_does_not_apply_is_refused_with_the_reason() {
    let outbox = Outbox::create().await;
    let (dead, old) = (insert_dead(&outbox).await, insert_dead(&outbox).await);
    make_older(&outbox, old, 200).await;
    let backing_off = outbox.insert_hidden(None, std::time::Duration::from_secs(600)).await;
    sqlx::query("UPDATE outbox SET attempts = 1 WHERE event_id = $1")
        .bind(backing_off)
        .execute(&outbox.pool)
        .await
        .unwrap();
    let admin = Admin::start(outbox).await;
    let requeue = async |other: Uuid| {
        let event_ids = vec![dead.to_string(), other.to_string()];
        let request = RequeueDeadEventsRequest { event_ids, ..requeue_by_ann() };
        admin.client().requeue_dead_events(request).await
    };
    let message = assert_refused(requeue(Uuid::now_v7()).await, Code::NotFound, "EVENT_NOT_FOUND", &[]);
    assert!(message.contains("is not in the outbox"), "{message}");
    let message = assert_refused(requeue(backing_off).await, Code::FailedPrecondition, "EVENT_NOT_DEAD", &[]);
    assert!(message.contains("it is backing off"), "{message}");
    assert_refused(requeue(old).await, Code::FailedPrecondition, "EVENT_TOO_OLD", &[]);

    let request = RequeueDeadEventsRequest {
        event_ids: vec!["1".into()],
        all: true,
        r#type: "\n".into(),
        token: "x".into(),
        subscription: "\n".into(),
        code: "\n".into(),
        requeued_by: " ".into(),
        reason: "a\nb".into(),
    };
    let refused = admin.client().requeue_dead_events(request).await;
    let bad = ["event_ids", "type", "code", "subscription", "event_ids[0]", "token", "requeued_by", "reason"];
    assert_refused(refused, Code::InvalidArgument, "INVALID_REQUEUE", &bad);
    let request = RequeueDeadEventsRequest { event_ids: vec![dead.to_string()], token: "x".into(), ..requeue_by_ann() };
    let refused = admin.client().requeue_dead_events(request).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_REQUEUE", &["token"]);
    let refused = admin.client().requeue_dead_events(requeue_by_ann()).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_REQUEUE", &["event_ids"]);
    let unknown = (0..1000).map(|_| Uuid::now_v7().to_string()).collect();
    let request = RequeueDeadEventsRequest { event_ids: unknown, ..requeue_by_ann() };
    let message =
        assert_refused(admin.client().requeue_dead_events(request).await, Code::NotFound, "EVENT_NOT_FOUND", &[]);
    assert!(message.ends_with('…'), "{message}");
    assert!(admin.outbox.row(dead).await.unwrap().dead, "none was requeued");
    admin.stop().await;
}

/// More than one call requeues. The outbox is paused, so that no event is delivered meanwhile.
#[tokio::test]
async fn a_requeue_of_all_takes_several_calls_and_each_goes_on_where_the_last_one_ended() {
    let outbox = Outbox::create().await;
    let dead = 15_001;
    insert_many_dead(&outbox, dead).await;
    let admin = Admin::start(outbox).await;
    admin
        .client()
        .pause(PauseRequest { paused_by: "ann".into(), reason: "a test".into(), ..PauseRequest::default() })
        .await
        .unwrap();
    let (mut requeued, mut calls, mut token) = (0, 0, String::new());
    loop {
        let request = RequeueDeadEventsRequest { all: true, token, ..requeue_by_ann() };
        let done = admin.client().requeue_dead_events(request).await.unwrap().into_inner();
        assert!(done.requeued > 0 && done.requeued <= 15_000, "{done:?}");
        requeued += done.requeued;
        calls += 1;
        assert_eq!(requeued + done.remaining, dead);
        token = done.next_token;
        if token.is_empty() {
            break;
        }
        let of_another_type =
            RequeueDeadEventsRequest { all: true, token: token.clone(), r#type: "a.B".into(), ..requeue_by_ann() };
        let refused = admin.client().requeue_dead_events(of_another_type).await;
        assert_refused(refused, Code::InvalidArgument, "INVALID_REQUEUE", &["token"]);
        // The events die again behind the walk, and are not requeued again.
        kill_requeued(&admin.outbox).await;
    }
    assert!(calls >= 2 && requeued == dead, "{requeued} in {calls} calls");

    // Without the token a call starts from the beginning, with the events that have died again.
    let request = RequeueDeadEventsRequest { all: true, ..requeue_by_ann() };
    let done = admin.client().requeue_dead_events(request).await.unwrap().into_inner();
    assert!(done.requeued > 0, "{done:?}");
    admin.stop().await;
}

#[tokio::test]
async fn a_discarded_event_is_gone_and_its_successors_are_delivered() {
    let outbox = Outbox::create().await;
    let [dead, second, third] = insert_dead_with_successors(&outbox).await;
    let admin = Admin::start(outbox).await;
    let request = || DiscardDeadEventRequest {
        event_id: dead.event_id.to_string(),
        discarded_by: "ann".into(),
        reason: "a typo".into(),
        subscription: String::new(),
        refuse: false,
    };
    let done = admin.client().discard_dead_event(request()).await.unwrap().into_inner();
    assert!(done.freed == 2 && done.discard_time.is_some(), "{done:?}");
    admin.outbox.wait_until_empty().await;
    assert_eq!(admin.receiver.read(Log::ids), [second.event_id, third.event_id]);

    let refused = admin.client().discard_dead_event(request()).await;
    let message = assert_refused(refused, Code::NotFound, "EVENT_NOT_FOUND", &[]);
    assert!(message.contains("was discarded by ann"), "{message}");
    let bad = DiscardDeadEventRequest { reason: "n\0ul".into(), ..DiscardDeadEventRequest::default() };
    let refused = admin.client().discard_dead_event(bad).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_DISCARD", &["event_id", "discarded_by", "reason"]);
    let refused = admin.client().get_dead_event(GetDeadEventRequest { event_id: "x".into() }).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_EVENT_ID", &["event_id"]);
    assert_eq!(count_discarded(&admin.outbox).await, 1);
    admin.stop().await;
}

#[tokio::test]
async fn a_discarded_event_is_restored_and_what_nobody_can_refuse_is_not_discarded() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await.to_string();
    let admin = Admin::start(outbox).await;
    let discard = |refuse| DiscardDeadEventRequest {
        event_id: event_id.clone(),
        discarded_by: "ann".into(),
        reason: "a typo".into(),
        refuse,
        ..DiscardDeadEventRequest::default()
    };
    let restore = || RestoreDiscardedEventRequest {
        event_id: event_id.clone(),
        restored_by: "bob".into(),
        ..RestoreDiscardedEventRequest::default()
    };
    let refused = admin.client().restore_discarded_event(restore()).await;
    assert_refused(refused, Code::NotFound, "EVENT_NOT_FOUND", &[]);
    let refused = admin.client().discard_dead_event(discard(true)).await;
    assert_refused(refused, Code::FailedPrecondition, "NO_REFUSALS", &[]);
    admin.client().discard_dead_event(discard(false)).await.unwrap();
    let done = admin.client().restore_discarded_event(restore()).await.unwrap().into_inner();
    assert_eq!((done.restored, admin.outbox.count().await, count_discarded(&admin.outbox).await), (1, 1, 0));
    let refused = admin.client().restore_discarded_event(RestoreDiscardedEventRequest::default()).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_RESTORE", &["event_id", "restored_by"]);
    admin.stop().await;
}

#[tokio::test]
async fn a_pause_starts_once_and_ends_once() {
    let admin = Admin::start(Outbox::create().await).await;
    let request = || PauseRequest { paused_by: "ann".into(), reason: "moving".into(), ..PauseRequest::default() };
    let paused = admin.client().pause(request()).await.unwrap().into_inner();
    let status = admin.client().get_status(GetStatusRequest {}).await.unwrap().into_inner();
    let of_status = OutboxPause { deed_id: 0, ..paused.clone() };
    assert_eq!((status.pause.as_ref(), paused.deed_id), (Some(&of_status), 1));
    let message =
        assert_refused(admin.client().pause(request()).await, Code::FailedPrecondition, "ALREADY_PAUSED", &[]);
    assert!(message.contains("by ann: moving"), "{message}");
    let resume = || ResumeRequest { resumed_by: "bob".into(), ..ResumeRequest::default() };
    let ended = admin.client().resume(resume()).await.unwrap().into_inner();
    assert_eq!(ended, OutboxPause { deed_id: 2, ..paused });
    assert_refused(admin.client().resume(resume()).await, Code::FailedPrecondition, "NOT_PAUSED", &[]);
    let refused = admin.client().resume(ResumeRequest::default()).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_RESUME", &["resumed_by"]);
    let refused = admin.client().pause(PauseRequest::default()).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_PAUSE", &["paused_by", "reason"]);
    admin.stop().await;
}

#[tokio::test]
async fn its_health_is_served() {
    let admin = Admin::start(Outbox::create().await).await;
    until("it serves", async || {
        let request = HealthCheckRequest { service: SERVICE_NAME.to_owned() };
        let answer = HealthClient::new(admin.channel.clone()).check(request).await;
        answer.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving)
    })
    .await;
    admin.stop().await;
}

/// As the page of a stranger in an operator's browser could.
#[tokio::test]
async fn a_call_that_is_not_grpc_reaches_no_service() {
    let admin = Admin::start(Outbox::create().await).await;
    let address = admin.relay.address;
    for content in ["text/plain", "application/grpc"] {
        let request = format!(
            "POST {STATUS} HTTP/1.1\r\nHost: relay\r\nContent-Type: {content}\r\nContent-Length: 5\r\n\
             Connection: close\r\n\r\n\0\0\0\0\0"
        );
        assert_eq!(ask(address, &request).await.unwrap().0, 404, "{content}");
    }
    for (content, status) in
        [("text/plain", 404), ("application/grpc-web", 404), ("application/grpc", 200), ("application/grpc+proto", 200)]
    {
        assert_eq!(call(address, content).await, status, "{content}");
    }
    // A probe of a path that does not exist must not take it for health.
    assert_eq!(get(address, "/healthz").await.unwrap().0, 404);
    admin.stop().await;
}

const STATUS: &str = "/relay.v1.RelayAdmin/GetStatus";

/// The HTTP status of a call over HTTP/2 with this type of content.
async fn call(address: SocketAddr, content: &str) -> u16 {
    let (client, connection) = h2::client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://{address}{STATUS}")).header("content-type", content);
    let mut client = client.ready().await.unwrap();
    let (answer, mut body) = client.send_request(request.header("te", "trailers").body(()).unwrap(), false).unwrap();
    body.send_data(vec![0; 5].into(), true).unwrap();
    answer.await.unwrap().status().as_u16()
}

#[tokio::test]
async fn operators_are_told_to_try_again_while_the_relay_waits_for_its_database() {
    let nowhere = format!("postgres://outbox_relay:x@127.0.0.1:{}/none", free_port().unwrap());
    let relay = Relay::start_with_routes(&nowhere, &["all=http://127.0.0.1:1"], &[]).await;
    let mut client = RelayAdminClient::connect(format!("http://{}", relay.address)).await.unwrap();
    assert_eq!(client.get_status(GetStatusRequest {}).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(get(relay.address, "/livez").await.unwrap().0, 200);
    assert_eq!(get(relay.address, "/readyz").await.unwrap(), (503, "not ready: it starts\n".into()));
    relay.stop().await;
}

#[tokio::test]
async fn a_connection_on_which_an_operators_tool_asks_now_and_then_does_not_delay_the_end() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &["--drain-seconds", "600"]).await;
    let mut kept = TcpStream::connect(relay.address).await.unwrap();
    kept.write_all(b"GET /livez HTTP/1.1\r\nHost: relay\r\n\r\n").await.unwrap();
    let mut answer = [0; 15];
    kept.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    relay.stop().await;
}

/// More than one call undoes, and no event is delivered meanwhile.
#[tokio::test]
async fn a_discard_of_all_and_its_undo_take_several_calls_and_are_one_deed_each() {
    let outbox = Outbox::create().await;
    let dead = 15_001;
    insert_many_dead(&outbox, dead).await;
    let admin = Admin::start(outbox).await;
    let discard = |token| DiscardDeadEventsRequest {
        all: true,
        code: "BUSY".into(),
        token,
        discarded_by: "ann".into(),
        reason: "a test".into(),
        ..DiscardDeadEventsRequest::default()
    };
    let (mut discarded, mut deeds, mut token) = (0, Vec::new(), String::new());
    loop {
        let done = admin.client().discard_dead_events(discard(token)).await.unwrap().into_inner();
        discarded += done.discarded;
        deeds.push(done.deed_id);
        assert_eq!(discarded + done.remaining, dead);
        token = done.next_token;
        if token.is_empty() {
            break;
        }
    }
    assert!(deeds.len() >= 2 && deeds.iter().all(|deed| *deed == 1), "{deeds:?}");
    assert_eq!((discarded, count_discarded(&admin.outbox).await), (dead, dead));

    let undo = |token| UndoDeedRequest { deed_id: 1, undone_by: "bob".into(), reason: String::new(), token };
    let (mut undone, mut calls, mut token) = (0, 0, String::new());
    loop {
        let done = admin.client().undo_deed(undo(token)).await.unwrap().into_inner();
        (undone, calls, token) = (undone + done.undone, calls + 1, done.next_token);
        assert_eq!((done.left, done.deed_id), (0, 2));
        if token.is_empty() {
            break;
        }
    }
    assert!(calls >= 2 && undone == dead, "{undone} in {calls} calls");
    assert_eq!((count_dead(&admin.outbox).await, count_discarded(&admin.outbox).await), (dead, 0));
    let mut again = admin.client().undo_deed(undo(String::new())).await;
    while let Ok(done) = again {
        let done = done.into_inner();
        assert_eq!((done.undone, done.deed_id), (0, 0));
        again = admin.client().undo_deed(undo(done.next_token)).await;
    }
    assert_refused(again, Code::FailedPrecondition, "CANNOT_UNDO", &[]);

    let request = ListDeedsRequest { page_size: 1, ..ListDeedsRequest::default() };
    let page = admin.client().list_deeds(request).await.unwrap().into_inner();
    assert_eq!(
        page.deeds.iter().map(|deed| (deed.deed_id, deed.undoes, deed.events)).collect::<Vec<_>>(),
        [(2, 1, dead)]
    );
    let request = ListDeedsRequest { page_token: page.next_page_token, ..ListDeedsRequest::default() };
    let page = admin.client().list_deeds(request).await.unwrap().into_inner();
    assert_eq!(page.deeds.iter().map(|deed| (deed.deed_id, deed.undone_by)).collect::<Vec<_>>(), [(1, 2)]);
    admin.stop().await;
}

#[tokio::test]
async fn bad_requests_about_deeds_name_every_bad_field() {
    let admin = Admin::start(Outbox::create().await).await;
    let request = UndoDeedRequest { token: "x".into(), reason: "a\nb".into(), ..UndoDeedRequest::default() };
    let refused = admin.client().undo_deed(request).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_UNDO", &["deed_id", "undone_by", "reason", "token"]);
    let request = UndoDeedRequest { deed_id: 17, undone_by: "ann".into(), ..UndoDeedRequest::default() };
    assert_refused(admin.client().undo_deed(request).await, Code::NotFound, "DEED_NOT_FOUND", &[]);
    let request = ListDeedsRequest { page_size: -1, page_token: "x".into(), event_id: "x".into() };
    let refused = admin.client().list_deeds(request).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_PAGE", &["page_size", "event_id", "page_token"]);
    let refused = admin.client().discard_dead_events(DiscardDeadEventsRequest::default()).await;
    let bad = ["event_ids", "discarded_by", "reason"];
    assert_refused(refused, Code::InvalidArgument, "INVALID_DISCARD", &bad);
    let refused = admin.client().get_blast_radius(GetBlastRadiusRequest::default()).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_SELECTION", &["event_ids"]);
    admin.stop().await;
}

#[tokio::test]
async fn a_blast_radius_counts_what_a_deed_would_change_and_changes_nothing() {
    let outbox = Outbox::create().await;
    let [first, ..] = insert_dead_with_successors(&outbox).await;
    let old = insert_dead(&outbox).await;
    make_older(&outbox, old, 200).await;
    insert_many_dead(&outbox, 3).await;
    let admin = Admin::start(outbox).await;
    let measure = async |request: GetBlastRadiusRequest| {
        let of = admin.client().get_blast_radius(request).await.unwrap().into_inner();
        (of.events, of.subjects, of.held_back, of.too_old, of.more)
    };
    let all = |code: &str| GetBlastRadiusRequest { all: true, code: code.into(), ..Default::default() };
    assert_eq!(measure(all("")).await, (5, 5, 2, 1, false));
    assert_eq!(measure(all("BUSY")).await, (3, 3, 0, 0, false));
    assert_eq!(measure(all("NONE")).await, (0, 0, 0, 0, false));
    let event_ids = vec![first.event_id.to_string()];
    assert_eq!(measure(GetBlastRadiusRequest { event_ids, ..Default::default() }).await, (1, 1, 2, 0, false));
    assert_eq!(count_dead(&admin.outbox).await, 5);
    admin.stop().await;
}

/// The answer to the call with the token was lost, and some of its events have died again meanwhile.
#[tokio::test]
async fn a_call_that_is_repeated_with_its_token_goes_on_with_the_same_deed() {
    let outbox = Outbox::create().await;
    let dead = 15_001;
    insert_many_dead(&outbox, dead).await;
    let admin = Admin::start(outbox).await;
    let pause = PauseRequest { paused_by: "ann".into(), reason: "a test".into(), ..PauseRequest::default() };
    admin.client().pause(pause).await.unwrap();
    let requeue = async |by: &str, token: &str| {
        let request = RequeueDeadEventsRequest {
            all: true,
            token: token.to_owned(),
            requeued_by: by.to_owned(),
            ..RequeueDeadEventsRequest::default()
        };
        admin.client().requeue_dead_events(request).await.unwrap().into_inner()
    };
    let first = requeue("ann", "").await;
    assert!(!first.next_token.is_empty(), "{first:?}");
    requeue("ann", &first.next_token).await;
    kill_requeued(&admin.outbox).await;
    // Before the walk, somebody else requeues one that lies ahead: the later change is the walk's.
    let ahead = Uuid::from_u128(dead.unsigned_abs().into()).to_string();
    let request =
        RequeueDeadEventsRequest { event_ids: vec![ahead.clone()], requeued_by: "bob".into(), ..Default::default() };
    let of_bob = admin.client().requeue_dead_events(request).await.unwrap().into_inner().deed_id;
    kill_requeued(&admin.outbox).await;
    let (mut requeued, mut token) = (first.requeued, first.next_token.clone());
    while !token.is_empty() {
        let again = requeue("ann", &token).await;
        assert_eq!(again.deed_id, first.deed_id);
        (requeued, token) = (requeued + again.requeued, again.next_token);
    }
    assert_eq!(requeued, dead);

    let undo = |deed_id| UndoDeedRequest { deed_id, undone_by: "ann".into(), ..UndoDeedRequest::default() };
    let refused = admin.client().undo_deed(undo(of_bob)).await;
    assert_refused(refused, Code::FailedPrecondition, "CANNOT_UNDO", &[]);

    // Somebody else who goes on with the walk, or a token that names another's deed, has a deed of his own.
    kill_requeued(&admin.outbox).await;
    let of_another = requeue("bob", &first.next_token).await;
    assert!(of_another.deed_id > first.deed_id, "{of_another:?}");
    admin.stop().await;
}
