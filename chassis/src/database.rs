//! Connects to the database, and limits how long work there may take.

use std::{
    error::Error,
    fmt,
    future::Future,
    pin::Pin,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable};
use clap::Args;
use sqlx::{
    Connection, PgConnection, PgPool, Postgres,
    migrate::Migrator,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::{SchemaError, schema::check_schema};

/// Timeout of one attempt to connect, unless calls may wait longer for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A connection that was idle for longer is pinged before it is used.
const IDLE_MAX: Duration = Duration::from_millis(500);
/// A connection returns to the pool after this time even if it is always busy, since only the pool replaces old
/// connections.
const KEEP_MAX: Duration = Duration::from_secs(60);

/// The future of a unit of database work, as closures passed to [`Database::run`] return it.
pub type Work<'c, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>>;

/// The URL of a database. `Debug` and `Display` omit the password.
#[derive(Clone)]
pub struct DatabaseUrl(PgConnectOptions);

/// A database URL that cannot be parsed. The error does not repeat the URL, which may contain a password.
#[derive(Debug, thiserror::Error)]
#[error("not a database URL; it looks like postgres://user:password@host:5432/database")]
pub struct InvalidDatabaseUrl;

impl DatabaseUrl {
    /// The options to connect with.
    pub fn options(&self) -> PgConnectOptions {
        self.0.clone()
    }

    /// The same database, where a session plans each statement once, whatever its parameters are. For a session whose
    /// statements have one good plan: planning a small batch anew takes longer than executing it.
    #[must_use]
    pub fn with_generic_plans(&self) -> Self {
        Self(self.options().options([("plan_cache_mode", "force_generic_plan")]))
    }
}

impl FromStr for DatabaseUrl {
    type Err = InvalidDatabaseUrl;

    fn from_str(text: &str) -> Result<Self, InvalidDatabaseUrl> {
        if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
            return Err(InvalidDatabaseUrl);
        }
        PgConnectOptions::from_str(text).map(Self).map_err(|_| InvalidDatabaseUrl)
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(options) = self;
        let database = options.get_database().unwrap_or("");
        write!(f, "{}@{}:{}/{database}", options.get_username(), options.get_host(), options.get_port())
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// How a process uses its database.
#[derive(Args, Clone, Debug)]
pub struct DatabaseSettings {
    /// Maximum number of connections to the database.
    #[arg(long, env = "DATABASE_CONNECTIONS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub database_connections: u32,
    /// Milliseconds a call waits for a free connection. Then it fails with a hint to retry.
    #[arg(long, env = "DATABASE_ACQUIRE_MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub database_acquire_ms: u64,
    /// Milliseconds the database work of a call may take. Then its connection is cut and its transaction rolled back.
    #[arg(long, env = "DATABASE_WORK_MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub database_work_ms: u64,
}

/// A pool of connections. Work on it runs to its end, even if its caller goes away.
#[derive(Clone, Debug)]
pub struct Database {
    connections: Connections,
    acquire_limit: Duration,
    work_limit: Duration,
}

impl Database {
    /// Connects, and checks that all `migrations` were run. While the database does not answer, it retries with
    /// back-off and logs each retry.
    ///
    /// Returns `None` if `shutdown` comes first.
    ///
    /// # Errors
    /// Those that a retry does not fix: wrong credentials, or a schema that this process does not know.
    pub async fn connect(
        url: &DatabaseUrl,
        settings: &DatabaseSettings,
        migrations: &'static [&'static Migrator],
        shutdown: &CancellationToken,
    ) -> Result<Option<Self>, SchemaError> {
        let acquire_limit = Duration::from_millis(settings.database_acquire_ms);
        let pool = PgPoolOptions::new()
            .max_connections(settings.database_connections)
            .acquire_timeout(CONNECT_LIMIT.max(acquire_limit))
            .test_before_acquire(false)
            .before_acquire(|connection, state| Box::pin(ping_if_idle(connection, state.idle_for)))
            .connect_lazy_with(with_statement_timeout(url.options(), settings.database_work_ms));
        let back_off = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(5))
            .with_jitter()
            .without_max_times();
        // The pool hides why it cannot connect. A connection made without it returns the cause.
        let connect = || try_to_connect(url.options(), migrations);
        let waiting = connect
            .retry(back_off)
            .when(|error| matches!(error, SchemaError::Database(cause) if !is_refused(cause)))
            .notify(|error, delay| {
                let cause = error.source().map(ToString::to_string).unwrap_or_default();
                info!("waiting for database {url}: {cause}; next try in {delay:.1?}");
            });
        match shutdown.run_until_cancelled(waiting).await {
            None => Ok(None),
            Some(connected) => {
                let work_limit = Duration::from_millis(settings.database_work_ms);
                let connections = Connections { pool, kept: Arc::default(), return_limit: work_limit };
                connected.map(|()| Some(Self { connections, acquire_limit, work_limit }))
            }
        }
    }

    /// Runs one unit of work on a connection, to its end, even if the caller goes away.
    ///
    /// tonic drops a handler when its caller hangs up or its deadline passes. If that drops a `begin` half-way, sqlx
    /// returns the connection to the pool inside an open transaction (sqlx 0.9.0, launchbadge/sqlx#4393). The writes of
    /// the next caller are then lost. So the work is a task of its own; a caller that goes away only stops waiting for
    /// it.
    ///
    /// The work has a time limit. After it the connection is cut, not returned: a half-open connection then costs one
    /// unit of work and not a slot of the pool. The server rolls the open transaction back.
    ///
    /// # Errors
    /// - Those of the work.
    /// - [`sqlx::Error::PoolTimedOut`]: no connection was free in time, and the work has not started.
    /// - [`sqlx::Error::Io`] of kind `TimedOut`: the work took too long, and may or may not be committed.
    /// - [`sqlx::Error::WorkerCrashed`]: the work panicked.
    pub async fn run<T, E, W>(&self, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<sqlx::Error> + Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, E> + Send + 'static,
    {
        let Self { connections, acquire_limit, work_limit } = self.clone();
        let (start, started) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut acquired = connections.acquire().await?;
            if start.send(()).is_err() {
                return Err(E::from(sqlx::Error::PoolTimedOut));
            }
            if let Ok(done) = timeout(work_limit, work(&mut acquired.connection)).await {
                connections.release(acquired, done.is_ok());
                return done;
            }
            error!("database work took over {work_limit:?}: connection cut");
            // A drop closes the socket at once. sqlx's close_hard would first write pending bytes. If the network
            // swallows them, it waits until TCP gives up, for a quarter of an hour.
            drop(acquired.connection.detach());
            Err(E::from(timed_out()))
        });
        // Only the caller stops waiting here; the task goes on. After an outage every connection is made anew, which on
        // a busy machine may take longer than a call may wait. If each attempt ended with its caller, none would
        // succeed.
        if !starts_within(acquire_limit, started).await {
            return Err(E::from(sqlx::Error::PoolTimedOut));
        }
        task.await.unwrap_or_else(|_| Err(E::from(sqlx::Error::WorkerCrashed)))
    }

    /// A probe of the database's health.
    pub(crate) fn probe(&self) -> Probe {
        // Long enough to connect, even if the limit for work is shorter: with each attempt cut off, none would ever
        // succeed on a busy machine.
        let limit = CONNECT_LIMIT.max(self.work_limit);
        Probe { options: self.connections.pool.connect_options().as_ref().clone(), limit, connection: None }
    }
}

