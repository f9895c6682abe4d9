//! Undoes a deed, as far as what it changed is still as the deed has left it.
//!
//! An undo is a deed itself, and records the events that it has changed. So an event whose latest deed is another one is
//! left alone: it was undone already, or somebody has done something else to it since.

use std::collections::{HashMap, HashSet};

use outbox::{AggregateId, EventId};
use proto::relay::v1::deed::Kind;
use sqlx::{PgConnection, Postgres, Transaction, types::time::OffsetDateTime};
use uuid::Uuid;

use super::{
    Author, OperateError, Position, begin_durable, count,
    deeds::{NewDeed, kind},
    discard::give_up,
    free_successors,
    pause::{delete_pace, delete_pause, insert_pause},
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
    pub(crate) fn token(&self) -> String {
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

/// A piece of an undo.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    /// Events that are as they were before the deed.
    pub(crate) undone: i64,
    /// Events that stay as they are.
    pub(crate) left: i64,
    /// The deed that the undo is, once something was undone.
    pub(crate) undo_id: Option<i64>,
    /// What is left of the undo.
    pub(crate) rest: Option<Undo>,
    /// Events that are gone now, and hold back no others any more.
    gone: Vec<Position>,
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
    /// Somebody has paused or resumed the same since, or undone it, or its subscription has ended.
    is_superseded: bool,
}

/// Undoes the deed for the next of its events: at most `events_max` are looked at.
///
/// # Errors
/// [`OperateError::NoDeed`], [`OperateError::CannotUndo`] if it has found nothing to undo in any piece, and those of the
/// database. The piece is then undone as a whole, or not at all.
pub(crate) async fn undo_piece(
    connection: &mut PgConnection,
    undo: Undo,
    author: &Author,
    events_max: u32,
) -> Result<Piece, OperateError> {
    let mut tx = begin_durable(connection).await?;
    let mut deed = find_deed(&mut tx, undo.deed_id).await?;
    let piece = match kind(&deed.kind) {
        Kind::Pause | Kind::Resume => {
            // Until the end of this, nobody else pauses or resumes. Somebody may have before.
            lock_pauses(&mut tx).await?;
            deed = find_deed(&mut tx, undo.deed_id).await?;
            undo_pause(&mut tx, &deed, author).await?
        }
        // A function brings them back one by one.
        Kind::Discard => undo_events(&mut tx, &deed, undo, author, events_max / 5).await?,
        _ => undo_events(&mut tx, &deed, undo, author, events_max).await?,
    };
    if piece.undo_id.is_none() {
        // Nothing has changed so far, so there is no deed either.
        tx.rollback().await?;
        return Ok(piece);
    }
    tx.commit().await?;
    if !piece.gone.is_empty() {
        tell_of_change(connection, &piece.gone).await;
    } else if kind(&deed.kind) == Kind::Pause {
        wake_relays(connection).await;
    }
    Ok(piece)
}

/// Leases go on: they only read the pauses.
async fn lock_pauses(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    let lock = sqlx::query!(
        "-- operate: lock pauses
        LOCK TABLE outbox_pauses IN SHARE ROW EXCLUSIVE MODE"
    );
    lock.execute(tx).await?;
    Ok(())
}

/// Why a deed of this kind can never be undone.
fn never(of: Kind) -> &'static str {
    match of {
        Kind::Undo => "has undone another one: do that one again instead",
        Kind::Subscribe => "has made a subscription, which `unsubscribe` ends",
        Kind::Unsubscribe => "has ended a subscription, whose events cannot come back",
        Kind::Resume => "has ended or set a pace: resume again, and say how fast",
        Kind::Unspecified => "was done by a later version: undo it with that",
        _ => "has refused what its event tells of, and others know it",
    }
}

