//! A primary and its synchronous standby, without anything that would promote it, and HAProxy before them.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use rustix::process::Signal;
use sqlx::{Connection, PgConnection};
use testkit::{
    postgres::{Installation, Server},
    processes::{Process, free_port},
};

use super::{
    ground::{Ground, kill_server},
    haproxy::{self, Backend, Check, PROBE},
    until,
};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// What each node calls itself as the standby of the other.
const STANDBY: &str = "standby";
const CLIENT_RULES: &str = "host postgres haproxy 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
host replication postgres 127.0.0.1/32 scram-sha-256
";
/// In a file, so that they hold for pg_rewind too. When it recovers a crashed server, that must keep the log since the
/// last common checkpoint. So must the other server: nobody makes slots here.
const SETTINGS: &str = "listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 200
wal_keep_size = '1GB'
";

/// The cluster. Dropping it ends everything.
#[derive(Debug)]
pub(super) struct Standby {
    front: u16,
    nodes: Vec<Node>,
    primary: usize,
    installation: Installation,
    _haproxy: Process,
    // Last, because it deletes the files of all processes.
    ground: Ground,
}

#[derive(Debug)]
struct Node {
    name: &'static str,
    port: u16,
    /// None while it is down.
    server: Option<Process>,
}

impl Standby {
    /// Starts both nodes. Commits wait for the standby.
    pub(super) async fn start(ground: Ground, installation: &Installation) -> Result<Self> {
        let nodes = [("a", free_port()?), ("b", free_port()?)];
        let nodes = Vec::from(nodes.map(|(name, port)| Node { name, port, server: None }));
        let backend = |node: &Node| Backend { name: node.name.into(), postgres: node.port, check: Check::Query };
        let front = free_port()?;
        let haproxy = haproxy::start(&ground, front, &nodes.iter().map(backend).collect::<Vec<_>>())?;
        let installation = installation.clone();
        let mut cluster = Self { front, nodes, primary: 0, installation, _haproxy: haproxy, ground };
        cluster.initialise().await?;
        cluster.launch(0).await?;
        cluster.tell_primary("CREATE ROLE haproxy LOGIN").await.with_context(|| format!("role {PROBE}"))?;
        let (source, data) = (cluster.conninfo(0), cluster.data(1));
        let arguments = ["-d", &source, "-D", &data, "-c", "fast", "-X", "stream", "-R"];
        cluster.ground.execute(&cluster.installation.client("pg_basebackup"), &arguments).await?;
        cluster.launch(1).await?;
        cluster.make_synchronous().await?;
        Ok(cluster)
    }

    pub(super) fn front(&self) -> u16 {
        self.front
    }

    pub(super) fn ports(&self) -> Vec<u16> {
        self.nodes.iter().map(|node| node.port).collect()
    }

    /// Waits until commits wait for the standby.
    pub(super) async fn wait_whole(&self) -> Result<()> {
        until(START_LIMIT, "the standby is synchronous", async || self.is_synchronous().await.unwrap_or(false)).await
    }

    /// Stops the primary, which sends all it has to its standby, and promotes that.
    pub(super) async fn switch_over(&mut self) -> Result<()> {
        let mut server = self.take_primary()?;
        server.stop(Signal::INT, STOP_LIMIT).await?;
        self.promote().await
    }

    /// Kills the primary, and promotes its standby.
    pub(super) async fn crash(&mut self) -> Result<()> {
        let mut server = self.take_primary()?;
        kill_server(&self.ground.path(self.nodes[self.primary].name)).await?;
        server.wait().await?;
        self.promote().await
    }

    /// Has the node that is down follow the new primary, as its synchronous standby.
    pub(super) async fn repair(&mut self) -> Result<()> {
        let old = 1 - self.primary;
        if self.nodes[old].server.is_some() {
            return Ok(());
        }
        // Only a checkpoint writes the new timeline to where pg_rewind looks for it.
        self.tell_primary("CHECKPOINT").await?;
        let name = self.nodes[old].name;
        // Its settings as the primary. They would make it wait for a standby as soon as it is promoted.
        self.ground.write(&format!("{name}/postgresql.auto.conf"), "")?;
        let (source, data) = (self.conninfo(self.primary), self.data(old));
        let arguments = ["-D", &data, "--source-server", &source, "-R"];
        self.ground.execute(&self.installation.client("pg_rewind"), &arguments).await?;
        self.launch(old).await?;
        self.make_synchronous().await
    }

    async fn initialise(&self) -> Result<()> {
        let password = self.ground.write("password", "postgres\n")?.display().to_string();
        let data = self.data(0);
        let arguments = ["-D", &data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile", &password, "-k"];
        let arguments = [&arguments[..], &["-E", "UTF8", "--locale=C"]].concat();
        self.ground.execute(&self.installation.program("initdb"), &arguments).await?;
        for (file, content) in [("pg_hba.conf", CLIENT_RULES), ("postgresql.conf", SETTINGS)] {
            self.ground.write(&format!("{}/{file}", self.nodes[0].name), content)?;
        }
        Ok(())
    }

    /// Starts a server, and waits until it answers. Which node it follows depends on its files alone.
    async fn launch(&mut self, node: usize) -> Result<()> {
        let (data, port) = (self.data(node), self.nodes[node].port.to_string());
        // The other one, should this be the standby.
        let conninfo = format!("primary_conninfo={} application_name={STANDBY}", self.conninfo(1 - node));
        let arguments = ["-D", &data, "-p", &port, "-c", &conninfo];
        let program = self.installation.program("postgres");
        self.nodes[node].server = Some(self.ground.spawn(self.nodes[node].name, &program, &arguments)?);
        let server = self.server(node)?;
        until(START_LIMIT, "the server answers", async || server.connect().await.is_ok()).await
    }

    fn take_primary(&mut self) -> Result<Process> {
        self.nodes[self.primary].server.take().context("the primary is down")
    }

    async fn promote(&mut self) -> Result<()> {
        self.primary = 1 - self.primary;
        self.tell_primary("SELECT pg_promote()").await
    }

    async fn make_synchronous(&self) -> Result<()> {
        self.tell_primary("ALTER SYSTEM SET synchronous_standby_names = 'standby'").await?;
        self.tell_primary("SELECT pg_reload_conf()").await?;
        self.wait_whole().await
    }

    async fn is_synchronous(&self) -> Result<bool> {
        let mut connection = self.connect().await?;
        let is_synchronous = sqlx::query_scalar(
            "-- failover: look for the standby
            SELECT EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync')",
        );
        Ok(is_synchronous.fetch_one(&mut connection).await?)
    }

    async fn tell_primary(&self, statement: &'static str) -> Result<()> {
        let mut connection = self.connect().await?;
        sqlx::raw_sql(statement).execute(&mut connection).await.context(statement)?;
        Ok(connection.close().await?)
    }

    async fn connect(&self) -> Result<PgConnection> {
        self.server(self.primary)?.connect().await
    }

    fn server(&self, node: usize) -> Result<Server> {
        Server::parse(&format!("postgres://postgres:postgres@127.0.0.1:{}/postgres", self.nodes[node].port))
    }

    fn conninfo(&self, node: usize) -> String {
        format!("host=127.0.0.1 port={} user=postgres password=postgres dbname=postgres", self.nodes[node].port)
    }

    fn data(&self, node: usize) -> String {
        let path: &Path = &self.ground.path(self.nodes[node].name);
        path.display().to_string()
    }
}
