//! Reads what is known of a subject's events: what is left of them in the outbox and why it waits, what was discarded, and
//! what receivers have applied.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use outbox::{AggregateId, EventId};
use proto::relay::v1::{
    AppliedEvent, Journey, JourneyEvent, OutboxPause, RelayRoute, WaitCause, journey_event::State, wait_cause::Kind,
};
use sqlx::{PgConnection, types::time::OffsetDateTime};
use uuid::Uuid;

use super::{
    OperateError,
    pause::read_pauses,
    refuse::{NotApplicable, Reason, describe},
    status::read_routes,
};
use crate::{
    deliver::{Description, Receiver},
    route::Condition,
    subscription::{UNROUTED, read_subscriptions},
};

/// Ids of delivered events are derived from their subject and sequence. Receivers are asked for this many sequences.
const SEQUENCES: i32 = 50;

/// What the database says.
pub(crate) struct Facts {
    subject: AggregateId,
    /// The id that was asked for, which may be an event's.
    asked: Uuid,
    now: OffsetDateTime,
    rows: Vec<Row>,
    discarded: Vec<Discarded>,
    pauses: Vec<OutboxPause>,
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
    event_type: String,
    sequence: i32,
    created_at: OffsetDateTime,
    attempts: i32,
    charged: bool,
    failures: i32,
    reason: String,
    lease_token: Option<Uuid>,
    /// `None`: it is dead.
    visible_at: Option<OffsetDateTime>,
    now: OffsetDateTime,
}

struct Discarded {
    event_id: EventId,
    aggregate_id: AggregateId,
    subscription: String,
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
    let now = match rows.first() {
        Some(row) => row.now,
        None => read_time(connection).await?,
    };
    let (pauses, routes) = (read_pauses(connection).await?, read_routes(connection).await?);
    let subscriptions = read_subscriptions(connection).await?.into_iter().map(|of| of.name).collect();
    Ok(Facts { subject, asked: id, now, rows, discarded, pauses, routes, subscriptions })
}

/// Asks the receivers of all routes, each at its URL, at the same time. Then says what is known.
///
/// # Errors
/// Nobody knows the id.
pub(crate) async fn ask_receivers(facts: Facts) -> Result<Journey, OperateError> {
    let asked = join_all(receivers(&facts.routes).into_iter().map(|(subscription, url)| {
        let facts = &facts;
        async move {
            let answer = recall(facts, url).await;
            (subscription, url, answer)
        }
    }))
    .await;
    let without_route =
        facts.subscriptions.iter().filter(|name| facts.routes.iter().all(|route| route.route != **name));
    let mut not_asked: Vec<_> =
        without_route.map(|name| format!("{name}: no relay that delivers it has reported for 10 s")).collect();
    let mut applied = Vec::new();
    for (subscription, url, answer) in asked {
        match answer {
            Ok(events) => applied.extend(
                events.into_iter().map(|event| AppliedEvent { subscription: subscription.to_owned(), ..event }),
            ),
            Err(cause) => not_asked.push(format!("{subscription} at {url}: {cause}")),
        }
    }
    applied.sort_by(|one, other| (one.sequence, &one.subscription).cmp(&(other.sequence, &other.subscription)));
    let mut journey = facts.journey();
    if journey.events.is_empty() && applied.iter().all(|event| event.sequence == 0) {
        if applied.is_empty() && not_asked.is_empty() {
            let unknown = NotApplicable { event_id: facts.asked.into(), reason: Reason::UnknownToAll };
            return Err(OperateError::NotApplicable(vec![unknown]));
        }
        // It is the id of an event that was handled, or of nothing.
        journey.subject = String::new();
    }
    Ok(Journey { applied, not_asked, ..journey })
}

impl Facts {
    /// What the database alone knows.
    pub(crate) fn journey(&self) -> Journey {
        let mut events: Vec<_> = self.rows.iter().map(|row| waiting(row, self)).collect();
        events.extend(self.discarded.iter().map(given_up));
        events.sort_by(|one, other| (one.sequence, &one.subscription).cmp(&(other.sequence, &other.subscription)));
        Journey {
            subject: self.subject.to_string(),
            time: Some(outbox::timestamp(self.now)),
            events,
            ..Journey::default()
        }
    }
}

/// One receiver for each subscription.
fn receivers(routes: &[RelayRoute]) -> BTreeMap<&str, &str> {
    routes.iter().map(|route| (route.route.as_str(), route.receiver.as_str())).collect()
}

