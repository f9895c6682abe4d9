//! Connects to the database and bounds the work done there.

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

/// How long one try to connect may take, if calls do not wait longer for a connection than that.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long a connection is trusted without being asked.
const REST_MAX: Duration = Duration::from_millis(500);
/// How long a connection that is always busy is kept from the pool, which makes a new one every half hour.
const AT_HAND_MAX: Duration = Duration::from_secs(60);

/// A unit of database work: the future a closure passed to [`Database::run`] returns.
pub type Work<'c, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>>;

/// Where a database is and who connects. Its `Debug` and `Display` leave the password out.
#[derive(Clone)]
pub struct DatabaseUrl(PgConnectOptions);

/// A database URL that cannot be read. It does not repeat the URL, which may hold a password.
#[derive(Debug, thiserror::Error)]
#[error("not a database URL; it looks like postgres://user:password@host:5432/database")]
pub struct InvalidDatabaseUrl;

impl DatabaseUrl {
    /// What a connection is made from.
    pub fn options(&self) -> PgConnectOptions {
        self.0.clone()
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
    /// Connections to the database at most.
    #[arg(long, env = "DATABASE_CONNECTIONS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub database_connections: u32,
    /// Milliseconds a call waits for a free connection before it is refused with a hint to retry.
    #[arg(long, env = "DATABASE_ACQUIRE_MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub database_acquire_ms: u64,
    /// Milliseconds a unit of work may take in the database before its connection is cut and its transaction undone.
    #[arg(long, env = "DATABASE_WORK_MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub database_work_ms: u64,
}

/// A pool of connections on which work is run so that no caller can stop it half-way.
#[derive(Clone, Debug)]
pub struct Database {
    connections: Connections,
    acquire_limit: Duration,
    work_limit: Duration,
}

impl Database {
    /// Connects, waiting with back-off for as long as the database does not answer, and saying so; and checks that all
    /// `migrations` were run.
    ///
    /// Returns `None` when `shutdown` came first.
    ///
    /// # Errors
    /// What waiting does not mend: wrong credentials, a schema this process does not know.
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
            .before_acquire(|connection, state| Box::pin(test_after_rest(connection, state.idle_for)))
            .connect_lazy_with(with_statement_timeout(url.options(), settings.database_work_ms));
        let back_off = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(5))
            .with_jitter()
            .without_max_times();
        // The pool hides why it has no connection; one made by hand tells.
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
                let connections = Connections { pool, at_hand: Arc::default(), return_limit: work_limit };
                connected.map(|()| Some(Self { connections, acquire_limit, work_limit }))
            }
        }
    }

    /// Runs one unit of work on a connection, to its end, whatever becomes of the caller.
    ///
    /// tonic drops a handler when its caller hangs up or its time is over. A `begin` that is dropped half-way returns its
    /// connection to the pool inside an open transaction, and whatever the next caller writes there vanishes (sqlx 0.9.0,
    /// launchbadge/sqlx#4393). So the work is a task of its own, which a dropped caller merely stops waiting for. It is
    /// bounded here as well: on expiry the connection is cut, not returned, so that a half-open connection costs one
    /// unit of work and not a place in the pool; the server undoes what was not committed.
    ///
    /// # Errors
    /// Those of the work; [`sqlx::Error::PoolTimedOut`] when no connection came free in time, and then nothing was begun;
    /// [`sqlx::Error::Io`] of kind `TimedOut` when the work took too long, and then it may or may not have been
    /// committed; [`sqlx::Error::WorkerCrashed`] when it panicked.
    pub async fn run<T, E, W>(&self, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<sqlx::Error> + Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, E> + Send + 'static,
    {
        let Self { connections, acquire_limit, work_limit } = self.clone();
        let (begin, begun) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut taken = connections.take().await?;
            if begin.send(()).is_err() {
                return Err(E::from(sqlx::Error::PoolTimedOut));
            }
            if let Ok(done) = timeout(work_limit, work(&mut taken.connection)).await {
                connections.give_back(taken, done.is_ok());
                return done;
            }
            error!("database work took over {work_limit:?}: connection cut");
            // Dropped, the socket is closed at once. sqlx's close_hard would first write what is still to be sent, and where
            // the network swallows it wait for as long as TCP does: a quarter of an hour.
            drop(taken.connection.detach());
            Err(E::from(timed_out()))
        });
        // Only the caller stops waiting here, not the task: after an outage every connection is made anew, and on a busy
        // machine that may take longer than a call may wait. Were each try cut off with its caller, none would succeed.
        if !begins_within(acquire_limit, begun).await {
            return Err(E::from(sqlx::Error::PoolTimedOut));
        }
        task.await.unwrap_or_else(|_| Err(E::from(sqlx::Error::WorkerCrashed)))
    }

    /// Asks the database for its health from now on.
    pub(crate) fn probe(&self) -> Probe {
        // Enough for a connection to be made, however short work is to be: cut off each time, none ever would on a busy
        // machine.
        let limit = CONNECT_LIMIT.max(self.work_limit);
        Probe { options: self.connections.pool.connect_options().as_ref().clone(), limit, connection: None }
    }
}

