//! Measures calls: those that a server answers, and those that a process makes. Names, labels and limits of the buckets
//! are those of OpenTelemetry's semantic conventions, as Prometheus writes them.

use std::{
    array,
    collections::HashMap,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::{HeaderMap, HeaderValue},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use http_body::{Frame, SizeHint};
use metrics::{Histogram, Label, SharedString, Unit, describe_histogram, histogram};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tokio::time::Instant;
use tonic::Code;

use crate::trace::{self, KeyValue, NewSpan, Span, SpanKind, Trace};

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
const SERVER: &str = "rpc_server_call_duration_seconds";
const CLIENT: &str = "rpc_client_call_duration_seconds";

/// The convention's limits, and three below them: most calls here take less than its least.
pub(crate) const BUCKETS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

/// All codes there are, in their order.
const CODES: [(Code, &str); 17] = [
    (Code::Ok, "OK"),
    (Code::Cancelled, "CANCELLED"),
    (Code::Unknown, "UNKNOWN"),
    (Code::InvalidArgument, "INVALID_ARGUMENT"),
    (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
    (Code::NotFound, "NOT_FOUND"),
    (Code::AlreadyExists, "ALREADY_EXISTS"),
    (Code::PermissionDenied, "PERMISSION_DENIED"),
    (Code::ResourceExhausted, "RESOURCE_EXHAUSTED"),
    (Code::FailedPrecondition, "FAILED_PRECONDITION"),
    (Code::Aborted, "ABORTED"),
    (Code::OutOfRange, "OUT_OF_RANGE"),
    (Code::Unimplemented, "UNIMPLEMENTED"),
    (Code::Internal, "INTERNAL"),
    (Code::Unavailable, "UNAVAILABLE"),
    (Code::DataLoss, "DATA_LOSS"),
    (Code::Unauthenticated, "UNAUTHENTICATED"),
];

pub(crate) fn describe() {
    describe_histogram!(SERVER, Unit::Seconds, "Duration of the calls that this process has answered");
    describe_histogram!(CLIENT, Unit::Seconds, "Duration of the calls that this process has made");
}

/// Measures each call of the routes, by its method. A method that none of these descriptors has is `_OTHER`: a caller
/// must not decide how many time series there are.
pub(crate) fn measure_answers(routes: Router, descriptors: &[&[u8]]) -> Router {
    let methods = descriptors.iter().flat_map(|encoded| method_names(encoded));
    let by_path = methods.map(|method| (format!("/{method}"), Arc::new(Durations::of(SERVER, method)))).collect();
    let methods = Arc::new(Methods { by_path, other: Arc::new(Durations::of(SERVER, "_OTHER")) });
    routes.layer(from_fn_with_state(methods, answer))
}

/// The full names, such as `orders.v1.OrderService/CreateOrder`. Whoever built the descriptors has decoded them before.
pub(crate) fn method_names(encoded: &[u8]) -> Vec<String> {
    let files = FileDescriptorSet::decode(encoded).unwrap_or_default().file;
    let of_file = |file: &prost_types::FileDescriptorProto| -> Vec<String> {
        let of_service = |service: &prost_types::ServiceDescriptorProto| -> Vec<String> {
            let name = |method: &prost_types::MethodDescriptorProto| {
                format!("{}.{}/{}", file.package(), service.name(), method.name())
            };
            service.method.iter().map(name).collect()
        };
        file.service.iter().flat_map(of_service).collect()
    };
    files.iter().flat_map(of_file).collect()
}

#[derive(Debug)]
struct Methods {
    by_path: HashMap<String, Arc<Durations>>,
    other: Arc<Durations>,
}

async fn answer(State(methods): State<Arc<Methods>>, mut request: Request, next: Next) -> Response {
    let durations = methods.by_path.get(request.uri().path()).unwrap_or(&methods.other).clone();
    let span = begin_span(&durations, &mut request);
    let mut call = Answering { durations, span, began: Instant::now(), ended: false };
    let response = next.run(request).await;
    // An answer without a message has its status here, and every other in its trailers.
    if let Some(code) = read_code(response.headers()) {
        call.end(code);
        return response;
    }
    response.map(|body| Body::new(Answer { body, call }))
}

/// The span of the call. It takes the place of its caller's in the headers, so the work that it causes belongs to it.
///
/// Calls of gRPC's own services have none: load balancers make them without end.
fn begin_span(durations: &Durations, request: &mut Request) -> Option<Span> {
    if !trace::is_on() || durations.method.starts_with("grpc.") {
        return None;
    }
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    // A list may come in parts.
    let all = |name| {
        let values = request.headers().get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.collect::<Vec<_>>().join(",")
    };
    let parent = Trace::read(header(TRACEPARENT).unwrap_or_default(), &all(TRACESTATE));
    // The context that came says that already, to whatever the call causes.
    if parent.as_ref().is_some_and(|parent| !parent.is_sampled()) {
        return None;
    }
    let name = durations.method.to_string();
    let new =
        NewSpan { name, kind: SpanKind::Server, parent: parent.as_ref(), links: Vec::new(), attributes: Vec::new() };
    let mut span = new.begin()?;
    let trace = span.trace();
    // Most calls are not. What they cause belongs to no trace, and so is sampled by nobody: it needs no context.
    if !trace.is_sampled() {
        return None;
    }
    // Its parts are hexadecimal.
    if let Ok(own) = HeaderValue::from_str(&trace.to_string()) {
        request.headers_mut().insert(TRACEPARENT, own);
    }
    // That of another trace would go on with this one.
    if parent.is_none() {
        request.headers_mut().remove(TRACESTATE);
    }
    span.set(KeyValue::new("rpc.system.name", "grpc"));
    span.set(KeyValue::new("rpc.method", durations.method.to_string()));
    Some(span)
}

fn read_code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
}

/// A call that is not answered yet. If it is dropped, somebody has given it up: the caller, or a time limit.
struct Answering {
    durations: Arc<Durations>,
    span: Option<Span>,
    began: Instant,
    ended: bool,
}

impl Answering {
    fn end(&mut self, code: Code) {
        if !std::mem::replace(&mut self.ended, true) {
            self.durations.record(code, self.began.elapsed());
            let Some(mut span) = self.span.take() else { return };
            let name = code_name(code);
            span.set(KeyValue::new("rpc.status_code", name));
            if is_error(code, false) {
                span.fail_as(name);
            }
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

/// The body of an answer, whose trailers end its call.
struct Answer {
    body: Body,
    call: Answering,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &polled {
            Some(Ok(frame)) => {
                if let Some(code) = frame.trailers_ref().and_then(read_code) {
                    self.call.end(code);
                }
            }
            Some(Err(_)) => self.call.end(Code::Internal),
            None => self.call.end(Code::Unknown),
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Measures calls of one method that this process makes.
#[derive(Clone, Debug)]
pub struct CallsMade(Arc<Durations>);

impl CallsMade {
    /// Of the method with this full name, such as `events.v1.EventReceiver/Deliver`.
    pub fn of(method: &'static str) -> Self {
        Self(Arc::new(Durations::of(CLIENT, method)))
    }

    /// One has ended so.
    pub fn ended(&self, code: Code, took: Duration) {
        self.0.record(code, took);
    }
}

/// The durations of a method's calls, by status. A time series is made when a call first ends so.
#[derive(Debug)]
struct Durations {
    metric: &'static str,
    method: SharedString,
    by_code: [OnceLock<Histogram>; CODES.len()],
}

impl Durations {
    fn of(metric: &'static str, method: impl Into<SharedString>) -> Self {
        Self { metric, method: method.into(), by_code: array::from_fn(|_| OnceLock::new()) }
    }

    fn record(&self, code: Code, took: Duration) {
        let of_code = self.by_code.get(code as usize);
        let Some(durations) = of_code.map(|made| made.get_or_init(|| self.histogram(code))) else { return };
        durations.record(took.as_secs_f64());
    }

    fn histogram(&self, code: Code) -> Histogram {
        let name = code_name(code);
        let mut labels = vec![
            Label::new("rpc_system_name", "grpc"),
            Label::new("rpc_method", self.method.clone()),
            Label::new("rpc_status_code", name),
        ];
        if is_error(code, self.metric == CLIENT) {
            labels.push(Label::new("error_type", name));
        }
        histogram!(self.metric, labels)
    }
}

/// The name of a code, as the conventions write it.
pub fn code_name(code: Code) -> &'static str {
    CODES[code as usize].1
}

/// To a client, everything but OK. To a server, what is its own fault.
fn is_error(code: Code, to_client: bool) -> bool {
    match code {
        Code::Ok => false,
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => true,
        Code::Cancelled
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unauthenticated => to_client,
    }
}

#[cfg(test)]
mod tests {
    use super::{CODES, Code, method_names};

    #[test]
    fn each_code_is_found_at_its_number() {
        for (number, (code, name)) in (0_i32..).zip(CODES) {
            assert_eq!((Code::from(number), code as i32), (code, number), "{name}");
        }
    }

    #[test]
    fn methods_are_named_in_full() {
        let names = method_names(tonic_health::pb::FILE_DESCRIPTOR_SET);
        assert!(names.contains(&"grpc.health.v1.Health/Check".to_owned()), "{names:?}");
    }
}
