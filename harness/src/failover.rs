//! The subcommand `failover`: has the databases fail over under load, and measures what callers see of it.

mod ground;
mod haproxy;
mod load;
mod outage;
mod patroni;
mod schedule;
mod standby;

use std::{
    collections::HashSet,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use testkit::{
    bootstrap::{bootstrap, create_databases},
    postgres::{Installation, Server, find},
    processes::{Process, free_port},
};
use tokio::time::{sleep, timeout};

use self::{
    ground::{Ground, find_program},
    load::{Known, Load},
    outage::{Outage, Shown},
    patroni::{ETCD_MEMBERS, Patroni},
    schedule::{Counts, Fault, schedule},
    standby::Standby,
};
use crate::{
    audit::audit,
    interrupt::unless_interrupted,
    stress::{count_dead, count_missing, wait_until_delivered},
    system::{Layout, stop},
    target::{Databases, Target},
};

const DIRECTORY: &str = "target/failover/cluster";
const LOGS: &str = "target/failover/logs";
/// Load without a fault, before each one.
const CALM: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(50);
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
const FINDINGS_SHOWN: usize = 20;
/// As for wrong arguments: nothing was tried, so nothing was found.
const CANNOT_RUN: u8 = 2;

/// Have the databases fail over under load, and check that nothing is lost or doubled
///
/// Starts a cluster of PostgreSQL on loopback with all three databases, HAProxy before it, and the whole system.
/// Callers place orders, and repeat each call with its request id until it is acknowledged. Meanwhile the cluster fails
/// over. The seed draws the order of the faults. At the end every acknowledged order must be there once and settled, and
/// the audit clean.
///
/// With --patroni (the default), the cluster has three nodes under Patroni with synchronous replication, and three
/// members of etcd. A switchover is planned. A crash kills the leader's Patroni and PostgreSQL. A loss of etcd stops two
/// of its members until the leader steps down. With --standby, the cluster is a primary with a synchronous standby. Each
/// fault ends with the standby promoted, and the old primary as its standby.
///
/// Each fault has a line with three times. `cluster` is the longest gap of a bare INSERT loop through the same HAProxy.
/// It connects again at once. `callers` is the longest gap of any caller. `backlog` is the time from the first INSERT
/// afterwards until all orders placed before it were settled, and their events deleted. Callers may wait 2 s longer
/// than the cluster was away, and the last backlog may take 5 s.
///
/// Needs haproxy, and for --patroni also patroni and etcd (on Debian: apt-get install patroni etcd-server haproxy).
/// Everything ends with the command, also at Ctrl-C. The logs stay in target/failover/logs. Quote the last line.
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "Exit codes: 0 targets met, 1 a target missed or a failure, 2 wrong arguments or a program missing."
)]
pub struct Arguments {
    /// Three nodes under Patroni (default)
    #[arg(long, conflicts_with = "standby")]
    patroni: bool,
    /// A primary with a synchronous standby
    #[arg(long)]
    standby: bool,
    /// How the services reach the database that can write
    #[arg(long, value_enum, default_value_t = Connect::Haproxy)]
    connect: Connect,
    /// Planned changes of the leader
    #[arg(long, default_value_t = 10, value_name = "N")]
    switchovers: usize,
    /// Leaders that are killed
    #[arg(long, default_value_t = 5, value_name = "N")]
    crashes: usize,
    /// Losses of etcd's majority; 2 by default, and none with --standby
    #[arg(long, value_name = "N", conflicts_with = "standby")]
    etcd_losses: Option<usize>,
    /// Seed of the order of the faults. Random by default
    #[arg(long)]
    seed: Option<u64>,
    /// A run that takes longer has failed
    #[arg(long, default_value_t = 30, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..=1440))]
    minutes_at_most: u64,
}

/// How the services find the node that leads.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Connect {
    /// Through HAProxy
    Haproxy,
    /// By a URL that names all nodes, with target_session_attrs=read-write
    Hosts,
}

