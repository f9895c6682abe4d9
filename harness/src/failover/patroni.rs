//! Three nodes under Patroni, with three members of etcd, and HAProxy before them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use testkit::{
    postgres::Installation,
    processes::{Process, free_port},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    ground::{Ground, find_program, kill_server},
    haproxy::{self, Backend, Check},
    until,
};

pub(super) const ETCD_MEMBERS: usize = 3;
const NODES: usize = 3;
/// How long the leader's key lasts: a crashed leader is missed only then. Patroni allows no less.
const TTL_SECONDS: u64 = 20;
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
const SWITCHOVER_LIMIT: Duration = Duration::from_secs(60);
const START_LIMIT: Duration = Duration::from_secs(60);
const CHANGE_LIMIT: Duration = Duration::from_secs(90);
/// How long etcd stays away after the leader has stepped down.
const WITHOUT_LEADER: Duration = Duration::from_secs(2);

/// The cluster. Dropping it ends everything.
#[derive(Debug)]
pub(super) struct Patroni {
    front: u16,
    nodes: Vec<Node>,
    etcd: Vec<Process>,
    program: PathBuf,
    _haproxy: Process,
    // Last, because it deletes the files of all processes.
    ground: Ground,
}

/// A Patroni and its server.
#[derive(Debug)]
struct Node {
    name: String,
    postgres: u16,
    rest: u16,
    /// None while it is crashed.
    patroni: Option<Process>,
}

impl Patroni {
    /// Starts a cluster with two replicas, one of them synchronous.
    pub(super) async fn start(ground: Ground, installation: &Installation) -> Result<Self> {
        let program = find_program("patroni").context("patroni is missing")?;
        let (etcd, members) = start_etcd(&ground).await?;
        // Patroni needs the clients as well, so the directory of all programs.
        let programs = installation.client("pg_rewind").with_file_name("");
        let mut nodes = Vec::new();
        for number in 1..=NODES {
            let node = Node { name: format!("n{number}"), postgres: free_port()?, rest: free_port()?, patroni: None };
            let content = configuration(&node, &members, &ground, &programs);
            ground.write(&format!("{}.json", node.name), &content.to_string())?;
            nodes.push(node);
        }
        let backend = |node: &Node| {
            let check = Check::Rest(node.rest);
            Backend { name: node.name.clone(), postgres: node.postgres, check }
        };
        let front = free_port()?;
        let haproxy = haproxy::start(&ground, front, &nodes.iter().map(backend).collect::<Vec<_>>())?;
        let mut cluster = Self { front, nodes, etcd, program, _haproxy: haproxy, ground };
        // The first makes the cluster. The others, if started with it, would only race it.
        cluster.launch(0)?;
        until(START_LIMIT, "n1 leads", async || cluster.leader().await.is_some()).await?;
        cluster.launch(1)?;
        cluster.launch(2)?;
        cluster.wait_whole().await?;
        Ok(cluster)
    }

    pub(super) fn front(&self) -> u16 {
        self.front
    }

    pub(super) fn ports(&self) -> Vec<u16> {
        self.nodes.iter().map(|node| node.postgres).collect()
    }

    /// Waits until all nodes run, and one is the synchronous standby. Without one, nobody may follow a leader that dies.
    pub(super) async fn wait_whole(&self) -> Result<()> {
        until(CHANGE_LIMIT, "all nodes run, one of them synchronous", async || self.pair().await.is_some()).await
    }

    /// Has the synchronous standby take over.
    pub(super) async fn switch_over(&mut self) -> Result<()> {
        let (leader, standby) = self.pair().await.context("the cluster is not whole")?;
        let request = json!({ "leader": self.nodes[leader].name, "candidate": self.nodes[standby].name }).to_string();
        let asking = ask(self.nodes[leader].rest, "POST", "/switchover", &request);
        let (status, text) = timeout(SWITCHOVER_LIMIT, asking).await??;
        ensure!(status == 200, "Patroni refused to switch over: {text}");
        self.wait_for_another(leader).await
    }

