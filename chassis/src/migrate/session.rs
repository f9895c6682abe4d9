//! The session that migrates, and one beside it that sees what holds the first up.

use std::{pin::pin, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use sqlx::{
    Connection, Executor, PgConnection, Postgres, QueryBuilder,
    error::DatabaseError,
    migrate::{self, Migrate, Migration},
};
use tokio::{
    select,
    time::{Instant, interval_at},
};
use tracing::{info, warn};

use super::{
    Cause, LOCK_INTERVAL,
    holder::{find_blocking, find_open, list},
    patience::Patience,
};
use crate::{DatabaseUrl, pooler::require_own_session, schema::name};

/// For how long a migration waits for a lock, and others behind it.
const LOCK_TIMEOUT: &str = "2s";
/// Between two looks at the transactions that are open on the tables of a migration.
const OPEN_INTERVAL: Duration = Duration::from_millis(100);
/// Between two looks at what a migration waits for. It is less than the lock timeout, so no wait that fails is missed.
const BLOCKING_INTERVAL: Duration = Duration::from_secs(1);
/// Between an attempt and the next.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

pub(super) struct Session<'s> {
    connection: PgConnection,
    pid: i32,
    observer: PgConnection,
    patience: Patience<'s>,
}

impl<'s> Session<'s> {
    pub(super) async fn open(url: &DatabaseUrl, patience: Patience<'s>) -> Result<Self, Cause> {
        let opening = async {
            // A pooler that shares sessions would give the lock of this one to others.
            require_own_session(url).await?;
            Ok((connect(url).await?, connect(url).await?))
        };
        let (mut connection, observer) = patience.unless_stopped(opening).await?;
        let pid = sqlx::query_scalar("-- migrate: own pid\nSELECT pg_backend_pid()").fetch_one(&mut connection).await?;
        Ok(Self { connection, pid, observer, patience })
    }

    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    pub(super) async fn close(self) -> Result<(), Cause> {
        self.observer.close().await?;
        Ok(self.connection.close().await?)
    }

    /// Keeps others from migrating at the same time, until the session ends. It asks again and again. A session that
    /// waits for the lock has a snapshot, and an index that is built concurrently waits for all older snapshots: the
    /// migrations of two processes would deadlock.
    pub(super) async fn lock(&mut self) -> Result<(), Cause> {
        let mut said = false;
        loop {
            let locked = sqlx::query_scalar::<_, bool>(
                "-- migrate: try to lock
                SELECT pg_try_advisory_lock(hashtextextended('migrate ' || current_database(), 0))",
            );
            if locked.fetch_one(&mut self.connection).await? {
                return Ok(());
            }
            if !said {
                info!("another process migrates this database: waiting for it");
                said = true;
            }
            self.patience.pause(LOCK_INTERVAL).await?;
        }
    }

    /// Runs a migration, again and again while it does not get its locks.
    pub(super) async fn run(&mut self, table_name: &str, migration: &Migration) -> Result<(), Cause> {
        let back_off = ExponentialBuilder::default().with_min_delay(PAUSE_MIN).with_max_delay(PAUSE_MAX);
        let mut pauses = back_off.with_jitter().without_max_times().build();
        loop {
            self.wait_for_open_transactions(migration).await?;
            let failed = match self.attempt(table_name, migration).await {
                Ok(()) => return Ok(()),
                Err(Cause::Migration(_, failed)) if is_in_the_way(&failed) => failed,
                Err(other) => return Err(other),
            };
            let (name, pause) = (name(migration), pauses.next().unwrap_or(PAUSE_MAX));
            warn!("migration {name} let go, so that nobody waits behind it ({failed}); next try in {pause:.1?}");
            self.patience.pause(pause).await?;
        }
    }

    /// Returns when all transactions are over that were open on the tables of the migration when this began. It does
    /// not wait for those that came later: there is always one on a busy table.
    async fn wait_for_open_transactions(&mut self, migration: &Migration) -> Result<(), Cause> {
        let mut open = find_open(&mut self.connection, migration.sql.as_str()).await?;
        let mut say_at = Some(Instant::now() + BLOCKING_INTERVAL);
        while !open.is_empty() {
            if say_at.take_if(|say_at| Instant::now() >= *say_at).is_some() {
                info!("migration {} waits, and nobody waits for it: {} holds its tables", name(migration), list(&open));
            }
            self.patience.pause(OPEN_INTERVAL).await?;
            let now = find_open(&mut self.connection, migration.sql.as_str()).await?;
            open.retain(|before| before.is_in(&now));
        }
        if self.patience.is_stopped() { Err(Cause::Stopped) } else { Ok(()) }
    }

