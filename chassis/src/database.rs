//! Connects to the database, and limits how long work there may take.

use std::{error::Error, future::Future, pin::Pin, time::Duration};

use backon::{ExponentialBuilder, Retryable};
use clap::Args;
use sqlx::{Connection, PgConnection, migrate::Migrator};
use tokio::{sync::oneshot, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    DatabaseUrl, PasswordFile, SchemaError, pooler,
    probe::Probe,
    schema::check_schema,
    session::{is_refused, timed_out},
    sessions::{Sessions, Soundness},
    standby::{self, Standby},
};

/// The future of a unit of database work, as closures passed to [`Database::run`] return it.
pub type Work<'c, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>>;

/// The error of a unit of work.
pub trait WorkError: From<sqlx::Error> + Send + 'static {
    /// The error of the database, if it is one. It decides whether the session is used again.
    fn of_database(&self) -> Option<&sqlx::Error>;
}

impl WorkError for sqlx::Error {
    fn of_database(&self) -> Option<&sqlx::Error> {
        Some(self)
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
    /// Where the password is.
    #[command(flatten)]
    pub password_file: PasswordFile,
}

/// The sessions of a database. Work in them runs to its end, even if its caller goes away.
#[derive(Clone, Debug)]
pub struct Database {
    sessions: Sessions,
    standby: Standby,
    password_file: PasswordFile,
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
    /// Those that a retry does not fix: wrong credentials, a schema that this process does not know, or a pooler that
    /// mixes up the work of its clients.
    pub async fn connect(
        url: &DatabaseUrl,
        settings: &DatabaseSettings,
        migrations: &'static [&'static Migrator],
        shutdown: &CancellationToken,
    ) -> Result<Option<Self>, SchemaError> {
        let url = with_limits(url.clone(), settings.database_work_ms).with_password_file(&settings.password_file);
        let back_off = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(5))
            .with_jitter()
            .without_max_times();
        let connect = || try_to_connect(url.clone(), migrations);
        let waiting = connect
            .retry(back_off)
            .when(|error| matches!(error, SchemaError::Database(cause) if !is_refused(cause)))
            .notify(|error, delay| {
                let cause = error.source().map(ToString::to_string).unwrap_or_default();
                info!("waiting for database {url}: {cause}; next try in {delay:.1?}");
            });
        let Some(connected) = shutdown.run_until_cancelled(waiting).await else { return Ok(None) };
        let url = connected?;
        Ok(Some(Self {
            sessions: Sessions::new(url.clone(), settings.database_connections, "work"),
            standby: Standby::of(url),
            password_file: settings.password_file.clone(),
            acquire_limit: Duration::from_millis(settings.database_acquire_ms),
            work_limit: Duration::from_millis(settings.database_work_ms),
        }))
    }

    /// The database, for sessions that are not among the limited number. They are told what those are told.
    pub fn url(&self) -> &DatabaseUrl {
        &self.sessions.url
    }

    /// The same database with a limited number of other sessions. They plan a statement by its parameters, for statements
    /// that have no one good plan. None is opened before it is needed.
    #[must_use]
    pub fn with_plans_by_parameters(&self, connections: u32) -> Self {
        let url = self.sessions.url.clone().with_setting("plan_cache_mode", "auto");
        Self { sessions: Sessions::new(url, connections, "operators"), ..self.clone() }
    }

    /// The database for a session that is to be its client's alone, such as one that listens: the one that was
    /// `given`, or this. `None` if there is only a pooler that shares sessions. The password file is that of this.
    ///
    /// # Errors
    /// The one that was given leads to such a pooler.
    pub async fn url_of_own_session(&self, given: Option<&DatabaseUrl>) -> Result<Option<DatabaseUrl>, SchemaError> {
        if let Some(given) = given {
            let given = given.clone().with_password_file(&self.password_file);
            let found = timeout(given.connect_limit(), pooler::find_sessions(&given)).await;
            return match found.unwrap_or_else(|_| Err(timed_out().into())) {
                Ok(pooler::Sessions::Own) => Ok(Some(given)),
                Ok(pooler::Sessions::Shared) => Err(SchemaError::Pooler(format!(
                    "{given} of --listen-database-url leads to one that shares sessions: name the database itself"
                ))),
                // It is tried again, and polled meanwhile.
                Err(SchemaError::Database(cause)) => {
                    warn!(%cause, "cannot look at {given} of --listen-database-url");
                    Ok(Some(given))
                }
                Err(other) => Err(other),
            };
        }
        if self.sessions.url.is_shared() {
            warn!(
                "a pooler shares the sessions of {}, so nobody hears notifications there: this process polls ten times \
                 a second. With --listen-database-url it connects to the database itself",
                self.sessions.url
            );
            return Ok(None);
        }
        Ok(Some(self.sessions.url.clone()))
    }

    /// Whether commits wait for a synchronous standby. Work that writes would wait too.
    pub fn waits_for_standby(&self) -> bool {
        self.standby.is_waited_for()
    }

    /// Runs one unit of work that writes. While commits wait for a synchronous standby, it is refused at once: its
    /// session would wait too, and no limit could end that.
    ///
    /// # Errors
    /// Those of [`Self::run`], and an [`sqlx::Error::Io`] that says so.
    pub async fn write<T, E, W>(&self, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: WorkError,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, E> + Send + 'static,
    {
        if self.waits_for_standby() {
            return Err(E::from(standby::away()));
        }
        self.run(work).await
    }

    /// Runs one unit of work on a connection, to its end, even if the caller goes away.
    ///
    /// tonic drops a handler when its caller hangs up or its deadline passes. If that drops a `begin` half-way, sqlx
    /// leaves the connection inside an open transaction (sqlx 0.9.0, launchbadge/sqlx#4393). The writes of the next
    /// caller are then lost. So the work is a task of its own; a caller that goes away only stops waiting for it.
    ///
    /// The work has a time limit. After it the connection is cut, not used again: a half-open connection then costs one
    /// unit of work and not a slot. The server rolls the open transaction back.
    ///
    /// # Errors
    /// - Those of the work.
    /// - [`sqlx::Error::PoolTimedOut`]: no connection was free in time, and the work has not started.
    /// - [`sqlx::Error::Io`] of kind `TimedOut`: the work took too long, and may or may not be committed.
    /// - [`sqlx::Error::WorkerCrashed`]: the work panicked.
    pub async fn run<T, E, W>(&self, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: WorkError,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, E> + Send + 'static,
    {
        let Self { sessions, standby, acquire_limit, work_limit, .. } = self.clone();
        let (mut start, started) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut taken = sessions.take(&mut start).await?;
            if start.send(()).is_err() {
                sessions.give_back(taken, Soundness::Sound);
                return Err(E::from(sqlx::Error::PoolTimedOut));
            }
            if let Ok(done) = timeout(work_limit, work(&mut taken.connection)).await {
                let fault = done.as_ref().err().and_then(E::of_database);
                sessions.give_back(taken, fault.map_or(Soundness::Sound, Soundness::of));
                return done;
            }
            error!("database work took over {work_limit:?}: its session is closed");
            // Later it is dropped, which closes its socket at once. To say goodbye would first write pending bytes. If
            // the network swallows them, that waits until TCP gives up, for a quarter of an hour.
            standby.keep(taken);
            Err(E::from(timed_out()))
        });
        // Only the caller stops waiting here; the task goes on.
        if !starts_within(acquire_limit, started).await {
            return Err(E::from(sqlx::Error::PoolTimedOut));
        }
        task.await.unwrap_or_else(|_| Err(E::from(sqlx::Error::WorkerCrashed)))
    }

    /// A probe of the database's health.
    pub(crate) fn probe(&self) -> Probe {
        Probe::new(self.sessions.clone(), self.standby.clone())
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

/// Returns the database as its sessions are given out.
async fn try_to_connect(
    url: DatabaseUrl,
    migrations: &'static [&'static Migrator],
) -> Result<DatabaseUrl, SchemaError> {
    // It connects several times.
    let limit = url.connect_limit() * 2;
    let trying = async {
        let sessions = pooler::find_sessions(&url).await?;
        let url = if sessions == pooler::Sessions::Shared { url.shared() } else { url };
        let mut connection = url.connect().await?;
        check_schema(&mut connection, migrations).await?;
        connection.close().await?;
        Ok(url)
    };
    // A server that accepts connections but stays silent would otherwise block without a log line.
    timeout(limit, trying).await.unwrap_or_else(|_| Err(timed_out().into()))
}

/// What the sessions of units of work are told. The role says most of it too, for sessions that a pooler shares.
///
/// The server cancels a statement before its work is cut off here. Cutting the connection does not stop a statement. A
/// statement that is a transaction by itself could commit after its caller was told to retry.
///
/// A plan that was made over nearly empty tables would later scan full ones, and JIT would add to that.
fn with_limits(url: DatabaseUrl, work_ms: u64) -> DatabaseUrl {
    url.with_setting("statement_timeout", (work_ms * 9).div_ceil(10).to_string())
        .with_setting("idle_in_transaction_session_timeout", work_ms.saturating_mul(2).to_string())
        .with_setting("enable_seqscan", "off")
        .with_setting("jit", "off")
}
