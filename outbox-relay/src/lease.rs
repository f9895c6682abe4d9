//! Takes events out of everybody else's sight for a while: the only place that makes a [`Lease`].

use std::{ops::Range, sync::Arc, time::Duration};

use chassis::Database;
use sqlx::{PgConnection, types::time::OffsetDateTime};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    Settings,
    floor::{Floor, Start},
    route::RouteSettings,
};

/// What gRPC servers take in one message unless they are told otherwise is 4 MiB; a larger one is refused whole, and its
/// events would be delivered one by one.
const MESSAGE_BYTES_MAX: usize = 3 * 1024 * 1024;
/// How long a lease is renewed for a receiver that does not come back: longer than receivers take to start.
const HELD_MAX: Duration = Duration::from_secs(600);

/// A batch of events that no other worker takes before the lease expires. It ends in `settle`.
#[derive(Debug)]
pub(crate) struct Lease {
    /// The fencing token: whoever settles must name it, and a later lease of the same row has replaced it.
    pub(crate) token: Uuid,
    /// First those that have never failed, then those that have, then those too old to be delivered.
    pub(crate) rows: Vec<LeasedRow>,
    /// When the first of the rows was created.
    pub(crate) oldest: OffsetDateTime,
    asked_at: Instant,
    /// When it was asked for first, if it was renewed since.
    since: Instant,
    length: Duration,
    max_age_hours: i32,
}

/// One leased row of the outbox.
#[derive(Clone, Debug)]
pub(crate) struct LeasedRow {
    pub(crate) aggregate_id: Uuid,
    pub(crate) sequence: i32,
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) attempts: i32,
    pub(crate) traceparent: Option<String>,
    pub(crate) tracestate: Option<String>,
    /// Whether it is too old to be delivered.
    pub(crate) expired: bool,
}

impl LeasedRow {
    /// About what it adds to a message: ids, source, times and the marks of the fields are a few hundred bytes.
    fn message_bytes(&self) -> usize {
        let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        self.payload.len() + self.event_type.len() + length(&self.traceparent) + length(&self.tracestate) + 300
    }
}

/// What is leased, and for how long. Clones share the floor.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    /// The route's pattern, and those of the routes that come before it.
    like: String,
    unlike: Vec<String>,
    lease_seconds: u32,
    max_age_hours: i32,
    pub(crate) floor: Arc<Floor>,
}

impl Terms {
    /// Of the route that comes after `earlier` ones.
    pub(crate) fn of(settings: &Settings, route: &RouteSettings, earlier: &[RouteSettings]) -> Self {
        Self {
            like: route.like(),
            unlike: earlier.iter().map(RouteSettings::like).collect(),
            lease_seconds: settings.lease_seconds,
            max_age_hours: settings.max_age.max_age_hours.cast_signed(),
            floor: Arc::new(Floor::new()),
        }
    }
}

impl Lease {
    /// When a delivery under this lease must have ended, by this process's monotonic clock.
    ///
    /// Delivery may use three quarters of the lease, counted from *before* the statement is sent, while the database
    /// counts the whole of it from when the statement runs. So a delivery has ended before any other worker can take the
    /// rows, and the last quarter is there to settle; clocks are never compared, only durations.
    pub(crate) fn deliver_before(&self) -> Instant {
        self.quarters(3)
    }

    /// When a delivery must have ended that may have to be split: what is left then is for waiting until the receiver is
    /// back, and for renewing.
    pub(crate) fn split_before(&self) -> Instant {
        self.quarters(2)
    }

    /// Whether less than half of the lease is left for a delivery.
    pub(crate) fn is_worn(&self) -> bool {
        Instant::now() > self.quarters(1)
    }

    /// Whether it has lasted for so long that its events should be given back, whatever they are held for: another relay may
    /// be able to deliver them.
    pub(crate) fn is_overlong(&self) -> bool {
        self.since.elapsed() > HELD_MAX.max(2 * self.length)
    }

    /// Whether the database lets others take the rows, as far as can be told from here: at the latest from now on.
    pub(crate) fn has_expired(&self) -> bool {
        Instant::now() > self.quarters(4)
    }

    fn quarters(&self, quarters: u32) -> Instant {
        self.asked_at + self.length / 4 * quarters
    }

    /// What is to be delivered, batch by batch: those that have never failed together, as many as a message holds, each
    /// other alone. One that has failed is likely to fail again, and should take nobody with it. No two are of the same
    /// aggregate, so any order is right.
    pub(crate) fn batches(&self) -> Vec<Range<usize>> {
        let fresh = self.rows.partition_point(|row| !row.expired && row.attempts == 0);
        let live = self.rows.partition_point(|row| !row.expired);
        let mut batches: Vec<Range<usize>> = Vec::new();
        let mut bytes = 0;
        for row in 0..live {
            let size = self.rows[row].message_bytes();
            bytes += size;
            match batches.last_mut() {
                Some(batch) if row < fresh && bytes <= MESSAGE_BYTES_MAX => batch.end = row + 1,
                _ => {
                    batches.push(row..row + 1);
                    bytes = size;
                }
            }
        }
        batches
    }