    /// Kills Patroni and the server of the leader.
    pub(super) async fn crash(&mut self) -> Result<()> {
        let (leader, _) = self.pair().await.context("the cluster is not whole")?;
        let node = &mut self.nodes[leader];
        let mut patroni = node.patroni.take().context("the leader has no Patroni")?;
        patroni.kill().await?;
        kill_server(&self.ground.path(&node.name)).await?;
        self.wait_for_another(leader).await
    }

    /// Stops all etcd members but one until the leader has stepped down, and then lets them go on.
    pub(super) async fn lose_etcd(&mut self, left: usize) -> Result<()> {
        let stopped = self.etcd.iter().enumerate().filter(|(member, _)| *member != left);
        let stopped: Vec<&Process> = stopped.map(|(_, process)| process).collect();
        for process in &stopped {
            process.suspend().await?;
        }
        let stepped_down = until(CHANGE_LIMIT, "the leader steps down", async || self.leader().await.is_none()).await;
        sleep(WITHOUT_LEADER).await;
        for process in &stopped {
            process.signal(Signal::CONT)?;
        }
        stepped_down?;
        until(CHANGE_LIMIT, "a node leads", async || self.leader().await.is_some()).await
    }

    /// Starts the crashed nodes again, as replicas.
    pub(super) fn repair(&mut self) -> Result<()> {
        for node in 0..self.nodes.len() {
            if self.nodes[node].patroni.is_none() {
                self.launch(node)?;
            }
        }
        Ok(())
    }

    fn launch(&mut self, node: usize) -> Result<()> {
        let name = &self.nodes[node].name;
        let configuration = self.ground.path(&format!("{name}.json")).display().to_string();
        self.nodes[node].patroni = Some(self.ground.spawn(name, &self.program, &[&configuration])?);
        Ok(())
    }

    async fn wait_for_another(&self, old: usize) -> Result<()> {
        until(CHANGE_LIMIT, "another node leads", async || self.leader().await.is_some_and(|leader| leader != old))
            .await
    }

    async fn leader(&self) -> Option<usize> {
        for (index, node) in self.nodes.iter().enumerate() {
            let answer = timeout(ANSWER_LIMIT, ask(node.rest, "GET", "/primary", "")).await;
            if matches!(answer, Ok(Ok((200, _)))) {
                return Some(index);
            }
        }
        None
    }

    /// Leader and synchronous standby, if all nodes run.
    async fn pair(&self) -> Option<(usize, usize)> {
        let leader = self.leader().await?;
        let asking = ask(self.nodes[leader].rest, "GET", "/cluster", "");
        let (_, text) = timeout(ANSWER_LIMIT, asking).await.ok()?.ok()?;
        let (leader, standby) = pair_of(&serde_json::from_str(&text).ok()?, self.nodes.len())?;
        let index = |name: &str| self.nodes.iter().position(|node| node.name == name);
        Some((index(&leader)?, index(&standby)?))
    }
}

/// Returns the members, and the addresses for clients.
async fn start_etcd(ground: &Ground) -> Result<(Vec<Process>, String)> {
    let program = find_program("etcd").context("etcd is missing")?;
    let mut urls = Vec::new();
    for _ in 0..ETCD_MEMBERS {
        urls.push([free_port()?, free_port()?].map(|port| format!("http://127.0.0.1:{port}")));
    }
    let names = (1..).map(|number| format!("e{number}"));
    let all: Vec<String> = names.clone().zip(&urls).map(|(name, [_, peers])| format!("{name}={peers}")).collect();
    let all = all.join(",");
    let mut members = Vec::new();
    for (name, [clients, peers]) in names.zip(&urls) {
        let data = ground.path(&name).display().to_string();
        let arguments = [
            ["--name", &name],
            ["--data-dir", &data],
            ["--initial-cluster", &all],
            ["--listen-client-urls", clients],
            ["--advertise-client-urls", clients],
            ["--listen-peer-urls", peers],
            ["--initial-advertise-peer-urls", peers],
            ["--logger", "zap"],
        ];
        members.push(ground.spawn(&name, &program, arguments.as_flattened())?);
    }
    let hosts: Vec<&str> = urls.iter().filter_map(|[clients, _]| clients.strip_prefix("http://")).collect();
    Ok((members, hosts.join(",")))
}

