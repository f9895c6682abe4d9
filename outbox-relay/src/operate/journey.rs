//! Reads what is known of a subject's events: what is left of them in the outbox and why it waits, what was discarded, and
//! what receivers have applied.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use chassis::Tls;
use futures_util::future::join_all;
use outbox::{AggregateId, EventId};
use prost_types::Timestamp;
use proto::relay::v1::{
    AppliedEvent, Journey, JourneyEvent, OutboxPace, OutboxPause, RelayRoute, WaitCause, journey_event::State,
    wait_cause::Kind,
};
use sqlx::{Connection, PgConnection, types::time::OffsetDateTime};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    OperateError,
    pause::read_pauses,
    refuse::{NotApplicable, Reason, describe, end_of_pause, holds_up, resume_command},
    slow_down::{describe_pace, read_paces},
    status::read_routes,
};
use crate::{
    deliver::{Description, Receiver},
    lease::{is_cut_off, read_present},
    leased_row::LeaseToken,
    route::Condition,
    subscription::{UNROUTED, read_subscriptions},
};

/// Ids of delivered events are derived from their subject and number. Receivers are asked for these numbers.
const SEQUENCES: i32 = 50;
/// Ids that a receiver must take in one call.
const RECALL_MAX: usize = 1000;
/// Types that a receiver names, as far as they are looked at, and sources of them. It may name any number.
const TYPES_MAX: usize = 1000;
const SOURCES_MAX: usize = 16;
/// How long a receiver may take for both questions.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// Events of a subject that are shown.
const EVENTS_MAX: i64 = 1000;

/// What the database says.
pub(crate) struct Facts {
    subject: AggregateId,
    /// The id that was asked for, which may be an event's.
    asked: Uuid,
    now: OffsetDateTime,
    rows: Vec<Row>,
    discarded: Vec<Discarded>,
    pauses: Vec<OutboxPause>,
    paces: Vec<(String, OutboxPace)>,
    routes: Vec<RelayRoute>,
    /// The names of all.
    subscriptions: Vec<String>,
}

/// A row of the outbox.
#[derive(Clone, Debug)]
struct Row {
    event_id: EventId,
    aggregate_id: AggregateId,
    subscription_id: i16,
    subscription: String,
    /// Whether its subscription has.
    has_ended: bool,
    event_type: String,
    sequence: i32,
    created_at: OffsetDateTime,
    attempts: i32,
    charged: bool,
    failures: i32,
    reason: String,
    lease_token: Option<LeaseToken>,
    /// `None`: it is dead.
    visible_at: Option<OffsetDateTime>,
    /// The subscriptions that match its type.
    matches: Vec<i16>,
    /// The number of rows of its subject.
    of_subject: i64,
}

struct Discarded {
    event_id: EventId,
    aggregate_id: AggregateId,
    subscription: String,
    has_ended: bool,
    event_type: String,
    sequence: i32,
    created_at: OffsetDateTime,
    attempts: i32,
    last_error: String,
    discarded_by: String,
    discarded_at: OffsetDateTime,
    reason: String,
    refused: bool,
}

/// Reads what the database knows of the subject, or of the subject of the event, with this id.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_facts(connection: &mut PgConnection, id: Uuid) -> Result<Facts, OperateError> {
    let (mut rows, mut discarded) = read_both(connection, id).await?;
    if rows.is_empty()
        && discarded.is_empty()
        && let Some(subject) = find_subject(connection, id).await?
    {
        (rows, discarded) = read_both(connection, subject).await?;
    }
    let subject = rows.first().map(|row| row.aggregate_id);
    let subject = subject.or_else(|| discarded.first().map(|row| row.aggregate_id)).unwrap_or_else(|| id.into());
    let (now, pauses) = (read_present(connection).await?, read_pauses(connection).await?);
    let paces = read_paces(connection).await?;
    let routes = read_routes(connection).await?;
    let subscriptions = read_subscriptions(connection).await?.into_iter().map(|of| of.name).collect();
    Ok(Facts { subject, asked: id, now, rows, discarded, pauses, paces, routes, subscriptions })
}