impl Arguments {
    fn counts(&self) -> Counts {
        let etcd_losses = self.etcd_losses.unwrap_or(if self.standby { 0 } else { 2 });
        Counts { switchovers: self.switchovers, crashes: self.crashes, etcd_losses }
    }

    /// What a run needs, as the name of a program and of its package in Debian.
    fn programs(&self) -> &'static [(&'static str, &'static str)] {
        const ALL: [(&str, &str); 3] = [("haproxy", "haproxy"), ("patroni", "patroni"), ("etcd", "etcd-server")];
        if self.standby { &ALL[..1] } else { &ALL }
    }
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    let missing = missing_programs(arguments.programs(), |name| find_program(name).is_some());
    if let Some(missing) = missing {
        eprintln!("error: {missing}");
        return Ok(ExitCode::from(CANNOT_RUN));
    }
    let limit = Duration::from_secs(arguments.minutes_at_most * 60);
    let work = async {
        let shown = timeout(limit, Box::pin(fail_over(&arguments))).await;
        shown.unwrap_or_else(|_| bail!("not done after {} minutes: see the logs in {LOGS}", arguments.minutes_at_most))
    };
    unless_interrupted(work).await
}

/// One line on the programs that are not there; none if all are.
fn missing_programs(needed: &[(&str, &str)], is_there: impl Fn(&str) -> bool) -> Option<String> {
    let missing = needed.iter().filter(|(program, _)| !is_there(program));
    let (programs, packages): (Vec<&str>, Vec<&str>) = missing.copied().unzip();
    let (programs, packages) = (programs.join(", "), packages.join(" "));
    (!programs.is_empty()).then(|| format!("missing: {programs}; on Debian or Ubuntu: apt-get install {packages}"))
}

async fn fail_over(arguments: &Arguments) -> Result<ExitCode> {
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(1..1_000_000));
    let kind = if arguments.standby { "standby" } else { "patroni" };
    println!("failover: seed {seed}; starting the cluster ({kind}) and the system; logs are in {LOGS}");
    let ground = Ground::open(Path::new(DIRECTORY), Path::new(LOGS))?;
    let mut cluster = Cluster::start(ground, arguments.standby).await?;
    let server = cluster.server()?;
    let (target, processes) = start_system(&cluster, &server, arguments.connect).await?;
    let load = Load::start(&target, &server).await?;
    let mut shown = Shown::default();
    let inflicted = inflict_all(&mut cluster, &load, &target, seed, arguments.counts(), &mut shown).await;
    shown.note("broken off", inflicted);
    let known = load.finish().await;
    let checked = check(&target.databases, &server, known, &mut shown).await;
    shown.note("the check did not finish", checked);
    shown.note("the system did not end well", stop(processes).await);
    drop(cluster);
    let connect = format!("{:?}", arguments.connect).to_lowercase();
    Ok(conclude(&shown, &format!("kind={kind} connect={connect} seed={seed}")))
}

/// Prepares the databases, and starts all processes.
async fn start_system(cluster: &Cluster, server: &Server, connect: Connect) -> Result<(Target, Vec<Process>)> {
    bootstrap(server).await?;
    create_databases(server).await?;
    let layout = Layout::on_free_ports(server.clone(), "orders", "inventory", Path::new(LOGS))?;
    let mut layout = layout.with_loyalty("loyalty", [free_port()?, free_port()?]);
    layout.prepare().await?;
    if let Connect::Hosts = connect {
        layout.hosts = hosts(&cluster.ports());
    }
    let mut processes = Vec::new();
    for service in layout.services() {
        processes.push(layout.start(service).await?);
    }
    Ok((layout.target()?, processes))
}

fn hosts(ports: &[u16]) -> String {
    let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    hosts.join(",")
}

