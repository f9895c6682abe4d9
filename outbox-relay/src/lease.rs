//! Leases events: hides them from other workers for a while. The only place that makes a [`Lease`].

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use chassis::Database;
use outbox::AggregateId;
use sqlx::{PgConnection, types::time::OffsetDateTime};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::{
    floor::{Floor, RESCAN_INTERVAL, Scan, Start},
    isolate::Case,
    leased_row::{LeaseToken, LeasedRow},
    live::{OwnToken, RelayId},
    run::{Extension, Room, extend, number_waves, predecessors},
    settings::Settings,
    subscription::Subscription,
    sweep::Found,
};

/// Later events that a lease looks at, to find the first events of their aggregates.
const LATER_MAX: i64 = 2000;
/// The same, in a lease that scans everything.
const LATER_FAR_MAX: i64 = 50_000;
/// How long a lease is renewed for a receiver that stays away: longer than receivers take to start.
const HELD_MAX: Duration = Duration::from_secs(600);

/// A batch of events that no other worker takes before the lease expires. It ends in `settle`.
#[derive(Debug)]
pub(crate) struct Lease {
    /// While it is there, the relay takes its rows for leased.
    pub(crate) own: Arc<OwnToken>,
    pub(crate) subscription_id: i16,
    /// First the events that have never failed alone, then those that have, then those that are set aside.
    pub(crate) rows: Vec<LeasedRow>,
    /// Whether there may be more events: it has as many events, or bytes, as a lease may have.
    pub(crate) is_full: bool,
    pub(crate) last_look: LastLook,
    /// When the oldest of the events was created.
    pub(crate) oldest: OffsetDateTime,
    /// When it was last requested: by its own statement, or by its last renewal.
    requested_at: Instant,
    first_requested_at: Instant,
    pub(crate) leased_at: Instant,
    length: Duration,
    max_age: Duration,
}

/// Which events a worker leases, and for how long. Clones share the floor.
#[derive(Clone, Debug)]
pub(crate) struct LeaseQuery {
    subscription: Subscription,
    lease_seconds: u32,
    lease_bytes: u32,
    pub(crate) floor: Arc<Floor>,
    relay: RelayId,
    /// How many leases the workers of this route have asked for.
    leases: Arc<AtomicU64>,
}

impl LeaseQuery {
    pub(crate) fn of(settings: &Settings, relay: &RelayId, subscription: &Subscription, floor: &Arc<Floor>) -> Self {
        Self {
            subscription: subscription.clone(),
            lease_seconds: settings.lease_seconds,
            lease_bytes: settings.lease_mib * 1024 * 1024,
            floor: floor.clone(),
            relay: relay.clone(),
            leases: Arc::default(),
        }
    }

    /// Whether a lease after the settlement of the one that looked last may find events that no notification announces.
    ///
    /// If it was not full, all that were free are taken. A notification for a later one wakes a worker, now or at its next
    /// wait. But an event behind one of that lease is only free once that is settled, and its notification may have woken
    /// another worker before. That worker has asked for a lease of its own by now, and found nothing. One that asks later
    /// finds the event.
    pub(crate) fn may_leave_events(&self, LastLook { number, left_events }: LastLook) -> bool {
        left_events || self.leases.load(Ordering::Relaxed) != number
    }
}

/// What a lease saw of events that it did not take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LastLook {
    /// The number of the lease among those that the workers of this route have asked for.
    number: u64,
    /// There may be more events, or a later event of an aggregate was visible. It may be free once the lease is settled.
    left_events: bool,
}

impl Lease {
    /// When a delivery under this lease must have ended, by this process's monotonic clock.
    ///
    /// A delivery may use three quarters of the lease, counted from *before* the statement is sent. The database counts
    /// the whole lease from when the statement runs. So a delivery ends before any other worker can take the rows, and
    /// the last quarter is left to settle. Clocks are never compared, only durations.
    pub(crate) fn deliver_before(&self) -> Instant {
        self.quarters(3)
    }

    /// When the delivery of a batch that may have to be split must have ended. The rest of the lease is for waiting
    /// until the receiver is back, and for renewing.
    pub(crate) fn split_before(&self) -> Instant {
        self.quarters(2)
    }

    /// Whether less than half of the lease's length is left for a delivery.
    pub(crate) fn has_little_left(&self) -> bool {
        Instant::now() > self.quarters(1)
    }

    /// Whether it has lasted for so long that its events should be released: another relay may be able to deliver them.
    pub(crate) fn is_overlong(&self) -> bool {
        self.first_requested_at.elapsed() > HELD_MAX.max(2 * self.length)
    }

