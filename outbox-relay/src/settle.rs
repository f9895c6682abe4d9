//! Settles the events of a lease, which ends it. Nothing else does so, and every statement names the lease's token.

use std::{sync::Arc, time::Duration};

use chassis::Database;
use outbox::AggregateId;
use sqlx::PgConnection;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    Settings,
    deliver::Verdict,
    lease::{Lease, LeaseToken, LeasedRow},
    route::RETRY_AFTER_MAX,
};

/// A reason is cut to this many characters.
const REASON_CHARS_MAX: usize = 1000;
/// Longest delay for an event that its receiver cannot take while it takes others, unless the receiver asks for time.
const DEFER_MAX: Duration = Duration::from_secs(60);
/// The delay is at least this many times the time that the receiver has asked for, up to a limit of that time.
const DEFER_FACTOR: u32 = 8;
/// Longest pause before a failed settlement is repeated. It is random, so that workers do not retry in step.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// How many attempts an event has, and how it backs off.
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

/// Counts of the settled events, by how they were settled.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    pub(crate) handled: usize,
    pub(crate) retried: usize,
    pub(crate) died: usize,
    pub(crate) released: usize,
    /// The lease had expired, and another relay has leased these events.
    pub(crate) lost: usize,
    /// The database failed, so nothing is known about these. Some may be settled; the lease of the others expires.
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

    /// Counts the rest of the `leased` events: as lost, or as unsettled if the database failed.
    fn of(self, leased: usize) -> Self {
        let missing = leased - (self.handled + self.retried + self.died + self.released);
        let (lost, unsettled) = if self.interrupted { (0, missing) } else { (missing, 0) };
        Self { lost, unsettled, ..self }
    }
}

/// Applies one verdict per row of the lease.
///
/// Every statement compares the token with a plain `=`, which never matches a row without a lease; `IS NOT DISTINCT
/// FROM` could match one. A row keeps its token after the lease has expired, until another worker leases it. So a late
/// settlement is right while no other worker has the row, and changes nothing once one has.
///
/// No transaction encloses the statements, since none depends on another. Whatever a crash leaves unsettled is
/// delivered again.
///
/// A settlement that fails is repeated until the lease expires, or until `shutdown`. After a restart of the database
/// each connection in use fails once, and without the repetition the rows would stay hidden until the lease expires.
pub(crate) async fn settle(
    database: &Database,
    lease: Lease,
    verdicts: &[Verdict],
    policy: Policy,
    shutdown: &CancellationToken,
) -> Settled {
    let (token, leased) = (lease.token, lease.rows.len());
    let groups = Arc::new(Groups::by_verdict(&lease.rows, verdicts));
    let mut settled = Settled::default();
    loop {
        let groups = groups.clone();
        let settling = database.run(move |connection| Box::pin(settle_once(connection, token, groups, policy)));
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

/// A settlement that the database interrupted, with the counts before that.
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
    token: LeaseToken,
    groups: Arc<Groups>,
    policy: Policy,
) -> Result<Settled, Interrupted> {
    let mut settled = Settled::default();
    match settle_groups(connection, token, &groups, policy, &mut settled).await {
        Ok(()) => Ok(settled),
        Err(cause) => Err(Interrupted { before: settled, cause }),
    }
}

async fn settle_groups(
    connection: &mut PgConnection,
    token: LeaseToken,
    groups: &Groups,
    policy: Policy,
    settled: &mut Settled,
) -> Result<(), sqlx::Error> {
    settled.handled = delete_handled(connection, token, &groups.handled).await?;
    (settled.retried, settled.died) = reschedule(connection, token, &groups.failed, policy).await?;
    settled.died += mark_dead(connection, token, &groups.dead).await?;
    settled.released = release(connection, token, &groups.released, VisibleAt::After(Duration::ZERO)).await?;
    settled.released += release(connection, token, &groups.suspects, VisibleAt::BeforeAllOthers).await?;
    settled.released += release(connection, token, &groups.deferred, VisibleAt::After(groups.defer_time())).await?;
    Ok(())
}

/// Rows that share a verdict, as the arrays a statement takes.
#[derive(Debug, Default)]
struct Rows {
    aggregate_ids: Vec<AggregateId>,
    sequences: Vec<i32>,
    reasons: Vec<String>,
    /// The seconds that the receiver has asked for, up to a limit.
    delays: Vec<f64>,
}

impl Rows {
    fn push(&mut self, row: &LeasedRow, reason: &str, delay: Duration) {
        self.aggregate_ids.push(row.aggregate_id);
        self.sequences.push(row.sequence);
        self.delays.push(delay.min(RETRY_AFTER_MAX).as_secs_f64());
        // Reasons come from receivers. Postgres allows no NUL in text, and a NUL must not make the settlement fail.
        self.reasons.push(reason.chars().filter(|char| *char != '\0').take(REASON_CHARS_MAX).collect());
    }
}

#[derive(Debug, Default)]
struct Groups {
    handled: Rows,
    failed: Rows,
    dead: Rows,
    released: Rows,
    suspects: Rows,
    deferred: Rows,
}

impl Groups {
    fn by_verdict(rows: &[LeasedRow], verdicts: &[Verdict]) -> Self {
        let mut groups = Self::default();
        for (row, verdict) in rows.iter().zip(verdicts) {
            match verdict {
                Verdict::Handled => groups.handled.push(row, "", Duration::ZERO),
                Verdict::Retry { reason, after } => groups.failed.push(row, reason, *after),
                Verdict::Dead(reason) => groups.dead.push(row, reason, Duration::ZERO),
                Verdict::Release => groups.released.push(row, "", Duration::ZERO),
                Verdict::Suspect => groups.suspects.push(row, "", Duration::ZERO),
                Verdict::Defer { after } => groups.deferred.push(row, "", *after),
            }
        }
        groups
    }

    /// Delay for events that their receiver cannot take while it takes others. It is far longer than the time for which
    /// they keep the route down.
    fn defer_time(&self) -> Duration {
        let asked_for = self.deferred.delays.iter().copied().fold(0.0, f64::max);
        DEFER_MAX.mul_f64(0.5 + fastrand::f64() / 2.0).max(DEFER_FACTOR * Duration::from_secs_f64(asked_for))
    }
}

/// Finds each row by its key, in a subquery that no statistics can turn into a join. Planned as a join, the first
/// executions on a connection would read the whole outbox. The other statements here do the same. They find a row's
/// values in their arrays by its aggregate, since a lease has one row per aggregate.
///
/// The token is compared outside the subquery, where Postgres checks it again if another lease has changed the row
/// meanwhile.
async fn delete_handled(connection: &mut PgConnection, token: LeaseToken, rows: &Rows) -> Result<usize, sqlx::Error> {
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
        token as LeaseToken,
        &rows.aggregate_ids as &[AggregateId],
        &rows.sequences,
    )
    .execute(connection)
    .await?;
    Ok(count(deleted.rows_affected()))
}

