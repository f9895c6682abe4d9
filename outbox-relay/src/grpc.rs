//! The operator's commands as gRPC: reads requests, and maps answers and errors. The only place that makes a `Status`.

use std::collections::BTreeSet;

use chassis::{Database, Fields, Refuse, Work};
use outbox::EventId;
use proto::relay::v1::{
    DeadEventContent, DiagnoseRequest, Diagnosis, DiscardDeadEventRequest, DiscardDeadEventResponse,
    GetDeadEventRequest, GetJourneyRequest, GetStatusRequest, Journey, ListDeadEventsRequest, ListDeadEventsResponse,
    OutboxPause, OutboxStatus, PauseRequest, RequeueDeadEventsRequest, RequeueDeadEventsResponse,
    RestoreDiscardedEventRequest, RestoreDiscardedEventResponse, ResumeRequest, relay_admin_server::RelayAdmin,
};
use sqlx::PgConnection;
use tokio::time::{Duration, Instant, sleep};
use tonic::{Code, Request, Response, Status};

use crate::operate::{
    self, Descriptors, Discard, Filter, NAME_CHARS, OperateError, PIECE, Page, REASON_CHARS, Reason, SAMPLE, Walk,
    ask_receivers, check_text, diagnose, find_subscription, list_dead, read_all, read_facts, read_status, read_totals,
    requeue_piece, show_dead,
};

const REFUSE: Refuse = Refuse { domain: "outbox-relay" };

/// Events that one request may name.
const EVENT_IDS_MAX: usize = 1000;
/// A call that requeues all begins no further piece after this time. A piece may take as long as any database work, and
/// that is still within the limit of a call.
const REQUEUE_LIMIT: Duration = Duration::from_secs(2);
/// Pieces of one call, so that a caller on a fast server also learns how far it is.
const PIECES_MAX: usize = 10;
/// Bytes of an error message. It travels in the headers, and clients accept at most 16 KiB of these.
const MESSAGE_BYTES_MAX: usize = 2 * 1024;

/// `relay.v1.RelayAdmin`.
pub(crate) struct Admin {
    pub(crate) database: Database,
    pub(crate) descriptors: Option<Descriptors>,
}

#[tonic::async_trait]
impl RelayAdmin for Admin {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<OutboxStatus>, Status> {
        let earlier = self.run(|connection| Box::pin(async { Ok(read_totals(connection).await?) })).await?;
        // Holds no connection while it sleeps, since other calls may need it.
        sleep(SAMPLE).await;
        self.run(move |connection| Box::pin(async move { Ok(read_status(connection, &earlier).await?.0) }))
            .await
            .map(Response::new)
    }

    async fn list_dead_events(
        &self,
        request: Request<ListDeadEventsRequest>,
    ) -> Result<Response<ListDeadEventsResponse>, Status> {
        let page = read_page(request.into_inner())?;
        self.run(move |connection| Box::pin(async move { list_dead(connection, &page).await })).await.map(Response::new)
    }

    async fn get_dead_event(
        &self,
        request: Request<GetDeadEventRequest>,
    ) -> Result<Response<DeadEventContent>, Status> {
        let mut fields = Fields::default();
        let event_id = fields.uuid("event_id", &request.into_inner().event_id);
        let event_id = fields.finish(EventId::from(event_id)).map_err(|bad| REFUSE.invalid("INVALID_EVENT_ID", bad))?;
        let descriptors = self.descriptors.clone();
        self.run(move |connection| Box::pin(async move { show_dead(connection, event_id, descriptors.as_ref()).await }))
            .await
            .map(Response::new)
    }

    async fn diagnose(&self, _: Request<DiagnoseRequest>) -> Result<Response<Diagnosis>, Status> {
        let readings = self.run(|connection| Box::pin(read_all(connection))).await?;
        // Holds no connection while it waits for receivers.
        Ok(Response::new(diagnose(readings).await))
    }

    async fn get_journey(&self, request: Request<GetJourneyRequest>) -> Result<Response<Journey>, Status> {
        let mut fields = Fields::default();
        let id = fields.uuid("id", &request.into_inner().id);
        let id = fields.finish(id).map_err(|bad| REFUSE.invalid("INVALID_ID", bad))?;
        let facts = self.run(move |connection| Box::pin(async move { read_facts(connection, id).await })).await?;
        // Holds no connection while it waits for receivers.
        ask_receivers(facts).await.map(Response::new).map_err(|error| refuse(&error))
    }

    async fn requeue_dead_events(
        &self,
        request: Request<RequeueDeadEventsRequest>,
    ) -> Result<Response<RequeueDeadEventsResponse>, Status> {
        let answer = match read_selection(request.into_inner())? {
            Selection::All { filter, from } => self.requeue_all(filter, from).await,
            Selection::Named { ids, subscription } => {
                self.run(move |connection| {
                    Box::pin(async move { operate::requeue(connection, &ids, subscription.as_deref()).await })
                })
                .await
            }
        };
        answer.map(Response::new)
    }

