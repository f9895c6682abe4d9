//! Hands leased events to the receiver and reads what became of each.

use std::{collections::HashMap, error::Error, time::Duration};

use proto::events::v1::{
    DeliverRequest, DeliverResponse, Event, EventResult, Outcome, event_receiver_client::EventReceiverClient,
};
use tokio::time::{Instant, timeout_at};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};
use tracing::{error, warn};

use crate::{Settings, lease::LeasedRow};

/// What is to be done with one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Applied, now or earlier: delete it.
    Handled,
    /// Failed for its own reasons: try it later, or, after the last attempt, keep it as dead.
    Retry(String),
    /// Will never work: keep it as dead.
    Dead(String),
    /// Nothing is known of it: make it visible again, at no cost to it.
    Release,
}

/// What became of a delivery.
#[derive(Debug)]
pub(crate) enum Delivery {
    /// One verdict per event, in order.
    Answered(Vec<Verdict>),
    /// The receiver is up and refused the batch as a whole.
    Refused(String),
    /// The receiver was not reached, or did not answer: the events may or may not have been applied.
    Unknown,
}

/// A connection to the service that receives the events.
#[derive(Clone, Debug)]
pub(crate) struct Receiver {
    client: EventReceiverClient<Channel>,
    source: String,
}

impl Receiver {
    /// Connects at the first delivery, and again after a break. Pings find a connection whose other end is gone without
    /// a word, which would otherwise be learned only from expiring deadlines, again and again. They are sent only while a
    /// delivery waits, and so rarely that gRPC servers which count them as abuse (two within a call are borne by default)
    /// do not hang up.
    pub(crate) fn connect_lazily(settings: &Settings) -> Self {
        let channel = Endpoint::from(settings.receiver.clone())
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5))
            .connect_lazy();
        Self { client: EventReceiverClient::new(channel), source: settings.source.clone() }
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
            Err(_) => {
                warn!(events = rows.len(), "no reply within the lease");
                Delivery::Unknown
            }
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
            None => Verdict::Retry("NO_RESULT: the receiver answered without a result for this event".into()),
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
        Outcome::Retry | Outcome::Unspecified => Verdict::Retry(reason()),
    }
}

/// Tells an outage from a refusal: an outage says nothing about the events, and must cost them nothing.
fn read_status(status: &Status) -> Delivery {
    // A status that tonic made of a broken connection has a source, whatever its code; one that the receiver sent has none.
    let broken = status.source().is_some();
    let reason = format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        _ if broken => warn!(reason, "receiver not reached"),
        // Deadlines come as CANCELLED from tonic servers. OK with an error is a reply that was cut short.
        Code::Ok
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Unavailable => warn!(reason, "receiver did not take the batch"),
        // No event is at fault, and no repetition helps: somebody has to act.
        Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => {
            error!(reason, "receiver does not let this relay deliver: check RELAY_RECEIVER and its access");
        }
        Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Internal
        | Code::DataLoss => return Delivery::Refused(reason),
    }
    Delivery::Unknown
}
