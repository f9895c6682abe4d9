//! A server of one test's own.

use std::time::Duration;

use sqlx::{Executor, Postgres, QueryBuilder, migrate::Migrator};
use tokio::time::timeout;

use crate::{
    Scratch, TestDatabase,
    bootstrap::bootstrap,
    postgres::{Cluster, Options, Server, can_test_clusters},
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

    /// The server itself.
    pub fn server(&self) -> &Server {
        self.cluster.server()
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
            let mut statement = QueryBuilder::<Postgres>::new(statement);
            connection.execute(statement.build().persistent(false)).await.expect("a statement that succeeds");
        }
    }

    /// Writes a file into its directory, which nobody else can read. It is the server that writes, since it may run as another
    /// user than the test.
    ///
    /// # Panics
    /// If it cannot write.
    pub async fn write(&self, name: &str, text: &str) {
        let lines = format!("SELECT string_to_table('{}', E'\\n')", text.trim_end());
        self.execute(&format!("COPY ({lines}) TO PROGRAM 'umask 077; cat >{name}'")).await;
    }

    /// Lets it speak TLS with a certificate that is in one text with its key. Clients may show a certificate of the authority.
    ///
    /// # Panics
    /// If it does not.
    pub async fn speak_tls(&self, own: &str, authority: &str) {
        self.write("own.pem", own).await;
        self.write("authority.pem", authority).await;
        for setting in
            ["ssl_cert_file = 'own.pem'", "ssl_key_file = 'own.pem'", "ssl_ca_file = 'authority.pem'", "ssl = on"]
        {
            self.set(setting).await;
        }
    }

    /// Has all commits wait for a synchronous standby that does not exist. Returns once they do.
    ///
    /// # Panics
    /// If they do not.
    pub async fn take_standby_away(&self) {
        self.set("synchronous_standby_names = 'nobody'").await;
        // The server needs a moment for it. A commit that does not come back has met the setting.
        for _ in 0..100 {
            let mut connection = self.cluster.server().connect().await.expect("a superuser's connection");
            let commit = sqlx::raw_sql("SELECT pg_logical_emit_message(true, 'testkit', '')").execute(&mut connection);
            if timeout(Duration::from_millis(500), commit).await.is_err() {
                return;
            }
        }
        panic!("commits wait for nobody");
    }

    /// Ends that.
    pub async fn need_no_standby(&self) {
        self.set("synchronous_standby_names = ''").await;
    }

    /// Changes a setting, as `name = value`, for all sessions that have no other. Returns once new sessions have it: the
    /// server has then told the old ones, who read it before their next statement.
    ///
    /// # Panics
    /// If there is no such setting.
    pub async fn set(&self, setting: &str) {
        self.execute(&format!("ALTER SYSTEM SET {setting}")).await;
        self.execute("SELECT pg_reload_conf()").await;
        let name = setting.split_whitespace().next().expect("the name of a setting");
        let mut is_read = false;
        while !is_read {
            let mut connection = self.cluster.server().connect().await.expect("a superuser's connection");
            let ask = "SELECT current_setting($1) = setting FROM pg_file_settings WHERE name = $1 ORDER BY seqno DESC LIMIT 1";
            is_read = sqlx::query_scalar(ask).bind(name).fetch_one(&mut connection).await.expect("the setting");
        }
    }
}
