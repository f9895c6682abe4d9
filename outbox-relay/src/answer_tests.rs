//! What the relay reads out of the HTTP responses of receivers and proxies. These are the bytes that they send.

use std::{io::Write, time::Duration};

use chassis::{Tls, TlsFiles};
use flate2::{
    Compression,
    write::{GzEncoder, ZlibEncoder},
};
use outbox::{AggregateId, EventId};
use prost::Message;
use proto::events::v1::{DeliverRequest, DeliverResponse, EventResult, Outcome};
use sqlx::types::time::OffsetDateTime;
use testkit::{
    Scratch,
    certificates::{Authority, replace},
};
use tokio::{net::TcpListener, time::Instant};
use uuid::Uuid;

use crate::{
    deliver::Receiver,
    delivery::{Answer, Delivery, Failed, Failure},
    leased_row::LeasedRow,
    trace_events::Destination,
};

#[path = "../tests/it/http_stub.rs"]
mod http_stub;

use http_stub::{HttpReply, HttpStub};

const HTML: &str = "<html>\r\n<head><title>as nginx and HAProxy send it</title></head>\r\n</html>\r\n";
const OK: [(&str, &str); 1] = [("grpc-status", "0")];

fn row(payload_bytes: usize) -> LeasedRow {
    LeasedRow {
        aggregate_id: AggregateId::from(Uuid::now_v7()),
        sequence: 1,
        event_id: EventId::new(),
        event_type: "test.v1.Happened".into(),
        payload: vec![0; payload_bytes].into(),
        created_at: OffsetDateTime::UNIX_EPOCH,
        failures: 0,
        attempted_seconds: None,
        age_seconds: 0.0,
        quiet: false,
        unknown: false,
        follows: None,
        others_wait: false,
        wave: 0,
        adrift: false,
        traceparent: None,
        tracestate: None,
        expired: false,
    }
}

/// The result of delivering the rows to the stub.
async fn deliver_to(stub: &HttpStub, rows: &[LeasedRow]) -> Delivery {
    deliver_with(&format!("http://{}", stub.address), &TlsFiles::default(), rows).await
}

async fn deliver_with(receiver: &str, files: &TlsFiles, rows: &[LeasedRow]) -> Delivery {
    let (destination, tls) = (Destination::default(), Tls::read(files).unwrap());
    let limit = Duration::from_secs(30);
    let mut receiver = Receiver::connect_lazily(receiver.parse().unwrap(), "orders".into(), destination, limit, &tls);
    receiver.deliver(rows, Instant::now() + Duration::from_secs(20)).await
}

/// The result of delivering one event to a stub that replies so.
async fn deliver(mut reply: impl FnMut(DeliverRequest) -> HttpReply + Send + 'static) -> Delivery {
    let reply = move |_: &str, message: &[u8]| reply(DeliverRequest::decode(message).unwrap());
    deliver_to(&HttpStub::start(true, reply).await, &[row(0)]).await
}

async fn fail(reply: HttpReply) -> Failed {
    match deliver(move |_| reply.clone()).await {
        Delivery::Failed(failed) => failed,
        Delivery::Answered(answers) => panic!("{answers:?}"),
    }
}

/// An answer that all events are applied, as a message.
fn applied(request: &DeliverRequest) -> Vec<u8> {
    applied_ids(request.events.iter().map(|event| event.id.clone()))
}

fn applied_ids(event_ids: impl IntoIterator<Item = String>) -> Vec<u8> {
    let outcome = Outcome::Applied.into();
    let applied = |event_id| EventResult { event_id, outcome, ..EventResult::default() };
    DeliverResponse { results: event_ids.into_iter().map(applied).collect() }.encode_to_vec()
}

