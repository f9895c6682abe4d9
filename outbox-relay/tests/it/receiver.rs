//! The receiver: a real gRPC server that replies as a test tells it, and logs the deliveries.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use prost_types::Timestamp;
use proto::events::v1::{
    DeliverRequest, DeliverResponse, DescribeRequest, DescribeResponse, Event, EventResult, Outcome, RecallRequest,
    RecallResponse, RecalledEvent,
    event_receiver_server::{EventReceiver, EventReceiverServer},
};
use testkit::processes::free_port;
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Code, Request, Response, Status, async_trait,
    transport::{Server, server::TcpIncoming},
};
use tonic_types::{ErrorDetails, StatusExt};
use uuid::Uuid;

use crate::wait::AMPLE;

/// The receiver's reply to a batch.
pub(crate) enum Reply {
    Results(Vec<EventResult>),
    Refuse(Code),
    /// Refuses with a `RetryInfo`.
    Postpone(Code, Duration),
    /// No reply until the token is cancelled.
    Held(CancellationToken, Box<Reply>),
}

impl Reply {
    pub(crate) fn apply(events: &[Event]) -> Self {
        Self::each(events, applied)
    }

    pub(crate) fn each(events: &[Event], result: impl FnMut(&Event) -> EventResult) -> Self {
        Self::Results(events.iter().map(result).collect())
    }

    pub(crate) fn held(self, until: &CancellationToken) -> Self {
        Self::Held(until.clone(), Box::new(self))
    }

    pub(crate) fn never() -> Self {
        Self::Results(Vec::new()).held(&CancellationToken::new())
    }
}

pub(crate) fn result(event: &Event, outcome: Outcome, reason: &str, detail: &str) -> EventResult {
    EventResult {
        event_id: event.id.clone(),
        outcome: outcome.into(),
        reason: reason.to_owned(),
        detail: detail.to_owned(),
    }
}

pub(crate) fn applied(event: &Event) -> EventResult {
    result(event, Outcome::Applied, "", "")
}

pub(crate) fn retry(event: &Event) -> EventResult {
    result(event, Outcome::Retry, "BUSY", "later")
}

pub(crate) fn rejected(event: &Event) -> EventResult {
    result(event, Outcome::Rejected, "UNDECODABLE", "no such type")
}

pub(crate) fn id_of(event: &Event) -> Uuid {
    event.id.parse().unwrap()
}

/// One delivery.
#[derive(Clone, Debug)]
pub(crate) struct Delivery {
    pub(crate) at: Instant,
    pub(crate) has_deadline: bool,
    pub(crate) events: Vec<Event>,
}

/// All deliveries.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) deliveries: Vec<Delivery>,
    /// Number of calls of Describe.
    pub(crate) described: usize,
    /// The batch in which an event of each subject is in flight.
    in_flight: HashMap<String, usize>,
    applied: HashSet<String>,
    /// Events that arrived while another batch with their subject was in flight, or out of sequence within their batch.
    pub(crate) disorders: Vec<String>,
}

impl Log {
    /// Event ids in the order of arrival, one for each delivery of an event.
    pub(crate) fn ids(&self) -> Vec<Uuid> {
        self.deliveries.iter().flat_map(|delivery| &delivery.events).map(id_of).collect()
    }

    pub(crate) fn times(&self, event_id: Uuid) -> usize {
        self.ids().iter().filter(|id| **id == event_id).count()
    }

    fn arrive(&mut self, events: Vec<Event>, has_deadline: bool) -> usize {
        let batch = self.deliveries.len();
        let mut last = HashMap::new();
        for event in &events {
            let of = format!("event {} of {}", event.sequence, event.subject);
            if let Some(other) = self.in_flight.insert(event.subject.clone(), batch).filter(|other| *other != batch) {
                self.disorders.push(format!("{of} came in batch {batch}, while batch {other} was in flight"));
            }
            if last.insert(&event.subject, event.sequence).is_some_and(|before| before >= event.sequence) {
                self.disorders.push(format!("{of} came in batch {batch} after a later one"));
            }
        }
        self.deliveries.push(Delivery { at: Instant::now(), has_deadline, events });
        batch
    }
}

type Script = Box<dyn FnMut(&[Event]) -> Reply + Send>;
type Description = Box<dyn FnMut() -> Result<Option<Duration>, Code> + Send>;

/// The retention of a receiver, unless a test sets another.
const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);

struct State {
    script: Mutex<Script>,
    description: Mutex<Description>,
    ordered: AtomicBool,
    log: watch::Sender<Log>,
}

