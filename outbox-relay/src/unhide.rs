//! Frees rows that a wrong clock has hidden.
//!
//! `visible_at` comes from the database's clock. If that clock ran ahead and was then set right, rows from that time are
//! hidden for as long as it was ahead, be it a year. No relay takes them, and later events of their aggregates wait.
//! Either of two signs is enough to tell such a row from one that is hidden on purpose:
//!
//! - The row is dated ahead: its `created_at` lies in the future. A transaction that another one sees has begun before
//!   it ends, so no right clock writes that.
//! - The row is hidden for twice as long as any relay would hide it. How long that is depends on the settings of each
//!   relay on this outbox, so each announces it beside its routes. Otherwise a relay with short back-offs would cut the
//!   back-offs of another one short, again and again, and so spend the attempts of its events. The longest setting that
//!   is permitted, a day, would be as safe. But then a row that was leased or backed off while the clock was an hour
//!   ahead would stay hidden for that hour.
//!
//! A row that shows neither sign becomes visible by time alone, within minutes under the default settings.
//!
//! A relay that ended is forgotten. If its settings were longer than those of the others, its leases and
//! back-offs may end early: the event is delivered again, or sooner, once. That is safe. The row keeps its token, as
//! after any expired lease: a settlement by the old holder counts until another worker leases the row, and changes
//! nothing afterwards. Receivers drop what they have applied, as long as they remember it.
//!
//! A freed row that is dated ahead gets the present as its date. Otherwise it would count as young until that date, longer
//! than its receiver may remember it. A charge that is dated ahead gets the present too, or the next would be late. Dead
//! rows stay as they are: they wait for an operator, not for a time.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;

use crate::settings::Settings;

/// Rows that one statement examines of each subscription, first and later events: those that are hidden for the longest.
const ROWS_MAX: i64 = 10_000;
/// Longer than relays hide a row for reasons that no setting changes: parked for five minutes, deferred for eight.
const UNSET_MAX: Duration = Duration::from_secs(600);

/// The longest time for which a relay with these settings hides a row.
pub(crate) fn longest_hidden(settings: &Settings) -> Duration {
    let lease = Duration::from_secs(settings.lease_seconds.into());
    let back_off = Duration::from_millis(settings.back_off_max_ms.into());
    lease.max(back_off).max(UNSET_MAX)
}

/// Makes rows visible that a wrong clock has hidden. Returns how many. If there are any, there may be more.
///
/// # Errors
/// Those of the database.
pub(crate) async fn unhide(database: &Database, longest_hidden: Duration) -> Result<u64, sqlx::Error> {
    database.run(move |connection| Box::pin(unhide_farthest(connection, longest_hidden))).await
}

