//! A database of its own for every test.

use std::{
    collections::BTreeSet,
    env,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use sqlx::{
    Connection, Executor, PgConnection, PgPool, Postgres, QueryBuilder, migrate::Migrator, postgres::PgPoolOptions,
};
use tokio::sync::{Mutex, OnceCell};
use uuid::Uuid;

use crate::{
    bootstrap::{EMPTY, bootstrap, create_database, lift_limits},
    postgres::Server,
};

/// How long the end of a test waits for its database to be dropped.
const REMOVE_LIMIT: Duration = Duration::from_secs(2);

static SERVER: OnceCell<Server> = OnceCell::const_new();
/// Templates that are known to be complete, each with its server.
static TEMPLATES: Mutex<BTreeSet<(String, String)>> = Mutex::const_new(BTreeSet::new());

/// A new database on the server of `POSTGRES_URL`. It is dropped with this value. If the test fails, it is kept, and its URL
/// is printed.
#[derive(Debug)]
pub struct TestDatabase {
    name: String,
    server: Server,
}

impl TestDatabase {
    /// Creates a database whose owner is a role of the bootstrap, with the schema of the migrations, run as that role.
    ///
    /// Without a server no test can run: then this prints one line and ends the whole process, instead of letting every test
    /// fail for the same reason.
    ///
    /// # Panics
    /// If the server refuses.
    pub async fn create(owner_role: &str, migrators: &[&Migrator]) -> TestDatabase {
        let server = SERVER.get_or_init(bootstrapped_server).await.clone();
        Self::create_on(server, owner_role, migrators).await
    }

    /// The same on a server of the test's own, whose roles are made.
    ///
    /// # Panics
    /// If the server refuses.
    pub async fn create_on(server: Server, owner_role: &str, migrators: &[&Migrator]) -> TestDatabase {
        let template = template(&server, owner_role, migrators).await.expect("the schema of the test's database");
        let database = TestDatabase { name: format!("outbox_test_{}", Uuid::new_v4().simple()), server };
        let created = create_database(&database.server, &database.name, &template, owner_role).await;
        created.expect("a database for the test");
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

    /// The tables in any of whose columns the text is, as text or as bytes. They are those of the catalog, so a table or a
    /// column that is added later is searched, too.
    ///
    /// # Panics
    /// If a table cannot be read.
    pub async fn tables_that_hold(&self, text: &str) -> Vec<String> {
        let pool = self.pool().await;
        let tables = "-- testkit: list tables
            SELECT oid::regclass::text FROM pg_class
            WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY relname";
        let tables: Vec<String> = sqlx::query_scalar(tables).fetch_all(&pool).await.expect("the catalog");
        let mut holding = Vec::new();
        for table in tables {
            // Bytes are written as their hexadecimal digits.
            let mut search = QueryBuilder::<Postgres>::new("-- testkit: search a table\nSELECT EXISTS (SELECT FROM ");
            search.push(&table).push(" AS searched WHERE strpos(searched::text, ").push_bind(text);
            search.push(") > 0 OR strpos(searched::text, encode(convert_to(").push_bind(text);
            search.push(", 'UTF8'), 'hex')) > 0)");
            let holds: bool = search.build_query_scalar().fetch_one(&pool).await.expect("a table");
            if holds {
                holding.push(table);
            }
        }
        holding
    }

    /// Whether what PostgreSQL keeps of the tables' values for planning has the text, as text or as bytes.
    ///
    /// # Panics
    /// If the database cannot be read.
    pub async fn statistics_hold(&self, text: &str) -> bool {
        let search = "-- testkit: search the statistics
            SELECT EXISTS (SELECT FROM pg_stats, concat(most_common_vals::text, histogram_bounds::text) AS kept
                WHERE schemaname = 'public'
                    AND (strpos(kept, $1) > 0 OR strpos(kept, encode(convert_to($1, 'UTF8'), 'hex')) > 0))";
        sqlx::query_scalar(search).bind(text).fetch_one(&self.pool().await).await.expect("the statistics")
    }

    /// Rows that the test inserts into the outbox directly, without `outbox_enqueue`, are of this subscription from now on.
    ///
    /// # Panics
    /// If there is no outbox.
    pub async fn insert_for_subscription(&self, subscription_id: i16) {
        let mut default = QueryBuilder::new(
            "-- testkit: route inserted rows
            ALTER TABLE outbox ALTER subscription_id SET DEFAULT ",
        );
        default.push(subscription_id);
        let altering = async { self.pool().await.execute(default.build().persistent(false)).await.map(drop) };
        altering.await.expect("a table outbox");
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

/// The name of a database with this schema, to be copied. To copy one is faster than to migrate, so the first test that needs
/// a schema migrates a template, which stays on the server: a later run finds it by its name.
async fn template(server: &Server, owner_role: &str, migrators: &[&Migrator]) -> Result<String> {
    if migrators.is_empty() {
        return Ok(EMPTY.to_owned());
    }
    let name = format!("outbox_template_{:016x}", hash(owner_role, migrators));
    let mut known = TEMPLATES.lock().await;
    let of_server = (server.url().to_owned(), name.clone());
    if !known.contains(&of_server) {
        if !exists(server, &name).await? {
            create_template(server, &name, owner_role, migrators).await?;
        }
        known.insert(of_server);
    }
    Ok(name)
}

/// Of all that makes the schema: another migration is another template.
fn hash(owner_role: &str, migrators: &[&Migrator]) -> u64 {
    let mut hasher = DefaultHasher::new();
    owner_role.hash(&mut hasher);
    for migration in migrators.iter().flat_map(|migrator| migrator.iter()) {
        (migration.version, &migration.checksum).hash(&mut hasher);
    }
    hasher.finish()
}

async fn exists(server: &Server, name: &str) -> Result<bool> {
    let mut connection = server.connect().await?;
    let found = sqlx::query_scalar(
        "-- testkit: find database
        SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)",
    );
    Ok(found.bind(name).fetch_one(&mut connection).await?)
}

/// Under another name until it is complete. If another process is faster, its template is used, and this one dropped.
async fn create_template(server: &Server, name: &str, owner_role: &str, migrators: &[&Migrator]) -> Result<()> {
    let unfinished = format!("{name}_{}", Uuid::new_v4().simple());
    create_database(server, &unfinished, EMPTY, owner_role).await?;
    let mut connection = PgConnection::connect(&server.url_for(owner_role, &unfinished)).await?;
    for migrator in migrators {
        migrator.run(&mut connection).await?;
    }
    connection.close().await?;
    let mut rename = QueryBuilder::new("-- testkit: rename template\nALTER DATABASE ");
    rename.push(&unfinished).push(" RENAME TO ").push(name);
    if let Err(error) = execute(server, rename).await {
        let mut drop = QueryBuilder::new("-- testkit: drop template\nDROP DATABASE ");
        drop.push(&unfinished).push(" WITH (FORCE)");
        execute(server, drop).await?;
        ensure!(exists(server, name).await?, "cannot rename the template: {error:#}");
    }
    Ok(())
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
    lift_limits(&server).await?;
    Ok(server)
}

async fn execute(server: &Server, mut statement: QueryBuilder<Postgres>) -> Result<()> {
    let mut connection = server.connect().await?;
    connection.execute(statement.build().persistent(false)).await?;
    Ok(connection.close().await?)
}
