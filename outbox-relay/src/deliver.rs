//! Delivers leased events to a receiver, and reads what it says of each, or how the call failed.

use std::{collections::HashMap, error::Error, time::Duration};

use chassis::{
    CallsMade, Tls, code_name, explain,
    trace::{KeyValue, Span, Trace},
};
use prost_types::Timestamp;
use proto::events::v1::{
    DeliverRequest, DeliverResponse, DescribeRequest, DescribeResponse, Event, EventResult, Outcome, RecallRequest,
    event_receiver_client::EventReceiverClient,
};
use tokio::time::{Instant, error::Elapsed, timeout, timeout_at};
use tonic::{
    Code, ConnectError, Request, Status,
    codec::CompressionEncoding,
    transport::{Endpoint, Uri},
};
use tonic_types::StatusExt;

use crate::{
    delivery::{Answer, Delivery, Failed, Failure},
    http_answer::{GrpcAnswers, HttpAnswer},
    leased_row::LeasedRow,
    trace_events::{Destination, begin_delivery, trace_of},
};

/// How long a receiver may take to describe itself.
const DESCRIBE_LIMIT: Duration = Duration::from_secs(2);
/// How many bytes of headers or trailers an answer may have. Errors are sent there, and some receivers send whole stack
/// traces. A longer answer would look like a broken connection. hyper's own limit is 16 KiB.
const HEADER_BYTES_MAX: u32 = 1024 * 1024;
/// A reason is cut to this many characters. A receiver decides how long its errors are.
const REASON_CHARS_MAX: usize = 1000;
/// Pings are at least this far apart. The receiver usually answers within it.
const PING_INTERVAL_MIN: Duration = Duration::from_secs(10);
/// How long a receiver may take to answer a ping.
const PING_LIMIT: Duration = Duration::from_secs(5);

/// A receiver's answer to Describe.
#[derive(Debug)]
pub(crate) enum Description {
    /// It is up.
    Ready {
        /// How long it remembers applied events.
        retention: Duration,
        /// The types of events that it handles; none if it does not say.
        types: Vec<String>,
        /// The services whose events it accepts; none if it accepts any.
        sources: Vec<String>,
        /// Whether a batch may have several events of an aggregate: it applies them in order, and none behind one that it
        /// refuses.
        ordered: bool,
    },
    /// It is up, and does not say how long it remembers applied events. The text says what to do.
    Unknown(&'static str),
    /// It did not answer.
    Unavailable { reason: String, retry_after: Duration },
    /// It does not allow this relay to call it.
    Barred { reason: String },
}

/// A connection to the service that receives the events.
#[derive(Clone, Debug)]
pub(crate) struct Receiver {
    client: EventReceiverClient<GrpcAnswers>,
    source: String,
    destination: Destination,
    deliveries: CallsMade,
    descriptions: CallsMade,
}

impl Receiver {
    /// Connects at the first call, and again after a break.
    ///
    /// It accepts compressed answers: a grpcio server that compresses does so for every client, whatever that accepts.
    pub(crate) fn connect_lazily(
        receiver: Uri,
        source: String,
        destination: Destination,
        lease: Duration,
        tls: &Tls,
    ) -> Self {
        let endpoint = Endpoint::from(receiver)
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_keep_alive_interval(ping_interval(lease))
            .keep_alive_timeout(PING_LIMIT);
        let client = EventReceiverClient::new(GrpcAnswers::of(chassis::connect_lazily(&endpoint, tls)))
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Deflate);
        Self {
            client,
            source,
            destination,
            deliveries: CallsMade::of("events.v1.EventReceiver/Deliver"),
            descriptions: CallsMade::of("events.v1.EventReceiver/Describe"),
        }
    }

    pub(crate) fn destination(&self) -> &Destination {
        &self.destination
    }

    /// For questions of an operator, and no deliveries.
    pub(crate) fn connect_to_ask(receiver: Uri, tls: &Tls) -> Self {
        Self::connect_lazily(receiver, String::new(), Destination::default(), DESCRIBE_LIMIT, tls)
    }

    /// Asks which of these events it has on record, and since when. Each id is answered with its time, or none.
    ///
    /// # Errors
    /// Why it has not answered.
    pub(crate) async fn recall(&mut self, event_ids: Vec<String>) -> Result<Vec<(String, Option<Timestamp>)>, String> {
        let mut request = Request::new(RecallRequest { event_ids });
        set_trace(&mut request, None);
        request.set_timeout(DESCRIBE_LIMIT);
        let asked = timeout(DESCRIBE_LIMIT, self.client.recall(request)).await;
        let answered = asked.map_err(|_| "no answer to Recall".to_owned())?;
        let events = answered.map_err(|status| read_status(&status).reason)?.into_inner().events;
        Ok(events.into_iter().map(|event| (event.event_id, event.apply_time)).collect())
    }