async fn recall(facts: &Facts, url: &str) -> Result<Vec<AppliedEvent>, String> {
    let uri = url.parse().map_err(|_| "its URL cannot be read".to_owned())?;
    let mut receiver = Receiver::connect_to_ask(uri);
    let types = match receiver.describe().await {
        Description::Ready { types, .. } => types,
        Description::Unknown(text) => return Err(text.to_owned()),
        Description::Unavailable { reason, .. } | Description::Barred { reason } => return Err(reason),
    };
    let ids = candidates(facts, &types);
    let applied = receiver.recall(ids.keys().map(EventId::to_string).collect()).await?;
    let event = |(event_id, apply_time): (String, _)| {
        let sequence = Uuid::try_parse(&event_id).ok().and_then(|id| ids.get(&id.into()).copied());
        AppliedEvent { event_id, sequence: sequence.unwrap_or_default().into(), apply_time, ..AppliedEvent::default() }
    };
    Ok(applied.into_iter().filter(|(_, time)| time.is_some()).map(event).collect())
}

/// The ids that events of the subject have, or may have had, with their sequences. Ids depend on the source of a type
/// alone, so a few types do for all.
fn candidates(facts: &Facts, types: &[String]) -> BTreeMap<EventId, i32> {
    let of_rows = facts.rows.iter().map(|row| row.event_type.as_str());
    let of_discarded = facts.discarded.iter().map(|row| row.event_type.as_str());
    let types: BTreeSet<&str> = of_rows.chain(of_discarded).chain(types.iter().map(String::as_str)).collect();
    let mut ids = BTreeMap::from([(EventId::from(facts.asked), 0)]);
    for event_type in types {
        let derived = (1..=SEQUENCES).map(|sequence| (EventId::derive(event_type, facts.subject, sequence), sequence));
        ids.extend(derived);
    }
    // Earlier versions did not derive them.
    ids.extend(facts.rows.iter().map(|row| (row.event_id, row.sequence)));
    ids.extend(facts.discarded.iter().map(|row| (row.event_id, row.sequence)));
    // That it may name in one call.
    while ids.len() > RECALL_MAX {
        ids.pop_last();
    }
    ids
}

/// Ids that a receiver must take in one call.
const RECALL_MAX: usize = 1000;

fn waiting(row: &Row, facts: &Facts) -> JourneyEvent {
    let causes = causes(row, facts);
    let state = match causes.first().map(WaitCause::kind) {
        Some(Kind::Dead) => State::Dead,
        Some(Kind::Leased) => State::Leased,
        Some(Kind::BackingOff | Kind::Held) => State::BackingOff,
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
    let undo = if row.refused { "" } else { "; `outbox-relay dead restore` brings it back" };
    let text = format!(
        "discarded by {} at {}{how}: {}{undo}",
        row.discarded_by,
        outbox::timestamp(row.discarded_at),
        row.reason
    );
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
        return cause(Kind::Dead, format!("dead: {}; `outbox-relay dead requeue` or `dead discard` it", row.reason));
    };
    if row.subscription_id == UNROUTED {
        let text = format!("no subscription takes {}: `outbox-relay subscribe` one", row.event_type);
        return cause(Kind::Unrouted, text);
    }
    let shown = outbox::timestamp(visible_at);
    let until = Some(shown);
    let is_hidden = visible_at > facts.now;
    if let Some(token) = row.lease_token.filter(|_| is_hidden) {
        let relay = facts.routes.iter().find(|route| half(&route.relay_id) == Some(token.as_u64_pair().0));
        let by =
            relay.map_or("a relay that has not reported for 10 s".into(), |route| format!("relay {}", route.relay_id));
        return WaitCause { until, ..cause(Kind::Leased, format!("leased by {by} until {shown}")) };
    }
    if let Some(earlier) = predecessor(row, &facts.rows) {
        let (event_id, sequence) = (earlier.event_id.to_string(), earlier.sequence);
        let text = format!("behind event {event_id}, the subject's number {sequence}");
        return WaitCause { event_id, ..cause(Kind::Behind, text) };
    }
    if !is_hidden {
        return cause(Kind::Queued, "visible: a relay leases it once its turn comes");
    }
    if row.failures > 0 || row.charged {
        let text = format!("backs off until {shown}, after {} failures: {}", row.failures, row.reason);
        return WaitCause { until, ..cause(Kind::BackingOff, text) };
    }
    if row.reason.is_empty() {
        let text = format!("looked at again at {shown}: it waited for an earlier event of its subject, which is gone");
        return WaitCause { until, ..cause(Kind::Parked, text) };
    }
    WaitCause { until, ..cause(Kind::Held, format!("held until {shown}: {}", row.reason)) }
}

/// The first half of a relay's id is that of its tokens.
fn half(relay_id: &str) -> Option<u64> {
    Some(Uuid::try_parse(relay_id).ok()?.as_u64_pair().0)
}