fn gzip(message: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(message).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn a_response_that_is_no_grpc_answer_is_read_by_its_http_status_whatever_its_body() {
    let meanings = [
        (Failure::Unavailable, &[200, 408, 425, 429, 500, 502, 503, 504, 520][..]),
        (Failure::TooLarge, &[413]),
        (Failure::Barred, &[301, 308, 401, 403, 404, 405, 415]),
        (Failure::Refused, &[400, 418, 422]),
    ];
    for (meaning, statuses) in meanings {
        for status in statuses {
            for body in [HTML, ""] {
                let failed = fail(HttpReply::page(*status, &[("content-type", "text/html")], body)).await;
                assert_eq!(failed.failure, meaning, "{status} {body}");
                assert_eq!(failed.reason, format!("HTTP {status} with text/html instead of a gRPC answer"));
            }
        }
    }
    let without_type = fail(HttpReply::page(503, &[], "")).await;
    assert_eq!(without_type.reason, "HTTP 503 with no content type instead of a gRPC answer");
}

#[tokio::test]
async fn a_page_is_no_answer_though_its_content_type_begins_like_that_of_grpc() {
    for content_type in ["application/grpc-web", "application/grpcx", "application/json", ""] {
        let failed = fail(HttpReply::page(200, &[("content-type", content_type)], HTML)).await;
        assert_eq!(failed.failure, Failure::Unavailable, "{content_type}");
    }
}

#[tokio::test]
async fn an_answer_may_name_its_codec() {
    for content_type in ["application/grpc", "application/grpc+proto", "application/grpc; charset=utf-8"] {
        let delivery = deliver(move |request| {
            HttpReply::page(200, &[("content-type", content_type)], "").message(false, &applied(&request)).trailers(&OK)
        });
        assert_eq!(delivery.await, Delivery::Answered(vec![Answer::Taken]), "{content_type}");
    }
}

#[tokio::test]
async fn a_proxy_gets_the_time_it_asks_for() {
    for (asked, given) in [("7", 7), ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("-1", 0)] {
        let failed = fail(HttpReply::page(503, &[("content-type", "text/html"), ("retry-after", asked)], HTML)).await;
        assert_eq!(failed.retry_after, Duration::from_secs(given), "{asked}");
    }
}

/// nginx closes the stream before it has read a request that is too large.
#[tokio::test]
async fn a_page_that_comes_before_the_batch_is_read_is_read() {
    let page = HttpReply::page(413, &[("content-type", "text/html")], HTML);
    let stub = HttpStub::start(false, move |_, _| page.clone()).await;
    let Delivery::Failed(failed) = deliver_to(&stub, &[row(3 << 20)]).await else { panic!("an answer") };
    assert_eq!(failed.failure, Failure::TooLarge, "{failed:?}");
}

#[tokio::test]
async fn a_grpc_status_counts_whatever_the_http_status_is() {
    let down = [("grpc-status", "14"), ("grpc-message", "backend%20is%20down")];
    let answers = [
        HttpReply::grpc(&down),
        HttpReply::grpc(&[]).trailers(&down),
        // What nginx sends for `add_header grpc-status 14; return 204;`.
        HttpReply::page(204, &down, ""),
        HttpReply::page(502, &down, HTML),
        // There is no message, so nothing is encoded in a way that the relay does not know.
        HttpReply::grpc(&[&[("grpc-encoding", "snappy")], &down[..]].concat()),
    ];
    for answer in answers {
        let failed = fail(answer).await;
        assert_eq!((failed.failure, &*failed.reason), (Failure::Unavailable, "Unavailable: backend is down"));
    }
}

#[tokio::test]
async fn a_reply_without_a_status_or_a_whole_message_is_silence() {
    // The prefix of a message of four bytes, and these.
    let whole = "\0\0\0\0\x04\n\x02\n\0";
    let grpc = |body: &str| HttpReply::page(200, &[("content-type", "application/grpc")], body);
    let answers = [
        grpc(""),
        grpc(whole),
        grpc(whole).trailers(&[("x-trace", "1")]),
        grpc(&whole[..8]),
        grpc(&whole[..1]),
        grpc("").trailers(&OK),
        HttpReply::grpc(&OK),
        grpc(&whole[..8]).trailers(&OK),
        grpc(&whole[..1]).trailers(&OK),
    ];
    for answer in answers {
        let failed = fail(answer.clone()).await;
        assert_eq!(failed.failure, Failure::Silent, "{answer:?}: {failed:?}");
        assert!(failed.reason.ends_with("the reply was cut short"), "{failed:?}");
    }
}

/// Each of these ended a worker with a panic, or was another code.
#[tokio::test]
async fn a_status_is_read_though_its_message_or_its_details_are_not_what_grpc_says() {
    for bad in [("grpc-status-details-bin", "{no base64}"), ("grpc-message", "%ff")] {
        let failed = fail(HttpReply::grpc(&[("grpc-status", "14"), bad])).await;
        assert_eq!(failed.failure, Failure::Unavailable, "{failed:?}");
        let failed = fail(HttpReply::grpc(&[]).trailers(&[("grpc-status", "14"), bad])).await;
        assert_eq!(failed.failure, Failure::Unavailable, "{failed:?}");
        let taken = deliver(move |request| {
            HttpReply::grpc(&[]).message(false, &applied(&request)).trailers(&[("grpc-status", "0"), bad])
        });
        assert_eq!(taken.await, Delivery::Answered(vec![Answer::Taken]));
    }
    let failed = fail(HttpReply::grpc(&[("grpc-status", "fourteen")])).await;
    assert_eq!((failed.failure, &*failed.reason), (Failure::Refused, "Unknown: "));
}

#[tokio::test]
async fn an_answer_that_no_decoder_understands_is_a_refusal() {
    let answers = [
        HttpReply::grpc(&[]).message(false, b"\xff\xff\xff"),
        HttpReply::grpc(&[("grpc-encoding", "gzip")]).message(true, b"no gzip"),
        HttpReply::grpc(&[]).message(true, b""),
    ];
    for answer in answers {
        assert_eq!(fail(answer.trailers(&OK)).await.failure, Failure::Refused);
    }
}

#[tokio::test]
async fn an_error_of_64_kib_is_read_and_its_reason_cut() {
    let long = "%C3%A9".repeat(64 * 1024 / 6 + 1);
    let status = [("grpc-status", "13"), ("grpc-message", &*long)];
    for answer in [HttpReply::grpc(&status), HttpReply::grpc(&[]).trailers(&status)] {
        let failed = fail(answer).await;
        assert_eq!(failed.failure, Failure::Refused, "{failed:?}");
        assert!(failed.reason.starts_with("Internal: éé"), "{failed:?}");
        assert_eq!(failed.reason.chars().count(), 1000);
    }
}

/// A grpcio server compresses for every client, and sends the header even with a message that is not compressed.
#[tokio::test]
async fn compressed_answers_are_read() {
    let taken = Delivery::Answered(vec![Answer::Taken]);
    let answer = |encoding: &'static str, is_compressed, compress: fn(&[u8]) -> Vec<u8>| {
        deliver(move |request| {
            let message = compress(&applied(&request));
            HttpReply::grpc(&[("grpc-encoding", encoding)]).message(is_compressed, &message).trailers(&OK)
        })
    };
    assert_eq!(answer("gzip", true, gzip).await, taken);
    assert_eq!(answer("gzip", false, <[u8]>::to_vec).await, taken);
    assert_eq!(answer("identity", false, <[u8]>::to_vec).await, taken);
    let deflate = |message: &[u8]| {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(message).unwrap();
        encoder.finish().unwrap()
    };
    assert_eq!(answer("deflate", true, deflate).await, taken);
}