async fn find_deed(tx: &mut PgConnection, deed_id: i64) -> Result<DeedRow, OperateError> {
    let found = sqlx::query_as!(
        DeedRow,
        r#"-- operate: find deed
        SELECT deed_id, kind, done_at, about, subscription_id, coalesce(name, '') AS "subscription!", can_undo,
            ended_at IS NOT NULL OR EXISTS (
                SELECT FROM outbox_deeds AS later
                WHERE later.deed_id > deeds.deed_id AND later.subscription_id IS NOT DISTINCT FROM deeds.subscription_id
                  AND (later.kind IN ('pause', 'resume') OR later.undoes = deeds.deed_id)) AS "is_superseded!"
        FROM outbox_deeds AS deeds LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE deed_id = $1"#,
        deed_id,
    );
    let Some(deed) = found.fetch_optional(tx).await? else { return Err(OperateError::NoDeed(deed_id)) };
    let kind = kind(&deed.kind);
    if deed.can_undo && kind != Kind::Unspecified {
        Ok(deed)
    } else {
        Err(OperateError::CannotUndo { deed_id, why: never(kind) })
    }
}

/// The deed that an undo is: one for all pieces.
async fn record(
    tx: &mut PgConnection,
    deed: &DeedRow,
    author: &Author,
    begun: Option<i64>,
) -> Result<i64, sqlx::Error> {
    let about = format!("{} {}", deed.kind, deed.about);
    let new = NewDeed::new(Kind::Undo, author, deed.subscription_id, about.trim_end());
    NewDeed { can_undo: false, undoes: Some(deed.deed_id), ..new }.go_on(tx, begun).await
}

/// A pause is known by its time, which is that of its deed.
async fn undo_pause(tx: &mut PgConnection, deed: &DeedRow, author: &Author) -> Result<Piece, OperateError> {
    let (subscription_id, name) = (deed.subscription_id, deed.subscription.as_str());
    let changed = if deed.is_superseded {
        None
    } else if kind(&deed.kind) == Kind::Pause {
        let ended = delete_pause(tx, subscription_id, name, Some(deed.done_at)).await?;
        // A slow resume that did not end may have left one.
        if ended.is_some() {
            delete_pace(tx, subscription_id).await?;
        }
        ended
    } else {
        let author = with_reason(author, || format!("deed {} was undone, which had ended this pause", deed.deed_id));
        let paused = insert_pause(tx, subscription_id, name, &author).await?;
        delete_pace(tx, subscription_id).await?;
        paused
    };
    if changed.is_none() {
        let why = "has nothing left to undo: somebody has paused or resumed since, or the subscription has ended";
        return Err(OperateError::CannotUndo { deed_id: deed.deed_id, why });
    }
    Ok(Piece { undo_id: Some(record(tx, deed, author, None).await?), ..Piece::default() })
}

async fn undo_events(
    tx: &mut Transaction<'_, Postgres>,
    deed: &DeedRow,
    undo: Undo,
    author: &Author,
    events_max: u32,
) -> Result<Piece, OperateError> {
    let changes = find_changes(tx, &undo, events_max).await?;
    let last = changes.last().map(|change| (change.event_id, change.subscription_id));
    let more = last.filter(|_| changes.len() >= events_max as usize);
    let undo_id = record(tx, deed, author, undo.undo_id).await?;
    let mut gone = Vec::new();
    let undone = match kind(&deed.kind) {
        Kind::Requeue => {
            let rows = lock_latest(tx, &changes, State::Untried).await?;
            make_dead(tx, &rows, undo_id).await?
        }
        Kind::Discard => restore(tx, &changes, author, undo_id).await?,
        _ => {
            let author = with_reason(author, || format!("deed {} was undone", deed.deed_id));
            let rows = lock_latest(tx, &changes, State::Dead).await?;
            gone = give_up(tx, &rows, &author, undo_id, false).await?.positions();
            free_successors(tx, &gone).await?;
            gone.len() as u64
        }
    };
    let undo_id = Some(undo_id).filter(|_| undone > 0 || undo.undo_id.is_some());
    if undo_id.is_none() && more.is_none() {
        let why = "has nothing left to undo: its events were delivered, are being delivered, or have changed since";
        return Err(OperateError::CannotUndo { deed_id: deed.deed_id, why });
    }
    let left = count(changes.len() as u64 - undone);
    Ok(Piece { undone: count(undone), left, undo_id, rest: more.map(|after| Undo { after, undo_id, ..undo }), gone })
}