/// Inflicts the faults one after the other. Each strikes a cluster that is whole, and a system that has recovered.
async fn inflict_all(
    cluster: &mut Cluster,
    load: &Load,
    target: &Target,
    seed: u64,
    counts: Counts,
    shown: &mut Shown,
) -> Result<()> {
    let faults = schedule(seed, counts, ETCD_MEMBERS);
    load.wait_for_callers().await?;
    for (number, fault) in (1..).zip(&faults) {
        sleep(CALM).await;
        let began = load.now();
        let outage = inflict(cluster, load, &target.databases, *fault, began).await;
        let outage = outage.with_context(|| format!("fault {number} of {} ({fault})", faults.len()))?;
        println!("failover: {number:>2} of {}  {outage}", faults.len());
        shown.outages.push(outage);
    }
    Ok(())
}

async fn inflict(
    cluster: &mut Cluster,
    load: &Load,
    databases: &Databases,
    fault: Fault,
    began: Duration,
) -> Result<Outage> {
    cluster.inflict(fault).await?;
    let writable = load.wait_for_insert().await?;
    wait_for_backlog(databases).await?;
    let backlog = load.now() - writable;
    load.wait_for_callers().await?;
    cluster.repair().await?;
    cluster.wait_whole().await?;
    load.wait_for_callers().await?;
    let (cluster, callers) = load.outage(&(began..load.now()));
    Ok(Outage { fault, cluster, callers, backlog })
}

/// Waits until all orders that were placed until now are settled, and their events are delivered.
async fn wait_for_backlog(databases: &Databases) -> Result<()> {
    let started = Instant::now();
    let mut orders = databases.orders().await?;
    let now = sqlx::query_scalar!(
        r#"-- failover: now
        SELECT clock_timestamp() AS "now!""#
    );
    let now = now.fetch_one(&mut orders).await?;
    while started.elapsed() < DRAIN_LIMIT {
        let is_left = sqlx::query_scalar!(
            r#"-- failover: look for a backlog
            SELECT EXISTS (SELECT FROM outbox WHERE created_at <= $1)
                OR EXISTS (SELECT FROM orders WHERE status = 'PENDING' AND created_at <= $1) AS "is_left!""#,
            now
        );
        if !is_left.fetch_one(&mut orders).await? {
            return Ok(());
        }
        sleep(POLL).await;
    }
    bail!("orders that were placed before the failover are not settled {DRAIN_LIMIT:?} after it")
}

/// Compares what callers were told with the databases.
async fn check(databases: &Databases, server: &Server, known: Known, shown: &mut Shown) -> Result<()> {
    wait_until_delivered(databases, DRAIN_LIMIT).await?;
    let audit = audit(databases).await?;
    audit.print();
    for (failure, count) in &known.failures {
        println!("failover: {count:>6} calls were repeated after {failure}");
    }
    let order_ids: HashSet<String> = known.orders.values().cloned().collect();
    shown.orders = order_ids.len();
    shown.lost = count_missing(databases, &order_ids).await?;
    // Each caller has repeated each request until it was acknowledged, so there is one order for each.
    shown.doubled = audit.orders.saturating_sub(known.orders.len());
    shown.lost_by_cluster = known.inserts.saturating_sub(count_rows(server).await?);
    shown.findings.extend(known.wrong);
    shown.findings.extend(audit.findings);
    let dead = count_dead(databases).await?;
    if dead > 0 {
        shown.findings.push(format!("{dead} events are dead letters"));
    }
    Ok(())
}

async fn count_rows(server: &Server) -> Result<usize> {
    let count = sqlx::query_scalar(
        "-- failover: count rows
        SELECT count(*) FROM failover_rows",
    );
    let count: i64 = count.fetch_one(&mut server.connect().await?).await?;
    Ok(usize::try_from(count)?)
}