/// The pool, and connections of it that are kept from it.
///
/// The pool asks each connection that comes back whether it is well: one more round trip for every unit of work, a seventh
/// of what a lone order costs. So one whose work has succeeded is kept at hand for the next.
#[derive(Clone, Debug)]
struct Connections {
    pool: PgPool,
    at_hand: Arc<Mutex<AtHand>>,
    return_limit: Duration,
}

#[derive(Debug, Default)]
struct AtHand {
    /// The last to have been busy is on top.
    idle: Vec<Taken>,
    /// Units of work that wait for the pool, having found none at hand. Nothing is kept from it meanwhile.
    waiting: usize,
}

#[derive(Debug)]
struct Taken {
    connection: PoolConnection<Postgres>,
    /// When it was taken from the pool.
    since: Instant,
    /// When it was last at work, or asked.
    well: Instant,
}

impl Connections {
    async fn take(&self) -> Result<Taken, sqlx::Error> {
        while let Some(mut taken) = self.pop_or_wait() {
            let is_busy = taken.well.elapsed() <= REST_MAX;
            if is_busy || matches!(timeout(CONNECT_LIMIT, taken.connection.ping()).await, Ok(Ok(()))) {
                return Ok(taken);
            }
            drop(taken.connection.detach());
        }
        let acquired = self.pool.acquire().await;
        self.lock().waiting -= 1;
        let now = Instant::now();
        acquired.map(|connection| Taken { connection, since: now, well: now })
    }

    fn pop_or_wait(&self) -> Option<Taken> {
        let mut at_hand = self.lock();
        let taken = at_hand.idle.pop();
        at_hand.waiting += usize::from(taken.is_none());
        taken
    }

    /// What still has something to send, which is the end of a transaction that work has left open, sends it on the way back
    /// to the pool; at hand, it would hold its locks until it is wanted again.
    fn give_back(&self, mut taken: Taken, succeeded: bool) {
        let may_keep = succeeded && !taken.connection.should_flush() && taken.since.elapsed() < AT_HAND_MAX;
        let mut at_hand = self.lock();
        if may_keep && at_hand.waiting == 0 {
            taken.well = Instant::now();
            at_hand.idle.push(taken);
        } else {
            // The pool holds its place while it asks, without a limit.
            tokio::spawn(timeout(self.return_limit, taken.connection.return_to_pool()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, AtHand> {
        self.at_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether what is to send on `begin`'s channel before it begins does so in time. If not, its send fails from now on, and
/// it must not begin.
async fn begins_within(limit: Duration, mut begun: oneshot::Receiver<()>) -> bool {
    if timeout(limit, &mut begun).await.is_ok() {
        return true;
    }
    // Closed first, so that what begins at this moment either is told not to, or is waited for.
    begun.close();
    begun.try_recv().is_ok()
}

/// Asks the database whether it answers, over a connection of its own: a pool that is busy is not a database that is
/// away, and a load balancer that took it for one would make an overload an outage.
pub(crate) struct Probe {
    options: PgConnectOptions,
    limit: Duration,
    connection: Option<PgConnection>,
}

impl Probe {
    pub(crate) async fn answers(&mut self) -> bool {
        let asked = timeout(self.limit, ask(&self.options, self.connection.take())).await;
        self.connection = asked.ok().and_then(Result::ok);
        self.connection.is_some()
    }
}

async fn ask(options: &PgConnectOptions, connection: Option<PgConnection>) -> Result<PgConnection, sqlx::Error> {
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
    // A server that accepts and stays silent would otherwise be waited for without a word.
    timeout(CONNECT_LIMIT, trying).await.unwrap_or_else(|_| Err(timed_out().into()))
}

/// Has the server give a statement up before its work is cut off here. A connection that is cut does not stop a statement:
/// one that is a transaction by itself would be committed yet, after its caller was told to come again.
fn with_statement_timeout(options: PgConnectOptions, work_ms: u64) -> PgConnectOptions {
    options.options([("statement_timeout", (work_ms * 9).div_ceil(10))])
}

/// The pool asks every connection that comes back whether it is well. To ask again before the next work, as it does by
/// default, is a round trip more for each; so only one that has rested is asked.
async fn test_after_rest(connection: &mut PgConnection, rested: Duration) -> Result<bool, sqlx::Error> {
    if rested > REST_MAX {
        connection.ping().await?;
    }
    Ok(true)
}

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

/// Whether the server answered, and its answer will not change by waiting (SQLSTATE class 28: invalid authorization).
fn is_refused(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if error.code().is_some_and(|code| code.starts_with("28")))
}