/// A batch in flight, until it is answered or the call is cancelled.
struct Flight<'s> {
    state: &'s State,
    batch: usize,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.state.log.send_modify(|log| log.in_flight.retain(|_, batch| *batch != self.batch));
    }
}

struct Service(Arc<State>);

#[async_trait]
impl EventReceiver for Service {
    async fn deliver(&self, request: Request<DeliverRequest>) -> Result<Response<DeliverResponse>, Status> {
        let has_deadline = request.metadata().contains_key("grpc-timeout");
        let events = request.into_inner().events;
        let (batch, mut reply) = {
            // Locked first: whoever has seen a delivery in the log may follow another script, which is not for this one.
            let mut script = self.0.script.lock().unwrap();
            let mut batch = 0;
            self.0.log.send_modify(|log| batch = log.arrive(events.clone(), has_deadline));
            (batch, script(&events))
        };
        let _flight = Flight { state: &self.0, batch };
        loop {
            match reply {
                Reply::Results(results) => {
                    let applied = results.iter().filter(|result| result.outcome() == Outcome::Applied);
                    let applied: Vec<_> = applied.map(|result| result.event_id.clone()).collect();
                    self.0.log.send_modify(|log| log.applied.extend(applied));
                    return Ok(Response::new(DeliverResponse { results }));
                }
                Reply::Refuse(code) => return Err(Status::new(code, "as the test wants it")),
                Reply::Postpone(code, time) => {
                    let details = ErrorDetails::with_retry_info(Some(time));
                    return Err(Status::with_error_details(code, "as the test wants it", details));
                }
                Reply::Held(until, then) => {
                    until.cancelled().await;
                    reply = *then;
                }
            }
        }
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        self.0.log.send_modify(|log| log.described += 1);
        let described = (self.0.description.lock().unwrap())();
        let retention = described.map_err(|code| Status::new(code, "as the test wants it"))?;
        let retention = retention.map(|retention| retention.try_into().unwrap());
        let ordered = self.0.ordered.load(Ordering::Relaxed);
        Ok(Response::new(DescribeResponse { retention, ordered, ..DescribeResponse::default() }))
    }

    /// Has on record what it has applied.
    async fn recall(&self, request: Request<RecallRequest>) -> Result<Response<RecallResponse>, Status> {
        let log = self.0.log.borrow();
        let recalled = |event_id: String| RecalledEvent {
            apply_time: log.applied.contains(&event_id).then_some(Timestamp { seconds: 1, nanos: 0 }),
            event_id,
        };
        Ok(Response::new(RecallResponse { events: request.into_inner().event_ids.into_iter().map(recalled).collect() }))
    }
}

/// A receiver that serves until it is dropped.
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    _stop: DropGuard,
}

impl Receiver {
    pub(crate) async fn start(script: impl FnMut(&[Event]) -> Reply + Send + 'static) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], free_port().unwrap())), script).await
    }

    pub(crate) async fn start_at(address: SocketAddr, script: impl FnMut(&[Event]) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            script: Mutex::new(Box::new(script)),
            description: Mutex::new(Box::new(|| Ok(Some(RETENTION)))),
            ordered: AtomicBool::new(false),
            log: watch::Sender::new(Log::default()),
        });
        let stop = CancellationToken::new();
        let server = Server::builder()
            .add_service(EventReceiverServer::new(Service(state.clone())))
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), stop.clone().cancelled_owned());
        tokio::spawn(server);
        Self { address, state, _stop: stop.drop_guard() }
    }

    /// Replies by this script from the next batch on.
    pub(crate) fn follow(&self, script: impl FnMut(&[Event]) -> Reply + Send + 'static) {
        *self.state.script.lock().unwrap() = Box::new(script);
    }

    /// Answers Describe like this from the next call on.
    pub(crate) fn describe(&self, description: impl FnMut() -> Result<Option<Duration>, Code> + Send + 'static) {
        *self.state.description.lock().unwrap() = Box::new(description);
    }

    /// Describes itself as one that applies the events of an aggregate in order.
    pub(crate) fn is_ordered(&self) {
        self.state.ordered.store(true, Ordering::Relaxed);
    }

    pub(crate) fn read<T>(&self, read: impl FnOnce(&Log) -> T) -> T {
        read(&self.state.log.borrow())
    }

    pub(crate) async fn wait(&self, what: &str, condition: impl FnMut(&Log) -> bool) {
        let mut log = self.state.log.subscribe();
        let waited = timeout(AMPLE, log.wait_for(condition)).await;
        assert!(waited.is_ok(), "the receiver did not see within {AMPLE:?}: {what}");
    }

    pub(crate) async fn wait_for_deliveries(&self, count: usize) {
        self.wait("enough deliveries", |log| log.deliveries.len() >= count).await;
    }
}