/// Examines only the rows that become visible last. A row that is not among them becomes visible before they do. The
/// arrays are there for the plan, as in `park`, and so is the repeated bound on `visible_at`.
///
/// Concurrent changes stand, as in `park`. A row that a relay leased, settled or marked dead after the snapshot is no
/// longer at its `ctid`, and a locked row is left for the next time.
///
/// `now()` is the start of this transaction, and a row of its snapshot may be slightly younger. So a date counts as
/// ahead only after a minute.
async fn unhide_farthest(connection: &mut PgConnection, longest_hidden: Duration) -> Result<u64, sqlx::Error> {
    let freed = sqlx::query!(
        "-- relay: unhide
        UPDATE outbox
        SET visible_at = now(), created_at = least(created_at, now()),
            charged_at = CASE WHEN charged_at > now() THEN now() ELSE charged_at END
        WHERE ctid = ANY (ARRAY (
            SELECT hidden.ctid
            FROM outbox AS hidden
            WHERE hidden.ctid = ANY (ARRAY (
                    SELECT farthest.row
                    FROM (SELECT 0 UNION ALL SELECT subscription_id FROM outbox_subscriptions) AS each (subscription)
                    CROSS JOIN LATERAL (
                        (SELECT ctid
                         FROM outbox
                         WHERE subscription_id = each.subscription AND sequence = 1
                           AND visible_at > now() + interval '1 minute' AND visible_at < 'infinity'
                         ORDER BY visible_at DESC
                         LIMIT $1)
                        UNION ALL
                        (SELECT ctid
                         FROM outbox
                         WHERE subscription_id = each.subscription AND sequence > 1
                           AND visible_at > now() + interval '1 minute' AND visible_at < 'infinity'
                         ORDER BY visible_at DESC
                         LIMIT $1)) AS farthest (row)))
              AND hidden.visible_at < 'infinity'
              AND (hidden.created_at > now() + interval '1 minute'
                   OR hidden.visible_at > now() + 2 * make_interval(secs => greatest($2::double precision,
                       (SELECT max(hidden_seconds_max) FROM outbox_routes))))
            FOR UPDATE OF hidden SKIP LOCKED))",
        ROWS_MAX,
        longest_hidden.as_secs_f64(),
    )
    .execute(connection)
    .await?;
    Ok(freed.rows_affected())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sqlx::{Connection, PgConnection, PgPool};
    use testkit::TestDatabase;

    use super::unhide_farthest;

    const LONGEST: Duration = Duration::from_secs(600);

    struct Outbox {
        pool: PgPool,
        relay: PgConnection,
        _test: TestDatabase,
    }

    impl Outbox {
        async fn create() -> Self {
            let test = TestDatabase::create("orders_owner", &[&outbox::MIGRATOR]).await;
            test.insert_for_subscription(0).await;
            let relay = PgConnection::connect(&test.url_as("outbox_relay")).await.unwrap();
            Self { pool: test.pool().await, relay, _test: test }
        }

        /// A row that was enqueued and became hidden at these intervals from now. Its reason is its name.
        async fn insert(&self, name: &str, enqueued: &str, visible: &str, leased: bool) {
            sqlx::query(
                "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at,
                    lease_token, last_error)
                VALUES (gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', now() + $2::text::interval,
                    CASE $3 WHEN 'infinity' THEN 'infinity' ELSE now() + $3::text::interval END,
                    CASE WHEN $4 THEN gen_random_uuid() END, $1)",
            )
            .bind(name)
            .bind(enqueued)
            .bind(visible)
            .bind(leased)
            .execute(&self.pool)
            .await
            .unwrap();
        }

        async fn run(&self, sql: &'static str) {
            sqlx::raw_sql(sql).execute(&self.pool).await.unwrap();
        }

        async fn names(&self, sql: &'static str) -> Vec<String> {
            sqlx::query_scalar(sql).fetch_all(&self.pool).await.unwrap()
        }

        async fn visible(&self) -> Vec<String> {
            self.names("SELECT last_error FROM outbox WHERE visible_at <= now() ORDER BY 1").await
        }

        async fn unhide(&mut self) -> u64 {
            unhide_farthest(&mut self.relay, LONGEST).await.unwrap()
        }
    }

    #[tokio::test]
    async fn rows_that_a_clock_ahead_has_hidden_are_freed_and_no_others() {
        let mut outbox = Outbox::create().await;
        for ahead in ["1 hour", "1 year"] {
            outbox.insert(&format!("enqueued {ahead}"), ahead, ahead, false).await;
            outbox.insert(&format!("leased {ahead}"), "-1 second", ahead, true).await;
            outbox.insert(&format!("backs off {ahead}"), "-1 second", ahead, false).await;
        }
        // Hidden for a short time, but dated ahead.
        outbox.insert("dated ahead", "9 minutes", "9 minutes", false).await;
        let kept = ["by a right clock 1", "by a right clock 2", "dead", "dead and dated ahead"];
        outbox.insert(kept[0], "-1 second", "30 seconds", true).await;
        outbox.insert(kept[1], "-1 day", "19 minutes", false).await;
        outbox.insert(kept[2], "-1 hour", "infinity", false).await;
        outbox.insert(kept[3], "1 year", "infinity", false).await;
        outbox.insert("visible", "-1 hour", "-1 hour", false).await;
        outbox.run("UPDATE outbox SET charged_at = now() + interval '1 year' WHERE last_error LIKE 'leased %'").await;

        assert_eq!(outbox.unhide().await, 7);
        let charged = "SELECT last_error FROM outbox WHERE charged_at <= now() ORDER BY 1";
        assert_eq!(outbox.names(charged).await, ["leased 1 hour", "leased 1 year"]);
        let hidden = outbox.names("SELECT last_error FROM outbox WHERE visible_at > now() ORDER BY 1").await;
        assert_eq!(hidden, kept);
        let ahead = outbox.names("SELECT last_error FROM outbox WHERE created_at > now()").await;
        assert_eq!(ahead, ["dead and dated ahead"]);
        let leased = outbox.names("SELECT last_error FROM outbox WHERE lease_token IS NOT NULL ORDER BY 1").await;
        assert_eq!(leased, ["by a right clock 1", "leased 1 hour", "leased 1 year"]);
        assert_eq!(outbox.unhide().await, 0);
    }

    #[tokio::test]
    async fn rows_that_another_relay_may_hide_for_so_long_stay_hidden_while_it_runs() {
        let mut outbox = Outbox::create().await;
        outbox.insert("hour", "-1 second", "1 hour", true).await;
        outbox.insert("three days", "-1 second", "3 days", true).await;
        // As a relay announces them that has a back-off of an hour, and one of an earlier version.
        outbox
            .run(
                "INSERT INTO outbox_routes (relay_id, route, receiver, state, hidden_seconds_max) VALUES
                    (gen_random_uuid(), 'a.*', 'http://a:1', 'OPEN', 3600);
                INSERT INTO outbox_routes (relay_id, route, receiver, state) VALUES
                    (gen_random_uuid(), 'b.*', 'http://b:1', 'OPEN')",
            )
            .await;
        assert_eq!((outbox.unhide().await, outbox.visible().await), (1, vec!["three days".to_owned()]));
        outbox.run("DELETE FROM outbox_routes WHERE route = 'b.*'").await;
        assert_eq!(outbox.unhide().await, 0);
        outbox.run("DELETE FROM outbox_routes").await;
        assert_eq!((outbox.unhide().await, outbox.visible().await.len()), (1, 2));
    }

    #[tokio::test]
    async fn many_rows_are_freed_in_bounded_statements_and_a_locked_one_is_not_waited_for() {
        let mut outbox = Outbox::create().await;
        outbox
            .run(
                "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
                SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', at, at
                FROM generate_series(1, 25000) AS n, LATERAL (SELECT now() + interval '1 day' + n * interval '1 ms') AS e (at)",
            )
            .await;
        outbox.insert("locked", "1 year", "1 year", false).await;
        let mut other = outbox.pool.begin().await.unwrap();
        sqlx::query("SELECT FROM outbox WHERE last_error = 'locked' FOR UPDATE").execute(&mut *other).await.unwrap();
        let mut freed = Vec::new();
        for _ in 0..4 {
            freed.push(outbox.unhide().await);
        }
        assert_eq!(freed, [9999, 9999, 5002, 0]);
        other.rollback().await.unwrap();
        assert_eq!(outbox.unhide().await, 1);
    }
}