    async fn discard_dead_event(
        &self,
        request: Request<DiscardDeadEventRequest>,
    ) -> Result<Response<DiscardDeadEventResponse>, Status> {
        let DiscardDeadEventRequest { event_id, discarded_by, reason, subscription, refuse } = request.into_inner();
        let mut fields = Fields::default();
        let event_id = EventId::from(fields.uuid("event_id", &event_id));
        let by = read_text(&mut fields, "discarded_by", &discarded_by, NAME_CHARS);
        let reason = read_text(&mut fields, "reason", &reason, REASON_CHARS);
        let subscription = read_subscription(&mut fields, &subscription);
        fields.finish(()).map_err(|bad| REFUSE.invalid("INVALID_DISCARD", bad))?;
        let asked = Discard { event_id, subscription, by, reason, refuse };
        self.run(move |connection| Box::pin(async move { operate::discard(connection, &asked).await }))
            .await
            .map(Response::new)
    }

    async fn restore_discarded_event(
        &self,
        request: Request<RestoreDiscardedEventRequest>,
    ) -> Result<Response<RestoreDiscardedEventResponse>, Status> {
        let RestoreDiscardedEventRequest { event_id, subscription, restored_by } = request.into_inner();
        let mut fields = Fields::default();
        let event_id = EventId::from(fields.uuid("event_id", &event_id));
        let by = read_text(&mut fields, "restored_by", &restored_by, NAME_CHARS);
        let subscription = read_subscription(&mut fields, &subscription);
        fields.finish(()).map_err(|bad| REFUSE.invalid("INVALID_RESTORE", bad))?;
        self.run(move |connection| {
            Box::pin(async move { operate::restore(connection, event_id, subscription.as_deref(), &by).await })
        })
        .await
        .map(Response::new)
    }

    async fn pause(&self, request: Request<PauseRequest>) -> Result<Response<OutboxPause>, Status> {
        let PauseRequest { paused_by, reason, subscription } = request.into_inner();
        let mut fields = Fields::default();
        let by = read_text(&mut fields, "paused_by", &paused_by, NAME_CHARS);
        let reason = read_text(&mut fields, "reason", &reason, REASON_CHARS);
        let subscription = read_subscription(&mut fields, &subscription);
        fields.finish(()).map_err(|bad| REFUSE.invalid("INVALID_PAUSE", bad))?;
        self.run(move |connection| {
            Box::pin(async move { operate::pause(connection, subscription.as_deref(), &by, &reason).await })
        })
        .await
        .map(Response::new)
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<OutboxPause>, Status> {
        let mut fields = Fields::default();
        let subscription = read_subscription(&mut fields, &request.into_inner().subscription);
        fields.finish(()).map_err(|bad| REFUSE.invalid("INVALID_RESUME", bad))?;
        self.run(move |connection| Box::pin(async move { operate::resume(connection, subscription.as_deref()).await }))
            .await
            .map(Response::new)
    }
}

impl Admin {
    async fn run<T, W>(&self, work: W) -> Result<T, Status>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, OperateError> + Send + 'static,
    {
        self.database.run(work).await.map_err(|error| refuse(&error))
    }

