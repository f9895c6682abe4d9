//! Ends a lease: the only place that does, and, like its renewal, only with the lease's token.

use std::{sync::Arc, time::Duration};

use chassis::Database;
use sqlx::PgConnection;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use crate::{
    Settings,
    deliver::Verdict,
    lease::{Lease, LeasedRow},
    route::RETRY_AFTER_MAX,
};

/// A reason is kept up to this many characters.
const REASON_CHARS_MAX: usize = 1000;
/// How long an event at most is kept from a receiver that is not able to take it, and takes others, unless it has asked for
/// time; and how many times that time otherwise.
const PUT_OFF_MAX: Duration = Duration::from_secs(60);
const PUT_OFF_TIMES: u32 = 8;
/// Before the database is asked again that has failed, at most: workers do not come back in step.
const PAUSE_MAX: Duration = Duration::from_millis(500);

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
    /// Of which nothing is known, since the database failed: some may have been settled before it did; the others' lease
    /// expires.
    pub(crate) unsettled: usize,
    interrupted: bool,
}

impl Settled {
    fn add(&mut self, other: &Self) {
        self.handled += other.handled;
        self.retried += other.retried;
        self.died += other.died;
        self.released += other.released;
    }

    /// With what the others of so many are.
    fn of(self, leased: usize) -> Self {
        let missing = leased - (self.handled + self.retried + self.died + self.released);
        let (lost, unsettled) = if self.interrupted { (0, missing) } else { (missing, 0) };
        Self { lost, unsettled, ..self }
    }
}

/// Applies one verdict per row of the lease.
///
/// Every statement names the token in a plain `=`, which no row without a lease matches (`IS NOT DISTINCT FROM` would
/// let one through). A token outlives its lease's expiry until somebody else leases the row: settling late is right as
/// long as nobody has, and changes nothing once somebody has.
///
/// There is no transaction round the statements, since none depends on another: whatever a crash leaves unsettled is
/// delivered again.
///
/// A settlement that fails is repeated for as long as the lease lasts, until `shutdown`: after a restart of the database
/// each connection that was in use fails once, and rows that nobody settles stay out of sight until the lease expires.
pub(crate) async fn settle(
    database: &Database,
    lease: Lease,
    verdicts: &[Verdict],
    policy: Policy,
    shutdown: &CancellationToken,
) -> Settled {
    let (token, leased) = (lease.token, lease.rows.len());
    let sorted = Arc::new(Sorted::by_verdict(&lease.rows, verdicts));
    let mut settled = Settled::default();
    loop {
        let sorted = sorted.clone();
        let settling = database.run(move |connection| Box::pin(settle_once(connection, token, sorted, policy)));
        let Err(Interrupted { before, cause }) = settling.await.map(|last| settled.add(&last)) else { break };
        settled.add(&before);
        settled.interrupted = true;
        warn!(%cause, events = leased, "cannot settle");
        if lease.has_expired() || shutdown.is_cancelled() {
            break;
        }
        shutdown.run_until_cancelled(sleep(PAUSE_MAX.mul_f64(fastrand::f64()))).await;
    }
    settled.of(leased)
}

/// What a settlement got done before the database failed.
struct Interrupted {
    before: Settled,
    cause: sqlx::Error,
}

impl From<sqlx::Error> for Interrupted {
    fn from(cause: sqlx::Error) -> Self {
        Self { before: Settled::default(), cause }
    }
}

async fn settle_once(
    connection: &mut PgConnection,
    token: Uuid,
    sorted: Arc<Sorted>,
    policy: Policy,
) -> Result<Settled, Interrupted> {
    let mut settled = Settled::default();
    match settle_each(connection, token, &sorted, policy, &mut settled).await {
        Ok(()) => Ok(settled),
        Err(cause) => Err(Interrupted { before: settled, cause }),
    }
}

async fn settle_each(
    connection: &mut PgConnection,
    token: Uuid,
    sorted: &Sorted,
    policy: Policy,
    settled: &mut Settled,
) -> Result<(), sqlx::Error> {
    settled.handled = delete_handled(connection, token, &sorted.handled).await?;
    (settled.retried, settled.died) = reschedule(connection, token, &sorted.failed, policy).await?;
    settled.died += bury(connection, token, &sorted.dead).await?;
    settled.released = release(connection, token, &sorted.released, Back::After(Duration::ZERO)).await?;
    settled.released += release(connection, token, &sorted.suspects, Back::First).await?;
    settled.released += release(connection, token, &sorted.put_off, Back::After(sorted.put_off_time())).await?;
    Ok(())
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
    put_off: Rows,
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
                Verdict::PutOff { after } => sorted.put_off.push(row, "", *after),
            }
        }
        sorted
    }

    /// For how long those are kept away that the receiver is not able to take: for far longer than they keep it from others.
    fn put_off_time(&self) -> Duration {
        let asked_for = self.put_off.pauses.iter().copied().fold(0.0, f64::max);
        PUT_OFF_MAX.mul_f64(0.5 + fastrand::f64() / 2.0).max(PUT_OFF_TIMES * Duration::from_secs_f64(asked_for))
    }
}

