//! Migrates a database while others use it.
//!
//! A statement that changes a table waits for every transaction that has used the table. All who come later wait behind
//! that statement. So a migration first waits until the transactions are over that are open on its tables, and holds
//! nothing meanwhile. It then waits for a lock only briefly, and is rolled back and tried again if it does not get it.

mod holder;
mod patience;
mod plan;
mod session;

use std::time::Duration;

use clap::Args;
use sqlx::{
    PgConnection,
    migrate::{self, Migrate, Migrator},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    patience::Patience,
    plan::{Plan, Unfit, plan},
    session::Session,
};
use crate::{DatabaseUrl, NotOwnSession, PasswordFile};

/// Between two attempts to lock the database for a migration.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// A database that could not be migrated.
#[derive(Debug, thiserror::Error)]
#[error("cannot migrate {url}")]
pub struct MigrateError {
    url: DatabaseUrl,
    source: Cause,
}

/// Why a database could not be migrated.
#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("migration {0} failed")]
    Migration(String, #[source] migrate::MigrateError),
    #[error("cannot use the database")]
    Database(#[from] sqlx::Error),
    #[error(transparent)]
    Session(#[from] NotOwnSession),
    #[error("cannot read which migrations were run")]
    History(#[from] migrate::MigrateError),
    #[error("others held it up for longer than --give-up-after allows: it is safe to run again")]
    GaveUp,
    #[error("a signal ended it: it is safe to run again")]
    Stopped,
}

/// How far to migrate, and how long to wait for others.
#[derive(Args, Clone, Debug, Default)]
pub struct MigrateArguments {
    /// Also take away what earlier versions need. Run it when none of their processes runs any more.
    #[arg(long)]
    pub contract: bool,
    /// Seconds after which it gives up if others hold it up; by default it waits for as long as they do. Nobody waits
    /// for it meanwhile.
    #[arg(long, env = "MIGRATE_GIVE_UP_AFTER", value_name = "SECONDS")]
    pub give_up_after: Option<u32>,
    /// Where the password is.
    #[command(flatten)]
    pub password_file: PasswordFile,
}

/// Runs the migrators one after the other, as the owner of the database.
///
/// Migrations whose name begins with "contract" take away what processes of the version before need. They run only if
/// they are asked for, or if the database is new.
///
/// It is safe to repeat and to run twice at once: the second run waits for the first, and finds nothing to do. It is
/// also safe to end it at any moment, which `shutdown` asks for. A newer version may have migrated the database.
///
/// # Errors
/// Those of the database, and of migrations that do not fit those that were run.
pub async fn migrate(
    url: &DatabaseUrl,
    migrators: &[&Migrator],
    how: &MigrateArguments,
    shutdown: &CancellationToken,
) -> Result<(), MigrateError> {
    let patience = Patience::new(how.give_up_after.map(|seconds| Duration::from_secs(seconds.into())), shutdown);
    let url = url.clone().with_password_file(&how.password_file);
    let run = run_all(&url, migrators, how.contract, patience);
    match run.await {
        Ok(done) => done.say(&url),
        Err(source) => return Err(MigrateError { url, source }),
    }
    Ok(())
}

/// What became of all migrators.
#[derive(Default)]
struct Done {
    /// Migrations that were run.
    ran: usize,
    /// Whether contracting migrations are left.
    left: bool,
    /// Migrations of the database that this version does not know.
    ahead: usize,
}

impl Done {
    fn say(&self, url: &DatabaseUrl) {
        let Self { ran, left, ahead } = *self;
        if ahead > 0 && ran == 0 {
            info!("the database {url} is ahead by {ahead} migrations; nothing to do");
        } else if left {
            warn!(
                "schema of {url} is current, and still serves the version before: when no process of it runs, use --contract"
            );
        } else {
            info!("schema of {url} is current");
        }
    }
}

async fn run_all(
    url: &DatabaseUrl,
    migrators: &[&Migrator],
    contract: bool,
    patience: Patience<'_>,
) -> Result<Done, Cause> {
    let mut session = Session::open(url, patience).await?;
    session.lock().await?;
    // All plans come first, so a database that does not fit stays as it is.
    let mut plans = Vec::new();
    for migrator in migrators {
        let applied = applied(session.connection(), migrator).await?;
        plans.push((&migrator.table_name, plan(&migrator.migrations, &applied, contract)?));
    }
    let mut done = Done::default();
    for (table_name, Plan { now, left, ahead }) in plans {
        for migration in &now {
            session.run(table_name, migration).await?;
        }
        done = Done { ran: done.ran + now.len(), left: done.left || left, ahead: done.ahead + ahead };
    }
    session.close().await?;
    Ok(done)
}

/// The versions that were run, with their checksums; none in a new database.
async fn applied(connection: &mut PgConnection, migrator: &Migrator) -> Result<Vec<(i64, Vec<u8>)>, Cause> {
    connection.ensure_migrations_table(&migrator.table_name).await?;
    let applied = connection.list_applied_migrations(&migrator.table_name).await?;
    Ok(applied.into_iter().map(|migration| (migration.version, migration.checksum.into_owned())).collect())
}