/// Spends an attempt of each row. Returns how many are retried, and how many are dead after their last attempt.
///
/// The longest back-off doubles with every attempt, up to its cap. The back-off is a random part of that, so that
/// events that failed together are not retried together. It is never shorter than the time that the receiver has asked
/// for, up to a limit of that time. Attempts before a requeue do not count.
async fn reschedule(
    connection: &mut PgConnection,
    token: LeaseToken,
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
                WHEN attempts + 1 - attempts_before_requeue >= $5 THEN 'infinity'
                -- The exponent is bounded, since 2^1024 is out of range. The cap is reached long before.
                ELSE now() + make_interval(secs => greatest(
                    ($8::double precision[])[array_position($2, aggregate_id)],
                    random() * least($7, $6 * 2 ^ least(attempts - attempts_before_requeue, 40))))
            END
        WHERE lease_token = $1 AND ctid = ANY (ARRAY (
            SELECT (
                SELECT leased.ctid
                FROM outbox AS leased
                WHERE leased.aggregate_id = failed.aggregate_id AND leased.sequence = failed.sequence)
            FROM unnest($2::uuid[], $3::integer[]) AS failed (aggregate_id, sequence)))
        RETURNING visible_at = 'infinity' AS "died!""#,
        token as LeaseToken,
        &rows.aggregate_ids as &[AggregateId],
        &rows.sequences,
        &rows.reasons,
        policy.attempts_max,
        policy.back_off_seconds,
        policy.back_off_seconds_max,
        &rows.delays,
    )
    .fetch_all(connection)
    .await?;
    let dead = died.iter().filter(|died| **died).count();
    Ok((died.len() - dead, dead))
}

async fn mark_dead(connection: &mut PgConnection, token: LeaseToken, rows: &Rows) -> Result<usize, sqlx::Error> {
    if rows.sequences.is_empty() {
        return Ok(0);
    }
    let marked = sqlx::query!(
        "-- relay: mark dead
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
        token as LeaseToken,
        &rows.aggregate_ids as &[AggregateId],
        &rows.sequences,
        &rows.reasons,
    )
    .execute(connection)
    .await?;
    Ok(count(marked.rows_affected()))
}

