//! The system under test: a private durable cluster, databases for each part, and the processes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sqlx::{Connection, PgConnection};

use super::{machine, report::Report};
use harness::{
    audit::audit,
    system::{Layout, Service, stop},
};
use testkit::{
    bootstrap::{EMPTY, bootstrap, create_database},
    postgres::{self, Cluster, Installation, Options},
    processes::Process,
};

/// Durability has its defaults. These settings apply to both sides of every comparison. Memory is large enough that
/// reads do not count. WAL is large enough that no checkpoint starts in the middle of a short run.
const SETTINGS: [&str; 5] = [
    "track_commit_timestamp=on",
    "shared_buffers=1GB",
    "max_wal_size=8GB",
    "checkpoint_timeout=30min",
    // With parameters, the log of statements would be far larger.
    "log_parameter_max_length=0",
];

/// The cluster, and where its files are.
#[derive(Debug)]
pub(super) struct Site {
    cluster: Cluster,
    directory: PathBuf,
    /// Whether sizes are small.
    pub(super) quick: bool,
}

impl Site {
    /// Starts the cluster in the directory. Logs and scratch files are there as well.
    pub(super) async fn start(directory: &Path, quick: bool) -> Result<Self> {
        let home = directory.join("postgres");
        // The cluster of a bench that was killed has databases with the same names.
        postgres::remove_abandoned(&home).await?;
        let options = Options {
            directory: home,
            port: None,
            keep: false,
            durable: true,
            settings: SETTINGS.map(str::to_owned).into(),
        };
        let cluster = Cluster::start(options).await?;
        bootstrap(cluster.server()).await?;
        Ok(Self { cluster, directory: directory.to_owned(), quick })
    }

    /// The full size, or that of a quick run.
    pub(super) fn size<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    pub(super) fn rounds(&self) -> usize {
        self.size(3, 1)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn installation(&self) -> &Installation {
        self.cluster.installation()
    }

    /// The log file of the server.
    pub(super) fn server_log(&self) -> PathBuf {
        self.cluster.log()
    }

    /// Creates a pair of databases with their schemas and the demo stock.
    pub(super) async fn databases(&self, name: &str) -> Result<Layout> {
        let server = self.cluster.server();
        let (orders, inventory) = (format!("{name}_orders"), format!("{name}_inventory"));
        create_database(server, &orders, EMPTY, "orders_owner").await?;
        create_database(server, &inventory, EMPTY, "inventory_owner").await?;
        let logs = self.directory.join("logs").join(name);
        let layout = Layout::on_free_ports(server.clone(), &orders, &inventory, &logs)?;
        layout.prepare().await?;
        for database in [&orders, &inventory] {
            sqlx::raw_sql(ROUTE_INSERTED).execute(&mut self.connect(database).await?).await?;
        }
        Ok(layout)
    }

    /// Connects as superuser.
    pub(super) async fn connect(&self, database: &str) -> Result<PgConnection> {
        let url = self.superuser_url(database);
        PgConnection::connect(&url).await.with_context(|| format!("cannot connect to {database}"))
    }

    pub(super) fn superuser_url(&self, database: &str) -> String {
        self.cluster.server().superuser_url(database)
    }

    /// Flushes all earlier writes, so that no measurement pays for the one before.
    pub(super) async fn checkpoint(&self) -> Result<()> {
        let mut connection = self.cluster.server().connect().await?;
        sqlx::raw_sql("CHECKPOINT").execute(&mut connection).await?;
        Ok(())
    }

    pub(super) async fn describe(&self) -> Result<serde_json::Value> {
        machine::describe(&mut self.cluster.server().connect().await?).await
    }

    /// Counts deadlocks in all databases since the cluster was created.
    pub(super) async fn count_deadlocks(&self) -> Result<i64> {
        let mut connection = self.cluster.server().connect().await?;
        let deadlocks = sqlx::query_scalar(
            "-- bench: count deadlocks
            SELECT coalesce(sum(deadlocks), 0)::bigint FROM pg_stat_database",
        );
        Ok(deadlocks.fetch_one(&mut connection).await?)
    }

    pub(super) async fn stop(self) -> Result<()> {
        self.cluster.stop().await
    }
}

/// Rows that a measurement inserts directly are for the only subscription.
const ROUTE_INSERTED: &str = "-- bench: route inserted rows
    ALTER TABLE outbox ALTER subscription_id SET DEFAULT 1";

/// Starts the services one after another.
pub(super) async fn start(layout: &Layout, services: &[Service]) -> Result<Vec<Process>> {
    let mut processes = Vec::new();
    for service in services {
        processes.push(layout.start(*service).await?);
    }
    Ok(processes)
}

/// Audits both databases, and stops the processes.
pub(super) async fn finish(layout: &Layout, processes: Vec<Process>, report: &mut Report) -> Result<()> {
    let audit = audit(&layout.target()?.databases).await?;
    report.audited(&audit);
    stop(processes).await
}
