//! The outbox under test, filled and read as the superuser.

use std::time::Duration;

use sqlx::{FromRow, PgPool, types::time::OffsetDateTime};
use testkit::{OwnServer, TestDatabase};
use uuid::Uuid;

use crate::wait::{AMPLE, until, until_within};

/// An outbox in a database of its own, which a relay may use.
pub(crate) struct Outbox {
    pub(crate) database: TestDatabase,
    pub(crate) pool: PgPool,
}

/// An event as a test enqueues it. Its type and data do not matter.
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

/// A row of the outbox. `visible_at` itself cannot be decoded when it is infinity.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub(crate) struct Row {
    pub(crate) event_id: Uuid,
    pub(crate) attempts: i32,
    /// How often it failed alone, charged or not.
    pub(crate) failures: i32,
    pub(crate) lease_token: Option<Uuid>,
    pub(crate) last_error: Option<String>,
    pub(crate) visible: bool,
    pub(crate) dead: bool,
}

impl Outbox {
    /// With one subscription, `all`, which rows that are inserted directly belong to.
    pub(crate) async fn create() -> Self {
        let outbox = Self::without_subscriptions().await;
        let id = outbox.subscribe("all", "*").await;
        outbox.database.insert_for_subscription(id).await;
        outbox
    }

    /// The same on a server of the test's own.
    pub(crate) async fn create_at(server: &OwnServer) -> Self {
        let outbox = Self::of(server.database("orders_owner", &[&outbox::MIGRATOR]).await).await;
        let id = outbox.subscribe("all", "*").await;
        outbox.database.insert_for_subscription(id).await;
        outbox
    }

    pub(crate) async fn without_subscriptions() -> Self {
        Self::of(TestDatabase::create("orders_owner", &[&outbox::MIGRATOR]).await).await
    }

    async fn of(database: TestDatabase) -> Self {
        let pool = database.pool().await;
        Self { database, pool }
    }

    /// Returns the id of the subscription.
    pub(crate) async fn subscribe(&self, name: &str, pattern: &str) -> i16 {
        let subscribe = "INSERT INTO outbox_subscriptions (name, pattern, created_by) VALUES ($1, $2, 'a test')
            RETURNING subscription_id";
        sqlx::query_scalar(subscribe).bind(name).bind(pattern).fetch_one(&self.pool).await.unwrap()
    }

    /// Enqueues events of different aggregates as a service does. Returns their ids, in the order in which the relay
    /// sends them.
    pub(crate) async fn enqueue(&self, event_type: &str, count: usize) -> Vec<Uuid> {
        let events: Vec<_> = (0..count).map(|_| NewEvent::of(Uuid::new_v4(), 1)).collect();
        self.enqueue_as(event_type, &events).await;
        events.iter().map(|event| event.event_id).collect()
    }

    pub(crate) async fn enqueue_as(&self, event_type: &str, events: &[NewEvent]) {
        let nothing: Vec<Option<String>> = vec![None; events.len()];
        sqlx::query("SELECT outbox_enqueue($1, $2, $3, $4, $5, $6, $6)")
            .bind(events.iter().map(|event| event.aggregate_id).collect::<Vec<_>>())
            .bind(events.iter().map(|event| event.sequence).collect::<Vec<_>>())
            .bind(events.iter().map(|event| event.event_id).collect::<Vec<_>>())
            .bind(vec![event_type; events.len()])
            .bind(vec![Vec::<u8>::new(); events.len()])
            .bind(nothing)
            .execute(&self.pool)
            .await
            .unwrap();
    }

    pub(crate) fn relay_url(&self) -> String {
        self.database.url_as("outbox_relay")
    }

    /// Inserts the events in one transaction.
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

    /// Inserts events of different aggregates. Returns their ids, in the order in which the relay sends them.
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

    /// Inserts an event as a transaction would that took a minute.
    pub(crate) async fn insert_late(&self) -> Uuid {
        let late = sqlx::query_scalar::<_, Uuid>(
            "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, created_at, visible_at)
            SELECT gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '', at, at
            FROM (SELECT now() - interval '1 minute') AS enqueued (at)
            RETURNING event_id",
        );
        late.fetch_one(&self.pool).await.unwrap()
    }

    /// Inserts an event that becomes visible after this time, as after a lease or a back-off.
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
            "SELECT event_id, attempts, failures, lease_token, last_error, visible_at <= now() AS visible,
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

    /// Waits for `count` dead rows, and returns all dead rows.
    pub(crate) async fn wait_for_dead(&self, count: usize) -> Vec<Row> {
        let dead = async || self.rows().await.into_iter().filter(|row| row.dead).collect::<Vec<_>>();
        until("events are dead", async || dead().await.len() >= count).await;
        dead().await
    }

    /// Waits for `count` dead rows while others are enqueued, and returns all dead rows. The receiver must take the
    /// others: without a witness no event is charged.
    pub(crate) async fn wait_for_dead_beside_others(&self, count: usize) -> Vec<Row> {
        let dead = async || self.rows().await.into_iter().filter(|row| row.dead).collect::<Vec<_>>();
        until("events are dead", async || {
            self.insert_one().await;
            dead().await.len() >= count
        })
        .await;
        dead().await
    }

    /// Waits until a new event is delivered. The relay leases rows in the order in which they became visible, and this
    /// one is the last. So it has passed over every row that is still there.
    pub(crate) async fn wait_for_a_later_event(&self) {
        let later = self.insert_one().await;
        self.wait_until_gone(later).await;
    }

    /// Allows or refuses new connections. Open ones stay.
    pub(crate) async fn allow_connections(&self, allowed: bool) {
        // Opens all connections of the pool, so that the pool needs no new ones.
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

    /// Counts the leases from now on, also those that find nothing. A sequence counts at once.
    pub(crate) async fn count_leases(&self) {
        sqlx::raw_sql(
            "CREATE SEQUENCE leases;
            CREATE FUNCTION count_lease() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
                BEGIN
                    IF current_query() LIKE '%-- relay: lease%' THEN PERFORM nextval('public.leases'); END IF;
                    RETURN NULL;
                END $$;
            CREATE TRIGGER count_lease BEFORE UPDATE ON outbox FOR EACH STATEMENT EXECUTE FUNCTION count_lease()",
        )
        .execute(&self.pool)
        .await
        .unwrap();
    }

    pub(crate) async fn leases(&self) -> i64 {
        let leases = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM leases";
        sqlx::query_scalar(leases).fetch_one(&self.pool).await.unwrap()
    }

    pub(crate) async fn notify(&self) {
        sqlx::query("SELECT pg_notify('outbox', '')").execute(&self.pool).await.unwrap();
    }

    /// Records every attempt that is spent from now on, also by events that are deleted later.
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

    /// One event id per attempt that was spent.
    pub(crate) async fn charges(&self) -> Vec<Uuid> {
        sqlx::query_scalar::<_, Uuid>("SELECT event_id FROM charges").fetch_all(&self.pool).await.unwrap()
    }

    /// The states that relays announce, ordered by route.
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

    /// The database's time, which back-off is measured by.
    pub(crate) async fn clock(&self) -> OffsetDateTime {
        sqlx::query_scalar::<_, OffsetDateTime>("SELECT clock_timestamp()").fetch_one(&self.pool).await.unwrap()
    }
}
