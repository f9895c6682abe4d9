//! Serves `events.v1.EventReceiver`: applies each event once, and completely or not at all.

use std::{sync::Arc, time::Duration};

use chassis::{Allowed, Database, Fields, Refuse};
use clap::Args;
use proto::events::v1::{
    DeliverRequest, DeliverResponse, DescribeRequest, DescribeResponse, Event, RecallRequest, RecallResponse,
    RecalledEvent,
    event_receiver_server::{EventReceiver, EventReceiverServer},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, codec::CompressionEncoding};

use crate::{
    EventId,
    gather::{Applier, Gatherer},
    handler::Handler,
    measure,
    prune::prune_until_shutdown,
    recall::{RECALL_MAX, recall},
    trace_events::Processing,
};

const EVENTS_MAX: usize = 1000;
/// More than a full batch of the largest orders takes.
const BATCH_BYTES_MAX: usize = 16 * 1024 * 1024;
/// A source that is not accepted is named with this many characters.
const SOURCE_CHARS_MAX: usize = 100;

/// Settings of the inbox.
#[derive(Args, Clone, Debug)]
pub struct InboxSettings {
    /// Hours for which ids of applied events are kept. Older events are rejected, since they may have been applied
    /// before. Relays deliver events up to six sevenths of this.
    #[arg(long, env = "RETENTION_HOURS", default_value_t = 168, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    pub retention_hours: u32,
    /// Maximum number of transactions that apply batches of events at once. Other batches wait, and small ones share the
    /// next transaction. Raise it if batches rarely change the same rows.
    #[arg(long, env = "BATCHES_AT_ONCE", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub batches_at_once: u16,
    /// Services whose events are accepted, by the --source of their relays. Batches with events of others are refused.
    /// Without it, events of any service are accepted.
    #[arg(long, env = "ACCEPT_SOURCES", value_name = "SOURCE,…", value_delimiter = ',')]
    pub accept_sources: Vec<String>,
}

impl InboxSettings {
    fn retention(&self) -> Duration {
        Duration::from_secs(3600) * self.retention_hours
    }

    /// A variable that is set to nothing means any source too, and not the one without a name.
    fn sources(&self) -> Vec<String> {
        let sources = self.accept_sources.iter().map(|source| source.trim());
        sources.filter(|source| !source.is_empty()).map(str::to_owned).collect()
    }
}

/// Serves `events.v1.EventReceiver` for a service.
#[derive(Debug)]
pub struct Receiver<H> {
    applier: Arc<Applier<H>>,
    gatherer: Arc<Gatherer<H>>,
    /// The services whose events are accepted; any if it is empty.
    sources: Vec<String>,
}

impl<H: Handler> Receiver<H> {
    /// Returns the server, to be added to the service's routes, and prunes the inbox until `shutdown`.
    pub fn start(
        database: &Database,
        handler: H,
        refuse: Refuse,
        settings: &InboxSettings,
        shutdown: CancellationToken,
    ) -> EventReceiverServer<Self> {
        measure::describe();
        let retention = settings.retention();
        tokio::spawn(prune_until_shutdown(database.clone(), retention, shutdown));
        let applier = Arc::new(Applier { database: database.clone(), handler, refuse, retention });
        let gatherer = Gatherer::new(applier.clone(), settings.batches_at_once);
        let receiver = Self { applier, gatherer, sources: settings.sources() };
        // The limit holds for the size of a message as it comes, and for the size that it has when it is decompressed.
        EventReceiverServer::new(receiver)
            .max_decoding_message_size(BATCH_BYTES_MAX)
            .accept_compressed(CompressionEncoding::Gzip)
    }

