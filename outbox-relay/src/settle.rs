//! Settles the events of a lease, which ends it. Nothing else does so, and the statement names the lease's token.

use std::{sync::Arc, time::Duration};

use chassis::Database;
use outbox::{AggregateId, EventId};
use sqlx::PgConnection;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    fate::{Fate, RETRY_AFTER_MAX, Wait},
    lease::Lease,
    leased_row::{LeaseToken, LeasedRow},
    settings::Settings,
};

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) handled: usize,
    /// Back, after they failed alone.
    pub(crate) retried: usize,
    pub(crate) died: usize,
    /// Those that died, of their last attempt too: only the row tells how many it had.
    pub(crate) dead: Vec<EventId>,
    /// Back, with nothing learned about them.
    pub(crate) released: usize,
    /// The lease had expired, and another relay has leased these events.
    pub(crate) lost: usize,
    /// The database failed, so nothing is known about these. Some may be settled; the lease of the others expires.
    pub(crate) unsettled: usize,
}

/// Carries out one fate per row of the lease.
///
/// A row keeps its token after the lease has expired, until another worker leases it. So a late settlement is right
/// while no other worker has the row, and changes nothing once one has.
///
/// A settlement that fails is repeated until the lease expires, or until `shutdown`. After a restart of the database
/// each connection in use fails once, and without the repetition the rows would stay hidden until the lease expires. A
/// repetition after a commit that was not confirmed finds no row with its token, so nothing is charged twice.
pub(crate) async fn settle(
    database: &Database,
    lease: Lease,
    fates: &[Fate],
    policy: Policy,
    shutdown: &CancellationToken,
) -> Settled {
    let (key, leased) = ((lease.own.token, lease.subscription_id), lease.rows.len());
    let rows = Arc::new(Rows::of(&lease.rows, fates));
    let mut interrupted = false;
    loop {
        let rows = rows.clone();
        match database.run(move |connection| Box::pin(settle_rows(connection, key, rows, policy))).await {
            Ok(settled) => return settled.of(leased, interrupted),
            Err(cause) => warn!(%cause, events = leased, "cannot settle"),
        }
        interrupted = true;
        if lease.has_expired() || shutdown.is_cancelled() {
            return Settled::default().of(leased, interrupted);
        }
        shutdown.run_until_cancelled(sleep(PAUSE_MAX.mul_f64(fastrand::f64()))).await;
    }
}

impl Settled {
    /// Counts the rest of the `leased` events. They are lost; or unsettled, if the database has failed meanwhile, since
    /// then an unconfirmed settlement may have reached them.
    fn of(self, leased: usize, interrupted: bool) -> Self {
        let missing = leased.saturating_sub(self.handled + self.retried + self.died + self.released);
        let (lost, unsettled) = if interrupted { (0, missing) } else { (missing, 0) };
        Self { lost, unsettled, ..self }
    }
}

/// The rows of a lease with their fates, as the arrays that the statement takes.
#[derive(Debug, Default)]
struct Rows {
    handled: Keys,
    back: Keys,
    // One element per row of `back`:
    event_ids: Vec<EventId>,
    failed: Vec<bool>,
    charged: Vec<bool>,
    dead: Vec<bool>,
    first: Vec<bool>,
    reasons: Vec<Option<String>>,
    /// The least seconds of a back-off; `None`: no back-off.
    back_offs: Vec<Option<f64>>,
    /// Exactly these seconds.
    waits: Vec<Option<f64>>,
}

/// What a fate notes with a row.
#[derive(Clone, Copy, Debug, Default)]
struct Marks {
    failed: bool,
    charged: bool,
    dead: bool,
}

/// Primary keys of rows.
#[derive(Debug, Default)]
struct Keys {
    aggregate_ids: Vec<AggregateId>,
    sequences: Vec<i32>,
}

impl Keys {
    fn push(&mut self, row: &LeasedRow) {
        self.aggregate_ids.push(row.aggregate_id);
        self.sequences.push(row.sequence);
    }
}

impl Rows {
    fn of(rows: &[LeasedRow], fates: &[Fate]) -> Self {
        let mut all = Self::default();
        for (row, fate) in rows.iter().zip(fates) {
            match fate {
                Fate::Delete => all.handled.push(row),
                Fate::Dead(reason) => {
                    let marks = Marks { failed: true, charged: true, dead: true };
                    all.push_back(row, marks, Wait::None, Some(reason));
                }
                Fate::Failed { charge, wait, reason } => {
                    all.push_back(row, Marks { failed: true, charged: *charge, dead: false }, *wait, Some(reason));
                }
                Fate::Held { wait, reason } => {
                    all.push_back(row, Marks::default(), Wait::For(*wait), Some(reason));
                }
                Fate::Back(wait) => all.push_back(row, Marks::default(), *wait, None),
            }
        }
        all
    }