/// The first event of the aggregate that is left before it, in its subscription or in none.
fn predecessor<'r>(row: &Row, rows: &'r [Row]) -> Option<&'r Row> {
    let is_before = |earlier: &&Row| {
        earlier.sequence < row.sequence
            && (earlier.subscription_id == row.subscription_id || earlier.subscription_id == UNROUTED)
    };
    rows.iter().filter(is_before).min_by_key(|earlier| earlier.sequence)
}

fn causes_of_subscription(subscription: &str, facts: &Facts) -> Vec<WaitCause> {
    let mut causes = Vec::new();
    for pause in &facts.pauses {
        let (what, resume) = match pause.subscription.as_str() {
            "" => ("all subscriptions are".to_owned(), "`outbox-relay resume`".to_owned()),
            name if name == subscription => {
                (format!("{name} is"), format!("`outbox-relay resume --subscription {name}`"))
            }
            _ => continue,
        };
        causes.push(cause(Kind::Paused, format!("{what} paused {}; {resume} ends it", describe(pause))));
    }
    let of_it: Vec<_> = facts.routes.iter().filter(|route| route.route == subscription).collect();
    if of_it.is_empty() {
        let text = format!(
            "no relay that delivers {subscription} has reported for 10 s: start one with --route {subscription}=URL"
        );
        causes.push(cause(Kind::NoRelay, text));
    } else if of_it.iter().all(|route| route.state != Condition::Open.as_str()) {
        for route in of_it {
            let since = route.state_time.unwrap_or_default();
            let text = format!(
                "the route to {} is {} since {since}; the log of relay {} says why",
                route.receiver, route.state, route.relay_id
            );
            causes.push(cause(Kind::RouteNotOpen, text));
        }
    }
    causes
}

async fn read_both(connection: &mut PgConnection, subject: Uuid) -> Result<(Vec<Row>, Vec<Discarded>), sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"-- operate: read events of a subject
        SELECT event_id, aggregate_id, subscription_id, coalesce(name, '') AS "subscription!", event_type, sequence,
            outbox.created_at, attempts, attempts > attempts_before_requeue AS "charged!", failures,
            coalesce(last_error, '') AS "reason!", lease_token, nullif(visible_at, 'infinity') AS visible_at,
            now() AS "now!"
        FROM outbox LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE aggregate_id = $1
        ORDER BY sequence, name
        LIMIT 1000"#,
        subject,
    )
    .fetch_all(&mut *connection)
    .await?;
    let discarded = sqlx::query_as!(
        Discarded,
        r#"-- operate: read discarded events of a subject
        SELECT event_id, aggregate_id, coalesce(name, '') AS "subscription!", event_type, sequence,
            discarded.created_at, attempts, last_error, discarded_by, discarded_at, discarded.reason, refused
        FROM outbox_discarded AS discarded LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE aggregate_id = $1
        ORDER BY sequence, name
        LIMIT 1000"#,
        subject,
    )
    .fetch_all(connection)
    .await?;
    Ok((rows, discarded))
}

/// The subject of an event. It reads the whole outbox if the event is not dead, since there is no index for this.
async fn find_subject(connection: &mut PgConnection, event_id: Uuid) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: find the subject of an event
        SELECT coalesce(
            (SELECT aggregate_id FROM outbox WHERE visible_at = 'infinity' AND event_id = $1 LIMIT 1),
            (SELECT aggregate_id FROM outbox_discarded WHERE event_id = $1 LIMIT 1),
            (SELECT aggregate_id FROM outbox WHERE event_id = $1 LIMIT 1))"#,
        event_id,
    )
    .fetch_one(connection)
    .await
}

async fn read_time(connection: &mut PgConnection) -> Result<OffsetDateTime, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: read the time
        SELECT now() AS "now!""#
    )
    .fetch_one(connection)
    .await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prost_types::Timestamp;

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
            event_type: "orders.v1.OrderCreated".into(),
            sequence,
            created_at: NOW,
            attempts: 0,
            charged: false,
            failures: 0,
            reason: String::new(),
            lease_token: None,
            visible_at: Some(NOW - Duration::from_secs(1)),
            now: NOW,
        }
    }

    fn route(state: &str) -> RelayRoute {
        RelayRoute {
            relay_id: Uuid::from_u64_pair(7, 8).to_string(),
            route: "inventory".into(),
            receiver: "http://inventory:50052/".into(),
            state: state.into(),
            state_time: Some(Timestamp::default()),
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
        let token = Some(Uuid::from_u64_pair(7, 99));
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
            (Row { reason: "UNKNOWN_TYPE: z".into(), ..hidden.clone() }, Kind::Held, "UNKNOWN_TYPE: z"),
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
        let behind = causes(&parked, &facts(vec![unrouted.clone(), parked.clone()])).remove(0);
        assert_eq!((behind.kind(), behind.event_id), (Kind::Behind, unrouted.event_id.to_string()));
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