    /// Runs a migration once.
    ///
    /// One without a transaction builds an index concurrently. Nobody waits behind it but other changes of the schema,
    /// and to let go would waste what is built. So it waits for its locks as long as it takes.
    async fn attempt(&mut self, table_name: &str, migration: &Migration) -> Result<(), Cause> {
        let lock_timeout = if migration.no_tx { "0" } else { LOCK_TIMEOUT };
        set(&mut self.connection, &[("lock_timeout", lock_timeout)]).await?;
        let Self { connection, pid, observer, patience } = self;
        let work = async {
            if migration.no_tx {
                drop_unrecorded_index(connection, migration).await.map_err(migrate::MigrateError::Execute)?;
            }
            connection.apply(table_name, migration).await
        };
        let took = watch(&name(migration), work, observer, *pid, patience).await?;
        info!("migration {} was run in {took:.1?}", name(migration));
        Ok(())
    }
}

/// Does the work of the session `pid`, and says what holds it up. It cancels the work when the signal comes, and when
/// the time is over while others hold it up.
async fn watch(
    name: &str,
    work: impl Future<Output = Result<Duration, migrate::MigrateError>>,
    observer: &mut PgConnection,
    pid: i32,
    patience: &Patience<'_>,
) -> Result<Duration, Cause> {
    let mut work = pin!(work);
    let mut looks = interval_at(Instant::now() + BLOCKING_INTERVAL, BLOCKING_INTERVAL);
    let (mut said, mut cancelled) = (Vec::new(), None);
    loop {
        select! {
            done = &mut work => {
                return match (done, cancelled) {
                    (Err(_), Some(cause)) => Err(cause),
                    (done, _) => done.map_err(|error| Cause::Migration(name.to_owned(), error)),
                };
            }
            () = patience.stopped(), if cancelled.is_none() => {
                cancel(observer, pid).await?;
                cancelled = Some(Cause::Stopped);
            }
            _ = looks.tick() => {
                let blocking = find_blocking(observer, pid).await?;
                if !blocking.is_empty() && blocking != said {
                    info!("migration {name} waits for {}", list(&blocking));
                }
                let gives_up = !blocking.is_empty() && patience.is_over();
                // Again if it was cancelled before: the first time, it may have been between two statements.
                if gives_up || cancelled.is_some() {
                    cancel(observer, pid).await?;
                    cancelled = cancelled.or(Some(Cause::GaveUp));
                }
                said = blocking;
            }
        }
    }
}

/// It ends the statement that is executed at this moment, if there is one.
async fn cancel(observer: &mut PgConnection, pid: i32) -> Result<(), sqlx::Error> {
    let cancel = sqlx::query("-- migrate: cancel\nSELECT pg_cancel_backend($1)").bind(pid);
    cancel.execute(observer).await.map(drop)
}

/// Another transaction held a lock for too long, or both waited for each other. The migration was rolled back.
fn is_in_the_way(error: &migrate::MigrateError) -> bool {
    let (migrate::MigrateError::Execute(cause) | migrate::MigrateError::ExecuteMigration(cause, _)) = error else {
        return false;
    };
    let code = cause.as_database_error().and_then(DatabaseError::code);
    code.is_some_and(|code| ["55P03", "40P01"].contains(&&*code))
}

/// A migration takes as long as it takes.
async fn connect(url: &DatabaseUrl) -> Result<PgConnection, Cause> {
    let unlimited = ["statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"];
    let url = unlimited.into_iter().fold(url.clone(), |url, name| url.with_setting(name, "0"));
    Ok(url.with_setting("standard_conforming_strings", "on").connect().await?)
}

/// A server of an earlier version lacks some settings, and the limits that they would set.
async fn set(connection: &mut PgConnection, settings: &[(&str, &str)]) -> Result<(), Cause> {
    let (names, values): (Vec<_>, Vec<_>) = settings.iter().copied().unzip();
    let set = sqlx::query(
        "-- migrate: set what it relies on
        SELECT set_config(name, wanted.value, false)
        FROM unnest($1::text[], $2::text[]) AS wanted (name, value) JOIN pg_settings USING (name)",
    );
    set.bind(names).bind(values).execute(connection).await?;
    Ok(())
}

/// The server goes on to build an index concurrently after its client is gone. What it leaves, finished or not, is not
/// recorded as a migration, which runs again and finds the name taken. So an index that such a migration builds goes.
///
/// The drop waits for a server that still builds. It is concurrent too, so nobody else waits behind it.
async fn drop_unrecorded_index(connection: &mut PgConnection, next: &Migration) -> Result<(), sqlx::Error> {
    let indexes = sqlx::query_scalar::<_, String>(
        "-- migrate: find indexes
        SELECT quote_ident(relname)
        FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
        WHERE relnamespace = current_schema()::regnamespace",
    );
    let indexes = indexes.fetch_all(&mut *connection).await?;
    let of_next = |index: &String| next.sql.as_str().contains(&format!(" CONCURRENTLY {index} ON "));
    for index in indexes.into_iter().filter(of_next) {
        warn!(index, "an earlier migration was interrupted: its index is dropped, and built again");
        let mut drop = QueryBuilder::<Postgres>::new("-- migrate: drop an unrecorded index\nDROP INDEX CONCURRENTLY ");
        drop.push(index);
        connection.execute(drop.build().persistent(false)).await?;
    }
    Ok(())
}
