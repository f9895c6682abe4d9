//! Migrates a database, and checks that it has the schema a process needs.

use std::{collections::HashSet, time::Duration};

use clap::Args;
use sqlx::{
    Connection, Executor, PgConnection, Postgres, QueryBuilder,
    migrate::{self, Migrate, Migration, Migrator},
};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::DatabaseUrl;

/// Between two attempts to lock the database for a migration.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// Why a process cannot use a database.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// A migration that this process needs was not run.
    #[error("the database lacks migration {0}: run the `migrate` command of the service that owns it")]
    Missing(String),
    /// A migration was run with other text than this process was built with.
    #[error(
        "migration {0} of the database differs from the one this binary was built with: run the version that migrated it"
    )]
    Different(String),
    /// A pooler stands before the database, and work behind it is not safe.
    #[error("cannot work behind this pooler: {0}")]
    Pooler(String),
    /// The database did not answer, or refused this process.
    #[error("cannot use the database")]
    Database(#[from] sqlx::Error),
}

/// A database that could not be migrated.
#[derive(Debug, thiserror::Error)]
#[error("cannot migrate {url}")]
pub struct MigrateError {
    url: DatabaseUrl,
    source: migrate::MigrateError,
}

/// The database to migrate, and how far.
#[derive(Args, Clone, Debug)]
pub struct MigrateArguments {
    /// Also take away what earlier versions need. Run it when none of their processes runs any more.
    #[arg(long)]
    pub contract: bool,
}

/// Runs the migrators one after the other, as the owner of the database.
///
/// Migrations whose name begins with "contract" take away what processes of the version before need. They run only if
/// they are asked for, or if the database is new.
///
/// It is safe to repeat and to run twice at once: the second run waits for the first, and finds nothing to do.
///
/// # Errors
/// Those of the database, and of migrations that were changed after they were run.
pub async fn migrate(url: &DatabaseUrl, migrators: &[&Migrator], contract: bool) -> Result<(), MigrateError> {
    let left = run_all(url, migrators, contract).await.map_err(|source| MigrateError { url: url.clone(), source })?;
    if left {
        warn!(
            "schema of {url} is current, and still serves the version before: when no process of it runs, use --contract"
        );
    } else {
        info!("schema of {url} is current");
    }
    Ok(())
}

/// Returns whether contracting migrations are left.
async fn run_all(url: &DatabaseUrl, migrators: &[&Migrator], contract: bool) -> Result<bool, migrate::MigrateError> {
    let mut connection = url.connect().await?;
    lock(&mut connection).await?;
    let mut left = false;
    for migrator in migrators {
        let applied = applied(&mut connection, migrator).await?;
        let runs = |migration: &Migration| {
            contract || applied.is_empty() || applied.contains(&migration.version) || !is_contracting(migration)
        };
        let (now, later): (Vec<_>, Vec<_>) = migrator.iter().cloned().partition(runs);
        left |= !later.is_empty();
        drop_unrecorded_indexes(&mut connection, now.iter().filter(|next| !applied.contains(&next.version))).await?;
        let table_name = migrator.table_name.clone();
        let chosen = Migrator { migrations: now.into(), locking: false, table_name, ..Migrator::DEFAULT };
        chosen.run_direct(None, &mut connection, false).await?;
    }
    connection.close().await?;
    Ok(left)
}

fn is_contracting(migration: &Migration) -> bool {
    migration.description.starts_with("contract")
}

/// The versions that were run; none in a new database.
async fn applied(connection: &mut PgConnection, migrator: &Migrator) -> Result<HashSet<i64>, migrate::MigrateError> {
    connection.ensure_migrations_table(&migrator.table_name).await?;
    let applied = connection.list_applied_migrations(&migrator.table_name).await?;
    Ok(applied.into_iter().map(|migration| migration.version).collect())
}

/// Keeps others from migrating at the same time, until the session ends. It asks again and again. A session that waits
/// for the lock has a snapshot, and an index that is built concurrently waits for all older snapshots: the migrations of
/// two processes would deadlock.
async fn lock(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut said = false;
    loop {
        let locked = sqlx::query_scalar::<_, bool>(
            "-- migrate: try to lock
            SELECT pg_try_advisory_lock(hashtextextended('migrate ' || current_database(), 0))",
        );
        if locked.fetch_one(&mut *connection).await? {
            return Ok(());
        }
        if !said {
            info!("another process migrates this database: waiting for it");
            said = true;
        }
        sleep(LOCK_INTERVAL).await;
    }
}

/// The server goes on to build an index concurrently after its client is gone. What it leaves, finished or not, is not
/// recorded as a migration, which runs again and finds the name taken. So an index that such a migration builds goes.
async fn drop_unrecorded_indexes(
    connection: &mut PgConnection,
    next: impl Iterator<Item = &Migration>,
) -> Result<(), sqlx::Error> {
    let next: Vec<_> = next.map(|migration| migration.sql.as_str()).collect();
    let indexes = sqlx::query_scalar::<_, String>(
        "-- migrate: find indexes
        SELECT relname
        FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
        WHERE relnamespace = current_schema()::regnamespace",
    );
    let indexes = indexes.fetch_all(&mut *connection).await?;
    let of_next = |index: &String| next.iter().any(|sql| sql.contains(&format!(" CONCURRENTLY {index} ")));
    for index in indexes.into_iter().filter(of_next) {
        warn!(index, "an earlier migration was interrupted: its index is dropped, and built again");
        let mut drop = QueryBuilder::<Postgres>::new("-- migrate: drop an unrecorded index\nDROP INDEX ");
        drop.push(index);
        connection.execute(drop.build().persistent(false)).await?;
    }
    Ok(())
}

/// Checks that all migrations of `migrators` were run, but for contracting ones. Later ones are no error: a new schema is
/// deployed before the processes that need it.
pub(crate) async fn check_schema(connection: &mut PgConnection, migrators: &[&Migrator]) -> Result<(), SchemaError> {
    for migrator in migrators {
        check(connection, migrator).await?;
    }
    Ok(())
}

async fn check(connection: &mut PgConnection, migrator: &Migrator) -> Result<(), SchemaError> {
    let applied = match connection.list_applied_migrations(&migrator.table_name).await {
        Ok(applied) => applied,
        // There is no history, or no right to read it: a later migration grants that.
        Err(migrate::MigrateError::Execute(sqlx::Error::Database(error)))
            if error.code().is_some_and(|code| ["42P01", "42501"].contains(&&*code)) =>
        {
            Vec::new()
        }
        Err(migrate::MigrateError::Execute(error)) => return Err(error.into()),
        Err(other) => return Err(sqlx::Error::from(other).into()),
    };
    for expected in migrator.iter() {
        let found = applied.iter().find(|migration| migration.version == expected.version);
        if is_contracting(expected) && found.is_none() {
            continue;
        }
        let name = || format!("{} ({})", expected.version, expected.description);
        match found {
            None => return Err(SchemaError::Missing(name())),
            Some(found) if found.checksum != expected.checksum => return Err(SchemaError::Different(name())),
            Some(_) => {}
        }
    }
    Ok(())
}
