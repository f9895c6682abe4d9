//! Attacks by what a call says, and by how many there are.

use std::time::Duration;

use prost::Message;
use proto::orders::v1::{CreateOrderRequest, WatchOrderRequest};
use testkit::fuzz::MESSAGE_MAX;
use tokio::{io::AsyncWriteExt, task::JoinSet, time::sleep};
use tonic::{Code, codec::CompressionEncoding};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt;

use super::{
    Attack, MIB,
    frames::{
        CONTINUATION, Connection, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Frame, HEADERS, REFUSED_STREAM,
        RST_STREAM, WINDOW_UPDATE, call_of, frame, header, message, read_frame,
    },
    victim::Victim,
};
use crate::{
    intake::place_for,
    service::{Service, order},
};

const CREATE: &str = "/orders.v1.OrderService/CreateOrder";
const CANCEL: u32 = 8;
/// A window that is larger by so much is too large.
const WINDOW_MAX: u32 = 0x7fff_ffff;
/// REQUEST HEADER FIELDS TOO LARGE, as it is compressed.
const STATUS_431: [u8; 3] = [0x69, 0x90, 0xff];

/// Floods one connection after the other with these frames, each time for another stream. All are ended for the flood, and
/// callers are served.
async fn is_shed(flags: &[&str], bytes: impl Fn(u32) -> Vec<u8> + Copy + Send + Sync + 'static) {
    let victim = Victim::start(flags).await;
    let address = victim.address;
    let attack = Attack::begin(1, move || async move { Connection::open(address).await.flood(bytes).await });
    for round in 1..=3 {
        let shed = attack.sheds(2 * round).await;
        assert_eq!(shed, vec![Some(ENHANCE_YOUR_CALM); shed.len()]);
        victim.serves_the_next_caller().await;
    }
    drop(attack);
    victim.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_are_reset_at_once_end_their_connection() {
    is_shed(&[], |stream| {
        let begin = frame(HEADERS, END_HEADERS, stream, &call_of(CREATE));
        [begin, frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())].concat()
    })
    .await;
}