    fn push_back(&mut self, row: &LeasedRow, marks: Marks, wait: Wait, reason: Option<&str>) {
        self.back.push(row);
        self.event_ids.push(row.event_id);
        self.failed.push(marks.failed);
        self.charged.push(marks.charged);
        self.dead.push(marks.dead);
        self.first.push(wait == Wait::BeforeAllOthers);
        // Reasons come from receivers. Postgres allows no NUL in text, and a NUL must not make the settlement fail.
        self.reasons.push(reason.map(|reason| reason.replace('\0', "")));
        let (back_off, exactly) = match wait {
            Wait::BackOff { at_least } => (Some(at_least.min(RETRY_AFTER_MAX)), None),
            Wait::For(time) => (None, Some(time)),
            Wait::None | Wait::BeforeAllOthers => (None, None),
        };
        self.back_offs.push(back_off.map(|time| time.as_secs_f64()));
        self.waits.push(exactly.map(|time| time.as_secs_f64()));
    }
}

/// Deletes the handled rows, and puts the others back with what was learned of them.
///
/// The token is compared with a plain `=`, which never matches a row without a lease; `IS NOT DISTINCT FROM` could match
/// one. It is compared outside the subqueries, where Postgres checks it again if another lease has changed the row
/// meanwhile.
///
/// Each row is found by its key, in a subquery that no statistics can turn into a join. Planned as a join, the first
/// executions on a connection would read the whole outbox.
///
/// The longest back-off doubles with every failure, charged or not, up to its cap. The back-off is a random part of
/// that, so that events that failed together are not retried together. Attempts before a requeue do not count. An event
/// that comes back with its route, without a back-off, does not count as having failed. The exponent is bounded, since
/// 2^1024 is out of range. The cap is reached long before.
///
/// `n` is the row's place in the arrays: of failed flags ($7), charged ($8), dead ($9), first ($10), reasons ($11),
/// least back-offs ($12) and exact waits ($13).
async fn settle_rows(
    connection: &mut PgConnection,
    (token, subscription_id): (LeaseToken, i16),
    rows: Arc<Rows>,
    policy: Policy,
) -> Result<Settled, sqlx::Error> {
    let counts = sqlx::query_as!(
        Counts,
        r#"-- relay: settle
        WITH deleted AS (
            DELETE FROM outbox
            WHERE lease_token = $1 AND ctid = ANY (ARRAY (
                SELECT (
                    SELECT leased.ctid
                    FROM outbox AS leased
                    WHERE (leased.aggregate_id, leased.subscription_id, leased.sequence)
                        = (handled.aggregate_id, $17, handled.sequence))
                FROM unnest($2::uuid[], $3::integer[]) AS handled (aggregate_id, sequence)))
            RETURNING 1
        ), returned AS (
            UPDATE outbox
            SET (lease_token, attempts, charged_at, failures, attempted_at, last_error, visible_at) = (
                SELECT NULL::uuid,
                    attempts + ($8::boolean[])[n]::integer,
                    CASE WHEN ($8::boolean[])[n] THEN now() ELSE charged_at END,
                    failures + (($7::boolean[])[n] AND ($12::double precision[])[n] IS NOT NULL)::integer,
                    CASE WHEN ($7::boolean[])[n] THEN now() ELSE attempted_at END,
                    coalesce(($11::text[])[n], last_error),
                    CASE
                        WHEN ($9::boolean[])[n] OR (($8::boolean[])[n] AND attempts + 1 - attempts_before_requeue >= $14)
                            THEN 'infinity'
                        WHEN ($10::boolean[])[n] THEN created_at
                        WHEN ($12::double precision[])[n] IS NULL
                            THEN now() + make_interval(secs => coalesce(($13::double precision[])[n], 0))
                        ELSE now() + make_interval(secs => greatest(
                            ($12::double precision[])[n],
                            random() * least(
                                $16, $15 * 2 ^ least(greatest(failures, attempts - attempts_before_requeue), 40))))
                    END
                FROM (SELECT array_position($6, event_id)) AS place (n))
            WHERE lease_token = $1 AND ctid = ANY (ARRAY (
                SELECT (
                    SELECT leased.ctid
                    FROM outbox AS leased
                    WHERE (leased.aggregate_id, leased.subscription_id, leased.sequence)
                        = (back.aggregate_id, $17, back.sequence))
                FROM unnest($4::uuid[], $5::integer[]) AS back (aggregate_id, sequence)))
            RETURNING event_id, visible_at = 'infinity' AS died, attempted_at = now() AS failed
        )
        SELECT (SELECT count(*) FROM deleted) AS "handled!", count(*) FILTER (WHERE failed AND NOT died) AS "retried!",
            count(*) FILTER (WHERE NOT died AND failed IS NOT TRUE) AS "released!",
            coalesce(array_agg(event_id) FILTER (WHERE died), '{}') AS "dead!: Vec<EventId>"
        FROM returned"#,
        token as LeaseToken,
        &rows.handled.aggregate_ids as &[AggregateId],
        &rows.handled.sequences,
        &rows.back.aggregate_ids as &[AggregateId],
        &rows.back.sequences,
        &rows.event_ids as &[EventId],
        &rows.failed,
        &rows.charged,
        &rows.dead,
        &rows.first,
        &rows.reasons as &[Option<String>],
        &rows.back_offs as &[Option<f64>],
        &rows.waits as &[Option<f64>],
        policy.attempts_max,
        policy.back_off_seconds,
        policy.back_off_seconds_max,
        subscription_id,
    )
    .fetch_one(connection)
    .await?;
    Ok(counts.into())
}