    /// Whether the lease has expired. True a little early, since the database counts from when the statement ran.
    pub(crate) fn has_expired(&self) -> bool {
        Instant::now() > self.quarters(4)
    }

    fn quarters(&self, quarters: u32) -> Instant {
        self.requested_at + self.length / 4 * quarters
    }

    /// The events to deliver, as ranges of rows. Events that have never failed alone share a batch, as many as `limits`
    /// allow. Each event that has failed alone is alone again: it is likely to fail, and must not fail others with it. No
    /// two events of a wave are of the same aggregate, so any order of them is right. Only a receiver that applies events
    /// of an aggregate in their order gets those of several waves at once. The first wave goes ahead if it has events that
    /// nothing follows: they should not take as long as a line of another aggregate.
    pub(crate) fn batches(&self, limits: BatchLimits) -> Vec<Range<usize>> {
        let BatchLimits { events: events_max, bytes: bytes_max, ordered } = limits;
        let live = self.rows.partition_point(|row| !row.is_set_aside());
        let in_wave = |wave| self.rows[..live].iter().filter(|row| row.wave == wave).count();
        let first_goes_ahead = in_wave(1) < in_wave(0);
        let mut batches: Vec<Range<usize>> = Vec::new();
        let mut bytes = 0;
        for row in 0..live {
            let size = self.rows[row].message_bytes();
            bytes += size;
            let fits = |last: usize| {
                let (last, next) = (&self.rows[last], &self.rows[row]);
                let together = last.wave == next.wave || (ordered && (last.wave > 0 || !first_goes_ahead));
                together && last.failures == 0 && next.failures == 0 && bytes <= bytes_max
            };
            match batches.last_mut() {
                Some(batch) if batch.len() < events_max && fits(row - 1) => batch.end = row + 1,
                _ => {
                    batches.push(row..row + 1);
                    bytes = size;
                }
            }
        }
        batches
    }

    /// Sets the events aside whose type the receiver does not know. Returns whether there are any.
    pub(crate) fn set_unknown_aside(&mut self, knows: impl Fn(&str) -> bool) -> bool {
        let mut changed = false;
        for row in &mut self.rows {
            let unknown = !knows(&row.event_type);
            changed |= std::mem::replace(&mut row.unknown, unknown) != unknown;
        }
        // The rows are in order already, unless one of them was set aside or is so no more.
        if changed {
            sort(&mut self.rows);
        }
        self.rows.iter().any(|row| row.unknown)
    }

    /// What is known of each event before it is delivered. A time of the database becomes one of this process's clock by
    /// how long ago it was when the statement ran, which was before `leased_at`: so it is late rather than early.
    pub(crate) fn cases(&self) -> Vec<Case> {
        let case = |(row, after): (&LeasedRow, Option<usize>)| {
            let age = row.attempted_seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default());
            Case {
                attempted: age.map(|age| self.leased_at.checked_sub(age).unwrap_or(self.leased_at)),
                known: row.failures > 0,
                quiet: row.quiet,
                bytes: row.message_bytes(),
                after,
            }
        };
        self.rows.iter().zip(predecessors(&self.rows)).map(case).collect()
    }

    /// Starts the lease again from now. A worker needs this when it has learned something about its events, and has too
    /// little of the lease left to use it.
    ///
    /// Returns whether the worker still holds all of the rows, and may deliver them. An expired lease can be renewed
    /// until another worker takes one of the rows. The answer is false while the outbox is paused, and once one of the
    /// events has become too old.
    pub(crate) async fn renew(&mut self, database: &Database) -> Result<bool, sqlx::Error> {
        let (token, subscription_id) = (self.own.token, self.subscription_id);
        let (seconds, max_age) = (self.length.as_secs_f64(), self.max_age);
        let live = self.rows.iter().filter(|row| !row.expired).count();
        let (aggregate_ids, sequences): (Vec<_>, Vec<_>) =
            self.rows.iter().map(|row| (row.aggregate_id, row.sequence)).unzip();
        self.requested_at = Instant::now();
        let renewed = database
            .run(move |connection| {
                let renewing =
                    renew_rows(connection, token, subscription_id, aggregate_ids, sequences, seconds, max_age);
                Box::pin(renewing)
            })
            .await?;
        Ok(renewed.len() == self.rows.len() && renewed.into_iter().filter(|expired| !expired).count() == live)
    }
}

