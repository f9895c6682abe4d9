//! A server of one test's own.

use sqlx::{AssertSqlSafe, Executor, migrate::Migrator};

use crate::{
    Scratch, TestDatabase,
    bootstrap::bootstrap,
    postgres::{Cluster, Options, can_test_clusters},
};

/// A server whose settings a test may change, since nobody else uses it. It stops when this is dropped.
#[derive(Debug)]
pub struct OwnServer {
    cluster: Cluster,
    // Last, because its files may be deleted only after the server has ended.
    _scratch: Scratch,
}

impl OwnServer {
    /// Starts a server with the project's roles. `None`, and a line that says why, if there are no programs for it.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn start() -> Option<OwnServer> {
        if !can_test_clusters() {
            eprintln!("skipped: this test needs the programs of PostgreSQL, and POSTGRES_URL");
            return None;
        }
        let scratch = Scratch::new();
        let directory = scratch.join("postgres");
        let options = Options { directory, port: None, keep: false, durable: false, settings: Vec::new() };
        let cluster = Cluster::start(options).await.expect("a server");
        bootstrap(cluster.server()).await.expect("its roles");
        Some(OwnServer { cluster, _scratch: scratch })
    }

    /// Its address, as host:port.
    pub fn address(&self) -> String {
        self.cluster.server().address()
    }

    /// A new database on it (see [`TestDatabase::create`]).
    pub async fn database(&self, owner_role: &str, migrators: &[&Migrator]) -> TestDatabase {
        TestDatabase::create_on(self.cluster.server().clone(), owner_role, migrators).await
    }

    /// Executes a statement as the superuser, outside a transaction.
    ///
    /// # Panics
    /// If it fails.
    pub async fn execute(&self, statement: &str) {
        let mut connection = self.cluster.server().connect().await.expect("a superuser's connection");
        for statement in ["SET default_transaction_read_only = off", statement] {
            connection.execute(AssertSqlSafe(statement.to_owned())).await.expect(statement);
        }
    }

    /// Changes a setting, as `name = value`, for all sessions that have no other.
    ///
    /// # Panics
    /// If there is no such setting.
    pub async fn set(&self, setting: &str) {
        self.execute(&format!("ALTER SYSTEM SET {setting}")).await;
        self.execute("SELECT pg_reload_conf()").await;
    }
}