/// Asks the receivers of all routes, each at its URL, at the same time. Then says what is known.
///
/// # Errors
/// Nobody knows the id.
pub(crate) async fn ask_receivers(facts: Facts, tls: &Tls) -> Result<Journey, OperateError> {
    let is_served = |name: &&String| facts.routes.iter().any(|route| route.route == **name);
    let without_route = facts.subscriptions.iter().filter(|name| !is_served(name));
    let mut unanswered: Vec<_> =
        without_route.map(|name| format!("{name}: no relay that delivers it has reported for 10 s")).collect();
    // One receiver for each subscription.
    let receivers: BTreeMap<_, _> =
        facts.routes.iter().map(|route| (route.route.as_str(), route.receiver.as_str())).collect();
    let asking = receivers.into_iter().map(|(subscription, url)| {
        let facts = &facts;
        async move {
            let answer = timeout(ASK_LIMIT, recall(facts, url, tls)).await;
            (subscription, url, answer.unwrap_or_else(|_| Err(format!("no answer within {ASK_LIMIT:?}"))))
        }
    });
    let mut applied = Vec::new();
    for (subscription, url, answer) in join_all(asking).await {
        match answer {
            Ok(events) => applied.extend(
                events.into_iter().map(|event| AppliedEvent { subscription: subscription.to_owned(), ..event }),
            ),
            Err(cause) => unanswered.push(format!("{subscription} at {url}: {cause}")),
        }
    }
    applied.sort_by(|one, other| (one.sequence, &one.subscription).cmp(&(other.sequence, &other.subscription)));
    let mut journey = facts.journey();
    if journey.events.is_empty() && applied.iter().all(|event| event.sequence == 0) {
        if applied.is_empty() && unanswered.is_empty() {
            let unknown = NotApplicable { event_id: facts.asked.into(), reason: Reason::UnknownToAll };
            return Err(OperateError::NotApplicable(vec![unknown]));
        }
        // It is the id of an event that was handled, or of nothing.
        journey.subject = String::new();
    }
    Ok(Journey { applied, unanswered, ..journey })
}

impl Facts {
    /// What the database alone knows.
    pub(crate) fn journey(&self) -> Journey {
        let mut events: Vec<_> = self.rows.iter().map(|row| waiting(row, self)).collect();
        events.extend(self.discarded.iter().map(given_up));
        events.sort_by(|one, other| (one.sequence, &one.subscription).cmp(&(other.sequence, &other.subscription)));
        let shown = i64::try_from(self.rows.len()).unwrap_or(i64::MAX);
        Journey {
            subject: self.subject.to_string(),
            time: Some(outbox::timestamp(self.now)),
            events,
            left_out: self.rows.first().map_or(0, |row| row.of_subject - shown),
            ..Journey::default()
        }
    }
}

async fn recall(facts: &Facts, url: &str, tls: &Tls) -> Result<Vec<AppliedEvent>, String> {
    let uri = url.parse().map_err(|_| "its URL cannot be read".to_owned())?;
    let mut receiver = Receiver::connect_to_ask(uri, tls);
    let types = match receiver.describe().await {
        Description::Ready { types, .. } => types,
        Description::Unknown(text) => return Err(text.to_owned()),
        Description::Unavailable { reason, .. } | Description::Barred { reason } => return Err(reason),
    };
    let mut ids = candidates(facts, &types);
    let answered = receiver.recall(ids.keys().map(EventId::to_string).collect()).await?;
    // It may answer anything: only what it was asked for counts, and that once.
    let applied = answered.into_iter().filter_map(|(event_id, apply_time)| {
        let id = EventId::from(Uuid::try_parse(&event_id).ok()?);
        let apply_time = apply_time.filter(is_in_the_common_era)?;
        let sequence = ids.remove(&id)?.into();
        let event_id = id.to_string();
        Some(AppliedEvent { event_id, sequence, apply_time: Some(apply_time), ..AppliedEvent::default() })
    });
    Ok(applied.collect())
}

/// A time that can be shown: of the years 1 to 9999.
fn is_in_the_common_era(time: &Timestamp) -> bool {
    (-62_135_596_800..253_402_300_800).contains(&time.seconds) && (0..1_000_000_000).contains(&time.nanos)
}

