//! Brings a database to the schema a process knows, and checks that it is there.

use sqlx::{
    Connection, PgConnection,
    migrate::{Migrate, MigrateError, Migrator},
};

use crate::DatabaseUrl;

/// Why a process cannot use a database.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// A migration this process relies on was not run.
    #[error("the database lacks migration {0}: run the `migrate` command of the service that owns it")]
    Missing(String),
    /// A migration was run, but not the one this process was built with.
    #[error("migration {0} of the database is not the one this process was built with")]
    Different(String),
    /// The database did not answer, or refuses this process.
    #[error("cannot use the database")]
    Database(#[from] sqlx::Error),
}

/// Runs the migrators one after the other, with the owner's rights. Safe to repeat, and to run twice at once: each takes
/// an advisory lock, and the second finds nothing left to do.
///
/// # Errors
/// Those of the database, and of migrations that were changed after they were run.
pub async fn migrate(url: &DatabaseUrl, migrators: &[&Migrator]) -> Result<(), MigrateError> {
    let mut connection = PgConnection::connect_with(&url.options()).await?;
    for migrator in migrators {
        migrator.run_direct(None, &mut connection, false).await?;
    }
    connection.close().await?;
    Ok(())
}

/// Checks that all migrations of `migrators` were run. Later ones are no error: the schema moves ahead of the processes
/// while they are being replaced.
pub(crate) async fn check_schema(connection: &mut PgConnection, migrators: &[&Migrator]) -> Result<(), SchemaError> {
    for migrator in migrators {
        check(connection, migrator).await?;
    }
    Ok(())
}

async fn check(connection: &mut PgConnection, migrator: &Migrator) -> Result<(), SchemaError> {
    let applied = match connection.list_applied_migrations(&migrator.table_name).await {
        Ok(applied) => applied,
        // The history is not there (42P01), or not ours to read yet (42501), which the last of the migrations grants.
        Err(MigrateError::Execute(sqlx::Error::Database(error)))
            if error.code().is_some_and(|code| ["42P01", "42501"].contains(&&*code)) =>
        {
            Vec::new()
        }
        Err(MigrateError::Execute(error)) => return Err(error.into()),
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