    /// Asks the receiver whether it is up, and what it accepts.
    pub(crate) async fn describe(&mut self) -> Description {
        let mut request = Request::new(DescribeRequest {});
        set_trace(&mut request, None);
        request.set_timeout(DESCRIBE_LIMIT);
        let began = Instant::now();
        let asked = timeout(DESCRIBE_LIMIT, self.client.describe(request)).await;
        self.descriptions.ended(code_of(&asked), began.elapsed());
        let Ok(answer) = asked else {
            return Description::Unavailable { reason: "no answer to Describe".into(), retry_after: Duration::ZERO };
        };
        match answer {
            Ok(response) => read_description(response.into_inner()),
            Err(status) if status.code() == Code::Unimplemented => Description::Unknown(
                "does not implement events.v1.EventReceiver.Describe: deploy one that does, or correct the route",
            ),
            Err(status) => {
                let Failed { failure, reason, retry_after } = read_status(&status);
                match failure {
                    Failure::Barred => Description::Barred { reason },
                    // Describe carries no event, so whatever is wrong lies in the receiver, or on the way to it.
                    Failure::Unreachable
                    | Failure::Unavailable
                    | Failure::Silent
                    | Failure::Refused
                    | Failure::TooLarge
                    | Failure::Unmatched => Description::Unavailable { reason, retry_after },
                }
            }
        }
    }

    /// Delivers the rows as one batch, in their order, giving up at `deadline`.
    pub(crate) async fn deliver(&mut self, rows: &[LeasedRow], deadline: Instant) -> Delivery {
        let events = rows.iter().map(|row| event(row, &self.source, self.destination.id)).collect();
        let mut request = Request::new(DeliverRequest { events });
        let mut span = begin_delivery(rows, &self.destination);
        set_trace(&mut request, span.as_ref());
        // The receiver learns the deadline too, so that it can stop when this relay no longer waits.
        let began = Instant::now();
        request.set_timeout(deadline.saturating_duration_since(began));
        let called = timeout_at(deadline, self.client.deliver(request)).await;
        let code = code_of(&called);
        self.deliveries.ended(code, began.elapsed());
        if let Some(span) = &mut span {
            span.set(KeyValue::new("rpc.status_code", code_name(code)));
            if code != Code::Ok {
                span.fail_as(code_name(code));
            }
        }
        match called {
            Ok(Ok(response)) => read_answers(rows, response.into_inner()),
            Ok(Err(status)) => Delivery::Failed(read_status(&status)),
            Err(_) => Delivery::Failed(failed(Failure::Silent, "no reply within the lease")),
        }
    }
}

/// Without a span, the receiver's sampler would make each such call a trace of its own. So it is told not to.
fn set_trace<T>(request: &mut Request<T>, span: Option<&Span>) {
    let trace = span.map_or_else(Trace::not_sampled, Span::trace);
    // Its parts are hexadecimal.
    if let Ok(traceparent) = trace.to_string().parse() {
        request.metadata_mut().insert("traceparent", traceparent);
    }
}

/// How a call ended, for the metrics.
fn code_of<T>(called: &Result<Result<T, Status>, Elapsed>) -> Code {
    match called {
        Ok(Ok(_)) => Code::Ok,
        // A reply that was cut short.
        Ok(Err(status)) if status.code() == Code::Ok => Code::Unknown,
        Ok(Err(status)) => status.code(),
        Err(_) => Code::DeadlineExceeded,
    }
}

fn event(row: &LeasedRow, source: &str, subscription_id: i16) -> Event {
    let own = trace_of(row, subscription_id).map(|trace| trace.to_string());
    Event {
        id: row.event_id.to_string(),
        source: source.to_owned(),
        r#type: row.event_type.clone(),
        subject: row.aggregate_id.to_string(),
        sequence: row.sequence.into(),
        time: Some(outbox::timestamp(row.created_at)),
        data: row.payload.clone(),
        traceparent: own.or_else(|| row.traceparent.clone()).unwrap_or_default(),
        tracestate: row.tracestate.clone().unwrap_or_default(),
    }
}