/// When a released row becomes visible, and so its position among the visible rows.
#[derive(Clone, Copy, Debug)]
enum VisibleAt {
    /// At once, before all other rows. This is for suspects. Behind a backlog that never shrinks they would never be
    /// delivered again, so the event that crashes the receiver would never be found.
    BeforeAllOthers,
    /// After a delay, behind the rows that are visible by then.
    After(Duration),
}

/// Makes rows visible again. The route's back-off protects a receiver that is down from constant retries.
async fn release(
    connection: &mut PgConnection,
    token: LeaseToken,
    rows: &Rows,
    visible_at: VisibleAt,
) -> Result<usize, sqlx::Error> {
    if rows.sequences.is_empty() {
        return Ok(0);
    }
    let seconds = match visible_at {
        VisibleAt::BeforeAllOthers => None,
        VisibleAt::After(delay) => Some(delay.as_secs_f64()),
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
        token as LeaseToken,
        &rows.aggregate_ids as &[AggregateId],
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

    use outbox::{AggregateId, EventId};
    use proptest::{
        prelude::*,
        test_runner::{Config, TestCaseError, TestRunner},
    };
    use prost::bytes::Bytes;
    use sqlx::{PgConnection, types::time::OffsetDateTime};
    use testkit::TestDatabase;
    use tokio::runtime::Runtime;

    use super::{Groups, Policy, RETRY_AFTER_MAX, reschedule};
    use crate::{
        deliver::Verdict,
        lease::{LeaseToken, LeasedRow},
    };

    /// An event that fails: its attempts before and since its requeue, and the time that its receiver asks for.
    #[derive(Clone, Debug)]
    struct Failing {
        before_requeue: i32,
        counted: i32,
        after: Duration,
    }

    /// The row after the failure.
    #[derive(Debug, sqlx::FromRow)]
    struct Failed {
        attempts: i32,
        is_leased: bool,
        has_its_reason: bool,
        /// `None`: dead.
        back_off_seconds: Option<f64>,
    }

    fn policy() -> impl Strategy<Value = Policy> {
        // No setting allows as many as the last range. It reaches powers of two that are out of range.
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
        // Few enough to show the doubling; about as many as the settings allow; and more, as if the settings had
        // allowed more before.
        let counted = || prop_oneof![3 => 0..=14, 2 => 0..=1100, 1 => 0..=i32::MAX / 2];
        let after =
            prop_oneof![Just(Duration::ZERO), (0_u64..=120_000).prop_map(Duration::from_millis), any::<Duration>()];
        (counted(), counted(), after).prop_map(|(before_requeue, counted, after)| Failing {
            before_requeue,
            counted,
            after,
        })
    }

    /// Fails the events once more, each for a reason of its own. Returns their rows afterwards, in order, and the
    /// counts. `now()` is the same throughout.
    async fn fail(connection: &mut PgConnection, events: &[Failing], policy: Policy) -> (Vec<Failed>, (usize, usize)) {
        let token = LeaseToken::new();
        let (mut rows, mut verdicts) = (Vec::new(), Vec::new());
        for event in events {
            let row = leased(event.before_requeue + event.counted);
            sqlx::query(
                "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, attempts, attempts_before_requeue,
                    lease_token)
                VALUES ($1, $2, $3, $4, '', $5, $6, $7)",
            )
            .bind(row.aggregate_id)
            .bind(row.sequence)
            .bind(row.event_id)
            .bind(&row.event_type)
            .bind(row.attempts)
            .bind(event.before_requeue)
            .bind(token)
            .execute(&mut *connection)
            .await
            .unwrap();
            verdicts.push(Verdict::Retry { reason: row.event_id.to_string(), after: event.after });
            rows.push(row);
        }
        let groups = Groups::by_verdict(&rows, &verdicts);
        let counts = reschedule(connection, token, &groups.failed, policy).await.unwrap();
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
            aggregate_id: AggregateId::new(),
            sequence: 1,
            event_id: EventId::new(),
            event_type: "test.v1.Happened".into(),
            payload: Bytes::new(),
            created_at: OffsetDateTime::UNIX_EPOCH,
            attempts,
            traceparent: None,
            tracestate: None,
            expired: false,
        }
    }

    fn check(event: &Failing, failed: &Failed, policy: Policy) -> Result<(), TestCaseError> {
        prop_assert_eq!(failed.attempts, event.before_requeue + event.counted + 1);
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
    fn a_failed_event_backs_off_within_its_bounds_and_is_dead_exactly_after_its_last_attempt() {
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
