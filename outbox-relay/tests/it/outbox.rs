//! An outbox to relay from, filled and looked at as the superuser.

use std::time::Duration;

use sqlx::{FromRow, PgPool, types::time::OffsetDateTime};
use testkit::TestDatabase;
use uuid::Uuid;

use crate::wait::{AMPLE, until, until_within};

/// The outbox of a database of its own, and the rights of a relay on it.
pub(crate) struct Outbox {
    pub(crate) database: TestDatabase,
    pub(crate) pool: PgPool,
}

/// An event as a test enqueues it; its type and data are of no interest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewEvent {
    pub(crate) aggregate_id: Uuid,
    pub(crate) sequence: i32,
    pub(crate) event_id: Uuid,
}

impl NewEvent {
    pub(crate) fn of(aggregate_id: Uuid, sequence: i32) -> Self {
        Self { aggregate_id, sequence, event_id: Uuid::now_v7() }
    }
}

/// What became of a row. `visible_at` itself cannot be read when it is infinity.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub(crate) struct Row {
    pub(crate) event_id: Uuid,
    pub(crate) attempts: i32,
    pub(crate) lease_token: Option<Uuid>,
    pub(crate) last_error: Option<String>,
    pub(crate) visible: bool,
    pub(crate) dead: bool,
}

impl Outbox {
    pub(crate) async fn create() -> Self {
        let database = TestDatabase::create("orders_owner", &[&outbox::MIGRATOR]).await;
        let pool = database.pool().await;
        Self { database, pool }
    }

    pub(crate) fn relay_url(&self) -> String {
        self.database.url_as("outbox_relay")
    }

    /// All in one transaction.
    pub(crate) async fn insert(&self, events: &[NewEvent]) {
        self.insert_as("test.v1.Happened", events).await;
    }

    async fn insert_as(&self, event_type: &str, events: &[NewEvent]) {
        let aggregate_ids: Vec<_> = events.iter().map(|event| event.aggregate_id).collect();
        let sequences: Vec<_> = events.iter().map(|event| event.sequence).collect();
        let event_ids: Vec<_> = events.iter().map(|event| event.event_id).collect();
        sqlx::query(
            "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
            SELECT aggregate_id, sequence, event_id, $4, ''
            FROM unnest($1::uuid[], $2::integer[], $3::uuid[]) AS event (aggregate_id, sequence, event_id)",
        )
        .bind(aggregate_ids)
        .bind(sequences)
        .bind(event_ids)
        .bind(event_type)
        .execute(&self.pool)
        .await
        .unwrap();
    }

    /// Each the first of an aggregate of its own; returns their ids, in the order in which the relay sends them.
    pub(crate) async fn insert_unrelated(&self, count: usize) -> Vec<Uuid> {
        self.insert_of_type("test.v1.Happened", count).await
    }

    pub(crate) async fn insert_of_type(&self, event_type: &str, count: usize) -> Vec<Uuid> {
        let events: Vec<_> = (0..count).map(|_| NewEvent::of(Uuid::new_v4(), 1)).collect();
        self.insert_as(event_type, &events).await;
        events.iter().map(|event| event.event_id).collect()
    }

    pub(crate) async fn insert_one(&self) -> Uuid {
        self.insert_unrelated(1).await[0]
    }

    /// As of a transaction that took a minute.
    pub(crate) async fn insert_late(&self) -> Uuid {
        let late = sqlx::query_scalar::<_, Uuid>(
            "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
            SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', at, at
            FROM (SELECT now() - interval '1 minute') AS enqueued (at)
            RETURNING event_id",
        );
        late.fetch_one(&self.pool).await.unwrap()
    }

    /// Becomes visible when the time is over, as after a lease or a back-off.
    pub(crate) async fn insert_hidden(&self, lease_token: Option<Uuid>, time: Duration) -> Uuid {
        sqlx::query_scalar::<_, Uuid>(
            "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, lease_token, visible_at)
            VALUES (gen_random_uuid(), 1, $1, 'test.v1.Happened', '', $2, now() + make_interval(secs => $3))
            RETURNING event_id",
        )
        .bind(Uuid::now_v7())
        .bind(lease_token)
        .bind(time.as_secs_f64())
        .fetch_one(&self.pool)
        .await
        .unwrap()
    }