/// The ids that events of the subject have, or may have, with their numbers; 0 if that is not known. Those that are known
/// come first, since there may be too many.
fn candidates(facts: &Facts, types: &[String]) -> BTreeMap<EventId, i32> {
    let of_rows = facts.rows.iter().map(|row| (row.event_id, row.sequence, row.event_type.as_str()));
    let of_discarded = facts.discarded.iter().map(|row| (row.event_id, row.sequence, row.event_type.as_str()));
    let known: Vec<_> = of_rows.chain(of_discarded).collect();
    let mut ids = BTreeMap::from([(EventId::from(facts.asked), 0)]);
    for (event_id, sequence, _) in known.iter().take(RECALL_MAX / 2) {
        ids.insert(*event_id, *sequence);
    }
    // Ids depend on the source of a type alone: one type of each does for all.
    let named = known.iter().map(|(_, _, event_type)| *event_type).chain(types.iter().map(String::as_str));
    let mut first_ids = HashSet::new();
    let of_sources: Vec<_> = named
        .take(TYPES_MAX)
        .filter(|event_type| first_ids.insert(EventId::derive(event_type, facts.subject, 1)))
        .take(SOURCES_MAX)
        .collect();
    for sequence in 1..=SEQUENCES {
        for event_type in &of_sources {
            if ids.len() < RECALL_MAX {
                ids.insert(EventId::derive(event_type, facts.subject, sequence), sequence);
            }
        }
    }
    ids
}

fn waiting(row: &Row, facts: &Facts) -> JourneyEvent {
    let causes = causes(row, facts);
    let state = match causes.first().map(WaitCause::kind) {
        Some(Kind::Dead) => State::Dead,
        Some(Kind::Leased) => State::Leased,
        Some(Kind::BackingOff) => State::BackingOff,
        _ => State::Waiting,
    };
    JourneyEvent {
        event_id: row.event_id.to_string(),
        r#type: row.event_type.clone(),
        sequence: row.sequence.into(),
        subscription: row.subscription.clone(),
        state: state.into(),
        create_time: Some(outbox::timestamp(row.created_at)),
        attempts: row.attempts,
        failures: row.failures,
        reason: row.reason.clone(),
        causes,
    }
}

fn given_up(row: &Discarded) -> JourneyEvent {
    let how = if row.refused { ", and refused what it tells of" } else { "" };
    let undo = if row.refused || row.has_ended { "" } else { "; `outbox-relay dead restore` brings it back" };
    let at = outbox::timestamp(row.discarded_at);
    let text = format!("discarded by {} at {at}{how}: {}{undo}", row.discarded_by, row.reason);
    JourneyEvent {
        event_id: row.event_id.to_string(),
        r#type: row.event_type.clone(),
        sequence: row.sequence.into(),
        subscription: row.subscription.clone(),
        state: State::Discarded.into(),
        create_time: Some(outbox::timestamp(row.created_at)),
        attempts: row.attempts,
        failures: 0,
        reason: row.last_error.clone(),
        causes: vec![cause(Kind::Discarded, text)],
    }
}

fn cause(kind: Kind, text: impl Into<String>) -> WaitCause {
    WaitCause { kind: kind.into(), text: text.into(), ..WaitCause::default() }
}

/// Why the row waits. What holds it back by itself comes first, and what holds back its whole subscription after that. A
/// row that is dead, leased or unrouted is where it is whatever its subscription does.
fn causes(row: &Row, facts: &Facts) -> Vec<WaitCause> {
    if row.has_ended {
        let text = format!("{} has ended (`outbox-relay unsubscribe`): relays discard its events", row.subscription);
        return vec![cause(Kind::Unrouted, text)];
    }
    let own = own_cause(row, facts);
    let is_final = matches!(own.kind(), Kind::Dead | Kind::Leased | Kind::Unrouted);
    let mut causes = vec![own];
    if !is_final {
        causes.extend(causes_of_subscription(&row.subscription, facts));
    }
    // It would say that nothing holds it back.
    if causes.len() > 1 && causes[0].kind() == Kind::Queued {
        causes.remove(0);
    }
    causes
}

