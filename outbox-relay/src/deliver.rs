//! Delivers leased events to a receiver, and turns the reply into a verdict on each.

use std::{collections::HashMap, error::Error, time::Duration};

use proto::events::v1::{
    DeliverRequest, DeliverResponse, DescribeRequest, Event, EventResult, Outcome,
    event_receiver_client::EventReceiverClient,
};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{
    Code, ConnectError, Request, Status,
    transport::{Channel, Endpoint, Uri},
};
use tonic_types::StatusExt;

use crate::lease::LeasedRow;

/// How long a receiver may take to describe itself.
const DESCRIBE_LIMIT: Duration = Duration::from_secs(2);

/// How to settle one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Applied, now or earlier: delete it.
    Handled,
    /// It failed, for a reason of its own: retry it, no earlier than `after`. After its last attempt, mark it dead.
    Retry { reason: String, after: Duration },
    /// It can never be applied: mark it dead.
    Dead(String),
    /// Nothing is known about it: make it visible again. It spends no attempt.
    Release,
    /// Nothing is known about it, and it may be the cause of a failed delivery: make it visible before all others. It
    /// spends no attempt. The next delivery, usually by a probe, finds out.
    Suspect,
    /// The receiver reports an outage for it alone, and takes others: make it visible later. It spends no attempt. The
    /// delay is at least several times `after`, the time that the receiver has asked for, which counts up to a limit.
    Defer { after: Duration },
}

/// The result of a delivery.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// One verdict per event, in order.
    Answered(Vec<Verdict>),
    /// The receiver is up and refused the batch as a whole.
    Refused { reason: String, retry_after: Duration },
    /// The receiver was not reached, or cannot work now. This says nothing about the events.
    Outage { reason: String, retry_after: Duration },
    /// The receiver got the events and did not answer. They may have been applied, and one of them may be the cause.
    Silent { reason: String },
    /// The receiver does not allow this relay to deliver.
    Barred { reason: String },
}

impl Delivery {
    /// The value of the metric's label.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Answered(_) => "answered",
            Self::Refused { .. } => "refused",
            Self::Outage { .. } => "outage",
            Self::Silent { .. } => "silent",
            Self::Barred { .. } => "barred",
        }
    }
}

/// A receiver's answer to Describe.
#[derive(Debug)]
pub(crate) enum Description {
    /// It is up, and remembers applied events for this long.
    Retention(Duration),
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
    client: EventReceiverClient<Channel>,
    source: String,
}

impl Receiver {
    /// Connects at the first call, and again after a break.
    ///
    /// Pings detect a connection whose other end has vanished. Without them, only the deadlines of one call after
    /// another would. They are sent only while a delivery waits. They are rare, since some gRPC servers count pings as
    /// abuse and close the connection; by default these tolerate two within a call.
    pub(crate) fn connect_lazily(receiver: Uri, source: String) -> Self {
        let channel = Endpoint::from(receiver)
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5))
            .connect_lazy();
        Self { client: EventReceiverClient::new(channel), source }
    }

    /// Asks the receiver whether it is up, and for how long it remembers applied events.
    pub(crate) async fn describe(&mut self) -> Description {
        let mut request = Request::new(DescribeRequest {});
        request.set_timeout(DESCRIBE_LIMIT);
        let Ok(answer) = timeout(DESCRIBE_LIMIT, self.client.describe(request)).await else {
            return Description::Unavailable { reason: "no answer to Describe".into(), retry_after: Duration::ZERO };
        };
        match answer {
            Ok(response) => {
                // The conversion fails for a negative duration.
                let retention = response.into_inner().retention.and_then(|retention| retention.try_into().ok());
                retention.map_or(
                    Description::Unknown(
                        "does not say how long it remembers applied events: make its Describe answer a retention",
                    ),
                    Description::Retention,
                )
            }
            Err(status) if status.code() == Code::Unimplemented => Description::Unknown(
                "does not implement events.v1.EventReceiver.Describe: deploy one that does, or correct the route",
            ),
            Err(status) => match read_status(&status) {
                Delivery::Barred { reason } => Description::Barred { reason },
                Delivery::Outage { reason, retry_after } | Delivery::Refused { reason, retry_after } => {
                    Description::Unavailable { reason, retry_after }
                }
                Delivery::Silent { reason } => Description::Unavailable { reason, retry_after: Duration::ZERO },
                // `read_status` never makes this of a status.
                Delivery::Answered(_) => Description::Unknown("answers Describe with a status that is no error"),
            },
        }
    }

    /// Delivers the rows as one batch, in their order, giving up at `deadline`.
    pub(crate) async fn deliver(&mut self, rows: &[LeasedRow], deadline: Instant) -> Delivery {
        let events = rows.iter().map(|row| event(row, &self.source)).collect();
        let mut request = Request::new(DeliverRequest { events });
        // The receiver learns the deadline too, so that it can stop when this relay no longer waits.
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        match timeout_at(deadline, self.client.deliver(request)).await {
            Ok(Ok(response)) => Delivery::Answered(read_verdicts(rows, response.into_inner())),
            Ok(Err(status)) => read_status(&status),
            Err(_) => Delivery::Silent { reason: "no reply within the lease".into() },
        }
    }
}