/// Of a Patroni. It reads YAML, of which JSON is a part.
fn configuration(node: &Node, etcd: &str, ground: &Ground, programs: &Path) -> Value {
    let Node { name, postgres, rest, .. } = node;
    let at = |port: &u16| format!("127.0.0.1:{port}");
    json!({
        "scope": "outbox",
        "name": name,
        "restapi": { "listen": at(rest), "connect_address": at(rest) },
        "etcd3": { "hosts": etcd },
        "bootstrap": {
            "dcs": {
                "ttl": TTL_SECONDS,
                "loop_wait": 2,
                "retry_timeout": 5,
                "maximum_lag_on_failover": 1_048_576,
                // A leader whose server has died does not wait for it, but lets another take over.
                "master_start_timeout": 0,
                "primary_start_timeout": 0,
                "synchronous_mode": true,
                "postgresql": {
                    "use_pg_rewind": true,
                    "use_slots": true,
                    "parameters": { "max_connections": 200, "wal_log_hints": "on" },
                },
            },
            "initdb": [{ "encoding": "UTF8" }, { "locale": "C" }, "data-checksums"],
        },
        "postgresql": {
            "listen": at(postgres),
            "connect_address": at(postgres),
            "data_dir": ground.path(name),
            "bin_dir": programs,
            "pgpass": ground.path(&format!("pgpass-{name}")),
            "use_unix_socket": false,
            "authentication": {
                "superuser": { "username": "postgres", "password": "postgres" },
                "replication": { "username": "replicator", "password": "replicator" },
                "rewind": { "username": "rewinder", "password": "rewinder" },
            },
            "parameters": { "unix_socket_directories": "" },
            "pg_hba": [
                "host all all 127.0.0.1/32 scram-sha-256",
                "host replication replicator 127.0.0.1/32 scram-sha-256",
            ],
        },
        // A watchdog would reset this machine.
        "watchdog": { "mode": "off" },
    })
}

/// Leader and synchronous standby by what Patroni says of the cluster, if `nodes` nodes run.
fn pair_of(cluster: &Value, nodes: usize) -> Option<(String, String)> {
    let members = cluster["members"].as_array()?;
    let running = members.iter().filter(|member| matches!(member["state"].as_str(), Some("running" | "streaming")));
    let in_role =
        |role: &str| members.iter().find(|member| member["role"] == role)?["name"].as_str().map(str::to_owned);
    (running.count() == nodes).then(|| Some((in_role("leader")?, in_role("sync_standby")?)))?
}

/// Asks Patroni's REST interface. Returns the status and the body.
async fn ask(port: u16, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let length = body.len();
    let request = format!("{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { bail!("not an answer of HTTP: {answer}") };
    let status = head.split_whitespace().nth(1).context("an answer without a status")?.parse()?;
    Ok((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(members: &[(&str, &str, &str)]) -> Value {
        let member = |(name, role, state): &(&str, &str, &str)| json!({ "name": name, "role": role, "state": state });
        json!({ "members": members.iter().map(member).collect::<Vec<_>>() })
    }

    #[test]
    fn a_cluster_is_whole_if_all_nodes_run_and_one_is_synchronous() {
        let whole = [("n1", "replica", "running"), ("n2", "leader", "running"), ("n3", "sync_standby", "streaming")];
        assert_eq!(pair_of(&cluster(&whole), 3), Some(("n2".into(), "n3".into())));
        assert_eq!(pair_of(&cluster(&whole[1..]), 3), None, "a node is missing");
        let [_, leader, standby] = whole;
        assert_eq!(pair_of(&cluster(&[("n1", "replica", "starting"), leader, standby]), 3), None);
        assert_eq!(pair_of(&cluster(&[whole[0], leader, ("n3", "replica", "running")]), 3), None, "none synchronous");
        assert_eq!(pair_of(&json!({}), 3), None);
    }
}
