//! The subcommand `upgrade`: replaces the processes of one version by those of another, one at a time, under load.

mod full_tables;
mod load;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use testkit::{
    bootstrap::{bootstrap, create_databases},
    postgres::{Cluster, Options},
    processes::{Process, binary, free_port},
};
use tokio::{process::Command, time::timeout};

use self::load::{Load, Pace};
use crate::{
    audit::audit,
    interrupt::unless_interrupted,
    stress::{count_dead, count_missing, wait_until_delivered},
    system::{Layout, Service, stop},
};

const DIRECTORY: &str = "target/upgrade/postgres";
const LOGS: &str = "target/upgrade/logs";
/// How long a migration may take.
const MIGRATE_LIMIT: Duration = Duration::from_secs(1800);
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// In the order in which docs/operating.md replaces them.
const FORWARDS: [Service; 5] =
    [Service::OrdersRelay, Service::InventoryRelay, Service::Inventory, Service::Loyalty, Service::Orders];

/// Replace each process of an earlier version by one of a later version under load, and back, and check the result
///
/// Starts a private PostgreSQL server and the earlier version. Places orders all the time. Migrates, and replaces the
/// relays and services one at a time: forwards, back, and forwards again; then contracts the schema. After each step, a
/// new order must be confirmed. Exits with 1 if a call fails for ten seconds, an event dies, or the audit has findings.
/// `.ci/rolling-upgrade` builds an earlier commit for it.
///
/// With --fill-orders, it fills the tables of the orders database at the earlier schema instead, and tells how long
/// `migrate` takes, and for how long an order waited meanwhile.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Directory of the earlier version's programs
    #[arg(long, value_name = "DIRECTORY")]
    from: PathBuf,
    /// Directory of the later version's programs [default: where this program is]
    #[arg(long, value_name = "DIRECTORY")]
    to: Option<PathBuf>,
    #[command(flatten)]
    pace: Pace,
    /// Number of orders that are there before `migrate`
    #[arg(long, value_name = "N")]
    fill_orders: Option<u32>,
    /// Number of events in the outbox before `migrate`, in every state
    #[arg(long, value_name = "N", default_value_t = 0, requires = "fill_orders")]
    fill_events: u32,
}

/// The system with the programs of one version.
#[derive(Clone)]
struct Version {
    name: &'static str,
    layout: Layout,
    /// Whether its relays know subscriptions. Those of the first versions know routes of event types only.
    subscribes: bool,
}

impl Version {
    async fn new(name: &'static str, mut layout: Layout, programs: &Path) -> Result<Self> {
        let relay = programs.join("outbox-relay");
        let help = Command::new(&relay).args(["subscribe", "--help"]).output().await;
        let subscribes = help.with_context(|| format!("cannot run {}", relay.display()))?.status.success();
        layout.programs = Some(programs.to_owned());
        let service = programs.join("order-service");
        let help = Command::new(&service).args(["serve", "--help"]).output().await;
        let help = help.with_context(|| format!("cannot run {}", service.display()))?.stdout;
        // Earlier services take events where they take calls.
        if !String::from_utf8_lossy(&help).contains("--events-listen") {
            (layout.order_events, layout.inventory_events) = (layout.order_service, layout.inventory_service);
            if let Some(loyalty) = &mut layout.loyalty {
                loyalty.events = loyalty.address;
            }
        }
        Ok(Self { name, layout, subscribes })
    }

    async fn create(&self) -> Result<()> {
        self.migrate(&[]).await?;
        if self.subscribes {
            self.layout.subscribe_receivers().await?;
        }
        self.layout.seed().await
    }

    async fn migrate(&self, flags: &[&str]) -> Result<()> {
        for service in [Service::Orders, Service::Inventory, Service::Loyalty] {
            if self.layout.services().contains(&service) {
                finish(self.layout.start_migrate(service, flags)?).await?;
            }
        }
        Ok(())
    }
}

async fn finish(mut migrate: Process) -> Result<()> {
    let status = timeout(MIGRATE_LIMIT, migrate.wait()).await;
    let status = status.with_context(|| format!("{} migrate took over {MIGRATE_LIMIT:?}", migrate.name()))??;
    ensure!(status.success(), "{} migrate failed: {}", migrate.name(), migrate.log_tail(5));
    Ok(())
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    unless_interrupted(Box::pin(async { upgrade(&arguments).await.map(|()| ExitCode::SUCCESS) })).await
}

async fn upgrade(arguments: &Arguments) -> Result<()> {
    let own = binary("harness")?;
    let to = arguments.to.as_deref().or(own.parent()).context("a program is in a directory")?;
    let directory = PathBuf::from(DIRECTORY);
    let cluster =
        Cluster::start(Options { directory, port: None, keep: false, durable: true, settings: Vec::new() }).await?;
    let server = cluster.server().clone();
    bootstrap(&server).await?;
    create_databases(&server).await?;
    let layout = Layout::on_free_ports(server, "orders", "inventory", Path::new(LOGS))?;
    let mut earlier = Version::new("the earlier version", layout.clone(), &arguments.from).await?;
    let mut later = Version::new("the later version", layout.clone(), to).await?;
    // loyalty is the second subscriber, and there can be none while processes without subscriptions run.
    if earlier.subscribes && arguments.from.join("loyalty-service").is_file() {
        let layout = layout.with_loyalty("loyalty", [free_port()?, free_port()?]);
        earlier = Version::new(earlier.name, layout.clone(), &arguments.from).await?;
        later = Version::new(later.name, layout, to).await?;
    }
    match arguments.fill_orders {
        Some(orders) => {
            full_tables::migrate(&earlier, &later, orders, arguments.fill_events, arguments.pace).await?;
        }
        None => roll(&earlier, &later, arguments.pace).await?,
    }
    cluster.stop().await
}

