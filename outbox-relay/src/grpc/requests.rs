//! Reads the requests of operators, and refuses bad input with every bad field.

use std::{collections::BTreeSet, ops::RangeInclusive};

use chassis::Fields;
use outbox::EventId;
use proto::relay::v1::{
    DiscardDeadEventRequest, DiscardDeadEventsRequest, GetBlastRadiusRequest, GetDeadEventRequest, GetJourneyRequest,
    GroupDeadEventsRequest, ListDeadEventsRequest, ListDeedsRequest, PauseRequest, RequeueDeadEventsRequest,
    RestoreDiscardedEventRequest, ResumeRequest, UndoDeedRequest,
};
use tonic::{Request, Status};
use uuid::Uuid;

use super::REFUSE;
use crate::{
    access::Caller,
    operate::{
        Author, Change, DeedPage, Discard, Filter, NAME_CHARS, OPTIONAL_REASON_CHARS, Page, REASON_CHARS, SlowDown,
        Undo, Walk, check_text,
    },
};

/// Events that one request may name.
const EVENT_IDS_MAX: usize = 1000;

fn finish<T>(fields: Fields, read: T, reason: &'static str) -> Result<T, Status> {
    fields.finish(read).map_err(|bad| REFUSE.invalid(reason, bad))
}

pub(super) fn event_id(request: &GetDeadEventRequest) -> Result<EventId, Status> {
    let mut fields = Fields::default();
    let event_id = EventId::from(fields.uuid("event_id", &request.event_id));
    finish(fields, event_id, "INVALID_EVENT_ID")
}

pub(super) fn journey_id(request: &GetJourneyRequest) -> Result<Uuid, Status> {
    let mut fields = Fields::default();
    let id = fields.uuid("id", &request.id);
    finish(fields, id, "INVALID_ID")
}