/// How long a receiver may say nothing during a delivery before it is pinged.
///
/// Pings detect a connection whose other end has vanished. Without them, only the deadlines of one call after another
/// would. They are sent only while a call waits.
///
/// But servers count them. By default grpc-java hangs up at the third ping within a call, and others at the fourth. On
/// a connection that was idle, hyper sends the first one as the call begins. So only one more may fit into a delivery,
/// which takes up to three quarters of the lease. A second is added, since a call does not end on time to the instant.
fn ping_interval(lease: Duration) -> Duration {
    PING_INTERVAL_MIN.max(lease * 3 / 4 / 2 + Duration::from_secs(1))
}

fn read_description(description: DescribeResponse) -> Description {
    let DescribeResponse { retention, types, sources, ordered } = description;
    // The conversion fails for a negative duration.
    match retention.and_then(|retention| retention.try_into().ok()) {
        Some(retention) => Description::Ready { retention, types, sources, ordered },
        None => Description::Unknown(
            "does not say how long it remembers applied events: make its Describe answer a retention",
        ),
    }
}

/// Matches results by id, not by position: if a receiver leaves one out, no other event takes its place.
fn read_answers(rows: &[LeasedRow], response: DeliverResponse) -> Delivery {
    let (count, first) = (response.results.len(), response.results.first().map(|result| result.event_id.clone()));
    let mut results: HashMap<String, EventResult> =
        response.results.into_iter().map(|result| (result.event_id.clone(), result)).collect();
    let answers: Vec<_> = rows.iter().map(|row| results.remove(&row.event_id.to_string())).collect();
    if !answers.is_empty() && answers.iter().all(Option::is_none) {
        let reason = first.map_or("NO_RESULT: the answer has no results".into(), |first| {
            format!("NO_RESULT: none of the {count} results names an event of the batch; the first names \"{first}\"")
        });
        return Delivery::Failed(failed(Failure::Unmatched, reason));
    }
    let missing = || Answer::Retry("NO_RESULT: the receiver answered without a result for this event".into());
    Delivery::Answered(answers.into_iter().map(|result| result.as_ref().map_or_else(missing, read_result)).collect())
}

fn read_result(result: &EventResult) -> Answer {
    let code = if result.reason.is_empty() { result.outcome().as_str_name() } else { &result.reason };
    let reason = || {
        let detail = if result.detail.is_empty() { "the receiver gave no details" } else { &result.detail };
        cut(format!("{code}: {detail}"))
    };
    match result.outcome() {
        Outcome::Applied | Outcome::Duplicate => Answer::Taken,
        Outcome::Rejected => Answer::Rejected(reason()),
        Outcome::Retry | Outcome::Unspecified => Answer::Retry(reason()),
    }
}

fn failed(failure: Failure, reason: impl Into<String>) -> Failed {
    Failed { failure, reason: cut(reason.into()), retry_after: Duration::ZERO }
}

fn cut(mut reason: String) -> String {
    if let Some((end, _)) = reason.char_indices().nth(REASON_CHARS_MAX) {
        reason.truncate(end);
    }
    reason
}

/// Reads what made a call fail. Only after some failures can one of the events be the cause.
fn read_status(status: &Status) -> Failed {
    // A status that was made here has a source, whatever its code: a broken connection, or an HTTP response that is no
    // gRPC answer. A status from the receiver has none.
    if let Some(answer) = causes(status.source()).find_map(<dyn Error>::downcast_ref::<HttpAnswer>) {
        return Failed { retry_after: answer.retry_after, ..failed(answer.failure(), answer.to_string()) };
    }
    let reason = explain(status);
    match status.source() {
        Some(cause) if is_connect_error(cause) => failed(Failure::Unreachable, reason),
        Some(_) => failed(Failure::Silent, reason),
        None => {
            let retry_info = status.get_details_retry_info();
            let failure = read_code(status.code(), retry_info.is_some());
            let retry_after = retry_info.and_then(|info| info.retry_delay).unwrap_or_default();
            Failed { retry_after, ..failed(failure, reason) }
        }
    }
}

/// What a status means that the receiver, or a proxy that speaks gRPC, has sent.
fn read_code(code: Code, has_retry_info: bool) -> Failure {
    match code {
        Code::Aborted | Code::Unavailable => Failure::Unavailable,
        // A receiver that is overloaded says when to come again. Without that, it may mean the size of the message:
        // most servers report a message over their limit so, and tonic as OUT_OF_RANGE.
        Code::ResourceExhausted if has_retry_info => Failure::Unavailable,
        Code::ResourceExhausted | Code::OutOfRange => Failure::TooLarge,
        // Tonic servers report a missed deadline as CANCELLED. An error of code OK is a reply that was cut short.
        Code::Ok | Code::Cancelled | Code::DeadlineExceeded => Failure::Silent,
        Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => Failure::Barred,
        Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::Internal
        | Code::DataLoss => Failure::Refused,
    }
}