/// It resets each of these streams itself, since the caller breaks a rule. So it does the work, not the caller.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_make_the_server_reset_them_end_their_connection() {
    is_shed(&[], |stream| {
        let begin = frame(HEADERS, END_HEADERS, stream, &call_of(CREATE));
        [begin, frame(WINDOW_UPDATE, 0, stream, &WINDOW_MAX.to_be_bytes())].concat()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_without_end_end_their_connection() {
    is_shed(&[], |stream| match stream {
        1 => frame(HEADERS, 0, 1, &call_of(CREATE)),
        _ => frame(CONTINUATION, 0, 1, &header("x", "y")),
    })
    .await;
}

/// One that is a little too large is refused alone, as a proxy may have added to it. Floods end their connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_are_too_large_are_refused() {
    let victim = Victim::start(&[]).await;
    let mut connection = Connection::open(victim.address).await;
    let headers = [call_of(CREATE), header("x", &"y".repeat(10_000)), header("z", &"y".repeat(10_000))].concat();
    let (first, rest) = headers.split_at(16_000);
    connection.send(&frame(HEADERS, END_STREAM, 1, first)).await.unwrap();
    connection.send(&frame(CONTINUATION, END_HEADERS, 1, rest)).await.unwrap();
    let refused = connection.find("an answer", |frame| frame.kind == HEADERS).await.unwrap();
    assert_eq!((refused.stream, refused.ends_call()), (1, true), "{refused:?}");
    assert!(refused.payload.windows(3).any(|bytes| bytes == STATUS_431), "{refused:?}");
    victim.serves_the_next_caller().await;
    victim.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_calls_than_a_connection_may_have_are_refused_at_once() {
    let victim = Victim::start(&["--concurrent-streams", "100"]).await;
    let mut connection = Connection::open(victim.address).await;
    for call in 0..150 {
        connection.send(&frame(HEADERS, END_HEADERS, 1 + 2 * call, &call_of(CREATE))).await.unwrap();
    }
    for call in 100..150 {
        let refused = connection.find("a refusal", |frame| frame.kind == RST_STREAM).await.unwrap();
        assert_eq!((refused.stream, refused.code()), (1 + 2 * call, REFUSED_STREAM));
    }
    victim.serves_the_next_caller().await;
    victim.end().await;
}

/// Each says that it brings a message of the largest size, and then brings a byte now and then. They do not count as calls
/// that wait for an answer, as the service waits for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_come_too_slowly_are_given_up() {
    const CALLS: u32 = 200;
    let victim = Victim::start(&["--request-seconds", "2", "--calls", "16"]).await;
    let before = victim.resident();
    let mut connection = Connection::open(victim.address).await;
    let begins = u32::try_from(MESSAGE_MAX).unwrap().to_be_bytes();
    let streams = || (0..CALLS).map(|call| 1 + 2 * call);
    for stream in streams() {
        let begin = frame(HEADERS, END_HEADERS, stream, &call_of(CREATE));
        let body = frame(DATA, 0, stream, &[&[0], &begins[..]].concat());
        connection.send(&[begin, body].concat()).await.unwrap();
    }
    victim.serves_the_next_caller().await;
    if let (Some(before), Some(now)) = (before, victim.resident()) {
        assert!(now.saturating_sub(before) < 64 * MIB, "{before} bytes of memory became {now}");
    }
    let Connection { mut reader, mut writer } = connection;
    let slowly = tokio::spawn(async move {
        loop {
            for stream in streams() {
                if writer.write_all(&frame(DATA, 0, stream, b"x")).await.is_err() {
                    return;
                }
            }
            sleep(Duration::from_millis(100)).await;
        }
    });
    let mut ended = 0;
    while ended < CALLS {
        let frame = read_frame(&mut reader).await.expect("each is answered");
        ended += u32::from(frame.kind == HEADERS && frame.ends_call());
    }
    slowly.abort();
    victim.end().await;
}

/// They all come by one connection, which may be a gateway's. It is kept.
#[tokio::test]
async fn more_calls_than_may_wait_are_refused_at_once() {
    const WAITING: usize = 16;
    const OTHERS: usize = 1000;
    let service = Service::start_with(&["--calls", "16", "--writers", "1", "--database-acquire-ms", "8000"]).await;
    let lock = service.lock_orders().await;
    let mut calls = JoinSet::new();
    // Customers of their own, who have no share to exceed.
    (0..WAITING + OTHERS).for_each(|n| place_for(&service, &mut calls, &n.to_string()));
    for _ in 0..OTHERS {
        let refused = calls.join_next().await.unwrap().unwrap().unwrap_err();
        let details = refused.get_error_details();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert_eq!(details.error_info().unwrap().reason, "TOO_MANY_CALLS");
        assert!(details.retry_info().unwrap().retry_delay.is_some_and(|delay| !delay.is_zero()), "{refused:?}");
    }
    assert_eq!(service.health().await, Some(ServingStatus::Serving));
    lock.rollback().await.unwrap();
    assert_eq!(calls.join_all().await.iter().filter(|answer| answer.is_ok()).count(), WAITING);
    service.place(order()).await;
    service.end().await;
}

/// A call may end with headers instead of with its message. No client library does so.
#[tokio::test]
async fn a_call_that_ends_with_trailers_waits_like_any_other() {
    const WAITING: u32 = 16;
    let service = Service::start_with(&["--calls", "16", "--writers", "1", "--database-acquire-ms", "8000"]).await;
    let lock = service.lock_orders().await;
    let mut connection = Connection::open(service.address).await;
    for call in 0..=WAITING {
        let stream = 1 + 2 * call;
        let begin = frame(HEADERS, END_HEADERS, stream, &call_of(CREATE));
        let request = CreateOrderRequest { customer_id: call.to_string(), ..order() };
        let body = frame(DATA, 0, stream, &message(&request.encode_to_vec()));
        let end = frame(HEADERS, END_HEADERS | END_STREAM, stream, &header("x-checksum", "none"));
        connection.send(&[begin, body, end].concat()).await.unwrap();
    }
    let refused = connection.find("a refusal", Frame::ends_call).await.unwrap();
    assert_eq!((refused.kind, refused.stream), (HEADERS, 1 + 2 * WAITING));
    lock.rollback().await.unwrap();
    for _ in 0..WAITING {
        connection.find("an answer", Frame::ends_call).await.unwrap();
    }
    assert_eq!(service.written().await.orders, i64::from(WAITING));
    service.end().await;
}

#[tokio::test]
async fn watchers_are_no_calls_that_wait() {
    let service = Service::start_with(&["--calls", "16"]).await;
    let watched = service.place(order()).await;
    let mut watchers = Vec::new();
    for _ in 0..32 {
        let request = WatchOrderRequest { order_id: watched.order_id.clone() };
        let mut watcher = service.orders().watch_order(request).await.unwrap().into_inner();
        watcher.message().await.unwrap().unwrap();
        watchers.push(watcher);
    }
    service.place(order()).await;
    drop(watchers);
    service.end().await;
}

/// The size that counts is that of the message, not that of what is sent for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_too_large_are_refused_before_they_are_there() {
    let victim = Victim::start(&[]).await;
    let mut connection = Connection::open(victim.address).await;
    let claims = u32::try_from(MESSAGE_MAX + 1).unwrap().to_be_bytes();
    let begin = frame(HEADERS, END_HEADERS, 1, &call_of(CREATE));
    connection.send(&[begin, frame(DATA, 0, 1, &[&[0], &claims[..]].concat())].concat()).await.unwrap();
    let refused = connection.find("an answer", |frame| frame.stream == 1 && frame.ends_call()).await.unwrap();
    assert_eq!(refused.kind, HEADERS, "it was to be answered: {refused:?}");
    victim.serves_the_next_caller().await;
    victim.end().await;
}

/// A message of 8 MiB is less than a service takes while it is compressed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_too_large_once_they_are_decompressed_are_refused() {
    const CALLS: usize = 16;
    const BOMB: usize = 8 * 1024 * 1024;
    let victim = Victim::start(&["--request-seconds", "60"]).await;
    victim.serves_the_next_caller().await;
    let before = victim.resident();
    let bomb = CreateOrderRequest { customer_id: "a".repeat(BOMB), ..order() };
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        let mut orders = victim.connect().send_compressed(CompressionEncoding::Gzip);
        let bomb = bomb.clone();
        calls.spawn(async move { orders.create_order(bomb).await });
    }
    victim.serves_the_next_caller().await;
    let codes = calls.join_all().await.into_iter().map(|answer| answer.unwrap_err().code()).collect::<Vec<_>>();
    // The server also resets the stream, since it does not read on. A client may look at that first.
    assert!(codes.iter().all(|code| [Code::ResourceExhausted, Code::Cancelled].contains(code)), "{codes:?}");
    assert!(codes.contains(&Code::ResourceExhausted), "{codes:?}");
    if let (Some(before), Some(now)) = (before, victim.resident()) {
        // Less than half of what they hold.
        assert!(now.saturating_sub(before) < 48 * MIB, "{before} bytes of memory became {now}");
    }
    victim.end().await;
}