    /// Begins the lease anew, for a worker that has found out something in its time and needs more to make use of it.
    /// Returns whether it has all of the rows, and may have: an expired lease can be renewed until somebody else takes one
    /// of them, but not while the outbox is paused, nor once an event that was to be delivered has become too old.
    pub(crate) async fn renew(&mut self, database: &Database) -> Result<bool, sqlx::Error> {
        let (token, seconds, max_age_hours) = (self.token, self.length.as_secs_f64(), self.max_age_hours);
        let live = self.rows.iter().filter(|row| !row.expired).count();
        let (aggregate_ids, sequences): (Vec<_>, Vec<_>) =
            self.rows.iter().map(|row| (row.aggregate_id, row.sequence)).unzip();
        self.asked_at = Instant::now();
        let renewed = database
            .run(move |connection| {
                Box::pin(push_back(connection, token, aggregate_ids, sequences, seconds, max_age_hours))
            })
            .await?;
        Ok(renewed.len() == self.rows.len() && renewed.into_iter().filter(|expired| !expired).count() == live)
    }
}

/// Leases up to `limit` events; `None` when there is nothing to take, or the outbox is paused.
pub(crate) async fn lease(database: &Database, terms: &Terms, limit: u32) -> Result<Option<Lease>, sqlx::Error> {
    let token = Uuid::new_v4();
    let length = Duration::from_secs(terms.lease_seconds.into());
    let asked_at = Instant::now();
    let (start, floor) = (terms.floor.start(asked_at), terms.floor.clone());
    let (terms, max_age_hours) = (terms.clone(), terms.max_age_hours);
    let rows = database.run(move |connection| Box::pin(take_rows(connection, token, limit, terms, start))).await?;
    let Some(oldest) = rows.iter().map(|row| row.created_at).min() else { return Ok(None) };
    floor.took(start, oldest);
    Ok(Some(Lease { token, rows, oldest, asked_at, since: asked_at, length, max_age_hours }))
}

/// One statement, since `FOR UPDATE SKIP LOCKED` outside a transaction protects nothing beyond its own statement: the
/// rows it locks are marked before the lock ends.
///
/// A row is free to go when it is visible and no event of its aggregate comes before it. First events need no look. A
/// later event is committed after its predecessor, so a snapshot that shows it shows the predecessor too, unless that is
/// settled; and as predecessors only ever disappear, an answer that is a moment old errs on the side of waiting.
///
/// Rows are addressed by their place (`ctid`): they are locked, so they cannot move before the update finds them, and
/// the plan cannot degrade to a join over a large outbox whatever the statistics say.
///
/// The scan begins a second below the floor, so that it sees what was committed up to a second after others that were
/// enqueued at the same time; or at the start of the index. It is an element of an array because of the plan: a plain range
/// between two unknown times is taken for so narrow a one that, without statistics, all of it is read and sorted.
///
/// The pause is looked up here, and where a lease is renewed, so that whoever has set it knows: no lease is begun from now
/// on, by any relay.
async fn take_rows(
    connection: &mut PgConnection,
    token: Uuid,
    limit: u32,
    terms: Terms,
    start: Start,
) -> Result<Vec<LeasedRow>, sqlx::Error> {
    let mut rows = sqlx::query_as!(
        LeasedRow,
        r#"-- relay: lease
        UPDATE outbox
        SET lease_token = $1, visible_at = now() + make_interval(secs => $3)
        WHERE ctid = ANY (ARRAY (
            SELECT free.ctid
            FROM outbox AS free
            WHERE free.visible_at <= now()
              AND free.visible_at >= ANY (ARRAY[coalesce($7::timestamptz - interval '1 s', '-infinity')])
              AND free.event_type LIKE $4
              AND free.event_type NOT LIKE ALL ($5::text[])
              AND NOT EXISTS (SELECT FROM outbox_pause)
              AND (free.sequence = 1 OR NOT EXISTS (
                  SELECT FROM outbox AS earlier
                  WHERE earlier.aggregate_id = free.aggregate_id AND earlier.sequence < free.sequence))
            ORDER BY free.visible_at
            LIMIT $2
            FOR UPDATE OF free SKIP LOCKED))
        RETURNING aggregate_id, sequence, event_id, event_type, payload, created_at, attempts, traceparent, tracestate,
            created_at < now() - make_interval(hours => $6) AS "expired!""#,
        token,
        i64::from(limit),
        f64::from(terms.lease_seconds),
        terms.like,
        &terms.unlike,
        terms.max_age_hours,
        start.floor,
    )
    .fetch_all(connection)
    .await?;
    // UPDATE returns rows in no promised order. Ids are made in order of time.
    rows.sort_unstable_by_key(|row| (row.expired, row.attempts > 0, row.event_id));
    Ok(rows)
}

async fn push_back(
    connection: &mut PgConnection,
    token: Uuid,
    aggregate_ids: Vec<Uuid>,
    sequences: Vec<i32>,
    seconds: f64,
    max_age_hours: i32,
) -> Result<Vec<bool>, sqlx::Error> {
    // By place, as in `settle`.
    sqlx::query_scalar!(
        r#"-- relay: renew
        UPDATE outbox
        SET visible_at = now() + make_interval(secs => $4)
        WHERE lease_token = $1 AND NOT EXISTS (SELECT FROM outbox_pause) AND ctid = ANY (ARRAY (
            SELECT (
                SELECT leased.ctid
                FROM outbox AS leased
                WHERE leased.aggregate_id = renewed.aggregate_id AND leased.sequence = renewed.sequence)
            FROM unnest($2::uuid[], $3::integer[]) AS renewed (aggregate_id, sequence)))
        RETURNING created_at < now() - make_interval(hours => $5) AS "expired!""#,
        token,
        &aggregate_ids,
        &sequences,
        seconds,
        max_age_hours,
    )
    .fetch_all(connection)
    .await
}