/// What one call of the receiver may deliver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchLimits {
    pub(crate) events: usize,
    pub(crate) bytes: usize,
    /// Whether it may have several events of an aggregate.
    pub(crate) ordered: bool,
}

/// What one lease may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope {
    /// At most this many events.
    pub(crate) limit: u32,
    /// Older events are not delivered.
    pub(crate) max_age: Duration,
}

/// Leases as many events, or bytes, as a lease may have; `None` when no event is free, or the outbox is paused.
///
/// While scans of everything take too long, it scans parts of what lies below the floor, by turns with what lies above.
/// [`Floor`] says which, and for how long.
///
/// # Errors
/// Those of the database. If a scan was cut off, the next lease begins elsewhere.
pub(crate) async fn lease(database: &Database, query: &LeaseQuery, scope: Scope) -> Result<Option<Lease>, sqlx::Error> {
    loop {
        let requested_at = Instant::now();
        let start = query.floor.start(requested_at);
        let leased = lease_from(database, query, scope, (start, requested_at)).await;
        let cut_off = leased.as_ref().is_err_and(is_cut_off);
        // What is leased is delivered, whatever becomes of this.
        if let Err(cause) = note(database, query, start, requested_at.elapsed(), &leased).await {
            warn!(%cause, "cannot find a better place to begin the next scan");
        }
        match leased {
            Ok(None) if query.floor.goes_on(start, Instant::now()) => {}
            Err(_) if cut_off && start.scan.until().is_some() => {}
            leased => return leased,
        }
    }
}

/// Tells the floor how a scan has ended.
async fn note(
    database: &Database,
    query: &LeaseQuery,
    start: Start,
    took: Duration,
    leased: &Result<Option<Lease>, sqlx::Error>,
) -> Result<(), sqlx::Error> {
    let found = match leased {
        Ok(None) => Found::Nothing,
        Ok(Some(lease)) if lease.is_full => Found::More(lease.oldest),
        Ok(Some(_)) => Found::All,
        Err(cause) if is_cut_off(cause) => Found::CutOff,
        Err(_) => return Ok(()),
    };
    let name = &query.subscription.name;
    if let Scan::Part(window) = start.scan {
        debug!(subscription = name, ?window, ?found, ?took, "scanned a part of the outbox");
        if query.floor.swept(window, found, took, Instant::now()) {
            info!(subscription = name, "a lease can scan the whole outbox again");
        }
        return Ok(());
    }
    // Above the floor, a lease that found events has raised it to them.
    let in_vain = matches!(found, Found::CutOff | Found::Nothing) || start.scan == Scan::Everything;
    if found == Found::CutOff || (in_vain && took > RESCAN_INTERVAL) {
        let present = database.run(|connection| Box::pin(read_present(connection))).await?;
        if query.floor.too_slow(start, took, present, Instant::now()) {
            warn!(
                subscription = name,
                ?took,
                "leases scan the outbox in parts, since a scan of all takes too long: is a transaction open for long?"
            );
        }
    }
    Ok(())
}

/// Whether the time limit of a statement, or of database work, has ended it. An operator who cancels the statement
/// looks the same, and a needless sweep is harmless.
pub(crate) fn is_cut_off(cause: &sqlx::Error) -> bool {
    match cause {
        sqlx::Error::Database(cause) => cause.code().is_some_and(|code| code == "57014"),
        sqlx::Error::Io(cause) => cause.kind() == std::io::ErrorKind::TimedOut,
        _ => false,
    }
}

pub(crate) async fn read_present(connection: &mut PgConnection) -> Result<OffsetDateTime, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- relay: read the present
        SELECT now() AS "now!""#
    )
    .fetch_one(connection)
    .await
}

