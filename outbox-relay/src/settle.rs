//! Ends a lease: the only place that changes a leased row, and only with the lease's token.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    Settings,
    deliver::Verdict,
    lease::{Lease, LeasedRow},
    route::RETRY_AFTER_MAX,
};

/// A reason is kept up to this many characters.
const REASON_CHARS_MAX: usize = 1000;

/// How failing events are treated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    attempts_max: i32,
    back_off_seconds: f64,
    back_off_seconds_max: f64,
}

impl Policy {
    pub(crate) fn of(settings: &Settings) -> Self {
        Self {
            attempts_max: settings.attempts,
            back_off_seconds: f64::from(settings.back_off_ms) / 1000.0,
            back_off_seconds_max: f64::from(settings.back_off_max_ms) / 1000.0,
        }
    }
}

/// How many events went which way.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    pub(crate) handled: usize,
    pub(crate) retried: usize,
    pub(crate) died: usize,
    pub(crate) released: usize,
    /// Not ours any more: the lease had expired, and another took the rows.
    pub(crate) lost: usize,
}

/// Applies one verdict per row of the lease.
///
/// Every statement names the token in a plain `=`, which no row without a lease matches (`IS NOT DISTINCT FROM` would
/// let one through). A token outlives its lease's expiry until somebody else leases the row: settling late is right as
/// long as nobody has, and changes nothing once somebody has.
///
/// There is no transaction round the statements, since none depends on another: whatever a crash leaves unsettled is
/// delivered again.
pub(crate) async fn settle(
    database: &Database,
    lease: Lease,
    verdicts: &[Verdict],
    policy: Policy,
) -> Result<Settled, sqlx::Error> {
    let Lease { token, rows, .. } = lease;
    let leased = rows.len();
    let sorted = Sorted::by_verdict(&rows, verdicts);
    database
        .run(move |connection| {
            Box::pin(async move {
                let handled = delete_handled(connection, token, &sorted.handled).await?;
                let (retried, died_late) = reschedule(connection, token, &sorted.failed, policy).await?;
                let died_now = bury(connection, token, &sorted.dead).await?;
                let released = release(connection, token, &sorted.released, false).await?
                    + release(connection, token, &sorted.suspects, true).await?;
                let died = died_late + died_now;
                let lost = leased - (handled + retried + died + released);
                Ok(Settled { handled, retried, died, released, lost })
            })
        })
        .await
}

/// Rows that share a verdict, as the arrays a statement takes.
#[derive(Debug, Default)]
struct Rows {
    aggregate_ids: Vec<Uuid>,
    sequences: Vec<i32>,
    reasons: Vec<String>,
    /// Seconds that a failed row waits at least.
    pauses: Vec<f64>,
}

impl Rows {
    fn push(&mut self, row: &LeasedRow, reason: &str, pause: Duration) {
        self.aggregate_ids.push(row.aggregate_id);
        self.sequences.push(row.sequence);
        self.pauses.push(pause.min(RETRY_AFTER_MAX).as_secs_f64());
        // Postgres has no NUL in text, and a reason comes from outside: it must not keep the event from being settled.
        self.reasons.push(reason.chars().filter(|char| *char != '\0').take(REASON_CHARS_MAX).collect());
    }
}

#[derive(Debug, Default)]
struct Sorted {
    handled: Rows,
    failed: Rows,
    dead: Rows,
    released: Rows,
    suspects: Rows,
}

impl Sorted {
    fn by_verdict(rows: &[LeasedRow], verdicts: &[Verdict]) -> Self {
        let mut sorted = Self::default();
        for (row, verdict) in rows.iter().zip(verdicts) {
            match verdict {
                Verdict::Handled => sorted.handled.push(row, "", Duration::ZERO),
                Verdict::Retry { reason, after } => sorted.failed.push(row, reason, *after),
                Verdict::Dead(reason) => sorted.dead.push(row, reason, Duration::ZERO),
                Verdict::Release => sorted.released.push(row, "", Duration::ZERO),
                Verdict::Suspect => sorted.suspects.push(row, "", Duration::ZERO),
            }
        }
        sorted
    }
}

