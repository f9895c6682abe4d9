//! Counts the events of an outbox for its metrics, without reading all of them.
//!
//! Counters that statements keep lost: every enqueue would wait for the row that it shares with all others. So did a count
//! of the whole table, which costs a second for a million rows, and an index by age, which every enqueue and lease would
//! pay for.

use sqlx::PgConnection;

use crate::park::Swept;

/// No more rows than this are looked at for each state of a subscription. Beyond it, the numbers are estimates.
const LOOK_MAX: i64 = 5000;
/// The pages that an estimate reads.
const SAMPLE_PAGES: f64 = 200.0;

/// The events of one subscription, or those of none.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Counted {
    pub(crate) subscription_id: i16,
    /// Empty: events that no subscription takes.
    pub(crate) name: String,
    pub(crate) waiting: i64,
    pub(crate) leased: i64,
    pub(crate) backing_off: i64,
    pub(crate) dead: i64,
    /// Whether there were too many to count in each range of rows.
    pub(crate) estimated: Ranges,
    /// How long ago the oldest event was enqueued that is not dead.
    pub(crate) oldest_seconds: Option<f64>,
    /// How old its events may become; `None`: the receiver has not said yet.
    pub(crate) max_age_seconds: Option<f64>,
    /// For how long it is paused.
    pub(crate) paused_seconds: f64,
}

/// The ranges of visibility, which are the states of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    pub(crate) visible: bool,
    pub(crate) hidden: bool,
    pub(crate) dead: bool,
}

impl Ranges {
    pub(crate) fn any(self) -> bool {
        let Self { visible, hidden, dead } = self;
        visible || hidden || dead
    }
}

/// Counts by subscription. The entry without a name is that of unrouted events.
///
/// Of subscriptions that are swept, only visible rows above the sweep are looked at: below are more rows that are gone than a
/// scan can pass. The rest is estimated.
///
/// # Errors
/// Those of the database.
pub(crate) async fn count_by_subscription(
    connection: &mut PgConnection,
    swept: &Swept,
) -> Result<Vec<Counted>, sqlx::Error> {
    let looked_at = look(connection, swept).await?;
    let mut counted: Vec<Counted> = looked_at.into_iter().map(|row| row.counted(swept)).collect();
    if counted.iter().any(|of| of.estimated.any()) {
        for estimate in estimate(connection).await? {
            if let Some(of) = counted.iter_mut().find(|of| of.subscription_id == estimate.subscription_id) {
                of.raise_to(&estimate);
            }
        }
    }
    Ok(counted)
}

impl Counted {
    /// What was seen is there. What was not seen may be, but only in a range that was cut off: the sample would make a
    /// hundred of a rare row, or none.
    fn raise_to(&mut self, estimate: &Estimate) {
        let Ranges { visible, hidden, dead } = self.estimated;
        if visible || hidden {
            self.waiting = self.waiting.max(estimate.waiting);
            self.oldest_seconds = self.oldest_seconds.into_iter().chain(estimate.oldest_seconds).reduce(f64::max);
        }
        if hidden {
            self.leased = self.leased.max(estimate.leased);
            self.backing_off = self.backing_off.max(estimate.backing_off);
        }
        if dead {
            self.dead = self.dead.max(estimate.dead);
        }
    }
}

/// What a look has found of a subscription.
struct Looked {
    subscription_id: i16,
    name: String,
    visible: i64,
    hidden: i64,
    leased: i64,
    backing_off: i64,
    dead: i64,
    oldest_seconds: Option<f64>,
    max_age_seconds: Option<f64>,
    paused_seconds: f64,
}

impl Looked {
    fn counted(self, swept: &Swept) -> Counted {
        let Self { subscription_id, visible, hidden, leased, backing_off, dead, .. } = self;
        Counted {
            subscription_id,
            name: self.name,
            waiting: visible + hidden - leased - backing_off,
            leased,
            backing_off,
            dead,
            estimated: Ranges {
                visible: visible >= LOOK_MAX || swept.subscription_ids.contains(&subscription_id),
                hidden: hidden >= LOOK_MAX,
                dead: dead >= LOOK_MAX,
            },
            oldest_seconds: self.oldest_seconds,
            max_age_seconds: self.max_age_seconds,
            paused_seconds: self.paused_seconds,
        }
    }
}

