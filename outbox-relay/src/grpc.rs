//! The operator's commands as gRPC: maps answers and errors. The only place that makes a `Status`, with `grpc/requests.rs`.

mod requests;

use chassis::{Database, Refuse, Tls, Work};
use proto::relay::v1::{
    BlastRadius, DeadEventContent, DiagnoseRequest, Diagnosis, DiscardDeadEventRequest, DiscardDeadEventResponse,
    DiscardDeadEventsRequest, DiscardDeadEventsResponse, GetBlastRadiusRequest, GetDeadEventRequest, GetJourneyRequest,
    GetStatusRequest, GroupDeadEventsRequest, GroupDeadEventsResponse, Journey, ListDeadEventsRequest,
    ListDeadEventsResponse, ListDeedsRequest, ListDeedsResponse, OutboxPause, OutboxStatus, PauseRequest,
    RequeueDeadEventsRequest, RequeueDeadEventsResponse, RestoreDiscardedEventRequest, RestoreDiscardedEventResponse,
    ResumeRequest, UndoDeedRequest, UndoDeedResponse, relay_admin_server::RelayAdmin,
};
use sqlx::PgConnection;
use tokio::time::{Duration, Instant, sleep};
use tonic::{Code, Request, Response, Status};

use self::requests::Selection;
use crate::{
    access::Denied,
    operate::{
        self, Author, Change, Descriptors, Discard, Filter, OperateError, PIECE, RELAYS_KNOW_POLL, Reason, SAMPLE,
        SetPace, SlowDown, Walk, ask_receivers, diagnose, find_subscription, group_dead, list_dead, list_deeds,
        measure_blast, read_all, read_facts, read_status, read_totals, relays_know, resume_slowly, set_pace, show_dead,
        undo_piece, walk_piece,
    },
};

pub(crate) const REFUSE: Refuse = Refuse { domain: "outbox-relay" };

/// A call that changes all begins no further piece after this time. A piece may take as long as any database work, and
/// that is still within the limit of a call.
const PIECES_LIMIT: Duration = Duration::from_secs(2);
/// How long a call waits until relays know a pace. They read the paces once a second.
const RELAYS_KNOW_LIMIT: Duration = Duration::from_secs(5);
/// Pieces of one call, so that a caller on a fast server also learns how far it is.
const PIECES_MAX: usize = 3;
/// Bytes of an error message. It travels in the headers, and clients accept at most 16 KiB of these.
const MESSAGE_BYTES_MAX: usize = 2 * 1024;