/// The pool, and idle connections that are kept outside it.
///
/// The pool pings each connection that is returned to it, which is one more round trip for each unit of work. So a
/// connection whose work succeeded is kept here for the next unit of work.
#[derive(Clone, Debug)]
struct Connections {
    pool: PgPool,
    kept: Arc<Mutex<Kept>>,
    return_limit: Duration,
}

#[derive(Debug, Default)]
struct Kept {
    /// The connection used last is at the end.
    idle: Vec<Acquired>,
    /// Units of work that found no kept connection and wait for the pool. Until there are none, all connections go back
    /// to the pool.
    waiting: usize,
}

#[derive(Debug)]
struct Acquired {
    connection: PoolConnection<Postgres>,
    /// When the pool handed it out.
    acquired_at: Instant,
    used_at: Instant,
}

impl Connections {
    async fn acquire(&self) -> Result<Acquired, sqlx::Error> {
        while let Some(mut kept) = self.pop_or_wait() {
            let is_fresh = kept.used_at.elapsed() <= IDLE_MAX;
            if is_fresh || matches!(timeout(CONNECT_LIMIT, kept.connection.ping()).await, Ok(Ok(()))) {
                return Ok(kept);
            }
            drop(kept.connection.detach());
        }
        let acquired = self.pool.acquire().await;
        self.lock().waiting -= 1;
        let now = Instant::now();
        acquired.map(|connection| Acquired { connection, acquired_at: now, used_at: now })
    }