#[tokio::test]
async fn an_answer_that_is_too_large_once_decompressed_is_not_read() {
    let bomb = gzip(&vec![0; 64 << 20]);
    assert!(bomb.len() < 100_000);
    let failed = fail(HttpReply::grpc(&[("grpc-encoding", "gzip")]).message(true, &bomb).trailers(&OK)).await;
    assert_eq!(failed.failure, Failure::TooLarge, "{failed:?}");
}

#[tokio::test]
async fn an_answer_that_names_no_event_of_the_batch_is_none() {
    for (named, part) in [(vec!["of another".to_owned()], "the first names \"of another\""), (vec![], "no results")] {
        let failed = fail(HttpReply::grpc(&[]).message(false, &applied_ids(named)).trailers(&OK)).await;
        assert_eq!(failed.failure, Failure::Unmatched);
        assert!(failed.reason.contains(part), "{failed:?}");
    }
}

#[tokio::test]
async fn an_event_that_the_answer_leaves_out_is_retried() {
    let rows = [row(0), row(0)];
    let named = rows[1].event_id.to_string();
    let stub = HttpStub::start(true, move |_, _| {
        HttpReply::grpc(&[]).message(false, &applied_ids([named.clone()])).trailers(&OK)
    });
    let Delivery::Answered(answers) = deliver_to(&stub.await, &rows).await else { panic!("no answer") };
    assert!(matches!(&answers[..], [Answer::Retry(reason), Answer::Taken] if reason.starts_with("NO_RESULT: ")));
}

/// "transport error" helps nobody.
#[tokio::test]
async fn a_receiver_that_cannot_be_reached_is_reported_with_the_last_cause() {
    let (scratch, stub) = (Scratch::new(), HttpStub::start(true, |_: &str, _: &[u8]| panic!("it was called")).await);
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let ca = scratch.join("ca.pem");
    replace(&ca, Authority::new().unwrap().pem()).unwrap();
    let files = TlsFiles { tls_ca_file: Some(ca), ..TlsFiles::default() };
    for (receiver, cause) in [
        (format!("http://{nobody}"), "Connection refused"),
        (format!("https://{nobody}"), "Connection refused"),
        (format!("https://{}", stub.address), "InvalidContentType"),
    ] {
        let Delivery::Failed(failed) = deliver_with(&receiver, &files, &[row(0)]).await else { panic!("answered") };
        assert_eq!(failed.failure, Failure::Unreachable, "{receiver}: {}", failed.reason);
        assert!(failed.reason.contains(cause), "{receiver}: {}", failed.reason);
    }
}
