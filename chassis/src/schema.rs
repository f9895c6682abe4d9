//! Checks that a database has the schema a process needs.

use sqlx::{
    PgConnection,
    migrate::{self, Migrate, Migration, Migrator},
};

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

/// As messages call a migration.
pub(crate) fn name(migration: &Migration) -> String {
    format!("{} ({})", migration.version, migration.description)
}

/// Whether a migration takes away what processes of the version before need.
pub(crate) fn is_contracting(migration: &Migration) -> bool {
    migration.description.starts_with("contract")
}

/// Checks that all migrations of `migrators` were run, but for contracting ones. Later ones are no error: a new schema is
/// deployed before the processes that need it.
///
/// # Errors
/// [`SchemaError`].
pub async fn check_schema(connection: &mut PgConnection, migrators: &[&Migrator]) -> Result<(), SchemaError> {
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
        match found {
            None => return Err(SchemaError::Missing(name(expected))),
            Some(found) if found.checksum != expected.checksum => return Err(SchemaError::Different(name(expected))),
            Some(_) => {}
        }
    }
    Ok(())
}