/// Each row is looked up by its key, in a subquery that no statistics can turn into a join: as a join, its first
/// executions on a connection read the whole of an outbox of 60,000, and 1,000 rows took 150 ms instead of 2.
///
/// The token stands outside, where it is asked again of a row that another lease has changed meanwhile.
async fn delete_handled(connection: &mut PgConnection, token: Uuid, rows: &Rows) -> Result<usize, sqlx::Error> {
    if rows.sequences.is_empty() {
        return Ok(0);
    }
    let deleted = sqlx::query!(
        "-- relay: delete handled
        DELETE FROM outbox
        WHERE lease_token = $1 AND ctid = ANY (ARRAY (
            SELECT (
                SELECT leased.ctid
                FROM outbox AS leased
                WHERE leased.aggregate_id = handled.aggregate_id AND leased.sequence = handled.sequence)
            FROM unnest($2::uuid[], $3::integer[]) AS handled (aggregate_id, sequence)))",
        token,
        &rows.aggregate_ids,
        &rows.sequences,
    )
    .execute(connection)
    .await?;
    Ok(count(deleted.rows_affected()))
}

/// Spends an attempt of each row. Back-off doubles with every attempt up to its cap, with full jitter: any time between
/// now and then, so that events which failed together do not come back together; but not earlier than the receiver has
/// asked. Attempts from before a requeue do not count. Returns how many are to be retried, and how many had no attempt
/// left.
async fn reschedule(
    connection: &mut PgConnection,
    token: Uuid,
    rows: &Rows,
    policy: Policy,
) -> Result<(usize, usize), sqlx::Error> {
    if rows.sequences.is_empty() {
        return Ok((0, 0));
    }
    let died = sqlx::query_scalar!(
        r#"-- relay: reschedule
        UPDATE outbox
        SET attempts = attempts + 1,
            lease_token = NULL,
            last_error = failed.reason,
            visible_at = CASE
                WHEN attempts + 1 - pardoned >= $5 THEN 'infinity'
                -- The exponent is bounded, since 2^1024 is out of range and the cap long reached.
                ELSE now() + make_interval(secs =>
                    greatest(failed.pause, random() * least($7, $6 * 2 ^ least(attempts - pardoned, 40))))
            END
        FROM unnest($2::uuid[], $3::integer[], $4::text[], $8::double precision[])
            AS failed (aggregate_id, sequence, reason, pause)
        WHERE outbox.aggregate_id = failed.aggregate_id AND outbox.sequence = failed.sequence AND lease_token = $1
        RETURNING visible_at = 'infinity' AS "died!""#,
        token,
        &rows.aggregate_ids,
        &rows.sequences,
        &rows.reasons,
        policy.attempts_max,
        policy.back_off_seconds,
        policy.back_off_seconds_max,
        &rows.pauses,
    )
    .fetch_all(connection)
    .await?;
    let dead = died.iter().filter(|died| **died).count();
    Ok((died.len() - dead, dead))
}

async fn bury(connection: &mut PgConnection, token: Uuid, rows: &Rows) -> Result<usize, sqlx::Error> {
    if rows.sequences.is_empty() {
        return Ok(0);
    }
    let buried = sqlx::query!(
        "-- relay: bury
        UPDATE outbox
        SET attempts = attempts + 1, lease_token = NULL, last_error = dead.reason, visible_at = 'infinity'
        FROM unnest($2::uuid[], $3::integer[], $4::text[]) AS dead (aggregate_id, sequence, reason)
        WHERE outbox.aggregate_id = dead.aggregate_id AND outbox.sequence = dead.sequence AND lease_token = $1",
        token,
        &rows.aggregate_ids,
        &rows.sequences,
        &rows.reasons,
    )
    .execute(connection)
    .await?;
    Ok(count(buried.rows_affected()))
}

/// Visible at once: behind what waits already, or, as `first`, before it. What keeps a receiver that is down from being
/// besieged is the route's back-off. Suspects go first, because behind a line that fills as fast as it is worked off their
/// turn would never come: the receiver would be crashed over and over, by an event that is never found out.
async fn release(connection: &mut PgConnection, token: Uuid, rows: &Rows, first: bool) -> Result<usize, sqlx::Error> {
    if rows.sequences.is_empty() {
        return Ok(0);
    }
    let released = sqlx::query!(
        "-- relay: release
        UPDATE outbox
        SET lease_token = NULL, visible_at = CASE WHEN $4 THEN created_at ELSE now() END
        FROM unnest($2::uuid[], $3::integer[]) AS released (aggregate_id, sequence)
        WHERE outbox.aggregate_id = released.aggregate_id AND outbox.sequence = released.sequence AND lease_token = $1",
        token,
        &rows.aggregate_ids,
        &rows.sequences,
        first,
    )
    .execute(connection)
    .await?;
    Ok(count(released.rows_affected()))
}

/// No more than the rows of one lease.
fn count(rows: u64) -> usize {
    usize::try_from(rows).unwrap_or(usize::MAX)
}