fn own_cause(row: &Row, facts: &Facts) -> WaitCause {
    let Some(visible_at) = row.visible_at else {
        let text = format!(
            "dead: {}; once the cause is mended, `outbox-relay dead requeue {} --subscription {}`; or `dead discard`",
            row.reason, row.event_id, row.subscription
        );
        return cause(Kind::Dead, text);
    };
    if row.subscription_id == UNROUTED {
        let text = format!("no subscription takes {}: `outbox-relay subscribe` one", row.event_type);
        return cause(Kind::Unrouted, text);
    }
    let earlier = predecessor(row, &facts.rows);
    let is_hidden = |row: &Row| row.visible_at.is_some_and(|visible_at| visible_at > facts.now);
    // A parked row may have the token of a lease long gone. One that is leased behind another shares its lease.
    let leased = row.lease_token.filter(|token| {
        is_hidden(row) && earlier.is_none_or(|earlier| earlier.lease_token == Some(*token) && is_hidden(earlier))
    });
    let shown = outbox::timestamp(visible_at);
    if let Some(token) = leased {
        let relay = facts.routes.iter().find(|route| half(&route.relay_id) == Some(token.uuid().as_u64_pair().0));
        let by = relay.map_or("a relay that has not reported for 10 s".into(), |of| format!("relay {}", of.relay_id));
        return until(shown, Kind::Leased, format!("leased by {by} until {shown}"));
    }
    if let Some(earlier) = earlier {
        let (event_id, sequence) = (earlier.event_id.to_string(), earlier.sequence);
        let dead = if earlier.visible_at.is_none() { ", which is dead" } else { "" };
        let text = format!("behind event {event_id}, the subject's number {sequence}{dead}");
        return WaitCause { event_id, ..cause(Kind::Behind, text) };
    }
    if !is_hidden(row) {
        return cause(Kind::Queued, "visible: a relay leases it once its turn comes");
    }
    if row.failures > 0 || row.charged {
        let failures = if row.failures == 1 { "1 failure".into() } else { format!("{} failures", row.failures) };
        return until(shown, Kind::BackingOff, format!("backs off until {shown}, after {failures}: {}", row.reason));
    }
    // After a requeue, an older reason is kept with it.
    if row.reason.starts_with("UNKNOWN_TYPE") || row.reason.starts_with("CLOCK") {
        let todo = "upgrade the receiver, correct the route or the clock, or narrow the subscription";
        return until(shown, Kind::Held, format!("held, and tried again at {shown}: {}; {todo}", row.reason));
    }
    let text = format!("looked at again at {shown}: it waited for an earlier event of its subject, which is gone");
    until(shown, Kind::Parked, text)
}

fn until(time: Timestamp, kind: Kind, text: String) -> WaitCause {
    WaitCause { until: Some(time), ..cause(kind, text) }
}

/// The first half of a relay's id is that of its tokens.
fn half(relay_id: &str) -> Option<u64> {
    Some(Uuid::try_parse(relay_id).ok()?.as_u64_pair().0)
}

/// The first event of the aggregate that is left before it, in its subscription, or in none though that takes its type.
fn predecessor<'r>(row: &Row, rows: &'r [Row]) -> Option<&'r Row> {
    let holds_back = |earlier: &Row| {
        earlier.subscription_id == row.subscription_id
            || (earlier.subscription_id == UNROUTED && earlier.matches.contains(&row.subscription_id))
    };
    let before = rows.iter().filter(|earlier| earlier.sequence < row.sequence && holds_back(earlier));
    before.min_by_key(|earlier| earlier.sequence)
}