async fn lease_from(
    database: &Database,
    query: &LeaseQuery,
    scope: Scope,
    (start, requested_at): (Start, Instant),
) -> Result<Option<Lease>, sqlx::Error> {
    let Scope { limit, max_age } = scope;
    let own = query.relay.lease_token();
    let token = own.token;
    let length = Duration::from_secs(query.lease_seconds.into());
    let number = query.leases.fetch_add(1, Ordering::Relaxed) + 1;
    let take = async |later_max| {
        let query = query.clone();
        let scan = start.scan;
        database.run(move |connection| Box::pin(lease_rows(connection, token, scope, query, (scan, later_max)))).await
    };
    // The oldest later events may all wait for events that are leased. Below the floor, it looks further.
    let mut rows = take(if matches!(start.scan, Scan::Above(_)) { LATER_MAX } else { LATER_FAR_MAX }).await?;
    let Some(oldest) = rows.iter().map(|row| row.created_at).min() else { return Ok(None) };
    query.floor.took(start, oldest);
    let room = |rows: &[LeasedRow]| {
        let bytes: usize = rows.iter().map(|row| row.payload.len()).sum();
        let room = Room {
            events: (limit as usize).saturating_sub(rows.len()),
            bytes: (query.lease_bytes as usize).saturating_sub(bytes),
        };
        (room.events > 0 && room.bytes > 0).then_some(room)
    };
    // Those behind an event of a window may lie in another window, which was scanned before.
    let others_wait = start.scan.until().is_some() || rows.iter().any(|row| row.others_wait);
    if let Some(room) = room(&rows)
        && others_wait
    {
        let Subscription { id: subscription_id, type_like, .. } = query.subscription.clone();
        let extension = Extension { token, subscription_id, type_like, lease_seconds: query.lease_seconds, max_age };
        // The lease is good without.
        match extend(database, extension, &rows, room).await {
            Ok(more) => rows.extend(more),
            Err(cause) => warn!(%cause, "cannot take further events of the same aggregates"),
        }
        number_waves(&mut rows);
    }
    // Rows come in no promised order. Ids are UUID v7, and so in order of time.
    sort(&mut rows);
    let is_full = room(&rows).is_none();
    Ok(Some(Lease {
        own: own.into(),
        subscription_id: query.subscription.id,
        rows,
        is_full,
        last_look: LastLook { number, left_events: is_full || others_wait },
        oldest,
        requested_at,
        first_requested_at: requested_at,
        leased_at: Instant::now(),
        length,
        max_age: scope.max_age,
    }))
}

