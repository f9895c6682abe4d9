//! Undoes a deed, as far as what it changed is still as the deed has left it.
//!
//! An undo is a deed itself, and records the events that it has changed. So an event whose latest deed is another one is
//! left alone: it was undone already, or somebody has done something else to it since.

use outbox::{AggregateId, EventId};
use proto::relay::v1::{UndoDeedResponse, deed::Kind};
use sqlx::{PgConnection, Postgres, Transaction, types::time::OffsetDateTime};
use uuid::Uuid;

use super::{
    Author, OperateError, Position, begin_durable, count,
    deeds::{NewDeed, kind},
    discard::give_up,
    free_successors,
    pause::{delete_pause, insert_pause},
    requeue::MAX_AGE_UNTOLD,
    restore::bring_back,
    tell_of_change, wake_relays,
};

/// An undo, and the part of the deed's events that it has yet to visit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Undo {
    /// The deed to undo.
    pub(crate) deed_id: i64,
    /// The last event that it has visited, with its subscription.
    after: (EventId, i16),
    /// The deed that this undo is, once it has changed something.
    undo_id: Option<i64>,
}

impl Undo {
    pub(crate) fn begin(deed_id: i64) -> Self {
        Self { deed_id, after: (Uuid::nil().into(), 0), undo_id: None }
    }

    fn list(deed_id: i64) -> String {
        format!("undo {deed_id}")
    }

    /// A token from which [`Undo::resume`] makes this undo again.
    fn token(&self) -> String {
        let (event_id, subscription_id) = self.after;
        let place = format!("{event_id} {subscription_id} {}", self.undo_id.unwrap_or_default());
        chassis::encode_page_token(&Self::list(self.deed_id), &place)
    }

    /// `None` if the token is not one of an undo of this deed.
    pub(crate) fn resume(deed_id: i64, token: &str) -> Option<Self> {
        let place = chassis::decode_page_token(&Self::list(deed_id), token)?;
        let mut parts = place.split(' ');
        let event_id = Uuid::try_parse(parts.next()?).ok()?;
        let subscription_id = parts.next()?.parse().ok()?;
        let undo_id = Some(parts.next()?.parse().ok()?).filter(|undo_id| *undo_id > 0);
        Some(Self { deed_id, after: (event_id.into(), subscription_id), undo_id })
    }
}

/// The deed to undo.
struct DeedRow {
    deed_id: i64,
    kind: String,
    done_at: OffsetDateTime,
    about: String,
    subscription_id: Option<i16>,
    subscription: String,
    can_undo: bool,
    /// Somebody has paused or resumed the same since, or undone it.
    is_superseded: bool,
}

/// An event that the deed has changed.
struct EventRow {
    event_id: EventId,
    subscription_id: i16,
    aggregate_id: AggregateId,
    sequence: i32,
    /// No later deed has changed it.
    is_latest: bool,
}

/// What a piece has done.
struct Piece {
    answer: UndoDeedResponse,
    /// Events that are gone now, and hold back no others any more.
    gone: Vec<Position>,
}

/// Undoes the deed for the next of its events: at most `events_max` are looked at. Its answer has a token as long as there
/// may be further events.
///
/// # Errors
/// [`OperateError::NoDeed`], [`OperateError::CannotUndo`] if it has found nothing to undo in any piece, and those of the
/// database. The piece is then undone as a whole, or not at all.
pub(crate) async fn undo_piece(
    connection: &mut PgConnection,
    undo: Undo,
    author: &Author,
    events_max: u32,
) -> Result<UndoDeedResponse, OperateError> {
    let mut tx = begin_durable(connection).await?;
    let deed = find_deed(&mut tx, undo.deed_id).await?;
    let of_pause = matches!(kind(&deed.kind), Kind::Pause | Kind::Resume);
    let Piece { answer, gone } = match of_pause {
        true => undo_pause(&mut tx, &deed, author).await?,
        false => undo_events(&mut tx, &deed, undo, author, events_max).await?,
    };
    if answer.deed_id == 0 {
        // Nothing has changed so far, so there is no deed either.
        tx.rollback().await?;
        return Ok(answer);
    }
    tx.commit().await?;
    if gone.is_empty() {
        wake_relays(connection).await;
    } else {
        tell_of_change(connection, &gone).await;
    }
    Ok(answer)
}

/// Why a deed of this kind can never be undone.
fn never(of: Kind) -> &'static str {
    match of {
        Kind::Undo => "has undone another one: do that one again instead",
        Kind::Subscribe => "has made a subscription, which `unsubscribe` ends",
        Kind::Unsubscribe => "has ended a subscription, whose events cannot come back",
        _ => "has refused what its event tells of, and others know it",
    }
}