fn event(row: &LeasedRow, source: &str) -> Event {
    Event {
        id: row.event_id.to_string(),
        source: source.to_owned(),
        r#type: row.event_type.clone(),
        subject: row.aggregate_id.to_string(),
        sequence: row.sequence.into(),
        time: Some(outbox::timestamp(row.created_at)),
        data: row.payload.clone(),
        traceparent: row.traceparent.clone().unwrap_or_default(),
        tracestate: row.tracestate.clone().unwrap_or_default(),
    }
}

/// Matches results by id, not by position: if a receiver leaves one out, no other event takes its place.
fn read_verdicts(rows: &[LeasedRow], response: DeliverResponse) -> Vec<Verdict> {
    let mut results: HashMap<String, EventResult> =
        response.results.into_iter().map(|result| (result.event_id.clone(), result)).collect();
    rows.iter()
        .map(|row| match results.remove(&row.event_id.to_string()) {
            None => retry("NO_RESULT: the receiver answered without a result for this event".into()),
            Some(result) => read_result(&result),
        })
        .collect()
}

fn read_result(result: &EventResult) -> Verdict {
    let code = if result.reason.is_empty() { result.outcome().as_str_name() } else { &result.reason };
    let reason = || format!("{code}: {}", result.detail);
    match result.outcome() {
        Outcome::Applied | Outcome::Duplicate => Verdict::Handled,
        Outcome::Rejected => Verdict::Dead(reason()),
        Outcome::Retry | Outcome::Unspecified => retry(reason()),
    }
}

fn retry(reason: String) -> Verdict {
    Verdict::Retry { reason, after: Duration::ZERO }
}

/// Distinguishes an outage, a refusal and silence. An outage says nothing about the events and must cost them no
/// attempt. After silence, only another delivery can tell whether the events were applied.
fn read_status(status: &Status) -> Delivery {
    let reason = format!("{:?}: {}", status.code(), status.message());
    let retry_after = status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
    // A status that tonic made from a broken connection has a source, whatever its code. A status from the receiver has
    // none.
    if let Some(source) = status.source() {
        return match is_connect_error(source) {
            true => Delivery::Outage { reason, retry_after },
            false => Delivery::Silent { reason },
        };
    }
    match status.code() {
        Code::ResourceExhausted | Code::Aborted | Code::Unavailable => Delivery::Outage { reason, retry_after },
        // Tonic servers report a missed deadline as CANCELLED. An error of code OK is a reply that was cut short.
        Code::Ok | Code::Cancelled | Code::DeadlineExceeded => Delivery::Silent { reason },
        Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => Delivery::Barred { reason },
        Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Internal
        | Code::DataLoss => Delivery::Refused { reason, retry_after },
    }
}

/// Whether the connection was never made, so that no event can have been applied.
fn is_connect_error(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |&error| error.source());
    causes.any(<dyn Error>::is::<ConnectError>)
}

#[cfg(test)]
mod tests {
    use super::read_status;
    use std::time::Duration;
    use tonic::{Code, ConnectError, Status};
    use tonic_types::{ErrorDetails, StatusExt};

    #[test]
    fn each_status_code_is_an_outage_a_refusal_silence_or_a_bar() {
        let results = (0..=16).map(|number| {
            let code = Code::from(number);
            (code, read_status(&Status::new(code, "as the test wants it")).as_str())
        });
        assert_eq!(
            results.collect::<Vec<_>>(),
            [
                (Code::Ok, "silent"),
                (Code::Cancelled, "silent"),
                (Code::Unknown, "refused"),
                (Code::InvalidArgument, "refused"),
                (Code::DeadlineExceeded, "silent"),
                (Code::NotFound, "refused"),
                (Code::AlreadyExists, "refused"),
                (Code::PermissionDenied, "barred"),
                (Code::ResourceExhausted, "outage"),
                (Code::FailedPrecondition, "refused"),
                (Code::Aborted, "outage"),
                (Code::OutOfRange, "refused"),
                (Code::Unimplemented, "barred"),
                (Code::Internal, "refused"),
                (Code::Unavailable, "outage"),
                (Code::DataLoss, "refused"),
                (Code::Unauthenticated, "barred"),
            ]
        );
    }

    #[test]
    fn a_connection_never_made_is_an_outage_and_one_that_broke_is_silence() {
        let never_made = Status::from_error(Box::new(ConnectError("refused".into())));
        assert_eq!(read_status(&never_made).as_str(), "outage");
        let broken = Status::from_error(Box::new(std::io::Error::other("broken pipe")));
        assert_eq!(read_status(&broken).as_str(), "silent");
    }

    #[test]
    fn the_retry_delay_of_a_receiver_is_read() {
        let status = Status::with_error_details(
            Code::Unavailable,
            "busy",
            ErrorDetails::with_retry_info(Some(Duration::from_secs(7))),
        );
        let super::Delivery::Outage { retry_after, .. } = read_status(&status) else { panic!("an outage") };
        assert_eq!(retry_after, Duration::from_secs(7));
    }
}