/// The same author, with this reason if he has given none.
fn with_reason(author: &Author, reason: impl Fn() -> String) -> Author {
    let given = author.reason.clone();
    Author { name: author.name.clone(), reason: if given.is_empty() { reason() } else { given } }
}

/// A change of an event by the deed.
struct Change {
    change_id: i64,
    event_id: EventId,
    subscription_id: i16,
    aggregate_id: AggregateId,
    sequence: i32,
}

/// In the order in which operators lock events. A long deed may have changed an event twice.
async fn find_changes(tx: &mut PgConnection, undo: &Undo, events_max: u32) -> Result<Vec<Change>, sqlx::Error> {
    sqlx::query_as!(
        Change,
        r#"-- operate: find changes of a deed
        SELECT DISTINCT ON (event_id, subscription_id) change_id, event_id, subscription_id, aggregate_id, sequence
        FROM outbox_deed_events
        WHERE deed_id = $1 AND (event_id, subscription_id) > ($2, $3)
        ORDER BY event_id, subscription_id, change_id DESC
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
    /// Requeued, held by no relay, and not failed since. A relay may have released it again, after silence.
    Untried,
}

/// Locks the rows of the events that are in this state, and that no later deed has changed. Returns their `ctid`.
///
/// A row that somebody else has locked is left out: a relay or an operator is at it, and was first. To wait could mean a
/// deadlock with a settlement, which locks in another order. An event that was sent again has never failed here, and is
/// left out, too.
async fn lock_latest(tx: &mut PgConnection, changes: &[Change], state: State) -> Result<Vec<String>, sqlx::Error> {
    let aggregate_ids: Vec<_> = changes.iter().map(|change| change.aggregate_id).collect();
    let subscription_ids: Vec<_> = changes.iter().map(|change| change.subscription_id).collect();
    let sequences: Vec<_> = changes.iter().map(|change| change.sequence).collect();
    let event_ids: Vec<_> = changes.iter().map(|change| change.event_id).collect();
    // Written so that only the primary key can find the rows. As a join, it would read all of the outbox for each of them: right
    // after all dead events were requeued, the statistics say that there are next to no others.
    let locked = sqlx::query!(
        r#"-- operate: lock events of a deed
        SELECT outbox.ctid::text AS "row!", event_id AS "event_id: EventId", subscription_id
        FROM outbox
        WHERE ctid = ANY (ARRAY (
                SELECT (
                    SELECT named.ctid FROM outbox AS named
                    WHERE (named.aggregate_id, named.subscription_id, named.sequence)
                        = (change.aggregate_id, change.subscription_id, change.sequence)
                      AND named.event_id = change.event_id)
                FROM unnest($1::uuid[], $2::smallint[], $3::integer[], $4::uuid[])
                    AS change (aggregate_id, subscription_id, sequence, event_id)))
          AND CASE
            WHEN $5 THEN visible_at = 'infinity'
            ELSE visible_at <> 'infinity' AND lease_token IS NULL AND attempted_at IS NULL AND failures = 0
                AND attempts > 0 AND attempts = attempts_before_requeue END
        FOR UPDATE SKIP LOCKED"#,
        &aggregate_ids as &[AggregateId],
        &subscription_ids,
        &sequences,
        &event_ids as &[EventId],
        state == State::Dead,
    );
    let locked = locked.fetch_all(&mut *tx).await?;
    let latest = Latest::of(tx, changes, locked.iter().map(|row| (row.event_id, row.subscription_id))).await?;
    Ok(locked.into_iter().filter(|row| latest.has(row.event_id, row.subscription_id)).map(|row| row.row).collect())
}

/// The events whose latest change is the deed's.
struct Latest(HashSet<(EventId, i16)>);

impl Latest {
    /// Of these changes, and of events that the transaction has locked. Whoever changes an event records it while the event
    /// is locked. So this holds until the end of the transaction.
    async fn of(
        tx: &mut PgConnection,
        changes: &[Change],
        locked: impl Iterator<Item = (EventId, i16)>,
    ) -> Result<Self, sqlx::Error> {
        let by_event: HashMap<_, _> =
            changes.iter().map(|change| ((change.event_id, change.subscription_id), change.change_id)).collect();
        let locked: Vec<_> = locked.filter_map(|event| Some((event, *by_event.get(&event)?))).collect();
        let change_ids: Vec<_> = locked.iter().map(|(_, change_id)| *change_id).collect();
        let latest = keep_latest(tx, &change_ids).await?;
        Ok(Self(locked.into_iter().filter(|(_, id)| latest.contains(id)).map(|(event, _)| event).collect()))
    }

    fn has(&self, event_id: EventId, subscription_id: i16) -> bool {
        self.0.contains(&(event_id, subscription_id))
    }
}

/// The changes that no later one has followed.
async fn keep_latest(tx: &mut PgConnection, change_ids: &[i64]) -> Result<HashSet<i64>, sqlx::Error> {
    let latest = sqlx::query_scalar!(
        "-- operate: find latest changes
        SELECT change_id FROM outbox_deed_events AS change
        WHERE change_id = ANY ($1)
          AND NOT EXISTS (
              SELECT FROM outbox_deed_events AS later
              WHERE later.event_id = change.event_id AND later.subscription_id = change.subscription_id
                AND later.change_id > change.change_id)",
        change_ids,
    );
    Ok(latest.fetch_all(tx).await?.into_iter().collect())
}

/// They keep their last reasons. Relays park what waits for them.
async fn make_dead(tx: &mut PgConnection, rows: &[String], undo_id: i64) -> Result<u64, sqlx::Error> {
    let recorded = sqlx::query!(
        "-- operate: make dead again
        WITH dead AS (
            UPDATE outbox SET visible_at = 'infinity' WHERE ctid = ANY ($1::text[]::tid[])
            RETURNING event_id, subscription_id, aggregate_id, sequence
        )
        INSERT INTO outbox_deed_events (deed_id, event_id, subscription_id, aggregate_id, sequence)
        SELECT $2, event_id, subscription_id, aggregate_id, sequence FROM dead",
        rows,
        undo_id,
    );
    Ok(recorded.execute(tx).await?.rows_affected())
}

/// Those that cannot come back stay where they are, as for `dead restore`. One that was sent again meanwhile is in the
/// outbox already.
async fn restore(tx: &mut PgConnection, changes: &[Change], author: &Author, undo_id: i64) -> Result<u64, sqlx::Error> {
    let event_ids: Vec<_> = changes.iter().map(|change| change.event_id).collect();
    let subscription_ids: Vec<_> = changes.iter().map(|change| change.subscription_id).collect();
    let locked = sqlx::query!(
        r#"-- operate: find what can be restored
        SELECT event_id AS "event_id: EventId", subscription_id
        FROM outbox_discarded AS discarded
        WHERE ctid = ANY (ARRAY (
                SELECT (
                    SELECT named.ctid FROM outbox_discarded AS named
                    WHERE named.event_id = change.event_id AND named.subscription_id = change.subscription_id)
                FROM unnest($1::uuid[], $2::smallint[]) AS change (event_id, subscription_id)))
          AND NOT refused
          AND NOT EXISTS (
              SELECT FROM outbox_subscriptions AS named
              WHERE named.subscription_id = discarded.subscription_id AND named.ended_at IS NOT NULL)
          AND created_at >= now() - make_interval(secs => coalesce((
              SELECT max_age_seconds FROM outbox_subscriptions AS named
              WHERE named.subscription_id = discarded.subscription_id), $3))
          AND (
              SELECT true FROM outbox AS there
              WHERE there.aggregate_id = discarded.aggregate_id AND there.subscription_id = discarded.subscription_id
                AND there.sequence = discarded.sequence) IS NULL
        FOR UPDATE SKIP LOCKED"#,
        &event_ids as &[EventId],
        &subscription_ids,
        MAX_AGE_UNTOLD,
    );
    let locked = locked.fetch_all(&mut *tx).await?;
    let latest = Latest::of(tx, changes, locked.iter().map(|row| (row.event_id, row.subscription_id))).await?;
    let back = locked.into_iter().filter(|row| latest.has(row.event_id, row.subscription_id));
    let (event_ids, subscription_ids): (Vec<_>, Vec<_>) = back.map(|row| (row.event_id, row.subscription_id)).unzip();
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