/// Whether the connection was never made, so that no event can have been applied.
fn is_connect_error(error: &(dyn Error + 'static)) -> bool {
    causes(Some(error)).any(<dyn Error>::is::<ConnectError>)
}

/// The error, and all that are behind it.
fn causes<'a>(error: Option<&'a (dyn Error + 'static)>) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(error, |&error| error.source())
}

#[cfg(test)]
mod tests {
    use proto::events::v1::{EventResult, Outcome};

    use super::{Answer, Failed, Failure, PING_LIMIT, ping_interval, read_code, read_result, read_status};
    use std::time::Duration;
    use tonic::{Code, ConnectError, Status};
    use tonic_types::{ErrorDetails, StatusExt};

    #[test]
    fn each_status_code_has_its_meaning() {
        let read = |number| (Code::from(number), read_code(Code::from(number), false));
        assert_eq!(
            (0..=16).map(read).collect::<Vec<_>>(),
            [
                (Code::Ok, Failure::Silent),
                (Code::Cancelled, Failure::Silent),
                (Code::Unknown, Failure::Refused),
                (Code::InvalidArgument, Failure::Refused),
                (Code::DeadlineExceeded, Failure::Silent),
                (Code::NotFound, Failure::Refused),
                (Code::AlreadyExists, Failure::Refused),
                (Code::PermissionDenied, Failure::Barred),
                (Code::ResourceExhausted, Failure::TooLarge),
                (Code::FailedPrecondition, Failure::Refused),
                (Code::Aborted, Failure::Unavailable),
                (Code::OutOfRange, Failure::TooLarge),
                (Code::Unimplemented, Failure::Barred),
                (Code::Internal, Failure::Refused),
                (Code::Unavailable, Failure::Unavailable),
                (Code::DataLoss, Failure::Refused),
                (Code::Unauthenticated, Failure::Barred),
            ]
        );
    }

    #[test]
    fn a_time_to_retry_changes_the_meaning_of_one_code_only() {
        for code in (0..=16).map(Code::from) {
            let changed = read_code(code, true) != read_code(code, false);
            assert_eq!(changed, code == Code::ResourceExhausted, "{code:?}");
        }
        assert_eq!(read_code(Code::ResourceExhausted, true), Failure::Unavailable);
    }

    #[test]
    fn a_connection_never_made_is_an_outage_and_one_that_broke_is_silence() {
        let never_made = Status::from_error(Box::new(ConnectError("refused".into())));
        assert_eq!(read_status(&never_made).failure, Failure::Unreachable);
        let broken = Status::from_error(Box::new(std::io::Error::other("broken pipe")));
        assert_eq!(read_status(&broken).failure, Failure::Silent);
    }

    #[test]
    fn a_result_without_a_reason_says_so() {
        let mut result = EventResult { outcome: Outcome::Retry.into(), ..EventResult::default() };
        assert_eq!(read_result(&result), Answer::Retry("OUTCOME_RETRY: the receiver gave no details".into()));
        (result.reason, result.detail) = ("BUSY".into(), "later".into());
        assert_eq!(read_result(&result), Answer::Retry("BUSY: later".into()));
    }

    #[test]
    fn the_retry_delay_of_a_receiver_is_read() {
        let status = Status::with_error_details(
            Code::ResourceExhausted,
            "busy",
            ErrorDetails::with_retry_info(Some(Duration::from_secs(7))),
        );
        let Failed { failure, retry_after, .. } = read_status(&status);
        assert_eq!((failure, retry_after), (Failure::Unavailable, Duration::from_secs(7)));
    }

    /// grpc-java hangs up at the third ping within a call. The first one may come as the call begins.
    #[test]
    fn two_pings_at_most_fit_into_a_delivery_and_notice_a_vanished_receiver_before_its_end() {
        for seconds in 1..=3600 {
            let lease = Duration::from_secs(seconds);
            let (delivery, interval) = (lease * 3 / 4, ping_interval(lease));
            assert!(2 * interval > delivery, "{seconds} s: {interval:?}");
            assert!(interval >= Duration::from_secs(10), "{seconds} s: {interval:?}");
            assert!(seconds < 30 || interval + PING_LIMIT < delivery, "{seconds} s: {interval:?}");
        }
    }
}
