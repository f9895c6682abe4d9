//! A receiver that only enqueues a new event for each it receives. So the relay can run for any time, while the number
//! of waiting events stays the same.

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use proto::events::v1::{
    DeliverRequest, DeliverResponse, DescribeRequest, DescribeResponse, EventResult, Outcome, RecallRequest,
    RecallResponse,
    event_receiver_server::{EventReceiver, EventReceiverServer},
};
use sqlx::PgConnection;
use tokio::{
    net::TcpListener,
    sync::{Mutex, watch},
    task::JoinSet,
};
use tonic::{
    Request, Response, Status, async_trait,
    transport::{Server, server::TcpIncoming},
};

/// The retention that the services report to the relay.
const RETENTION: Duration = Duration::from_hours(7 * 24);

/// Stops when dropped.
#[derive(Debug)]
pub(super) struct StubReceiver {
    batches: watch::Receiver<u64>,
    // Its drop stops the task.
    _server: JoinSet<Result<(), tonic::transport::Error>>,
}

impl StubReceiver {
    /// Listens. `outbox` is a connection to the database where it enqueues events.
    pub(super) async fn start(listen: SocketAddr, outbox: PgConnection) -> Result<Self> {
        let incoming = TcpIncoming::from(TcpListener::bind(listen).await?).with_nodelay(Some(true));
        let (counted, batches) = watch::channel(0);
        let service = EventReceiverServer::new(Service { outbox: Mutex::new(outbox), batches: counted });
        let mut server = JoinSet::new();
        server.spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        Ok(Self { batches, _server: server })
    }

    /// The number of batches so far.
    pub(super) fn delivered(&self) -> u64 {
        *self.batches.borrow()
    }

    /// Waits for that many batches.
    pub(super) async fn wait_for(&mut self, batches: u64) -> Result<()> {
        self.batches.wait_for(|count| *count >= batches).await?;
        Ok(())
    }
}

struct Service {
    outbox: Mutex<PgConnection>,
    batches: watch::Sender<u64>,
}

#[async_trait]
impl EventReceiver for Service {
    async fn deliver(&self, request: Request<DeliverRequest>) -> Result<Response<DeliverResponse>, Status> {
        let events = request.into_inner().events;
        let count = i32::try_from(events.len()).unwrap_or(i32::MAX);
        let replaced = sqlx::query(super::lease::ENQUEUE).bind(count).execute(&mut *self.outbox.lock().await).await;
        replaced.map_err(|error| Status::internal(error.to_string()))?;
        let applied = |event_id| EventResult { event_id, outcome: Outcome::Applied.into(), ..EventResult::default() };
        let results = events.into_iter().map(|event| applied(event.id)).collect();
        self.batches.send_modify(|count| *count += 1);
        Ok(Response::new(DeliverResponse { results }))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let retention = RETENTION.try_into().map_err(|_| Status::internal("the retention is out of range"))?;
        Ok(Response::new(DescribeResponse { retention: Some(retention), ..DescribeResponse::default() }))
    }

    async fn recall(&self, _: Request<RecallRequest>) -> Result<Response<RecallResponse>, Status> {
        Err(Status::unimplemented("nobody asks this receiver what it has applied"))
    }
}