/// Selects and marks the rows in one statement. Outside a transaction, `FOR UPDATE SKIP LOCKED` protects nothing beyond
/// its own statement, so the rows must be marked before their locks end.
///
/// A row is free when it is visible and its aggregate has no earlier event in the subscription. An event with sequence 1
/// needs no such check. The oldest visible later events tell which aggregates have some, and of each of these, the first
/// event that is left is taken if it is visible. An index of their own holds the later events, so that a long line of one
/// aggregate does not lie before the first events of others.
///
/// A later event is committed after its predecessor, so a snapshot that shows it shows the predecessor too, unless that
/// one is settled. Predecessors only ever disappear, so an answer that is slightly old errs on the side of waiting. An
/// earlier event may also be unrouted, of a type that the subscription takes: it was being enqueued while the subscription
/// was made, and joins it within a second.
///
/// The payloads before an event in the lease bound it, so one event always fits, and no lease has more than an event above
/// the bound. The rows that do not fit were locked in vain, and only until the end of the statement.
///
/// The update finds the rows by `ctid`. They are locked, so they cannot move before it does; and no statistics can turn
/// the plan into a join over a large outbox.
///
/// The scan begins one second below the floor. So it sees events that were committed up to a second after others of the
/// same time. Without a floor it begins at the start of the index, and in a sweep it has both bounds. Two indexes serve
/// it: the first and the later events of one subscription, in the order of `visible_at`.
///
/// The pause is checked here, and in the renewal. So no relay begins a lease after a pause is committed.
async fn lease_rows(
    connection: &mut PgConnection,
    token: LeaseToken,
    Scope { limit, max_age, .. }: Scope,
    query: LeaseQuery,
    (scan, later_max): (Scan, i64),
) -> Result<Vec<LeasedRow>, sqlx::Error> {
    sqlx::query_as!(
        LeasedRow,
        r#"-- relay: lease
        UPDATE outbox
        SET lease_token = $1, visible_at = now() + make_interval(secs => $3)
        WHERE ctid = ANY (ARRAY (
            SELECT fitting.row
            FROM (
                SELECT free.row, row_number() OVER oldest, sum(free.bytes) OVER oldest - free.bytes
                FROM (
                    SELECT * FROM (
                        SELECT ctid, visible_at, octet_length(payload) FROM outbox
                        WHERE subscription_id = $4 AND sequence = 1 AND visible_at >= coalesce($7::timestamptz, '-infinity')
                          AND visible_at <= now() AND visible_at < coalesce($10::timestamptz, 'infinity')
                        ORDER BY visible_at LIMIT $2 FOR UPDATE SKIP LOCKED) AS first
                    UNION ALL
                    SELECT * FROM (
                        SELECT ctid, visible_at, octet_length(payload) FROM outbox AS head
                        WHERE ctid = ANY (ARRAY (
                            SELECT earliest.row
                            FROM (
                                SELECT aggregate_id, min(visible_at) AS oldest
                                FROM (
                                    SELECT aggregate_id, visible_at FROM outbox
                                    WHERE subscription_id = $4 AND sequence > 1 AND visible_at >= coalesce($7::timestamptz, '-infinity')
                                      AND visible_at <= now() AND visible_at < coalesce($10::timestamptz, 'infinity')
                                    ORDER BY visible_at LIMIT $9) AS front
                                GROUP BY aggregate_id) AS waiting
                            CROSS JOIN LATERAL (
                                SELECT ctid, sequence, visible_at FROM outbox
                                WHERE aggregate_id = waiting.aggregate_id AND subscription_id = $4
                                ORDER BY sequence LIMIT 1) AS earliest (row, sequence, visible_at)
                            WHERE earliest.sequence > 1 AND earliest.visible_at <= now()
                            ORDER BY waiting.oldest LIMIT $2))
                          AND (SELECT head.visible_at <= now() AND NOT EXISTS (
                              SELECT FROM outbox AS unrouted
                              WHERE unrouted.aggregate_id = head.aggregate_id AND unrouted.subscription_id = 0
                                AND unrouted.sequence < head.sequence AND unrouted.event_type LIKE $5))
                        FOR UPDATE OF head SKIP LOCKED) AS later
                ) AS free (row, visible_at, bytes)
                WINDOW oldest AS (ORDER BY free.visible_at ROWS UNBOUNDED PRECEDING)
            ) AS fitting (row, place, bytes_before)
            WHERE fitting.place <= $2 AND fitting.bytes_before < $8
              AND NOT EXISTS (SELECT FROM outbox_pauses WHERE subscription_id IN (0, $4))))
        RETURNING aggregate_id, sequence, event_id, event_type, payload, created_at, failures,
            extract(epoch FROM now() - attempted_at)::double precision AS attempted_seconds,
            extract(epoch FROM now() - created_at)::double precision AS "age_seconds!",
            greatest(created_at, charged_at) < now() - interval '1 hour' AS "quiet!",
            traceparent, tracestate,
            created_at < now() - make_interval(secs => $6) AS "expired!", false AS "unknown!", NULL::integer AS follows,
            EXISTS (
                SELECT FROM outbox AS later
                WHERE later.subscription_id = $4 AND later.sequence > 1 AND later.visible_at <= now()
                  AND later.visible_at >= coalesce($7::timestamptz, '-infinity')
                  AND later.visible_at < coalesce($10::timestamptz, 'infinity')) AS "others_wait!", 0 AS "wave!", false AS "adrift!""#,
        token as LeaseToken,
        i64::from(limit),
        f64::from(query.lease_seconds),
        query.subscription.id,
        query.subscription.type_like,
        max_age.as_secs_f64(),
        scan.from(),
        i64::from(query.lease_bytes),
        later_max,
        scan.until(),
    )
    .fetch_all(connection)
    .await
}

fn sort(rows: &mut [LeasedRow]) {
    rows.sort_unstable_by_key(|row| (row.is_set_aside(), row.wave, row.failures > 0, row.event_id));
}

async fn renew_rows(
    connection: &mut PgConnection,
    token: LeaseToken,
    subscription_id: i16,
    aggregate_ids: Vec<AggregateId>,
    sequences: Vec<i32>,
    seconds: f64,
    max_age: Duration,
) -> Result<Vec<bool>, sqlx::Error> {
    // By `ctid`, as in `settle`.
    sqlx::query_scalar!(
        r#"-- relay: renew
        UPDATE outbox
        SET visible_at = now() + make_interval(secs => $4)
        WHERE lease_token = $1 AND NOT EXISTS (SELECT FROM outbox_pauses WHERE subscription_id IN (0, $6::smallint)) AND ctid = ANY (ARRAY (
            SELECT (
                SELECT leased.ctid
                FROM outbox AS leased
                WHERE leased.aggregate_id = renewed.aggregate_id AND leased.subscription_id = $6
                  AND leased.sequence = renewed.sequence)
            FROM unnest($2::uuid[], $3::integer[]) AS renewed (aggregate_id, sequence)))
        RETURNING created_at < now() - make_interval(secs => $5) AS "expired!""#,
        token as LeaseToken,
        &aggregate_ids as &[AggregateId],
        &sequences,
        seconds,
        max_age.as_secs_f64(),
        subscription_id,
    )
    .fetch_all(connection)
    .await
}