    pub(crate) async fn rows(&self) -> Vec<Row> {
        sqlx::query_as::<_, Row>(
            "SELECT event_id, attempts, lease_token, last_error, visible_at <= now() AS visible,
                visible_at = 'infinity' AS dead
            FROM outbox ORDER BY event_id",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap()
    }

    pub(crate) async fn row(&self, event_id: Uuid) -> Option<Row> {
        self.rows().await.into_iter().find(|row| row.event_id == event_id)
    }

    pub(crate) async fn count(&self) -> i64 {
        sqlx::query_scalar::<_, i64>("SELECT count(*) FROM outbox").fetch_one(&self.pool).await.unwrap()
    }

    pub(crate) async fn wait_until_empty(&self) {
        self.wait_until_empty_within(AMPLE).await;
    }

    pub(crate) async fn wait_until_empty_within(&self, limit: Duration) {
        until_within(limit, "the outbox is empty", async || self.count().await == 0).await;
    }

    pub(crate) async fn wait_until_gone(&self, event_id: Uuid) {
        until("the event is handled", async || self.row(event_id).await.is_none()).await;
    }

    /// Waits for `count` dead rows and returns them.
    pub(crate) async fn wait_for_dead(&self, count: usize) -> Vec<Row> {
        let dead = async || self.rows().await.into_iter().filter(|row| row.dead).collect::<Vec<_>>();
        until("events are dead", async || dead().await.len() >= count).await;
        dead().await
    }

    /// Proves that whatever else was free to go has been passed over: the relay takes rows in the order in which they
    /// became visible, and this one becomes so last.
    pub(crate) async fn wait_for_a_later_event(&self) {
        let later = self.insert_one().await;
        self.wait_until_gone(later).await;
    }

    /// New ones; those there are stay.
    pub(crate) async fn allow_connections(&self, allowed: bool) {
        // The pool opens connections as it likes, up to its limit: once they are all open, it needs no more.
        let mut open = Vec::new();
        for _ in 0..self.pool.options().get_max_connections() {
            open.push(self.pool.acquire().await.unwrap());
        }
        sqlx::query("UPDATE pg_database SET datallowconn = $1 WHERE datname = current_database()")
            .bind(allowed)
            .execute(&mut *open[0])
            .await
            .unwrap();
    }

    pub(crate) async fn notify(&self) {
        sqlx::query("SELECT pg_notify('outbox', '')").execute(&self.pool).await.unwrap();
    }

    /// Keeps a record of every attempt that is charged from now on, also to events that are gone in the end.
    pub(crate) async fn record_charges(&self) {
        sqlx::raw_sql(
            "CREATE TABLE charges (event_id uuid NOT NULL);
            CREATE FUNCTION charge() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
                'BEGIN INSERT INTO public.charges VALUES (NEW.event_id); RETURN NULL; END';
            CREATE TRIGGER charge AFTER UPDATE ON outbox FOR EACH ROW
                WHEN (NEW.attempts > OLD.attempts) EXECUTE FUNCTION charge()",
        )
        .execute(&self.pool)
        .await
        .unwrap();
    }

    /// One id per charged attempt.
    pub(crate) async fn charges(&self) -> Vec<Uuid> {
        sqlx::query_scalar::<_, Uuid>("SELECT event_id FROM charges").fetch_all(&self.pool).await.unwrap()
    }

    /// What the relays say of their routes, in the order of these.
    pub(crate) async fn route_states(&self) -> Vec<(String, String)> {
        sqlx::query_as::<_, (String, String)>("SELECT route, state FROM outbox_routes ORDER BY route")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    pub(crate) async fn wait_for_route_state(&self, state: &str) {
        until(&format!("the route is {state}"), async || self.route_states().await.iter().any(|(_, is)| is == state))
            .await;
    }

    /// By the clock that back-off is measured with.
    pub(crate) async fn clock(&self) -> OffsetDateTime {
        sqlx::query_scalar::<_, OffsetDateTime>("SELECT clock_timestamp()").fetch_one(&self.pool).await.unwrap()
    }
}
