//! Hands leased events to a receiver and reads what became of each.

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

/// What is to be done with one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Applied, now or earlier: delete it.
    Handled,
    /// Failed for its own reasons: try it later, not before `after`, or, after the last attempt, keep it as dead.
    Retry { reason: String, after: Duration },
    /// Will never work: keep it as dead.
    Dead(String),
    /// Nothing is known of it: make it visible again, at no cost to it.
    Release,
    /// The same, but it may be why nothing is known: make it visible before all others, so that whoever delivers next, as
    /// a rule in a turn, finds out.
    Suspect,
    /// The receiver is not able to take it, alone, and yet took others: make it visible later, at no cost to it, and not
    /// before the time the receiver has asked for has passed several times.
    PutOff { after: Duration },
}

/// What became of a delivery.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// One verdict per event, in order.
    Answered(Vec<Verdict>),
    /// The receiver is up and refused the batch as a whole.
    Refused { reason: String, retry_after: Duration },
    /// The receiver was not reached, or is not able to work: says nothing about the events.
    Outage { reason: String, retry_after: Duration },
    /// The receiver had the events and did not answer: they may or may not have been applied, and one of them may be why.
    Silent { reason: String },
    /// The receiver does not let this relay deliver.
    Barred { reason: String },
}

impl Delivery {
    /// As it is counted.
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

/// What a receiver says of itself.
#[derive(Debug)]
pub(crate) enum Description {
    /// It is up, and remembers for so long what it has applied.
    Retention(Duration),
    /// It is up, and does not say.
    Unknown(&'static str),
    /// It did not answer.
    Away { reason: String, retry_after: Duration },
    /// It does not talk to this relay.
    Barred { reason: String },
}

/// A connection to the service that receives the events.
#[derive(Clone, Debug)]
pub(crate) struct Receiver {
    client: EventReceiverClient<Channel>,
    source: String,
}

impl Receiver {
    /// Connects at the first call, and again after a break. Pings find a connection whose other end is gone without a
    /// word, which would otherwise be learned only from expiring deadlines, again and again. They are sent only while a
    /// delivery waits, and so rarely that gRPC servers which count them as abuse (two within a call are borne by default)
    /// do not hang up.
    pub(crate) fn connect_lazily(receiver: Uri, source: String) -> Self {
        let channel = Endpoint::from(receiver)
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5))
            .connect_lazy();
        Self { client: EventReceiverClient::new(channel), source }
    }

    /// Asks the receiver for what a relay has to know before it delivers, and whether it is up.
    pub(crate) async fn describe(&mut self) -> Description {
        let mut request = Request::new(DescribeRequest {});
        request.set_timeout(DESCRIBE_LIMIT);
        let Ok(answer) = timeout(DESCRIBE_LIMIT, self.client.describe(request)).await else {
            return Description::Away { reason: "it does not describe itself".into(), retry_after: Duration::ZERO };
        };
        match answer {
            Ok(response) => {
                // A negative duration is none.
                let retention = response.into_inner().retention.and_then(|retention| retention.try_into().ok());
                retention.map_or(
                    Description::Unknown(
                        "does not say how long it remembers what it has applied: have its Describe answer a retention",
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
                    Description::Away { reason, retry_after }
                }
                Delivery::Silent { reason } => Description::Away { reason, retry_after: Duration::ZERO },
                Delivery::Answered(_) => Description::Unknown("answers with an error that is none"),
            },
        }
    }

    /// Delivers the rows as one batch, in their order, giving up at `deadline`.
    pub(crate) async fn deliver(&mut self, rows: &[LeasedRow], deadline: Instant) -> Delivery {
        let events = rows.iter().map(|row| event(row, &self.source)).collect();
        let mut request = Request::new(DeliverRequest { events });
        // The receiver learns the deadline too, and need not work on what nobody waits for.
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
        data: row.payload.clone().into(),
        traceparent: row.traceparent.clone().unwrap_or_default(),
        tracestate: row.tracestate.clone().unwrap_or_default(),
    }
}

/// Results are matched by id, not by place, so that a receiver which leaves one out does not have its neighbour deleted.
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

/// Tells an outage, which says nothing about the events and must cost them nothing, from a refusal, and both from silence,
/// after which nobody can know without trying again.
fn read_status(status: &Status) -> Delivery {
    let reason = format!("{:?}: {}", status.code(), status.message());
    let retry_after = status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
    // A status that tonic made of a broken connection has a source, whatever its code; one that the receiver sent has none.
    if let Some(source) = status.source() {
        return match is_of_connecting(source) {
            true => Delivery::Outage { reason, retry_after },
            false => Delivery::Silent { reason },
        };
    }
    match status.code() {
        Code::ResourceExhausted | Code::Aborted | Code::Unavailable => Delivery::Outage { reason, retry_after },
        // Deadlines come as CANCELLED from tonic servers. OK with an error is a reply that was cut short.
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

/// Whether the connection was never made, so that nothing can have been applied.
fn is_of_connecting(error: &(dyn Error + 'static)) -> bool {
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
    fn every_code_a_receiver_can_send_is_judged() {
        let judged = (0..=16).map(|number| {
            let code = Code::from(number);
            (code, read_status(&Status::new(code, "as the test wants it")).as_str())
        });
        assert_eq!(
            judged.collect::<Vec<_>>(),
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
    fn what_tonic_says_of_a_connection_is_judged_by_whether_it_was_made() {
        let never_made = Status::from_error(Box::new(ConnectError("refused".into())));
        assert_eq!(read_status(&never_made).as_str(), "outage");
        let broken = Status::from_error(Box::new(std::io::Error::other("broken pipe")));
        assert_eq!(read_status(&broken).as_str(), "silent");
    }

    #[test]
    fn the_time_a_receiver_asks_for_is_read() {
        let status = Status::with_error_details(
            Code::Unavailable,
            "busy",
            ErrorDetails::with_retry_info(Some(Duration::from_secs(7))),
        );
        let super::Delivery::Outage { retry_after, .. } = read_status(&status) else { panic!("an outage") };
        assert_eq!(retry_after, Duration::from_secs(7));
    }
}