/// `relay.v1.RelayAdmin`.
pub(crate) struct Admin {
    pub(crate) database: Database,
    pub(crate) descriptors: Option<Descriptors>,
    /// For questions to receivers.
    pub(crate) tls: Tls,
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
        let page = requests::page(request.into_inner())?;
        self.run(move |connection| Box::pin(async move { list_dead(connection, &page).await })).await.map(Response::new)
    }

    async fn get_dead_event(
        &self,
        request: Request<GetDeadEventRequest>,
    ) -> Result<Response<DeadEventContent>, Status> {
        let event_id = requests::event_id(&request.into_inner())?;
        let descriptors = self.descriptors.clone();
        self.run(move |connection| Box::pin(async move { show_dead(connection, event_id, descriptors.as_ref()).await }))
            .await
            .map(Response::new)
    }

    async fn diagnose(&self, _: Request<DiagnoseRequest>) -> Result<Response<Diagnosis>, Status> {
        let readings = self.run(|connection| Box::pin(read_all(connection))).await?;
        // Holds no connection while it waits for receivers.
        Ok(Response::new(diagnose(readings, &self.tls).await))
    }

    async fn get_journey(&self, request: Request<GetJourneyRequest>) -> Result<Response<Journey>, Status> {
        let id = requests::journey_id(&request.into_inner())?;
        let facts = self.run(move |connection| Box::pin(async move { read_facts(connection, id).await })).await?;
        // Holds no connection while it waits for receivers.
        ask_receivers(facts, &self.tls).await.map(Response::new).map_err(|error| refuse(&error))
    }

    async fn group_dead_events(
        &self,
        request: Request<GroupDeadEventsRequest>,
    ) -> Result<Response<GroupDeadEventsResponse>, Status> {
        let filter = requests::groups(request.into_inner())?;
        self.run(move |connection| Box::pin(async move { group_dead(connection, &filter).await }))
            .await
            .map(Response::new)
    }

    async fn get_blast_radius(&self, request: Request<GetBlastRadiusRequest>) -> Result<Response<BlastRadius>, Status> {
        let (ids, filter) = match requests::blast(request.into_inner())? {
            Selection::All { filter, .. } => (None, filter),
            Selection::Named { ids, subscription } => (Some(ids), Filter { subscription, ..Filter::default() }),
        };
        self.run(move |connection| Box::pin(async move { measure_blast(connection, ids.as_deref(), &filter).await }))
            .await
            .map(Response::new)
    }

    async fn requeue_dead_events(
        &self,
        request: Request<RequeueDeadEventsRequest>,
    ) -> Result<Response<RequeueDeadEventsResponse>, Status> {
        let (selection, author) = requests::requeue(request)?;
        let answer = match selection {
            Selection::All { filter, from } => {
                let Walked { events: requeued, freed, too_old, remaining, next_token, deed_id } =
                    self.change_all(Change::Requeue, filter, from, author).await?;
                RequeueDeadEventsResponse { requeued, freed, too_old, remaining, next_token, deed_id }
            }
            Selection::Named { ids, subscription } => {
                self.run(move |connection| {
                    Box::pin(async move { operate::requeue(connection, &ids, subscription.as_deref(), &author).await })
                })
                .await?
            }
        };
        Ok(Response::new(answer))
    }

    async fn discard_dead_events(
        &self,
        request: Request<DiscardDeadEventsRequest>,
    ) -> Result<Response<DiscardDeadEventsResponse>, Status> {
        let (selection, author) = requests::discard(request)?;
        let answer = match selection {
            Selection::All { filter, from } => {
                let Walked { events: discarded, freed, remaining, next_token, deed_id, .. } =
                    self.change_all(Change::Discard, filter, from, author).await?;
                DiscardDeadEventsResponse { discarded, freed, remaining, next_token, deed_id }
            }
            Selection::Named { ids, subscription } => {
                let asked = Discard { event_ids: ids, subscription, author, refuse: false };
                let done = self
                    .run(move |connection| Box::pin(async move { operate::discard(connection, &asked).await }))
                    .await?;
                DiscardDeadEventsResponse {
                    discarded: done.changed.events,
                    freed: done.changed.freed,
                    deed_id: done.deed_id,
                    ..DiscardDeadEventsResponse::default()
                }
            }
        };
        Ok(Response::new(answer))
    }

    async fn discard_dead_event(
        &self,
        request: Request<DiscardDeadEventRequest>,
    ) -> Result<Response<DiscardDeadEventResponse>, Status> {
        let asked = requests::discard_one(request)?;
        let done =
            self.run(move |connection| Box::pin(async move { operate::discard(connection, &asked).await })).await?;
        Ok(Response::new(DiscardDeadEventResponse {
            freed: done.changed.freed,
            discard_time: Some(outbox::timestamp(done.at)),
            deed_id: done.deed_id,
        }))
    }

    async fn restore_discarded_event(
        &self,
        request: Request<RestoreDiscardedEventRequest>,
    ) -> Result<Response<RestoreDiscardedEventResponse>, Status> {
        let (event_id, subscription, author) = requests::restore(request)?;
        self.run(move |connection| {
            Box::pin(async move { operate::restore(connection, event_id, subscription.as_deref(), &author).await })
        })
        .await
        .map(Response::new)
    }

    async fn pause(&self, request: Request<PauseRequest>) -> Result<Response<OutboxPause>, Status> {
        let (subscription, author) = requests::pause(request)?;
        self.run(move |connection| {
            Box::pin(async move { operate::pause(connection, subscription.as_deref(), &author).await })
        })
        .await
        .map(Response::new)
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<OutboxPause>, Status> {
        let asked = requests::resume(request)?;
        if asked.events_per_second > 0 {
            return self.resume_slowly(asked).await.map(Response::new);
        }
        let SlowDown { subscription, author, .. } = asked;
        self.run(move |connection| {
            Box::pin(async move { operate::resume(connection, subscription.as_deref(), &author).await })
        })
        .await
        .map(Response::new)
    }

    async fn list_deeds(&self, request: Request<ListDeedsRequest>) -> Result<Response<ListDeedsResponse>, Status> {
        let page = requests::deeds(request.into_inner())?;
        self.run(move |connection| Box::pin(async move { Ok(list_deeds(connection, &page).await?) }))
            .await
            .map(Response::new)
    }

    async fn undo_deed(&self, request: Request<UndoDeedRequest>) -> Result<Response<UndoDeedResponse>, Status> {
        let (undo, author) = requests::undo(request)?;
        let (began, mut rest) = (Instant::now(), Some(undo));
        let mut answer = UndoDeedResponse::default();
        for _ in 0..PIECES_MAX {
            let Some(undo) = rest.take() else { break };
            let by = author.clone();
            let piece = self
                .run(move |connection| Box::pin(async move { undo_piece(connection, undo, &by, PIECE).await }))
                .await?;
            answer.undone += piece.undone;
            answer.left += piece.left;
            answer.deed_id = piece.undo_id.unwrap_or_default();
            rest = piece.rest;
            if began.elapsed() > PIECES_LIMIT {
                break;
            }
        }
        answer.next_token = rest.map(|undo| undo.token()).unwrap_or_default();
        Ok(Response::new(answer))
    }
}