/// The counts that the statement returns.
struct Counts {
    handled: i64,
    retried: i64,
    released: i64,
    dead: Vec<EventId>,
}

impl From<Counts> for Settled {
    fn from(counts: Counts) -> Self {
        Self {
            handled: count(counts.handled),
            retried: count(counts.retried),
            died: counts.dead.len(),
            released: count(counts.released),
            dead: counts.dead,
            ..Self::default()
        }
    }
}

/// No more than the rows of one lease.
fn count(rows: i64) -> usize {
    usize::try_from(rows).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use outbox::{AggregateId, EventId};
    use proptest::{
        prelude::*,
        test_runner::{Config, TestCaseError, TestRunner},
    };
    use prost::bytes::Bytes;
    use sqlx::{PgConnection, types::time::OffsetDateTime};
    use testkit::TestDatabase;
    use tokio::runtime::Runtime;

    use super::{Fate, Policy, RETRY_AFTER_MAX, Rows, Settled, Wait, settle_rows};
    use crate::{leased_row::LeasedRow, live::RelayId};

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
    async fn fail(connection: &mut PgConnection, events: &[Failing], policy: Policy) -> (Vec<Failed>, Settled) {
        let token = RelayId::new().lease_token().token;
        let (mut rows, mut fates) = (Vec::new(), Vec::new());
        for event in events {
            let row = leased();
            sqlx::query(
                "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, attempts, attempts_before_requeue,
                    lease_token)
                VALUES ($1, $2, $3, $4, '', $5, $6, $7)",
            )
            .bind(row.aggregate_id)
            .bind(row.sequence)
            .bind(row.event_id)
            .bind(&row.event_type)
            .bind(event.before_requeue + event.counted)
            .bind(event.before_requeue)
            .bind(token)
            .execute(&mut *connection)
            .await
            .unwrap();
            let wait = Wait::BackOff { at_least: event.after };
            fates.push(Fate::Failed { charge: true, wait, reason: row.event_id.to_string() });
            rows.push(row);
        }
        let counts = settle_rows(connection, (token, 0), Arc::new(Rows::of(&rows, &fates)), policy).await.unwrap();
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

    fn leased() -> LeasedRow {
        LeasedRow {
            aggregate_id: AggregateId::new(),
            sequence: 1,
            event_id: EventId::new(),
            event_type: "test.v1.Happened".into(),
            payload: Bytes::new(),
            created_at: OffsetDateTime::UNIX_EPOCH,
            failures: 0,
            attempted_seconds: None,
            age_seconds: 0.0,
            quiet: false,
            traceparent: None,
            tracestate: None,
            expired: false,
            unknown: false,
            follows: None,
            others_wait: false,
            wave: 0,
            adrift: false,
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
        runtime.block_on(database.insert_for_subscription(0));
        let pool = runtime.block_on(database.pool());
        let cases = (policy(), prop::collection::vec(failing(), 1..=20));
        let mut runner = TestRunner::new(Config { cases: 48, failure_persistence: None, ..Config::default() });
        let outcome = runner.run(&cases, |(policy, events)| {
            runtime.block_on(async {
                let mut tx = pool.begin().await.unwrap();
                let (failed, counts) = fail(&mut tx, &events, policy).await;
                tx.rollback().await.unwrap();
                for (event, failed) in events.iter().zip(&failed) {
                    check(event, failed, policy)?;
                }
                let died = failed.iter().filter(|failed| failed.back_off_seconds.is_none()).count();
                prop_assert_eq!(counts.dead.len(), died);
                let dead = counts.dead.clone();
                let expected = Settled { retried: failed.len() - died, died, dead, ..Settled::default() };
                prop_assert_eq!(counts, expected);
                Ok(())
            })
        });
        outcome.unwrap();
    }
}
