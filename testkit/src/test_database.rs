//! A database of its own for every test.

use std::{
    env,
    io::Write,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use sqlx::{
    Connection, Executor, PgConnection, PgPool, Postgres, QueryBuilder, migrate::Migrator, postgres::PgPoolOptions,
};
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::{
    bootstrap::{bootstrap, create_database},
    postgres::Server,
};

/// How long the end of a test waits for its database to be dropped.
const REMOVE_LIMIT: Duration = Duration::from_secs(2);

static SERVER: OnceCell<Server> = OnceCell::const_new();

/// A new database on the server of `POSTGRES_URL`. It is dropped with this value. If the test fails, it is kept, and its URL
/// is printed.
#[derive(Debug)]
pub struct TestDatabase {
    name: String,
    server: Server,
}

impl TestDatabase {
    /// Creates a database whose owner is a role of the bootstrap, and migrates it as that role.
    ///
    /// Without a server no test can run: then this prints one line and ends the whole process, instead of letting every test
    /// fail for the same reason.
    ///
    /// # Panics
    /// If the server refuses.
    pub async fn create(owner_role: &str, migrators: &[&Migrator]) -> TestDatabase {
        let server = SERVER.get_or_init(bootstrapped_server).await.clone();
        let database = TestDatabase { name: format!("outbox_test_{}", Uuid::new_v4().simple()), server };
        database.make(owner_role).await.expect("a database for the test");
        database.migrate(owner_role, migrators).await.expect("the schema of the test's database");
        database
    }

    /// Its name on the server.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its URL for a role of the bootstrap.
    pub fn url_as(&self, role: &str) -> String {
        self.server.url_for(role, &self.name)
    }

    /// A few connections as the superuser, to inspect what the code under test has done.
    pub async fn pool(&self) -> PgPool {
        let options = PgPoolOptions::new().max_connections(4);
        options.connect(&self.server.superuser_url(&self.name)).await.expect("a superuser's connection")
    }

    async fn make(&self, owner_role: &str) -> Result<()> {
        create_database(&self.server, &self.name, owner_role).await
    }

    async fn migrate(&self, owner_role: &str, migrators: &[&Migrator]) -> Result<()> {
        let mut connection = PgConnection::connect(&self.url_as(owner_role)).await?;
        for migrator in migrators {
            migrator.run(&mut connection).await?;
        }
        Ok(connection.close().await?)
    }

    /// Runs on a thread and runtime of its own: `drop` is not async, and the test's runtime may be calling it.
    ///
    /// Waits for that thread, but not long. DROP DATABASE waits until every session of the server has noticed it, even a
    /// session that the runtime blocked here is just opening. All of the server would wait until that session timed out.
    fn remove(&self) -> Result<()> {
        let mut statement = QueryBuilder::new("-- testkit: drop test database\nDROP DATABASE IF EXISTS ");
        statement.push(&self.name).push(" WITH (FORCE)");
        let server = self.server.clone();
        let (done, dropped) = mpsc::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            // Nobody receives this after the limit.
            drop(done.send(runtime.block_on(execute(&server, statement))));
            Ok::<_, std::io::Error>(())
        });
        match dropped.recv_timeout(REMOVE_LIMIT) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => Err(anyhow::anyhow!("the dropping thread ended")),
        }
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the test's database is kept: {}", self.server.superuser_url(&self.name));
        } else if let Err(error) = self.remove() {
            eprintln!("cannot drop the test's database {}: {error:#}", self.name);
        }
    }
}

async fn bootstrapped_server() -> Server {
    match server_of_environment().await {
        Ok(server) => server,
        Err(error) => {
            // libtest captures eprintln! and shows it when a test finishes, which none will.
            let message = format!(
                "these tests need PostgreSQL: run `make test`, which starts one, \
                 or set POSTGRES_URL to a superuser's URL ({error:#})\n"
            );
            let _ = std::io::stderr().write_all(message.as_bytes());
            std::process::exit(2)
        }
    }
}

async fn server_of_environment() -> Result<Server> {
    let url = env::var("POSTGRES_URL").ok().filter(|url| !url.is_empty()).context("it is not set")?;
    let server = Server::parse(&url)?;
    bootstrap(&server).await?;
    Ok(server)
}

async fn execute(server: &Server, mut statement: QueryBuilder<Postgres>) -> Result<()> {
    let mut connection = server.connect().await?;
    connection.execute(statement.build().persistent(false)).await?;
    Ok(connection.close().await?)
}