async fn find_deed(tx: &mut PgConnection, deed_id: i64) -> Result<DeedRow, OperateError> {
    let found = sqlx::query_as!(
        DeedRow,
        r#"-- operate: find deed
        SELECT deed_id, kind, done_at, about, subscription_id, coalesce(name, '') AS "subscription!", can_undo,
            EXISTS (
                SELECT FROM outbox_deeds AS later
                WHERE later.deed_id > deeds.deed_id AND later.subscription_id IS NOT DISTINCT FROM deeds.subscription_id
                  AND (later.kind IN ('pause', 'resume') OR later.undoes = deeds.deed_id)) AS "is_superseded!"
        FROM outbox_deeds AS deeds LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE deed_id = $1"#,
        deed_id,
    );
    let Some(deed) = found.fetch_optional(tx).await? else { return Err(OperateError::NoDeed(deed_id)) };
    if deed.can_undo { Ok(deed) } else { Err(OperateError::CannotUndo { deed_id, why: never(kind(&deed.kind)) }) }
}

async fn record(tx: &mut PgConnection, deed: &DeedRow, author: &Author) -> Result<i64, sqlx::Error> {
    let about = format!("{} {}", deed.kind, deed.about);
    let new = NewDeed::new(Kind::Undo, author, deed.subscription_id, about.trim_end());
    NewDeed { can_undo: false, undoes: Some(deed.deed_id), ..new }.record(tx).await
}

/// A pause is known by its time, which is that of its deed.
async fn undo_pause(tx: &mut PgConnection, deed: &DeedRow, author: &Author) -> Result<Piece, OperateError> {
    let (subscription_id, name) = (deed.subscription_id, deed.subscription.as_str());
    let changed = if deed.is_superseded {
        None
    } else if kind(&deed.kind) == Kind::Pause {
        delete_pause(tx, subscription_id, name, Some(deed.done_at)).await?
    } else {
        let author = with_reason(author, || format!("again: {}", deed.about));
        insert_pause(tx, subscription_id, name, &author).await?
    };
    if changed.is_none() {
        let why = "has nothing left to undo: somebody has paused or resumed since";
        return Err(OperateError::CannotUndo { deed_id: deed.deed_id, why });
    }
    let answer = UndoDeedResponse { deed_id: record(tx, deed, author).await?, ..UndoDeedResponse::default() };
    Ok(Piece { answer, gone: Vec::new() })
}

async fn undo_events(
    tx: &mut Transaction<'_, Postgres>,
    deed: &DeedRow,
    undo: Undo,
    author: &Author,
    events_max: u32,
) -> Result<Piece, OperateError> {
    let visited = find_events(tx, &undo, events_max).await?;
    let last = visited.last().map(|event| (event.event_id, event.subscription_id));
    let more = last.filter(|_| visited.len() >= events_max as usize);
    let latest: Vec<_> = visited.iter().filter(|event| event.is_latest).collect();
    let undo_id = match undo.undo_id {
        Some(undo_id) => undo_id,
        None => record(tx, deed, author).await?,
    };
    let mut gone = Vec::new();
    let undone = match kind(&deed.kind) {
        Kind::Requeue => make_dead(tx, &latest, undo_id).await?,
        Kind::Discard => restore(tx, &latest, author, undo_id).await?,
        _ => {
            let author = with_reason(author, || format!("deed {} was undone", deed.deed_id));
            let rows = lock(tx, &latest, State::Dead).await?;
            gone = give_up(tx, &rows, &author, undo_id).await?.positions();
            free_successors(tx, &gone).await?;
            gone.len() as u64
        }
    };
    let undo_id = Some(undo_id).filter(|_| undone > 0 || undo.undo_id.is_some());
    if undo_id.is_none() && more.is_none() {
        let why = "has nothing left to undo: its events were delivered, are being delivered, or have changed since";
        return Err(OperateError::CannotUndo { deed_id: deed.deed_id, why });
    }
    let next_token = more.map(|after| Undo { after, undo_id, ..undo }.token()).unwrap_or_default();
    let answer = UndoDeedResponse {
        undone: count(undone),
        left: count(visited.len() as u64 - undone),
        next_token,
        deed_id: undo_id.unwrap_or_default(),
    };
    Ok(Piece { answer, gone })
}

/// The same author, with this reason if he has given none.
fn with_reason(author: &Author, reason: impl Fn() -> String) -> Author {
    let given = author.reason.clone();
    Author { name: author.name.clone(), reason: if given.is_empty() { reason() } else { given } }
}

/// In the order in which operators lock events.
async fn find_events(tx: &mut PgConnection, undo: &Undo, events_max: u32) -> Result<Vec<EventRow>, sqlx::Error> {
    sqlx::query_as!(
        EventRow,
        r#"-- operate: find events of a deed
        SELECT event_id, subscription_id, aggregate_id, sequence,
            NOT EXISTS (
                SELECT FROM outbox_deed_events AS later
                WHERE later.event_id = of_deed.event_id AND later.subscription_id = of_deed.subscription_id
                  AND later.deed_id > of_deed.deed_id) AS "is_latest!"
        FROM outbox_deed_events AS of_deed
        WHERE deed_id = $1 AND (event_id, subscription_id) > ($2, $3)
        ORDER BY event_id, subscription_id
        LIMIT $4"#,
        undo.deed_id,
        undo.after.0 as EventId,
        undo.after.1,
        i64::from(events_max),
    )
    .fetch_all(tx)
    .await
}