/// What a call has changed of all events that match.
#[derive(Debug, Default)]
struct Walked {
    events: i64,
    freed: i64,
    too_old: i64,
    remaining: i64,
    next_token: String,
    deed_id: i64,
}

impl Admin {
    async fn run<T, W>(&self, work: W) -> Result<T, Status>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, OperateError> + Send + 'static,
    {
        self.database.run(work).await.map_err(|error| refuse(&error))
    }

    /// Sets the pace, waits until each relay knows it, and ends the pause.
    async fn resume_slowly(&self, asked: SlowDown) -> Result<OutboxPause, Status> {
        let slow_down = asked.clone();
        let set = self.run(move |connection| Box::pin(async move { set_pace(connection, &slow_down).await })).await?;
        let prepared = match set {
            SetPace::Prepared(prepared) => prepared,
            SetPace::Changed(changed) => return Ok(changed),
        };
        let began = Instant::now();
        // Holds no connection while it sleeps.
        while !self.run(move |connection| Box::pin(async move { Ok(relays_know(connection, prepared).await?) })).await?
        {
            if began.elapsed() > RELAYS_KNOW_LIMIT {
                let why = "a relay has not read the pace, and the pause goes on; try again";
                return Err(REFUSE.later(Code::Unavailable, "RELAYS_BEHIND", why));
            }
            sleep(RELAYS_KNOW_POLL).await;
        }
        self.run(move |connection| Box::pin(async move { resume_slowly(connection, &asked, prepared).await })).await
    }

    /// Does some pieces of a walk over all dead events. Each piece is a unit of work of its own, so none comes near its
    /// time limit, however many events are dead.
    ///
    /// If a piece fails, the earlier ones stay changed. A caller that repeats the call goes on with the events that are
    /// still dead, with the token or without it.
    async fn change_all(
        &self,
        change: Change,
        filter: Filter,
        from: Option<Walk>,
        author: Author,
    ) -> Result<Walked, Status> {
        let began = Instant::now();
        let mut rest = match from {
            Some(walk) => Some(walk),
            None => {
                self.run(move |connection| {
                    Box::pin(async move {
                        find_subscription(connection, filter.subscription.as_deref()).await?;
                        Ok(Walk::begin(connection, change, filter).await?)
                    })
                })
                .await?
            }
        };
        let mut answer = Walked::default();
        for _ in 0..PIECES_MAX {
            let Some(walk) = rest.take() else { break };
            let by = author.clone();
            let piece = self
                .run(move |connection| Box::pin(async move { walk_piece(connection, walk, &by, PIECE).await }))
                .await?;
            answer.events += piece.changed.events;
            answer.freed += piece.changed.freed;
            answer.too_old += piece.too_old;
            answer.deed_id = piece.deed_id.unwrap_or_default();
            rest = piece.rest;
            if began.elapsed() > PIECES_LIMIT {
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

/// Why a caller may not call.
pub(crate) fn deny(denied: &Denied) -> Status {
    let (code, reason) = match denied {
        Denied::NoToken => (Code::Unauthenticated, "TOKEN_REQUIRED"),
        Denied::NoCertificate => (Code::Unauthenticated, "CERTIFICATE_REQUIRED"),
        Denied::NotAllowed(_) => (Code::PermissionDenied, "NOT_ALLOWED"),
        Denied::NotLocal => (Code::PermissionDenied, "LOCAL_ONLY"),
        Denied::UnknownToken => (Code::Unauthenticated, "TOKEN_UNKNOWN"),
        Denied::Viewer(_) => (Code::PermissionDenied, "OPERATORS_ONLY"),
        Denied::Broken => (Code::Unavailable, "TOKEN_FILE_BROKEN"),
    };
    REFUSE.with(code, reason, denied.to_string())
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
        OperateError::PaceLost => (Code::Aborted, "PACE_LOST"),
        OperateError::NoDeed(_) => (Code::NotFound, "DEED_NOT_FOUND"),
        OperateError::CannotUndo { .. } => (Code::FailedPrecondition, "CANNOT_UNDO"),
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
