//! Serves inventory-service for one test.

use std::{env, future::Future, net::SocketAddr, time::Duration};

use clap::Parser;
use inventory_service::{MIGRATORS, Settings};
use proto::events::v1::Event;
use sqlx::{Executor, PgPool, Postgres, QueryBuilder, Transaction};
use testkit::{TestDatabase, postgres::Server};
use tokio::{
    net::TcpListener,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    client::Client,
    orders::{id_of, order_id_of},
};

pub(crate) const SERVICES: [&str; 3] = ["", "events.v1.EventReceiver", "inventory.v1.InventoryService"];
/// Far longer than any step here takes: only a step that hangs exceeds it.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

#[derive(Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
}

pub(crate) fn settings(database: &TestDatabase, flags: &[&str]) -> Settings {
    let url = database.url_as("inventory_service");
    // On a busy machine a hundred calls at once may wait longer than the default for one of 16 connections.
    let given = ["inventory-service", "--database-url", &url, "--database-acquire-ms", "9000"];
    // As with many replicas: only the database keeps batches apart.
    let given = given.iter().chain(&["--batches-at-once", "100", "--lame-duck-seconds", "0"]);
    Cli::parse_from(given.chain(flags)).settings
}

/// For callers, and for relays.
pub(crate) async fn sockets() -> [TcpListener; 2] {
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    [bind().await, bind().await]
}

/// The running service and its database.
pub(crate) struct Inventory {
    pub(crate) client: Client,
    /// For callers.
    pub(crate) address: SocketAddr,
    /// For callers, and for relays.
    pub(crate) addresses: [SocketAddr; 2],
    pub(crate) shutdown: CancellationToken,
    /// The superuser's connections.
    pub(crate) pool: PgPool,
    pub(crate) database: TestDatabase,
    running: JoinHandle<Result<(), chassis::RunError>>,
}

impl Inventory {
    /// Serves on a free port, and waits until health reports it.
    pub(crate) async fn serve(flags: &[&str]) -> Self {
        Self::serve_on(TestDatabase::create("inventory_owner", &MIGRATORS).await, flags).await
    }

    /// The same on a given database.
    pub(crate) async fn serve_on(database: TestDatabase, flags: &[&str]) -> Self {
        let pool = database.pool().await;
        let sockets = sockets().await;
        let addresses = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(inventory_service::run(sockets, settings(&database, flags), shutdown.clone()));
        let (client, [address, _]) = (Client::connect(addresses).await, addresses);
        let inventory = Self { client, address, addresses, shutdown, pool, database, running };
        for service in SERVICES {
            eventually("the service serves", async || inventory.health(service).await == Some(ServingStatus::Serving))
                .await;
        }
        inventory
    }

    /// Stops the service gracefully, then audits the invariants, which hold after any calls.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        timeout(LIMIT, self.running).await.expect("the service ends").unwrap().expect("it ends well");
        let pool = self.pool;
        // A session reports its statistics when it ends, and the audit reads the number of deadlocks from them.
        let sessions = "SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND usename = 'inventory_service'";
        eventually("the service's sessions end", async || count(&pool, sessions).await == 0).await;
        audit(&pool).await;
        pool.close().await;
    }

    /// Whether the process would have ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.running.is_finished()
    }

    /// `None` if health does not know the service.
    pub(crate) async fn health(&self, service: &str) -> Option<ServingStatus> {
        let request = HealthCheckRequest { service: service.into() };
        let answer = HealthClient::new(self.client.to(service)).check(request).await.ok()?;
        Some(answer.into_inner().status())
    }

    /// Adds stock, with its opening movement in the ledger.
    pub(crate) async fn put_in(&self, levels: &[(&str, i64)]) {
        for (sku, available) in levels {
            let sql = "WITH opened AS (INSERT INTO stock VALUES ($1, $2))
                INSERT INTO stock_ledger (reference, kind, sku, delta)
                SELECT gen_random_uuid(), 'OPENING', $1, $2 WHERE $2 <> 0";
            sqlx::query(sql).bind(*sku).bind(*available).execute(&self.pool).await.unwrap();
        }
    }

    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        count(&self.pool, sql).await
    }

    /// Every row of the service, to compare.
    pub(crate) async fn contents(&self) -> String {
        let sql = "SELECT jsonb_pretty(jsonb_build_object(
            'stock', (SELECT jsonb_agg(to_jsonb(stock) ORDER BY sku) FROM stock),
            'ledger', (SELECT jsonb_agg(to_jsonb(stock_ledger) ORDER BY reference, kind, sku) FROM stock_ledger),
            'reservations', (SELECT jsonb_agg(to_jsonb(reservations) ORDER BY order_id) FROM reservations),
            'inbox', (SELECT jsonb_agg(to_jsonb(processed_messages) ORDER BY message_id) FROM processed_messages),
            'outbox', (SELECT jsonb_agg(to_jsonb(outbox) ORDER BY aggregate_id, sequence) FROM outbox)))";
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    /// The reservation of the event's order: `RESERVED`, or `REJECTED` with the reason; and whether this event made it.
    pub(crate) async fn reservation(&self, event: &Event) -> (String, bool) {
        let sql = "SELECT concat_ws(' ', status, rejection), event_id = $2 FROM reservations WHERE order_id = $1";
        let query = sqlx::query_as(sql).bind(order_id_of(event)).bind(id_of(event));
        query.fetch_one(&self.pool).await.unwrap()
    }

    pub(crate) async fn is_in_inbox(&self, event: &Event) -> bool {
        let sql = "SELECT EXISTS (SELECT FROM processed_messages WHERE message_id = $1)";
        sqlx::query_scalar(sql).bind(id_of(event)).fetch_one(&self.pool).await.unwrap()
    }

    /// The types of the answers about the event's order in the outbox, in sequence.
    pub(crate) async fn answers(&self, event: &Event) -> Vec<String> {
        let sql = "SELECT event_type FROM outbox WHERE aggregate_id = $1 ORDER BY sequence";
        sqlx::query_scalar(sql).bind(order_id_of(event)).fetch_all(&self.pool).await.unwrap()
    }

    /// Blocks all batches and adjustments until this transaction ends.
    pub(crate) async fn lock_stock(&self) -> Transaction<'static, Postgres> {
        let mut lock = self.pool.begin().await.unwrap();
        sqlx::query("SELECT FROM stock FOR UPDATE").execute(&mut *lock).await.unwrap();
        lock
    }

    pub(crate) async fn wait_for_waiting_sessions(&self, sessions: i64) {
        let waiting = "SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND usename = 'inventory_service' AND wait_event_type = 'Lock'";
        eventually("sessions wait for a lock", async || self.count(waiting).await == sessions).await;
    }

    /// Takes the database away from the service: it loses its connections and gets no new ones.
    pub(crate) async fn cut_database(&self) {
        // Acquired first, since the pool gets no new connections either.
        let mut connection = self.pool.acquire().await.unwrap();
        self.allow_connections(false).await;
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
            WHERE datname = current_database() AND usename = 'inventory_service'";
        eventually("the service's sessions end", async || {
            sqlx::query_scalar::<_, i64>(sql).fetch_one(&mut *connection).await.unwrap() == 0
        })
        .await;
    }

    pub(crate) async fn restore_database(&self) {
        self.allow_connections(true).await;
    }

    async fn allow_connections(&self, allowed: bool) {
        // On a connection to another database: PostgreSQL refuses this for a session's own.
        let server = Server::parse(&env::var("POSTGRES_URL").unwrap()).unwrap();
        let mut statement: QueryBuilder<Postgres> = QueryBuilder::new("ALTER DATABASE ");
        statement.push(self.database.name()).push(" ALLOW_CONNECTIONS ").push(allowed);
        server.connect().await.unwrap().execute(statement.build().persistent(false)).await.unwrap();
    }
}