fn causes_of_subscription(subscription: &str, facts: &Facts) -> Vec<WaitCause> {
    let mut causes = Vec::new();
    for pause in &facts.pauses {
        if !holds_up(pause, subscription) {
            continue;
        }
        let what = if pause.subscription.is_empty() { "all subscriptions are" } else { &format!("{subscription} is") };
        let text = format!("{what} paused {}; {} ends it", describe(pause), resume_command(pause));
        causes.push(cause(Kind::Paused, text));
    }
    for (name, pace) in facts.paces.iter().filter(|(name, _)| name.is_empty() || name == subscription) {
        let what = if name.is_empty() { "all subscriptions are" } else { &format!("{subscription} is") };
        let ends = end_of_pause(name);
        causes.push(cause(Kind::Slowed, format!("{what} slowed {}; {ends} ends it", describe_pace(pace))));
    }
    let of_it: Vec<_> = facts.routes.iter().filter(|route| route.route == subscription).collect();
    if of_it.is_empty() {
        let text = format!(
            "no relay that delivers {subscription} has reported for 10 s: start one with --route {subscription}=URL"
        );
        causes.push(cause(Kind::NoRelay, text));
    } else if of_it.iter().all(|route| route.state != Condition::Open.as_str()) {
        causes.extend(of_it.into_iter().map(cause_of_route));
    }
    causes
}

fn cause_of_route(route: &RelayRoute) -> WaitCause {
    let RelayRoute { relay_id, receiver, state, .. } = route;
    let since = route.state_time.unwrap_or_default();
    let why = if route.reason.is_empty() { "its log says why" } else { &route.reason };
    cause(Kind::RouteNotOpen, format!("the route of relay {relay_id} to {receiver} is {state} since {since}: {why}"))
}

async fn read_both(connection: &mut PgConnection, subject: Uuid) -> Result<(Vec<Row>, Vec<Discarded>), sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"-- operate: read events of a subject
        SELECT event_id, aggregate_id, subscription_id, coalesce(name, '') AS "subscription!",
            ended_at IS NOT NULL AS "has_ended!", event_type, sequence, outbox.created_at, attempts,
            attempts > attempts_before_requeue AS "charged!", failures, coalesce(last_error, '') AS "reason!",
            lease_token AS "lease_token: LeaseToken", nullif(visible_at, 'infinity') AS visible_at,
            ARRAY (
                SELECT matching.subscription_id FROM outbox_subscriptions AS matching
                WHERE matching.ended_at IS NULL AND outbox.event_type LIKE matching.type_like) AS "matches!",
            count(*) OVER () AS "of_subject!"
        FROM outbox LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE aggregate_id = $1
        ORDER BY sequence, name
        LIMIT $2"#,
        subject,
        EVENTS_MAX,
    )
    .fetch_all(&mut *connection)
    .await?;
    let discarded = sqlx::query_as!(
        Discarded,
        r#"-- operate: read discarded events of a subject
        SELECT event_id, aggregate_id, coalesce(name, '') AS "subscription!", ended_at IS NOT NULL AS "has_ended!",
            event_type, sequence, discarded.created_at, attempts, last_error, discarded_by, discarded_at,
            discarded.reason, refused
        FROM outbox_discarded AS discarded LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE aggregate_id = $1
        ORDER BY sequence, name
        LIMIT $2"#,
        subject,
        EVENTS_MAX,
    )
    .fetch_all(connection)
    .await?;
    Ok((rows, discarded))
}

