//! Checks of the contract that hold for every call.

use prost::{
    Message,
    bytes::{Buf, BufMut, Bytes},
};
use proto::events::v1::{DeliverResponse, Event, EventResult, Outcome};
use tonic::{
    Code, Request, Response, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};
use uuid::Uuid;

/// Whether the transport itself refused these bytes because they are too large or no message; asserts that it had a reason
/// to, and that its status is the one the contract names.
pub fn is_refused_by_transport<M: Message + Default>(status: &Status, sent: &Bytes, limit: usize) -> bool {
    if sent.len() > limit {
        assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
        true
    } else if M::decode(sent.clone()).is_err() {
        assert_eq!((status.code(), status.details()), (Code::Internal, &[][..]), "{status:?}");
        true
    } else {
        false
    }
}

/// Asserts that the answer has one result for each event, in the same order, and a reason for each event not applied. An
/// event behind one of its source and subject that was not applied is not applied either.
pub fn is_result_of_each(events: &[Event], answer: &DeliverResponse) {
    let ids = |result: &EventResult| result.event_id.clone();
    assert!(answer.results.iter().map(ids).eq(events.iter().map(|event| event.id.clone())));
    let mut refused: Vec<(&str, Uuid, i64)> = Vec::new();
    for (event, result) in events.iter().zip(&answer.results) {
        let subject = Uuid::try_parse(&event.subject).ok();
        let is_behind = refused.iter().any(|(source, of, sequence)| {
            *source == event.source && Some(*of) == subject && *sequence < event.sequence
        });
        let applied = match result.outcome() {
            Outcome::Applied | Outcome::Duplicate => true,
            Outcome::Rejected => false,
            Outcome::Retry if is_behind && result.reason == "BEHIND_REFUSED" => false,
            Outcome::Retry | Outcome::Unspecified => panic!("no input may have this outcome: {result:?}"),
        };
        assert_eq!((result.reason.is_empty(), result.detail.is_empty()), (applied, applied), "{result:?}");
        assert!(!(applied && is_behind), "it was applied before an earlier one: {result:?}");
        refused.extend(subject.filter(|_| !applied).map(|subject| (event.source.as_str(), subject, event.sequence)));
    }
}

/// Makes the unary call at `path` with these bytes as its message, and returns the bytes of the answer.
///
/// # Errors
/// The call's status.
pub async fn call(
    channel: &Channel,
    path: &'static str,
    message: impl Into<Request<Bytes>>,
) -> Result<Response<Bytes>, Status> {
    // An answer repeats parts of what was sent, and a server may accept more than a client does by default.
    let mut client = Grpc::new(channel.clone()).max_decoding_message_size(usize::MAX);
    client.ready().await.map_err(|error| Status::unavailable(format!("not connected: {error}")))?;
    client.unary(message.into(), PathAndQuery::from_static(path), Verbatim).await
}

/// A message is its bytes.
#[derive(Clone, Copy, Debug)]
struct Verbatim;

impl Codec for Verbatim {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Verbatim {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Verbatim {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