/// Looks at the front of each range of the two indexes by visibility. The ranges are the states of a row: visible, hidden
/// and dead. A hidden row is leased, or backs off, or is parked, which counts as waiting.
///
/// The oldest event stands at the front of what is visible, unless it was put back: then it is behind events that became
/// visible before. So beyond the limit, its age may be greater.
async fn look(connection: &mut PgConnection, swept: &Swept) -> Result<Vec<Looked>, sqlx::Error> {
    sqlx::query_as!(
        Looked,
        r#"-- relay: look at events
        SELECT taken.subscription_id AS "subscription_id!", taken.name AS "name!",
            (sum(rows) FILTER (WHERE state = 'visible'))::bigint AS "visible!",
            (sum(rows) FILTER (WHERE state = 'hidden'))::bigint AS "hidden!",
            (sum(leased) FILTER (WHERE state = 'hidden'))::bigint AS "leased!",
            (sum(backing_off) FILTER (WHERE state = 'hidden'))::bigint AS "backing_off!",
            (sum(rows) FILTER (WHERE state = 'dead'))::bigint AS "dead!",
            extract(epoch FROM now() - min(oldest) FILTER (WHERE state <> 'dead'))::double precision AS oldest_seconds,
            taken.max_age_seconds::double precision AS max_age_seconds,
            coalesce((
                SELECT extract(epoch FROM now() - min(pause.paused_at))
                FROM outbox_pauses AS pause
                WHERE pause.subscription_id IN (0, taken.subscription_id)), 0)::double precision AS "paused_seconds!"
        FROM (
            SELECT subscription_id, name, max_age_seconds FROM outbox_subscriptions WHERE ended_at IS NULL
            UNION ALL
            SELECT 0::smallint, '', NULL) AS taken
        CROSS JOIN LATERAL (
            VALUES
                ('visible', coalesce((
                    SELECT below FROM unnest($2::smallint[], $3::timestamptz[]) AS swept (id, below)
                    WHERE swept.id = taken.subscription_id), '-infinity'), now()),
                -- No back-off is that long.
                ('hidden', now(), timestamptz '9999-12-31 UTC'),
                ('dead', timestamptz '9999-12-31 UTC', timestamptz 'infinity')) AS ranges (state, above, until)
        CROSS JOIN LATERAL (
            SELECT count(*) AS rows, count(lease_token) AS leased, min(created_at) AS oldest,
                count(*) FILTER (WHERE lease_token IS NULL AND (failures > 0 OR attempts > attempts_before_requeue))
                    AS backing_off
            FROM (
                (SELECT * FROM outbox
                 WHERE subscription_id = taken.subscription_id AND sequence = 1
                   AND visible_at > ranges.above AND visible_at <= ranges.until
                 ORDER BY visible_at
                 LIMIT $1)
                UNION ALL
                (SELECT * FROM outbox
                 WHERE subscription_id = taken.subscription_id AND sequence > 1
                   AND visible_at > ranges.above AND visible_at <= ranges.until
                 ORDER BY visible_at
                 LIMIT $1)
                LIMIT $1) AS front) AS looked
        GROUP BY taken.subscription_id, taken.name, taken.max_age_seconds
        ORDER BY taken.name"#,
        LOOK_MAX,
        &swept.subscription_ids,
        &swept.below,
    )
    .fetch_all(connection)
    .await
}

/// What a part of the table says of the whole.
#[derive(Debug)]
struct Estimate {
    subscription_id: i16,
    waiting: i64,
    leased: i64,
    backing_off: i64,
    dead: i64,
    oldest_seconds: Option<f64>,
}

/// Reads some hundred pages, wherever they lie. The subquery asks for the size once; the sample cannot ask itself.
async fn estimate(connection: &mut PgConnection) -> Result<Vec<Estimate>, sqlx::Error> {
    let pages = sqlx::query_scalar!(
        r#"-- relay: read size
        SELECT (pg_relation_size('outbox') / current_setting('block_size')::integer)::double precision AS "pages!""#
    )
    .fetch_one(&mut *connection)
    .await?;
    let part = (SAMPLE_PAGES / pages.max(1.0)).min(1.0);
    sqlx::query_as!(
        Estimate,
        r#"-- relay: estimate events
        SELECT subscription_id,
            (count(*) FILTER (WHERE NOT is_dead AND NOT is_leased AND NOT backs_off) / $1::double precision)::bigint AS "waiting!",
            (count(*) FILTER (WHERE is_leased) / $1)::bigint AS "leased!",
            (count(*) FILTER (WHERE backs_off) / $1)::bigint AS "backing_off!",
            (count(*) FILTER (WHERE is_dead) / $1)::bigint AS "dead!",
            extract(epoch FROM now() - min(created_at) FILTER (WHERE NOT is_dead))::double precision AS oldest_seconds
        FROM (
            SELECT subscription_id, created_at, visible_at = 'infinity' AS is_dead,
                lease_token IS NOT NULL AND visible_at > now() AS is_leased,
                lease_token IS NULL AND visible_at > now() AND visible_at < 'infinity'
                    AND (failures > 0 OR attempts > attempts_before_requeue) AS backs_off
            FROM outbox TABLESAMPLE SYSTEM (($1::double precision * 100)::real)) AS sample
        GROUP BY subscription_id"#,
        part,
    )
    .fetch_all(connection)
    .await
}

