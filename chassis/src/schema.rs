//! Migrates a database, and checks that it has the schema a process needs.

use sqlx::{
    Connection, PgConnection,
    migrate::{self, Migrate, Migrator},
};
use tracing::info;

use crate::DatabaseUrl;

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

/// Runs the migrators one after the other, as the owner of the database.
///
/// It is safe to repeat and to run twice at once: each migrator takes an advisory lock, and the second run finds
/// nothing to do.
///
/// # Errors
/// Those of the database, and of migrations that were changed after they were run.
pub async fn migrate(url: &DatabaseUrl, migrators: &[&Migrator]) -> Result<(), MigrateError> {
    run_all(url, migrators).await.map_err(|source| MigrateError { url: url.clone(), source })?;
    info!("schema of {url} is current");
    Ok(())
}

async fn run_all(url: &DatabaseUrl, migrators: &[&Migrator]) -> Result<(), migrate::MigrateError> {
    let mut connection = PgConnection::connect_with(&url.options()).await?;
    for migrator in migrators {
        migrator.run_direct(None, &mut connection, false).await?;
    }
    connection.close().await?;
    Ok(())
}

/// Checks that all migrations of `migrators` were run. Later ones are no error: a new schema is deployed before the
/// processes that need it.
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
        let name = || format!("{} ({})", expected.version, expected.description);
        match applied.iter().find(|migration| migration.version == expected.version) {
            None => return Err(SchemaError::Missing(name())),
            Some(found) if found.checksum != expected.checksum => return Err(SchemaError::Different(name())),
            Some(_) => {}
        }
    }
    Ok(())
}