/// As a deed has left an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Restored.
    Dead,
    /// Requeued, and neither leased nor failed since.
    Untried,
}

/// Locks the rows of the events that are in this state, in the order of their ids, and returns their `ctid`. A relay that
/// has one of them leased or settled meanwhile was first: then the row is left out.
async fn lock(tx: &mut PgConnection, events: &[&EventRow], state: State) -> Result<Vec<String>, sqlx::Error> {
    let aggregate_ids: Vec<_> = events.iter().map(|event| event.aggregate_id).collect();
    let subscription_ids: Vec<_> = events.iter().map(|event| event.subscription_id).collect();
    let sequences: Vec<_> = events.iter().map(|event| event.sequence).collect();
    sqlx::query_scalar!(
        r#"-- operate: lock events of a deed
        SELECT outbox.ctid::text AS "row!"
        FROM unnest($1::uuid[], $2::smallint[], $3::integer[]) AS named (aggregate_id, subscription_id, sequence)
        JOIN outbox USING (aggregate_id, subscription_id, sequence)
        WHERE CASE
            WHEN $4 THEN visible_at = 'infinity'
            ELSE visible_at <> 'infinity' AND lease_token IS NULL AND failures = 0
                AND attempts = attempts_before_requeue END
        ORDER BY event_id, subscription_id
        FOR UPDATE OF outbox"#,
        &aggregate_ids as &[AggregateId],
        &subscription_ids,
        &sequences,
        state == State::Dead,
    )
    .fetch_all(tx)
    .await
}

/// Their last reasons are still there. Relays park what waits for them.
async fn make_dead(tx: &mut PgConnection, events: &[&EventRow], undo_id: i64) -> Result<u64, sqlx::Error> {
    let rows = lock(tx, events, State::Untried).await?;
    let recorded = sqlx::query!(
        "-- operate: make dead again
        WITH dead AS (
            UPDATE outbox SET visible_at = 'infinity' WHERE ctid = ANY ($1::text[]::tid[])
            RETURNING event_id, subscription_id, aggregate_id, sequence
        )
        INSERT INTO outbox_deed_events (deed_id, event_id, subscription_id, aggregate_id, sequence)
        SELECT $2, event_id, subscription_id, aggregate_id, sequence FROM dead",
        &rows,
        undo_id,
    );
    Ok(recorded.execute(tx).await?.rows_affected())
}

/// Those that cannot come back stay where they are, as for `dead restore`. One that was sent again meanwhile is in the
/// outbox already.
async fn restore(
    tx: &mut PgConnection,
    events: &[&EventRow],
    author: &Author,
    undo_id: i64,
) -> Result<u64, sqlx::Error> {
    let event_ids: Vec<_> = events.iter().map(|event| event.event_id).collect();
    let subscription_ids: Vec<_> = events.iter().map(|event| event.subscription_id).collect();
    let can = sqlx::query!(
        r#"-- operate: find what can be restored
        SELECT discarded.event_id AS "event_id: EventId", discarded.subscription_id
        FROM unnest($1::uuid[], $2::smallint[]) AS named (event_id, subscription_id)
        JOIN outbox_discarded AS discarded USING (event_id, subscription_id)
        LEFT JOIN outbox_subscriptions AS subscription USING (subscription_id)
        WHERE NOT discarded.refused AND subscription.ended_at IS NULL
          AND discarded.created_at >= now() - make_interval(secs => coalesce(subscription.max_age_seconds, $3))
          AND NOT EXISTS (
              SELECT FROM outbox AS there
              WHERE there.aggregate_id = discarded.aggregate_id AND there.subscription_id = discarded.subscription_id
                AND there.sequence = discarded.sequence)
        ORDER BY discarded.event_id, discarded.subscription_id"#,
        &event_ids as &[EventId],
        &subscription_ids,
        MAX_AGE_UNTOLD,
    )
    .fetch_all(&mut *tx)
    .await?;
    let (event_ids, subscription_ids): (Vec<_>, Vec<_>) =
        can.into_iter().map(|row| (row.event_id, row.subscription_id)).unzip();
    bring_back(tx, &event_ids, &subscription_ids, author, undo_id).await
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::Undo;

    #[test]
    fn a_token_continues_an_undo_of_the_same_deed_only() {
        let undo = Undo { deed_id: 7, after: (Uuid::from_u128(1).into(), 2), undo_id: Some(9) };
        assert_eq!(Undo::resume(7, &undo.token()), Some(undo.clone()));
        assert_eq!(Undo::resume(8, &undo.token()), None);
        assert_eq!(Undo::resume(7, "no token"), None);
        let first = Undo { undo_id: None, ..undo };
        assert_eq!(Undo::resume(7, &first.token()), Some(first));
    }
}