/// What hinders VACUUM, and what it has left.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Upkeep {
    /// The age of the oldest transaction of the database, which keeps VACUUM from removing what was deleted since; `None`:
    /// this role may not see those of others. Standbys and replication slots may hold it too, and tell no time.
    pub(crate) horizon_seconds: Option<f64>,
    pub(crate) dead_rows: i64,
    /// Since the last VACUUM of the outbox, automatic or not; `None`: there was none.
    pub(crate) vacuumed_seconds: Option<f64>,
    /// Rows ever enqueued, by the server's statistics, those that were rolled back included.
    pub(crate) enqueued: i64,
    /// The server's time.
    pub(crate) at: f64,
}

/// Reads what the server's statistics say.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_upkeep(connection: &mut PgConnection) -> Result<Upkeep, sqlx::Error> {
    sqlx::query_as!(
        Upkeep,
        r#"-- relay: read upkeep
        SELECT CASE WHEN pg_has_role('pg_read_all_stats', 'USAGE') THEN greatest(0, (
                SELECT extract(epoch FROM clock_timestamp() - min(held.since))
                FROM (
                    SELECT xact_start AS since FROM pg_stat_activity
                    WHERE (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL) AND pid <> pg_backend_pid()
                      AND datname = current_database()
                    UNION ALL
                    SELECT prepared FROM pg_prepared_xacts WHERE database = current_database()) AS held))::double precision
            END AS horizon_seconds,
            pg_stat_get_dead_tuples('outbox'::regclass) AS "dead_rows!",
            extract(epoch FROM now() - greatest(pg_stat_get_last_vacuum_time('outbox'::regclass),
                pg_stat_get_last_autovacuum_time('outbox'::regclass)))::double precision AS vacuumed_seconds,
            pg_stat_get_tuples_inserted('outbox'::regclass) AS "enqueued!",
            extract(epoch FROM now())::double precision AS "at!""#
    )
    .fetch_one(connection)
    .await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::{Counted, LOOK_MAX, Ranges, Swept, Upkeep, count_by_subscription, read_upkeep};
    use crate::lease_time::{Outbox, STUCK, WAITING_MILLION};

    /// Three visible; two of them leased; one that backs off, one parked behind it, and one dead. The oldest event is not the
    /// one that became visible first. Another subscription has one event, is paused, and has said its age; one event has
    /// none.
    const ONE_OF_EACH: &str = "
        INSERT INTO outbox_subscriptions (name, pattern, created_by, max_age_seconds) VALUES ('other', 'x.*', 'a test', 600);
        INSERT INTO outbox_pauses (subscription_id, paused_at, paused_by, reason)
        VALUES (2, now() - interval '7 s', 'a test', 'a reason');
        INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at,
            lease_token, failures, last_error)
        SELECT subscription_id, gen_random_uuid(), sequence, gen_random_uuid(), 'test.v1.Happened', '',
            now() - age * interval '1 s', now() + visible * interval '1 s', CASE WHEN leased THEN gen_random_uuid() END,
            failures, CASE WHEN failures > 0 THEN 'BUSY' END
        FROM (VALUES
            (1, 1, 10, -10, false, 0), (1, 1, 300, -5, true, 0), (1, 2, 10, -10, false, 0),
            (1, 1, 10, 20, true, 0), (1, 2, 10, 20, true, 3),
            (1, 1, 10, 40, false, 2), (1, 2, 10, 40, false, 0),
            (2, 1, 100, -100, false, 0), (0, 3, 900, -900, false, 0)
        ) AS event (subscription_id, sequence, age, visible, leased, failures);
        INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at,
            last_error)
        VALUES (1, gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', now() - interval '1 day', 'infinity', 'X')";

    async fn count(outbox: &Outbox) -> Vec<Counted> {
        let counting = outbox
            .database
            .run(|connection| Box::pin(async move { count_by_subscription(connection, &Swept::default()).await }));
        counting.await.unwrap()
    }

    fn near(seconds: Option<f64>, expected: f64) -> bool {
        seconds.is_some_and(|seconds| (expected..expected + 60.0).contains(&seconds))
    }

    #[tokio::test]
    async fn events_are_counted_by_subscription_and_state_and_the_oldest_is_found_wherever_it_stands() {
        let outbox = Outbox::create().await;
        outbox.run(ONE_OF_EACH).await;
        let counted = count(&outbox).await;
        let numbers =
            |of: &Counted| (of.name.clone(), of.waiting, of.leased, of.backing_off, of.dead, of.estimated.any());
        assert_eq!(
            counted.iter().map(numbers).collect::<Vec<_>>(),
            [
                (String::new(), 1, 0, 0, 0, false),
                // An expired lease is a waiting event, and so is a parked one.
                ("all".into(), 4, 2, 1, 1, false),
                ("other".into(), 1, 0, 0, 0, false),
            ]
        );
        let [unrouted, all, other] = &counted[..] else { panic!("{counted:?}") };
        assert!(near(unrouted.oldest_seconds, 900.0), "{unrouted:?}");
        assert!(near(all.oldest_seconds, 300.0) && near(other.oldest_seconds, 100.0), "{counted:?}");
        assert!(near(Some(other.paused_seconds), 7.0) && all.paused_seconds <= 0.0, "{counted:?}");
        assert_eq!((all.max_age_seconds, other.max_age_seconds), (None, Some(600.0)));
    }

    #[tokio::test]
    async fn a_million_events_are_estimated_in_milliseconds_and_what_is_rare_is_counted() {
        let outbox = Outbox::create().await;
        outbox.run(WAITING_MILLION).await;
        outbox.run(ONE_OF_EACH).await;
        outbox.run("VACUUM ANALYZE outbox").await;
        let (mut took, mut counted) = (Duration::MAX, Vec::new());
        for _ in 0..21 {
            let began = Instant::now();
            counted = count(&outbox).await;
            took = took.min(began.elapsed());
        }
        println!("{took:.1?}: {counted:?}");
        // The fastest of many: other tests delay most of them. A debug build takes its part of it.
        assert!(took < Duration::from_millis(60), "{took:?}");
        let all = &counted[1];
        assert!((600_000..1_400_000).contains(&all.waiting), "{all:?}");
        assert_eq!(all.estimated, Ranges { visible: true, ..Ranges::default() });
        assert_eq!((counted[2].waiting, counted[2].estimated.any()), (1, false));
        assert!(near(all.oldest_seconds, 3599.0), "{all:?}");
        // What is rare is exact.
        assert_eq!((all.leased, all.backing_off, all.dead), (2, 1, 1), "{all:?}");

        outbox.run("DELETE FROM outbox WHERE last_error IS NOT NULL").await;
        outbox.run(STUCK).await;
        let all = count(&outbox).await.remove(1);
        // They lie side by side, in a twentieth of the table, so few of the pages are theirs.
        let (few, many) = (LOOK_MAX, 200_000);
        assert!((few..many).contains(&all.dead) && (few..many).contains(&all.backing_off), "{all:?}");
    }

    #[tokio::test]
    async fn a_subscription_that_is_swept_hides_no_event_of_another() {
        let outbox = Outbox::create().await;
        outbox.run(ONE_OF_EACH).await;
        let counting = outbox.database.run(|connection| {
            Box::pin(async move {
                let below = sqlx::query_scalar("SELECT now()").fetch_one(&mut *connection).await?;
                let swept = Swept { subscription_ids: vec![1], below: vec![below] };
                count_by_subscription(connection, &swept).await
            })
        });
        let counted: Vec<Counted> = counting.await.unwrap();
        let [_, all, other] = &counted[..] else { panic!("{counted:?}") };
        assert!(all.estimated.visible && !other.estimated.any(), "{counted:?}");
        // The table is smaller than a sample.
        assert_eq!((all.waiting, other.waiting), (4, 1));
        assert!(near(all.oldest_seconds, 300.0) && near(other.oldest_seconds, 100.0), "{counted:?}");
    }

    #[tokio::test]
    async fn the_relay_sees_who_holds_the_horizon_and_what_vacuum_has_left() {
        let outbox = Outbox::create().await;
        outbox.run("ALTER TABLE outbox SET (autovacuum_enabled = false)").await;
        let mut holder = outbox.pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
        sqlx::query("SELECT FROM outbox").execute(&mut *holder).await.unwrap();
        // A session that ends reports what it has counted. Before PostgreSQL 15, an idle one keeps it to itself.
        let mut session = outbox.pool.acquire().await.unwrap();
        for work in [ONE_OF_EACH, "DELETE FROM outbox"] {
            sqlx::raw_sql(work).execute(&mut *session).await.unwrap();
        }
        session.close().await.unwrap();
        let began = Instant::now();
        let read = async || outbox.database.run(|connection| Box::pin(read_upkeep(connection))).await.unwrap();
        let upkeep = loop {
            let upkeep = read().await;
            // Statistics come late.
            let is_there = upkeep.dead_rows == 10 && upkeep.enqueued == 10;
            if is_there && upkeep.horizon_seconds.expect("the role may see it") >= 1.0 {
                break upkeep;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{upkeep:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!(upkeep.vacuumed_seconds, None);
        holder.rollback().await.unwrap();
        outbox.run("VACUUM outbox").await;
        let vacuumed = loop {
            if let Upkeep { vacuumed_seconds: Some(seconds), .. } = read().await {
                break seconds;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "no VACUUM is known");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert!(vacuumed < 30.0, "{vacuumed}");
    }
}