fn conclude(shown: &Shown, run: &str) -> ExitCode {
    for finding in shown.findings.iter().take(FINDINGS_SHOWN) {
        println!("failover: FOUND {finding}");
    }
    let missed = shown.missed();
    for target in &missed {
        println!("failover: MISSED: {target}");
    }
    println!("failover: {run} {}", shown.figures());
    if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One of the two kinds of cluster.
#[derive(Debug)]
enum Cluster {
    Patroni(Patroni),
    Standby(Standby),
}

impl Cluster {
    async fn start(ground: Ground, standby: bool) -> Result<Self> {
        let installation: Installation = find()?;
        Ok(if standby {
            Self::Standby(Standby::start(ground, &installation).await?)
        } else {
            Self::Patroni(Patroni::start(ground, &installation).await?)
        })
    }

    /// The node that leads, through HAProxy.
    fn server(&self) -> Result<Server> {
        let port = match self {
            Self::Patroni(cluster) => cluster.front(),
            Self::Standby(cluster) => cluster.front(),
        };
        Server::parse(&format!("postgres://postgres:postgres@127.0.0.1:{port}/postgres"))
    }

    fn ports(&self) -> Vec<u16> {
        match self {
            Self::Patroni(cluster) => cluster.ports(),
            Self::Standby(cluster) => cluster.ports(),
        }
    }

    async fn wait_whole(&self) -> Result<()> {
        match self {
            Self::Patroni(cluster) => cluster.wait_whole().await,
            Self::Standby(cluster) => cluster.wait_whole().await,
        }
    }

    /// Returns when a node leads again.
    async fn inflict(&mut self, fault: Fault) -> Result<()> {
        match (self, fault) {
            (Self::Patroni(cluster), Fault::Switchover) => cluster.switch_over().await,
            (Self::Patroni(cluster), Fault::Crash) => cluster.crash().await,
            (Self::Patroni(cluster), Fault::EtcdLoss { left }) => cluster.lose_etcd(left).await,
            (Self::Standby(cluster), Fault::Switchover) => cluster.switch_over().await,
            (Self::Standby(cluster), Fault::Crash) => cluster.crash().await,
            (Self::Standby(_), Fault::EtcdLoss { .. }) => bail!("a cluster without etcd cannot lose it"),
        }
    }

    /// Brings back the node that a fault has ended.
    async fn repair(&mut self) -> Result<()> {
        match self {
            Self::Patroni(cluster) => cluster.repair(),
            Self::Standby(cluster) => cluster.repair().await,
        }
    }
}

/// Waits until something holds; `what` says it in words.
async fn until(limit: Duration, what: &str, holds: impl AsyncFn() -> bool) -> Result<()> {
    let waiting = async {
        while !holds().await {
            sleep(POLL).await;
        }
    };
    timeout(limit, waiting).await.with_context(|| format!("not true within {limit:?}: {what}; see the logs in {LOGS}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(flags: &[&str]) -> Option<Arguments> {
        CommandLine::try_parse_from([&["failover"], flags].concat()).ok().map(|line| line.arguments)
    }

    #[test]
    fn a_standby_has_no_etcd_to_lose() {
        let losses = |flags: &[&str]| parse(flags).map(|arguments| arguments.counts().etcd_losses);
        assert_eq!(losses(&[]), Some(2));
        assert_eq!(losses(&["--etcd-losses", "1"]), Some(1));
        assert_eq!(losses(&["--standby"]), Some(0));
        assert_eq!(losses(&["--standby", "--etcd-losses", "1"]), None);
        assert_eq!(losses(&["--standby", "--patroni"]), None);
    }

    #[test]
    fn what_is_missing_is_said_in_one_line() {
        let missing = |flags: &[&str], there: &[&str]| {
            let arguments = parse(flags).expect("sound flags");
            missing_programs(arguments.programs(), |name| there.contains(&name))
        };
        assert_eq!(missing(&[], &["haproxy", "patroni", "etcd"]), None);
        assert_eq!(missing(&["--standby"], &["haproxy"]), None);
        assert_eq!(
            missing(&[], &["patroni"]).as_deref(),
            Some("missing: haproxy, etcd; on Debian or Ubuntu: apt-get install haproxy etcd-server")
        );
    }

    #[test]
    fn a_url_may_name_all_nodes() {
        assert_eq!(hosts(&[5001, 5002]), "127.0.0.1:5001,127.0.0.1:5002");
    }
}