    /// Requeues some pieces of a walk over all dead events. Each piece is a unit of work of its own, so none comes near
    /// its time limit, however many events are dead.
    ///
    /// If a piece fails, the earlier ones stay requeued. A caller that repeats the call goes on with the events that are
    /// still dead, with the token or without it.
    async fn requeue_all(&self, filter: Filter, from: Option<Walk>) -> Result<RequeueDeadEventsResponse, Status> {
        let began = Instant::now();
        let mut rest = match from {
            Some(walk) => Some(walk),
            None => {
                self.run(|connection| {
                    Box::pin(async move {
                        find_subscription(connection, filter.subscription.as_deref()).await?;
                        Ok(Walk::begin(connection, filter).await?)
                    })
                })
                .await?
            }
        };
        let mut answer = RequeueDeadEventsResponse::default();
        for _ in 0..PIECES_MAX {
            let Some(walk) = rest.take() else { break };
            let piece = self
                .run(move |connection| Box::pin(async move { Ok(requeue_piece(connection, walk, PIECE).await?) }))
                .await?;
            answer.requeued += piece.requeued.events;
            answer.freed += piece.requeued.freed;
            answer.too_old += piece.too_old;
            rest = piece.rest;
            if began.elapsed() > REQUEUE_LIMIT {
                break;
            }
        }
        if let Some(walk) = rest {
            answer.next_token = walk.token();
            let counted =
                self.run(move |connection| Box::pin(async move { Ok(walk.count_remaining(connection).await?) }));
            answer.remaining = counted.await?;
        }
        Ok(answer)
    }
}

fn refuse(error: &OperateError) -> Status {
    let (code, reason) = match error {
        OperateError::Database(cause) => return REFUSE.database(cause),
        OperateError::AlreadyPaused(_) => (Code::FailedPrecondition, "ALREADY_PAUSED"),
        OperateError::NotPaused(_) => (Code::FailedPrecondition, "NOT_PAUSED"),
        OperateError::NoSubscription { .. } => (Code::NotFound, "SUBSCRIPTION_NOT_FOUND"),
        OperateError::OtherPattern { .. } => (Code::AlreadyExists, "OTHER_PATTERN"),
        OperateError::NoRefusals => (Code::FailedPrecondition, "NO_REFUSALS"),
        OperateError::NotRefused(_) => (Code::FailedPrecondition, "NOT_REFUSED"),
        OperateError::OlderVersion => (Code::FailedPrecondition, "OLDER_VERSION"),
        // The reason is that of the first event. The message gives the reason of each.
        OperateError::NotApplicable(events) => match events.first().map(|event| &event.reason) {
            Some(Reason::TooOld { .. } | Reason::Forgotten { .. }) => (Code::FailedPrecondition, "EVENT_TOO_OLD"),
            Some(Reason::RefusedBy { .. }) => (Code::FailedPrecondition, "EVENT_REFUSED"),
            Some(Reason::SubscriptionEnded) => (Code::FailedPrecondition, "SUBSCRIPTION_ENDED"),
            Some(Reason::NotDead { .. }) => (Code::FailedPrecondition, "EVENT_NOT_DEAD"),
            Some(Reason::Unknown | Reason::UnknownToAll | Reason::Discarded { .. } | Reason::NotDiscarded) | None => {
                (Code::NotFound, "EVENT_NOT_FOUND")
            }
        },
    };
    let mut message = error.to_string();
    if message.len() > MESSAGE_BYTES_MAX {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        message.push('…');
    }
    REFUSE.with(code, reason, message)
}

fn read_page(request: ListDeadEventsRequest) -> Result<Page, Status> {
    let ListDeadEventsRequest { page_size, page_token, r#type, failing, subscription } = request;
    let mut fields = Fields::default();
    let size = fields.page_size("page_size", page_size);
    let filter = read_filter(&mut fields, &r#type, &subscription);
    let list = Page::list(&filter, failing);
    let before = match page_token.as_str() {
        "" => Page::first(),
        token => {
            let last = chassis::decode_page_token(&list, token).and_then(|last| Page::read_position(&last));
            last.unwrap_or_else(|| {
                fields.refuse("page_token", "must be the next_page_token of an earlier answer to the same request");
                Page::first()
            })
        }
    };
    let page = Page { size, before, filter, failing };
    fields.finish(page).map_err(|bad| REFUSE.invalid("INVALID_PAGE", bad))
}

/// The dead events that a request names.
enum Selection {
    /// All of these events, or none.
    Named { ids: Vec<EventId>, subscription: Option<String> },
    /// All of these events that are not too old. They are visited from the beginning, or from where an earlier call has
    /// ended.
    All { filter: Filter, from: Option<Walk> },
}

fn read_selection(request: RequeueDeadEventsRequest) -> Result<Selection, Status> {
    let RequeueDeadEventsRequest { event_ids, all, r#type, token, subscription } = request;
    let mut fields = Fields::default();
    if all != event_ids.is_empty() {
        fields.refuse("event_ids", "must name events unless `all` is set, and must be empty if it is");
    }
    if event_ids.len() > EVENT_IDS_MAX {
        fields.refuse("event_ids", format!("must name at most {EVENT_IDS_MAX} events, but names {}", event_ids.len()));
    }
    if !all && !r#type.is_empty() {
        fields.refuse("type", "must be empty unless `all` is set");
    }
    if !all && !token.is_empty() {
        fields.refuse("token", "must be empty unless `all` is set");
    }
    let filter = read_filter(&mut fields, &r#type, &subscription);
    let numbered = event_ids.iter().take(EVENT_IDS_MAX).enumerate();
    // In a set, so that an event that is named twice counts once.
    let ids: BTreeSet<_> =
        numbered.map(|(index, id)| EventId::from(fields.uuid(format!("event_ids[{index}]"), id))).collect();
    let from = if all && !token.is_empty() { Walk::resume(&token, filter.clone()) } else { None };
    if all && !token.is_empty() && from.is_none() {
        fields.refuse("token", "must be the next_token of an earlier answer for the same filters");
    }
    let selection = if all {
        Selection::All { filter, from }
    } else {
        Selection::Named { ids: ids.into_iter().collect(), subscription: filter.subscription }
    };
    fields.finish(selection).map_err(|bad| REFUSE.invalid("INVALID_REQUEUE", bad))
}

fn read_filter(fields: &mut Fields, event_type: &str, subscription: &str) -> Filter {
    let event_type = (!event_type.is_empty()).then(|| read_text(fields, "type", event_type, NAME_CHARS));
    Filter { event_type, subscription: read_subscription(fields, subscription) }
}

fn read_subscription(fields: &mut Fields, name: &str) -> Option<String> {
    (!name.is_empty()).then(|| read_text(fields, "subscription", name, NAME_CHARS))
}

fn read_text(fields: &mut Fields, name: &str, text: &str, chars: std::ops::RangeInclusive<usize>) -> String {
    check_text(text, chars).unwrap_or_else(|description| {
        fields.refuse(name, description);
        String::new()
    })
}