async fn count(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar::<_, i64>(sql).fetch_one(pool).await.unwrap()
}

async fn audit(pool: &PgPool) {
    let violations = [
        (
            "a SKU's movements do not add up to what is available, or that is below zero",
            "SELECT count(*) FROM stock
            LEFT JOIN (SELECT sku, sum(delta) AS moved FROM stock_ledger GROUP BY sku) AS ledger USING (sku)
            WHERE available <> coalesce(moved, 0) OR available < 0",
        ),
        (
            "an event is in the inbox without an effect, or has an effect without being in the inbox",
            "SELECT count(*) FROM processed_messages FULL JOIN (
                SELECT event_id FROM reservations WHERE event_id IS NOT NULL
                UNION ALL SELECT cancelled_by FROM reservations WHERE cancelled_by IS NOT NULL
            ) AS effect ON message_id = event_id
            WHERE message_id IS NULL OR event_id IS NULL",
        ),
        (
            "what is reserved for an order is not what its reservation says",
            "SELECT count(*) FROM reservations WHERE (status = 'RESERVED') <> (0 > (
                SELECT coalesce(sum(delta), 0) FROM stock_ledger WHERE reference = order_id))",
        ),
        (
            "an order's release of a SKU is not what was reserved of it",
            "SELECT count(*) FROM reservations JOIN stock_ledger ON reference = order_id
            WHERE status <> 'RESERVED'
            GROUP BY order_id, sku HAVING sum(delta) <> 0 UNION ALL SELECT 0 ORDER BY 1 DESC LIMIT 1",
        ),
        (
            "an order has an answer that it should not have, or lacks one",
            "SELECT count(*) FROM (
                SELECT order_id, 1 AS sequence,
                    'inventory.v1.Stock' || CASE status WHEN 'REJECTED' THEN 'Rejected' ELSE 'Reserved' END AS event_type
                FROM reservations WHERE event_id IS NOT NULL
                UNION ALL
                SELECT order_id, 2, 'inventory.v1.StockReleased'
                FROM reservations WHERE event_id IS NOT NULL AND status = 'RELEASED'
            ) AS expected
            FULL JOIN outbox ON aggregate_id = order_id AND outbox.sequence = expected.sequence
                AND outbox.event_type = expected.event_type
            WHERE order_id IS NULL OR aggregate_id IS NULL",
        ),
        ("there were deadlocks", "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"),
    ];
    for (violation, sql) in violations {
        assert_eq!(count(pool, sql).await, 0, "{violation}");
    }
}

/// Waits until the condition holds; panics if it does not within [`LIMIT`].
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let polling = async {
        while !holds().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, polling).await.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"));
}

/// Runs the calls at once, and returns their results in order.
pub(crate) async fn at_once<T, F>(calls: impl IntoIterator<Item = F>) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let tasks: Vec<_> = calls.into_iter().map(tokio::spawn).collect();
    let mut done = Vec::new();
    for task in tasks {
        done.push(task.await.unwrap());
    }
    done
}
