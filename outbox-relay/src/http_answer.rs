//! Reads the HTTP response that should hold a gRPC answer, before tonic does.
//!
//! tonic takes any body for gRPC messages, whatever the HTTP status and the content type say. So the error page of a
//! proxy would look like a fault of the receiver in answering these events.

use std::{
    borrow::Cow,
    error::Error,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use http_body::Frame;
use percent_encoding::percent_decode;
use prost::bytes::Bytes;
use tonic::{Code, Status, body::Body, transport::Channel};
use tower_service::Service;

use crate::delivery::Failure;

type BoxError = Box<dyn Error + Send + Sync>;

/// Bytes before a gRPC message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Base64 as gRPC sends it: with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// An HTTP response that is no gRPC answer, as a proxy sends it.
#[derive(Debug, thiserror::Error)]
#[error("HTTP {} with {content_type} instead of a gRPC answer", .status.as_u16())]
pub(crate) struct HttpAnswer {
    status: StatusCode,
    content_type: String,
    /// The time that it asks for.
    pub(crate) retry_after: Duration,
}

impl HttpAnswer {
    fn of<B>(response: &Response<B>) -> Self {
        let header = |name| response.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
        let content_type = header(CONTENT_TYPE).map_or("no content type".into(), Cow::into_owned);
        // The header may also hold a date. Clocks are not compared here, so that is ignored.
        let seconds = header(RETRY_AFTER).and_then(|value| value.trim().parse().ok());
        let retry_after = seconds.map(Duration::from_secs).unwrap_or_default();
        Self { status: response.status(), content_type, retry_after }
    }

    pub(crate) fn failure(&self) -> Failure {
        match self.status.as_u16() {
            // A page says nothing about the events, whatever its status. With 200, something else than the receiver
            // has answered, and perhaps for a moment only.
            200 => Failure::Unavailable,
            // Request timeout, too early, too many requests, and all errors of servers.
            408 | 425 | 429 | 500..=599 => Failure::Unavailable,
            413 => Failure::TooLarge,
            // A redirection, a lack of rights, a wrong path or protocol: every call would get the same answer, so no
            // event can be its cause.
            300..=399 | 401..=405 | 407 | 410 | 415 | 421 | 426 => Failure::Barred,
            _ => Failure::Refused,
        }
    }
}

/// A reply that ends before its gRPC status, or before its message.
#[derive(Debug, thiserror::Error)]
#[error("the reply was cut short")]
struct CutShort;

/// A channel that passes on gRPC answers only.
///
/// Its error is an [`HttpAnswer`] if the response is no gRPC answer, and a [`Status`] if the receiver sent that.
#[derive(Clone, Debug)]
pub(crate) struct GrpcAnswers {
    channel: Channel,
}

impl GrpcAnswers {
    pub(crate) fn of(channel: Channel) -> Self {
        Self { channel }
    }
}

impl Service<Request<Body>> for GrpcAnswers {
    type Response = Response<Answer>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answer>, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.channel.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let response = self.channel.call(request);
        Box::pin(async move { read_head(response.await?) })
    }
}

/// Checks all that comes before the body. The body of a page is not read: nothing in it could be relied on.
fn read_head(mut response: Response<Body>) -> Result<Response<Answer>, BoxError> {
    // A status in the head is the whole answer. It counts whatever the HTTP status is, as gRPC says: with nginx, the
    // usual way to answer in gRPC is `return 204`.
    let told = read_status(response.headers_mut())?;
    let content_type = response.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    if !told && (response.status() != StatusCode::OK || !is_grpc(content_type)) {
        return Err(HttpAnswer::of(&response).into());
    }
    Ok(response.map(|body| Answer { body, told, prefix: [0; PREFIX_BYTES], received: 0 }))
}

/// Whether the content type is `application/grpc`, perhaps with a codec or a parameter. `application/grpc-web` is
/// another protocol.
fn is_grpc(content_type: &[u8]) -> bool {
    let content_type = content_type.to_ascii_lowercase();
    let rest = content_type.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

/// Reads the gRPC status out of headers or trailers. Returns whether it is there and OK.
///
/// tonic's own reading would panic over details that are not base64. It would report UNKNOWN in place of the code if
/// the message is not UTF-8. And before the status, it would complain about an encoding of the message that it does not
/// know, though there is no message.
fn read_status(headers: &mut HeaderMap) -> Result<bool, Status> {
    let Some(code) = headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes())) else { return Ok(false) };
    let (message, details) = (headers.remove("grpc-message"), headers.remove("grpc-status-details-bin"));
    if code == Code::Ok {
        return Ok(true);
    }
    let message = message.map(|message| percent_decode(message.as_bytes()).decode_utf8_lossy().into_owned());
    let details = details.and_then(|details| BASE64.decode(details.as_bytes()).ok());
    Err(Status::with_details(code, message.unwrap_or_default(), details.unwrap_or_default().into()))
}

/// The body of a gRPC answer. It ends with an error unless it holds a whole message and the status OK.
#[derive(Debug)]
pub(crate) struct Answer {
    body: Body,
    /// Whether the status OK has come.
    told: bool,
    /// The first bytes.
    prefix: [u8; PREFIX_BYTES],
    /// The number of bytes so far.
    received: usize,
}

impl Answer {
    fn read(&mut self, frame: Frame<Bytes>) -> Result<Frame<Bytes>, BoxError> {
        match frame.into_trailers() {
            Ok(mut trailers) => {
                self.told |= read_status(&mut trailers)?;
                self.end()?;
                Ok(Frame::trailers(trailers))
            }
            Err(frame) => {
                self.count(frame.data_ref().map_or(&[][..], |data| data));
                Ok(frame)
            }
        }
    }

    fn count(&mut self, data: &[u8]) {
        let missing = PREFIX_BYTES.saturating_sub(self.received).min(data.len());
        self.prefix[self.received.min(PREFIX_BYTES)..][..missing].copy_from_slice(&data[..missing]);
        self.received += data.len();
    }

    fn end(&self) -> Result<(), CutShort> {
        let [_, length @ ..] = self.prefix;
        let received = self.received.checked_sub(PREFIX_BYTES).map(|bytes| bytes as u64);
        let is_whole = received >= Some(u32::from_be_bytes(length).into());
        if self.told && is_whole { Ok(()) } else { Err(CutShort) }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => Some(self.read(frame)),
            Some(Err(status)) => Some(Err(status.into())),
            None => self.end().err().map(|cut| Err(cut.into())),
        })
    }
}