    /// Refuses a batch whole if one of its events is of a source that is not accepted. An outbox has one source, so the
    /// relay has a wrong name or a wrong receiver, and no other event of it would fare better.
    ///
    /// A caller whom a policy names may send events of his sources only. So a relay, or whoever has its certificate, cannot
    /// say what another service says.
    fn check_sources(&self, events: &[Event], caller: Option<&Allowed>) -> Result<(), Status> {
        if let Some(caller) = caller
            && let Some(event) = events.iter().find(|event| !caller.sources.contains(&event.source))
        {
            let message = format!(
                "{} may not deliver events of {:?}: the policy of this service allows it {}",
                caller.name,
                cut(&event.source),
                if caller.sources.is_empty() { "none (source=NAME)".to_owned() } else { caller.sources.join(", ") }
            );
            return Err(self.applier.refuse.with(Code::PermissionDenied, "SOURCE_NOT_ALLOWED", message));
        }
        let accepted = &self.sources;
        let Some(event) = events.iter().find(|event| !accepted.is_empty() && !accepted.contains(&event.source)) else {
            return Ok(());
        };
        let source = cut(&event.source);
        let message = format!(
            "events of {source:?} are not accepted here, only those of {}: correct the relay's route or its --source, or \
             add the source to --accept-sources (ACCEPT_SOURCES) of this service",
            accepted.join(", ")
        );
        Err(self.applier.refuse.with(Code::PermissionDenied, "SOURCE_NOT_ACCEPTED", message))
    }
}

/// The sender decides how long the name is.
fn cut(source: &str) -> String {
    source.chars().take(SOURCE_CHARS_MAX).collect()
}

#[tonic::async_trait]
impl<H: Handler> EventReceiver for Receiver<H> {
    async fn deliver(&self, request: Request<DeliverRequest>) -> Result<Response<DeliverResponse>, Status> {
        let (metadata, extensions, DeliverRequest { mut events }) = request.into_parts();
        let mut fields = Fields::default();
        if events.len() > EVENTS_MAX {
            fields.refuse("events", format!("must be at most {EVENTS_MAX}, and are {}", events.len()));
        }
        fields.finish(()).map_err(|bad| self.applier.refuse.invalid("INVALID_BATCH", bad))?;
        self.check_sources(&events, extensions.get())?;
        let processing = Processing::begin(&mut events, &metadata);
        let answer = self.gatherer.apply(events).await;
        processing.end(&answer);
        answer.map(|results| Response::new(DeliverResponse { results }))
    }

    /// Commits too: relays take an answer as the sign that a delivery can be applied.
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let Applier { database, handler, refuse, retention } = &*self.applier;
        let answers = database.write(|connection| Box::pin(chassis::confirm_seen(connection)));
        answers.await.map_err(|error| refuse.database(&error))?;
        let seconds = retention.as_secs().cast_signed();
        Ok(Response::new(DescribeResponse {
            retention: Some(prost_types::Duration { seconds, nanos: 0 }),
            types: handler.types(),
            sources: self.sources.clone(),
            ordered: true,
        }))
    }

    async fn recall(&self, request: Request<RecallRequest>) -> Result<Response<RecallResponse>, Status> {
        let Applier { database, refuse, .. } = &*self.applier;
        let named = request.into_inner().event_ids;
        let mut fields = Fields::default();
        if named.len() > RECALL_MAX {
            fields.refuse("event_ids", format!("must be at most {RECALL_MAX}, and are {}", named.len()));
        }
        let numbered = named.iter().take(RECALL_MAX).enumerate();
        let event_ids: Vec<EventId> =
            numbered.map(|(index, id)| fields.uuid(format_args!("event_ids[{index}]"), id).into()).collect();
        let event_ids = fields.finish(event_ids).map_err(|bad| refuse.invalid("INVALID_RECALL", bad))?;
        let recalled =
            database.run(move |connection| Box::pin(async move { recall(connection, &event_ids).await })).await;
        let applied = recalled.map_err(|error| refuse.database(&error))?;
        let event = |(event_id, apply_time)| RecalledEvent { event_id, apply_time };
        Ok(Response::new(RecallResponse { events: named.into_iter().zip(applied).map(event).collect() }))
    }
}