    /// Takes a kept connection, or counts this unit of work as waiting.
    fn pop_or_wait(&self) -> Option<Acquired> {
        let mut kept = self.lock();
        let popped = kept.idle.pop();
        kept.waiting += usize::from(popped.is_none());
        popped
    }

    /// Keeps the connection, or returns it to the pool.
    ///
    /// A connection with unsent bytes is never kept. They are the rollback of a transaction that the work left open.
    /// The pool sends them; a kept connection would hold the locks until its next use.
    fn release(&self, mut acquired: Acquired, succeeded: bool) {
        let may_keep = succeeded && !acquired.connection.should_flush() && acquired.acquired_at.elapsed() < KEEP_MAX;
        let mut kept = self.lock();
        if may_keep && kept.waiting == 0 {
            acquired.used_at = Instant::now();
            kept.idle.push(acquired);
        } else {
            // The pool's ping has no timeout of its own, and occupies a slot.
            tokio::spawn(timeout(self.return_limit, acquired.connection.return_to_pool()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the work sends on its channel in time. If it does not, its later send fails, and it must not start.
async fn starts_within(limit: Duration, mut started: oneshot::Receiver<()>) -> bool {
    if timeout(limit, &mut started).await.is_ok() {
        return true;
    }
    // Close before the last look. Work that starts at this moment has then either sent already, or its send fails.
    started.close();
    started.try_recv().is_ok()
}

/// Pings the database over a connection of its own.
///
/// A busy pool does not mean that the database is down. If a load balancer took the one for the other, it would make an
/// outage of an overload.
pub(crate) struct Probe {
    options: PgConnectOptions,
    limit: Duration,
    connection: Option<PgConnection>,
}

impl Probe {
    pub(crate) async fn answers(&mut self) -> bool {
        let pinged = timeout(self.limit, connect_and_ping(&self.options, self.connection.take())).await;
        self.connection = pinged.ok().and_then(Result::ok);
        self.connection.is_some()
    }
}

async fn connect_and_ping(
    options: &PgConnectOptions,
    connection: Option<PgConnection>,
) -> Result<PgConnection, sqlx::Error> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => PgConnection::connect_with(options).await?,
    };
    connection.ping().await?;
    Ok(connection)
}

async fn try_to_connect(
    options: PgConnectOptions,
    migrations: &'static [&'static Migrator],
) -> Result<(), SchemaError> {
    let trying = async {
        let mut connection = PgConnection::connect_with(&options).await?;
        check_schema(&mut connection, migrations).await?;
        Ok(connection.close().await?)
    };
    // A server that accepts connections but stays silent would otherwise block without a log line.
    timeout(CONNECT_LIMIT, trying).await.unwrap_or_else(|_| Err(timed_out().into()))
}

/// Makes the server cancel a statement before its work is cut off here.
///
/// Cutting the connection does not stop a statement. A statement that is a transaction by itself could commit after its
/// caller was told to retry.
fn with_statement_timeout(options: PgConnectOptions, work_ms: u64) -> PgConnectOptions {
    options.options([("statement_timeout", (work_ms * 9).div_ceil(10))])
}

/// The pool pings every connection that is returned to it. By default it pings again before each use, one more round
/// trip. Here it does so only after an idle time.
async fn ping_if_idle(connection: &mut PgConnection, idle: Duration) -> Result<bool, sqlx::Error> {
    if idle > IDLE_MAX {
        connection.ping().await?;
    }
    Ok(true)
}

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

/// Whether the server refuses the credentials (SQLSTATE class 28), which a retry does not change.
fn is_refused(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if error.code().is_some_and(|code| code.starts_with("28")))
}