/// Each row is looked up by its key, in a subquery that no statistics can turn into a join: as a join, its first
/// executions on a connection read the whole of an outbox of 60,000, and 1,000 rows took 150 ms instead of 2. The other
/// statements here do the same; what they write row by row they look up in their arrays by the aggregate, of which a lease
/// has one row.
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
            last_error = ($4::text[])[array_position($2, aggregate_id)],
            visible_at = CASE
                WHEN attempts + 1 - pardoned >= $5 THEN 'infinity'
                -- The exponent is bounded, since 2^1024 is out of range and the cap long reached.
                ELSE now() + make_interval(secs => greatest(
                    ($8::double precision[])[array_position($2, aggregate_id)],
                    random() * least($7, $6 * 2 ^ least(attempts - pardoned, 40))))
            END
        WHERE lease_token = $1 AND ctid = ANY (ARRAY (
            SELECT (
                SELECT leased.ctid
                FROM outbox AS leased
                WHERE leased.aggregate_id = failed.aggregate_id AND leased.sequence = failed.sequence)
            FROM unnest($2::uuid[], $3::integer[]) AS failed (aggregate_id, sequence)))
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
        SET attempts = attempts + 1,
            lease_token = NULL,
            last_error = ($4::text[])[array_position($2, aggregate_id)],
            visible_at = 'infinity'
        WHERE lease_token = $1 AND ctid = ANY (ARRAY (
            SELECT (
                SELECT leased.ctid
                FROM outbox AS leased
                WHERE leased.aggregate_id = dead.aggregate_id AND leased.sequence = dead.sequence)
            FROM unnest($2::uuid[], $3::integer[]) AS dead (aggregate_id, sequence)))",
        token,
        &rows.aggregate_ids,
        &rows.sequences,
        &rows.reasons,
    )
    .execute(connection)
    .await?;
    Ok(count(buried.rows_affected()))
}

/// Where in the line of those that wait a released row goes.
#[derive(Clone, Copy, Debug)]
enum Back {
    /// Before all others. So do suspects, because behind a line that fills as fast as it is worked off their turn would
    /// never come: the receiver would be crashed over and over, by an event that is never found out.
    First,
    /// To the end, once the time is over.
    After(Duration),
}

/// Makes rows visible again. What keeps a receiver that is down from being besieged is the route's back-off.
async fn release(connection: &mut PgConnection, token: Uuid, rows: &Rows, back: Back) -> Result<usize, sqlx::Error> {
    if rows.sequences.is_empty() {
        return Ok(0);
    }
    let seconds = match back {
        Back::First => None,
        Back::After(pause) => Some(pause.as_secs_f64()),
    };
    let released = sqlx::query!(
        "-- relay: release
        UPDATE outbox
        SET lease_token = NULL, visible_at = coalesce(now() + make_interval(secs => $4), created_at)
        WHERE lease_token = $1 AND ctid = ANY (ARRAY (
            SELECT (
                SELECT leased.ctid
                FROM outbox AS leased
                WHERE leased.aggregate_id = released.aggregate_id AND leased.sequence = released.sequence)
            FROM unnest($2::uuid[], $3::integer[]) AS released (aggregate_id, sequence)))",
        token,
        &rows.aggregate_ids,
        &rows.sequences,
        seconds,
    )
    .execute(connection)
    .await?;
    Ok(count(released.rows_affected()))
}