/// The processes that run, and what they bear.
struct Running {
    processes: HashMap<&'static str, Process>,
    /// The version that each process is of.
    versions: HashMap<&'static str, Version>,
    load: Load,
}

impl Running {
    async fn start(version: &Version, services: &[Service], pace: Pace) -> Result<Self> {
        let load = Load::start(&version.layout.target()?, pace)?;
        let mut running = Self { processes: HashMap::new(), versions: HashMap::new(), load };
        for service in services {
            running.versions.insert(service.name(), version.clone());
        }
        for service in services {
            running.start_again(*service).await?;
        }
        Ok(running)
    }

    /// Starts a process of its version, in place of the one that runs.
    async fn start_again(&mut self, service: Service) -> Result<()> {
        stop(self.processes.remove(service.name())).await?;
        let process = self.layout_of(service).start(service).await?;
        self.processes.insert(service.name(), process);
        Ok(())
    }

    /// Where a process finds the others. A relay delivers to where its receivers take events now, whatever version they are of.
    fn layout_of(&self, service: Service) -> Layout {
        let version = &self.versions[service.name()];
        let mut layout = version.layout.clone();
        if service.owns_database() {
            return layout;
        }
        let of = |receiver: Service| self.versions.get(receiver.name()).map(|version| &version.layout);
        for (receiver, events) in
            [(Service::Orders, &mut layout.order_events), (Service::Inventory, &mut layout.inventory_events)]
        {
            let now = of(receiver).and_then(|layout| layout.events_address(receiver).ok().flatten());
            *events = now.unwrap_or(*events);
        }
        if let (Some(loyalty), Some(now)) = (&mut layout.loyalty, of(Service::Loyalty)) {
            loyalty.events = now.loyalty.as_ref().map_or(loyalty.events, |now| now.events);
        }
        if !version.subscribes {
            // A route whose events never come does nothing, so both relays can have both.
            let (inventory, orders) = (layout.inventory_events, layout.order_events);
            let routes = format!("orders.v1.*=http://{inventory},inventory.v1.*=http://{orders}");
            layout.settings.push(("RELAY_ROUTES".into(), routes));
        }
        layout
    }

    /// Replaces the processes one at a time. After each, a new order gets through.
    async fn replace(&mut self, version: &Version, services: impl IntoIterator<Item = Service>) -> Result<()> {
        for service in services {
            let Some(before) = self.versions.get(service.name()).cloned() else { continue };
            self.versions.insert(service.name(), version.clone());
            self.start_again(service).await?;
            // Events for it wait until its relay looks for it elsewhere.
            if before.layout.events_address(service)? != version.layout.events_address(service)? {
                self.start_again(Service::OrdersRelay).await?;
                self.start_again(Service::InventoryRelay).await?;
            }
            self.load.gets_through().await.with_context(|| format!("after {} of {}", service.name(), version.name))?;
            self.say(&format!("{} is of {}", service.name(), version.name));
        }
        Ok(())
    }

    async fn migrate(&mut self, version: &Version, flags: &[&str]) -> Result<()> {
        let began = Instant::now();
        version.migrate(flags).await?;
        let took = began.elapsed();
        self.load.gets_through().await?;
        self.say(&format!("{} of {} took {took:.1?}", [&["migrate"], flags].concat().join(" "), version.name));
        Ok(())
    }

    fn say(&self, what: &str) {
        let taken = self.load.take();
        println!("upgrade: {what:<58} {taken}");
    }
}

async fn roll(earlier: &Version, later: &Version, pace: Pace) -> Result<()> {
    earlier.create().await?;
    let mut running = Running::start(earlier, &earlier.layout.services(), pace).await?;
    running.load.gets_through().await?;
    running.say("all of the earlier version");
    running.migrate(later, &[]).await?;
    if !earlier.subscribes {
        later.layout.subscribe_receivers().await?;
    }
    running.replace(later, FORWARDS).await?;
    running.replace(earlier, FORWARDS.into_iter().rev()).await?;
    running.replace(later, FORWARDS).await?;
    running.migrate(later, &["--contract"]).await?;
    check(later, running).await
}

async fn check(later: &Version, running: Running) -> Result<()> {
    let Running { processes, load, .. } = running;
    let databases = later.layout.target()?.databases;
    let placed = load.stop().await?;
    let drained = wait_until_delivered(&databases, DRAIN_LIMIT).await?;
    stop(processes.into_values()).await?;
    let (missing, dead) = (count_missing(&databases, &placed.order_ids).await?, count_dead(&databases).await?);
    let audit = audit(&databases).await?;
    audit.print();
    println!(
        "upgrade: {} orders acknowledged, {} of them after a repeated call, the slowest after {:.1?}; delivered {drained:.1?} \
         after the last; {missing} missing, {dead} events dead",
        placed.order_ids.len(),
        placed.repeated,
        placed.slowest
    );
    if missing > 0 || dead > 0 || !audit.findings.is_empty() {
        bail!("the upgrade lost or broke something: the logs are in {LOGS}");
    }
    Ok(())
}