pub(super) fn page(request: ListDeadEventsRequest) -> Result<Page, Status> {
    let ListDeadEventsRequest { page_size, page_token, r#type, failing, subscription, code } = request;
    let mut fields = Fields::default();
    let size = fields.page_size("page_size", page_size);
    let filter = read_filter(&mut fields, &r#type, &subscription, &code);
    let list = Page::list(&filter, failing);
    let before = read_token(&mut fields, &page_token, || {
        chassis::decode_page_token(&list, &page_token).and_then(|last| Page::read_position(&last))
    });
    let page = Page { size, before: before.unwrap_or_else(Page::first), filter, failing };
    finish(fields, page, "INVALID_PAGE")
}

pub(super) fn groups(request: GroupDeadEventsRequest) -> Result<Filter, Status> {
    let GroupDeadEventsRequest { r#type, subscription } = request;
    let mut fields = Fields::default();
    let filter = read_filter(&mut fields, &r#type, &subscription, "");
    finish(fields, filter, "INVALID_GROUPS")
}

pub(super) fn deeds(request: ListDeedsRequest) -> Result<DeedPage, Status> {
    let ListDeedsRequest { page_size, page_token, event_id } = request;
    let mut fields = Fields::default();
    let size = fields.page_size("page_size", page_size);
    let event_id = (!event_id.is_empty()).then(|| EventId::from(fields.uuid("event_id", &event_id)));
    let list = DeedPage::list(event_id);
    let before = read_token(&mut fields, &page_token, || chassis::decode_page_token(&list, &page_token)?.parse().ok());
    finish(fields, DeedPage { size, before: before.unwrap_or(i64::MAX), event_id }, "INVALID_PAGE")
}

pub(super) fn undo(request: Request<UndoDeedRequest>) -> Result<(Undo, Author), Status> {
    let caller = request.extensions().get().cloned();
    let UndoDeedRequest { deed_id, undone_by, reason, token } = request.into_inner();
    let mut fields = Fields::default();
    if deed_id <= 0 {
        fields.refuse("deed_id", "must be the id of a deed: a number from 1");
    }
    let author = read_author(&mut fields, caller, "undone_by", &undone_by, &reason, OPTIONAL_REASON_CHARS);
    let from = if token.is_empty() { None } else { Undo::resume(deed_id, &token) };
    if !token.is_empty() && from.is_none() {
        fields.refuse("token", "must be the next_token of an earlier answer for the same deed");
    }
    finish(fields, (from.unwrap_or_else(|| Undo::begin(deed_id)), author), "INVALID_UNDO")
}

pub(super) fn pause(request: Request<PauseRequest>) -> Result<(Option<String>, Author), Status> {
    let caller = request.extensions().get().cloned();
    let PauseRequest { paused_by, reason, subscription } = request.into_inner();
    let mut fields = Fields::default();
    let author = read_author(&mut fields, caller, "paused_by", &paused_by, &reason, REASON_CHARS);
    let subscription = read_subscription(&mut fields, &subscription);
    finish(fields, (subscription, author), "INVALID_PAUSE")
}

/// A pace of 0 events per second stands for none.
pub(super) fn resume(request: Request<ResumeRequest>) -> Result<SlowDown, Status> {
    let caller = request.extensions().get().cloned();
    let ResumeRequest { subscription, resumed_by, reason, events_per_second } = request.into_inner();
    let mut fields = Fields::default();
    let author = read_author(&mut fields, caller, "resumed_by", &resumed_by, &reason, OPTIONAL_REASON_CHARS);
    let subscription = read_subscription(&mut fields, &subscription);
    if !(0..=1_000_000).contains(&events_per_second) {
        fields.refuse("events_per_second", "must be 1 to 1000000, or 0 for as fast as relays can");
    }
    finish(fields, SlowDown { subscription, events_per_second, author }, "INVALID_RESUME")
}

pub(super) fn restore(
    request: Request<RestoreDiscardedEventRequest>,
) -> Result<(EventId, Option<String>, Author), Status> {
    let caller = request.extensions().get().cloned();
    let RestoreDiscardedEventRequest { event_id, subscription, restored_by, reason } = request.into_inner();
    let mut fields = Fields::default();
    let event_id = EventId::from(fields.uuid("event_id", &event_id));
    let author = read_author(&mut fields, caller, "restored_by", &restored_by, &reason, OPTIONAL_REASON_CHARS);
    let subscription = read_subscription(&mut fields, &subscription);
    finish(fields, (event_id, subscription, author), "INVALID_RESTORE")
}

pub(super) fn discard_one(request: Request<DiscardDeadEventRequest>) -> Result<Discard, Status> {
    let caller = request.extensions().get().cloned();
    let DiscardDeadEventRequest { event_id, discarded_by, reason, subscription, refuse } = request.into_inner();
    let mut fields = Fields::default();
    let event_id = EventId::from(fields.uuid("event_id", &event_id));
    let author = read_author(&mut fields, caller, "discarded_by", &discarded_by, &reason, REASON_CHARS);
    let subscription = read_subscription(&mut fields, &subscription);
    finish(fields, Discard { event_ids: vec![event_id], subscription, author, refuse }, "INVALID_DISCARD")
}

pub(super) fn discard(request: Request<DiscardDeadEventsRequest>) -> Result<(Selection, Author), Status> {
    let caller = request.extensions().get().cloned();
    let DiscardDeadEventsRequest { event_ids, all, r#type, code, token, subscription, discarded_by, reason } =
        request.into_inner();
    let mut fields = Fields::default();
    let asked = Asked { event_ids, all, event_type: &r#type, code: &code, subscription: &subscription };
    let selection = read_selection(&mut fields, asked, Some((&token, Change::Discard)));
    let author = read_author(&mut fields, caller, "discarded_by", &discarded_by, &reason, REASON_CHARS);
    finish(fields, (selection, author), "INVALID_DISCARD")
}

pub(super) fn requeue(request: Request<RequeueDeadEventsRequest>) -> Result<(Selection, Author), Status> {
    let caller = request.extensions().get().cloned();
    let RequeueDeadEventsRequest { event_ids, all, r#type, token, subscription, code, requeued_by, reason } =
        request.into_inner();
    let mut fields = Fields::default();
    let asked = Asked { event_ids, all, event_type: &r#type, code: &code, subscription: &subscription };
    let selection = read_selection(&mut fields, asked, Some((&token, Change::Requeue)));
    let author = read_author(&mut fields, caller, "requeued_by", &requeued_by, &reason, OPTIONAL_REASON_CHARS);
    finish(fields, (selection, author), "INVALID_REQUEUE")
}

pub(super) fn blast(request: GetBlastRadiusRequest) -> Result<Selection, Status> {
    let GetBlastRadiusRequest { event_ids, all, r#type, code, subscription } = request;
    let mut fields = Fields::default();
    let asked = Asked { event_ids, all, event_type: &r#type, code: &code, subscription: &subscription };
    let selection = read_selection(&mut fields, asked, None);
    finish(fields, selection, "INVALID_SELECTION")
}

/// The dead events that a request names.
pub(super) enum Selection {
    /// All of these events, or none.
    Named { ids: Vec<EventId>, subscription: Option<String> },
    /// All of these events. They are visited from the beginning, or from where an earlier call has ended.
    All { filter: Filter, from: Option<Walk> },
}

/// The fields of a request that name dead events.
struct Asked<'r> {
    event_ids: Vec<String>,
    all: bool,
    event_type: &'r str,
    code: &'r str,
    subscription: &'r str,
}

/// With the token of a walk and what the walk does, if the request may go on with one.
fn read_selection(fields: &mut Fields, asked: Asked<'_>, token: Option<(&str, Change)>) -> Selection {
    let Asked { event_ids, all, event_type, code, subscription } = asked;
    if all != event_ids.is_empty() {
        fields.refuse("event_ids", "must name events unless `all` is set, and must be empty if it is");
    }
    if event_ids.len() > EVENT_IDS_MAX {
        fields.refuse("event_ids", format!("must name at most {EVENT_IDS_MAX} events, but names {}", event_ids.len()));
    }
    let only_with_all = [("type", event_type), ("code", code), ("token", token.map_or("", |(token, _)| token))];
    for (name, text) in only_with_all {
        if !all && !text.is_empty() {
            fields.refuse(name, "must be empty unless `all` is set");
        }
    }
    let filter = read_filter(fields, event_type, subscription, code);
    let numbered = event_ids.iter().take(EVENT_IDS_MAX).enumerate();
    // In a set, so that an event that is named twice counts once.
    let ids: BTreeSet<_> =
        numbered.map(|(index, id)| EventId::from(fields.uuid(format_args!("event_ids[{index}]"), id))).collect();
    if !all {
        return Selection::Named { ids: ids.into_iter().collect(), subscription: filter.subscription };
    }
    let token = token.filter(|(token, _)| !token.is_empty());
    let from = token.and_then(|(token, change)| Walk::resume(token, change, filter.clone()));
    if token.is_some() && from.is_none() {
        fields.refuse("token", "must be the next_token of an earlier answer for the same filters");
    }
    Selection::All { filter, from }
}

fn read_filter(fields: &mut Fields, event_type: &str, subscription: &str, code: &str) -> Filter {
    let event_type = (!event_type.is_empty()).then(|| read_text(fields, "type", event_type, NAME_CHARS));
    let code = (!code.is_empty()).then(|| read_text(fields, "code", code, REASON_CHARS));
    Filter { event_type, subscription: read_subscription(fields, subscription), code }
}

fn read_subscription(fields: &mut Fields, name: &str) -> Option<String> {
    (!name.is_empty()).then(|| read_text(fields, "subscription", name, NAME_CHARS))
}

/// A caller who is known by his token acts under that name, whatever the request says.
fn read_author(
    fields: &mut Fields,
    caller: Option<Caller>,
    field: &'static str,
    by: &str,
    reason: &str,
    reason_chars: RangeInclusive<usize>,
) -> Author {
    Author {
        name: caller.map_or_else(|| read_text(fields, field, by, NAME_CHARS), |caller| caller.name),
        reason: read_text(fields, "reason", reason, reason_chars),
    }
}

/// The position of a page token; `None` for the first page.
fn read_token<T>(fields: &mut Fields, token: &str, decode: impl FnOnce() -> Option<T>) -> Option<T> {
    if token.is_empty() {
        return None;
    }
    let position = decode();
    if position.is_none() {
        fields.refuse("page_token", "must be the next_page_token of an earlier answer to the same request");
    }
    position
}

fn read_text(fields: &mut Fields, name: &str, text: &str, chars: RangeInclusive<usize>) -> String {
    check_text(text, chars).unwrap_or_else(|description| {
        fields.refuse(name, description);
        String::new()
    })
}