/// No more than the rows of one lease.
fn count(rows: u64) -> usize {
    usize::try_from(rows).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::{
        prelude::*,
        test_runner::{Config, TestCaseError, TestRunner},
    };
    use sqlx::{PgConnection, types::time::OffsetDateTime};
    use testkit::TestDatabase;
    use tokio::runtime::Runtime;
    use uuid::Uuid;

    use super::{Policy, RETRY_AFTER_MAX, Sorted, reschedule};
    use crate::{deliver::Verdict, lease::LeasedRow};

    /// An event that fails: how often it has before and since it was requeued, and for how long its receiver wants it kept
    /// away.
    #[derive(Clone, Debug)]
    struct Failing {
        pardoned: i32,
        counted: i32,
        after: Duration,
    }

    /// What became of it.
    #[derive(Debug, sqlx::FromRow)]
    struct Failed {
        attempts: i32,
        is_leased: bool,
        has_its_reason: bool,
        /// `None` for ever.
        back_off_seconds: Option<f64>,
    }

    fn policy() -> impl Strategy<Value = Policy> {
        // No setting allows as many as the last: they reach the powers of two that are out of range.
        let attempts_max = prop_oneof![1..=12, 1..=1000, 1..=i32::MAX];
        let milliseconds = |most: u32| prop_oneof![1..=1000_u32, 1..=most];
        (attempts_max, milliseconds(600_000), milliseconds(86_400_000)).prop_map(|(attempts_max, back_off, most)| {
            Policy {
                attempts_max,
                back_off_seconds: f64::from(back_off) / 1000.0,
                back_off_seconds_max: f64::from(most) / 1000.0,
            }
        })
    }

    fn failing() -> impl Strategy<Value = Failing> {
        // Few enough for the doubling to be seen; about as many as are allowed; and more, of a relay that allowed more before.
        let counted = || prop_oneof![3 => 0..=14, 2 => 0..=1100, 1 => 0..=i32::MAX / 2];
        let after =
            prop_oneof![Just(Duration::ZERO), (0_u64..=120_000).prop_map(Duration::from_millis), any::<Duration>()];
        (counted(), counted(), after).prop_map(|(pardoned, counted, after)| Failing { pardoned, counted, after })
    }

    /// Has the events fail once more, each for a reason of its own, and returns what became of them, in their order, and
    /// what was counted. `now()` is the same for all of it.
    async fn fail(connection: &mut PgConnection, events: &[Failing], policy: Policy) -> (Vec<Failed>, (usize, usize)) {
        let token = Uuid::new_v4();
        let (mut rows, mut verdicts) = (Vec::new(), Vec::new());
        for event in events {
            let row = leased(event.pardoned + event.counted);
            sqlx::query(
                "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, attempts, pardoned, lease_token)
                VALUES ($1, $2, $3, $4, '', $5, $6, $7)",
            )
            .bind(row.aggregate_id)
            .bind(row.sequence)
            .bind(row.event_id)
            .bind(&row.event_type)
            .bind(row.attempts)
            .bind(event.pardoned)
            .bind(token)
            .execute(&mut *connection)
            .await
            .unwrap();
            verdicts.push(Verdict::Retry { reason: row.event_id.to_string(), after: event.after });
            rows.push(row);
        }
        let sorted = Sorted::by_verdict(&rows, &verdicts);
        let counts = reschedule(connection, token, &sorted.failed, policy).await.unwrap();
        let mut failed = Vec::new();
        for row in rows {
            let query = sqlx::query_as(
                "SELECT attempts, lease_token IS NOT NULL AS is_leased, last_error = event_id::text AS has_its_reason,
                    CASE WHEN visible_at <> 'infinity'
                        THEN extract(epoch FROM visible_at - now())::double precision END AS back_off_seconds
                FROM outbox WHERE event_id = $1",
            );
            failed.push(query.bind(row.event_id).fetch_one(&mut *connection).await.unwrap());
        }
        (failed, counts)
    }

    fn leased(attempts: i32) -> LeasedRow {
        LeasedRow {
            aggregate_id: Uuid::new_v4(),
            sequence: 1,
            event_id: Uuid::now_v7(),
            event_type: "test.v1.Happened".into(),
            payload: Vec::new(),
            created_at: OffsetDateTime::UNIX_EPOCH,
            attempts,
            traceparent: None,
            tracestate: None,
            expired: false,
        }
    }

    fn check(event: &Failing, failed: &Failed, policy: Policy) -> Result<(), TestCaseError> {
        prop_assert_eq!(failed.attempts, event.pardoned + event.counted + 1);
        prop_assert!(failed.has_its_reason && !failed.is_leased);
        let Some(seconds) = failed.back_off_seconds else {
            prop_assert!(event.counted + 1 >= policy.attempts_max, "dead before its last attempt");
            return Ok(());
        };
        prop_assert!(event.counted + 1 < policy.attempts_max, "not dead after its last attempt");
        let asked = event.after.min(RETRY_AFTER_MAX).as_secs_f64();
        let doubled = policy.back_off_seconds * 2_f64.powi(event.counted);
        let most = doubled.min(policy.back_off_seconds_max).max(asked);
        // The database counts microseconds.
        let least = asked - 1e-6;
        prop_assert!(seconds >= least && seconds <= most + 1e-6, "{} s of {} to {}", seconds, least, most);
        Ok(())
    }

    #[test]
    fn an_event_that_fails_backs_off_within_its_bounds_or_is_dead_exactly_after_its_last_attempt() {
        let runtime = Runtime::new().unwrap();
        let database = runtime.block_on(TestDatabase::create("orders_owner", &[&outbox::MIGRATOR]));
        let pool = runtime.block_on(database.pool());
        let cases = (policy(), prop::collection::vec(failing(), 1..=20));
        let mut runner = TestRunner::new(Config { cases: 48, failure_persistence: None, ..Config::default() });
        let outcome = runner.run(&cases, |(policy, events)| {
            runtime.block_on(async {
                let mut tx = pool.begin().await.unwrap();
                let (failed, (retried, died)) = fail(&mut tx, &events, policy).await;
                tx.rollback().await.unwrap();
                for (event, failed) in events.iter().zip(&failed) {
                    check(event, failed, policy)?;
                }
                let dead = failed.iter().filter(|failed| failed.back_off_seconds.is_none()).count();
                prop_assert_eq!((retried, died), (failed.len() - dead, dead));
                Ok(())
            })
        });
        outcome.unwrap();
    }
}