/// The subject of an event. For an event that is neither dead nor discarded there is no index. So that look has a second,
/// and over a large outbox finds nothing: this is mostly an order whose events were all handled.
async fn find_subject(connection: &mut PgConnection, event_id: Uuid) -> Result<Option<Uuid>, sqlx::Error> {
    let mut tx = connection.begin().await?;
    sqlx::query!(
        "-- operate: limit the look
        SET LOCAL statement_timeout = '1s'"
    )
    .execute(&mut *tx)
    .await?;
    let found = sqlx::query_scalar!(
        r#"-- operate: find the subject of an event
        SELECT coalesce(
            (SELECT aggregate_id FROM outbox WHERE visible_at = 'infinity' AND event_id = $1 LIMIT 1),
            (SELECT aggregate_id FROM outbox_discarded WHERE event_id = $1 LIMIT 1),
            (SELECT aggregate_id FROM outbox WHERE event_id = $1 LIMIT 1))"#,
        event_id,
    )
    .fetch_one(&mut *tx)
    .await;
    tx.rollback().await?;
    match found {
        Err(cause) if is_cut_off(&cause) => Ok(None),
        found => found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn later() -> OffsetDateTime {
        NOW + Duration::from_mins(1)
    }

    fn row(sequence: i32) -> Row {
        Row {
            event_id: Uuid::from_u128(sequence.unsigned_abs().into()).into(),
            aggregate_id: Uuid::nil().into(),
            subscription_id: 1,
            subscription: "inventory".into(),
            has_ended: false,
            event_type: "orders.v1.OrderCreated".into(),
            sequence,
            created_at: NOW,
            attempts: 0,
            charged: false,
            failures: 0,
            reason: String::new(),
            lease_token: None,
            visible_at: Some(NOW - Duration::from_secs(1)),
            matches: vec![1],
            of_subject: 1,
        }
    }

    fn route(state: &str) -> RelayRoute {
        RelayRoute {
            relay_id: Uuid::from_u64_pair(7, 8).to_string(),
            route: "inventory".into(),
            receiver: "http://inventory:52052/".into(),
            state: state.into(),
            state_time: Some(Timestamp::default()),
            reason: "no reply".into(),
            delivered: 0,
        }
    }

    fn facts(rows: Vec<Row>) -> Facts {
        Facts {
            subject: Uuid::nil().into(),
            asked: Uuid::nil(),
            now: NOW,
            rows,
            discarded: Vec::new(),
            pauses: Vec::new(),
            paces: Vec::new(),
            routes: vec![route("OPEN")],
            subscriptions: vec!["inventory".into()],
        }
    }

    fn kinds(row: &Row, facts: &Facts) -> Vec<Kind> {
        causes(row, facts).iter().map(WaitCause::kind).collect()
    }

    #[test]
    fn each_row_has_its_cause() {
        let hidden = Row { visible_at: Some(later()), ..row(1) };
        let token = Some(LeaseToken::from(Uuid::from_u64_pair(7, 99)));
        for (row, expected, text) in [
            (row(1), Kind::Queued, "visible"),
            (Row { visible_at: None, reason: "BAD: x".into(), ..row(1) }, Kind::Dead, "dead: BAD: x"),
            (Row { subscription_id: 0, ..row(1) }, Kind::Unrouted, "takes orders.v1.OrderCreated"),
            (Row { lease_token: token, ..hidden.clone() }, Kind::Leased, "relay 00000000-0000-0007-"),
            // It has expired.
            (Row { lease_token: token, ..row(1) }, Kind::Queued, "visible"),
            (
                Row { failures: 2, reason: "BUSY: y".into(), ..hidden.clone() },
                Kind::BackingOff,
                "after 2 failures: BUSY: y",
            ),
            (Row { charged: true, ..hidden.clone() }, Kind::BackingOff, "backs off until 1970-01-01T00:01:00Z"),
            (Row { reason: "UNKNOWN_TYPE: z".into(), ..hidden.clone() }, Kind::Held, "UNKNOWN_TYPE: z; upgrade"),
            // Requeued, and parked since.
            (Row { reason: "BUSY: old".into(), ..hidden.clone() }, Kind::Parked, "looked at again"),
            (Row { has_ended: true, ..row(1) }, Kind::Unrouted, "inventory has ended"),
            (hidden.clone(), Kind::Parked, "looked at again at 1970-01-01T00:01:00Z"),
        ] {
            let causes = causes(&row, &facts(vec![row.clone()]));
            assert_eq!(causes.iter().map(WaitCause::kind).collect::<Vec<_>>(), [expected], "{row:?}");
            assert!(causes[0].text.contains(text), "{text:?} in {causes:?}");
        }
    }

    #[test]
    fn an_event_waits_for_the_first_of_its_subject_that_is_left_in_its_subscription_or_in_none() {
        let parked = Row { visible_at: Some(later()), ..row(3) };
        let other = Row { subscription_id: 2, subscription: "loyalty".into(), ..row(1) };
        assert_eq!(kinds(&parked, &facts(vec![other.clone(), parked.clone()])), [Kind::Parked]);
        let behind = causes(&parked, &facts(vec![row(1), row(2), parked.clone()])).remove(0);
        assert_eq!((behind.kind(), behind.event_id), (Kind::Behind, row(1).event_id.to_string()));
        let unrouted = Row { subscription_id: UNROUTED, ..row(2) };
        let of_another_type = Row { matches: vec![2], ..unrouted.clone() };
        assert_eq!(kinds(&parked, &facts(vec![of_another_type, parked.clone()])), [Kind::Parked]);
        let behind = causes(&parked, &facts(vec![unrouted.clone(), parked.clone()])).remove(0);
        assert_eq!((behind.kind(), behind.event_id), (Kind::Behind, unrouted.event_id.to_string()));
    }

    #[test]
    fn an_event_is_leased_with_the_one_before_it_or_it_has_an_old_token() {
        let token = |lease| Some(LeaseToken::from(Uuid::from_u64_pair(7, lease)));
        let hidden = |sequence, lease| Row { visible_at: Some(later()), lease_token: token(lease), ..row(sequence) };
        assert_eq!(kinds(&hidden(2, 5), &facts(vec![hidden(1, 5), hidden(2, 5)])), [Kind::Leased]);
        assert_eq!(kinds(&hidden(2, 5), &facts(vec![hidden(1, 6), hidden(2, 5)])), [Kind::Behind]);
        let dead = Row { visible_at: None, lease_token: None, ..row(1) };
        let behind = causes(&hidden(2, 5), &facts(vec![dead, hidden(2, 5)])).remove(0);
        assert!(behind.text.ends_with("number 1, which is dead"), "{behind:?}");
    }

    #[test]
    fn a_receiver_that_names_any_number_of_types_is_asked_for_a_thousand_ids_and_the_known_ones_are_among_them() {
        let known = Row { event_id: EventId::new(), sequence: 900, ..row(1) };
        let asked = Facts { asked: Uuid::max(), ..facts(vec![known.clone()]) };
        let types: Vec<_> = (0..100_000).map(|number| format!("source{number}.v1.Happened")).collect();
        let ids = candidates(&asked, &types);
        assert!(ids.len() <= RECALL_MAX && ids.len() > 500, "{}", ids.len());
        assert_eq!((ids.get(&known.event_id), ids.get(&Uuid::max().into())), (Some(&900), Some(&0)));
        let first = EventId::derive("orders.v1.OrderCreated", asked.subject, 1);
        assert_eq!(ids.get(&first), Some(&1));
        assert_eq!(candidates(&asked, &[]).len(), 2 + SEQUENCES.unsigned_abs() as usize);
    }

    #[test]
    fn what_holds_back_the_subscription_is_said_too_but_not_of_an_event_that_is_dead_or_leased() {
        let pause = |subscription: &str| OutboxPause {
            subscription: subscription.into(),
            paused_by: "ann".into(),
            reason: "a move".into(),
            ..OutboxPause::default()
        };
        let stopped = Facts {
            pauses: vec![pause(""), pause("inventory"), pause("loyalty")],
            routes: vec![route("DOWN"), route("BARRED"), RelayRoute { route: "loyalty".into(), ..route("OPEN") }],
            ..facts(vec![row(1)])
        };
        let expected = [Kind::Paused, Kind::Paused, Kind::RouteNotOpen, Kind::RouteNotOpen];
        assert_eq!(kinds(&row(1), &stopped), expected);
        let backs_off = Row { visible_at: Some(later()), failures: 1, ..row(1) };
        assert_eq!(kinds(&backs_off, &stopped)[..2], [Kind::BackingOff, Kind::Paused]);
        assert_eq!(kinds(&Row { visible_at: None, ..row(1) }, &stopped), [Kind::Dead]);

        // One open route is enough.
        let one_open = Facts { routes: vec![route("DOWN"), route("OPEN")], ..facts(vec![row(1)]) };
        assert_eq!(kinds(&row(1), &one_open), [Kind::Queued]);
        assert_eq!(kinds(&row(1), &Facts { routes: Vec::new(), ..facts(vec![row(1)]) }), [Kind::NoRelay]);
    }
}
