//! The system under test: two durable clusters, the six processes, and a proxy between every two that talk.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use sqlx::{Connection, PgConnection};
use tokio::{sync::Mutex, task::JoinSet};

use super::{
    disk::SmallDisk,
    proxy::Link,
    unit::{Plan, START, Unit},
    wire::Protocol,
};
use harness::{
    system::operate,
    target::{Databases, Target},
};
use testkit::{
    bootstrap::{EMPTY, bootstrap, create_database},
    postgres::{self, Cluster, Installation, Options, Server},
    processes::{Process, binary, free_port},
};

const HEALTHY_LIMIT: Duration = Duration::from_secs(30);

/// The most sessions of a server. There are few, so that a fault can use all of them.
pub(super) const SESSIONS_MAX: u32 = 150;
/// The lease of a relay. It is short, so that it expires often.
pub(super) const LEASE: Duration = Duration::from_secs(5);
/// The connections of a service. There are few, so that a fault can use all of them.
pub(super) const POOL: u32 = 4;

/// Small limits, so that a run of minutes meets all that a system meets in months. All other settings have their
/// defaults.
fn settings() -> Vec<(String, String)> {
    [
        ("RELAY_LEASE_SECONDS", LEASE.as_secs().to_string()),
        ("RELAY_BACK_OFF_MS", "100".into()),
        ("RELAY_BACK_OFF_MAX_MS", "1000".into()),
        ("ORDER_SERVICE_QUEUE", "256".into()),
        ("DATABASE_WORK_MS", "2500".into()),
        ("BATCHES_AT_ONCE", POOL.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// One of the six processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Orders,
    Inventory,
    OrdersRelay1,
    OrdersRelay2,
    InventoryRelay1,
    InventoryRelay2,
}

impl Part {
    pub(super) const ALL: [Self; 6] = [
        Self::Orders,
        Self::Inventory,
        Self::OrdersRelay1,
        Self::OrdersRelay2,
        Self::InventoryRelay1,
        Self::InventoryRelay2,
    ];
    pub(super) const RELAYS: [Self; 4] =
        [Self::OrdersRelay1, Self::OrdersRelay2, Self::InventoryRelay1, Self::InventoryRelay2];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Orders => "order-service",
            Self::Inventory => "inventory-service",
            Self::OrdersRelay1 => "orders-relay-1",
            Self::OrdersRelay2 => "orders-relay-2",
            Self::InventoryRelay1 => "inventory-relay-1",
            Self::InventoryRelay2 => "inventory-relay-2",
        }
    }

    /// The service whose database it uses.
    pub(super) fn side(self) -> Self {
        match self {
            Self::Orders | Self::OrdersRelay1 | Self::OrdersRelay2 => Self::Orders,
            Self::Inventory | Self::InventoryRelay1 | Self::InventoryRelay2 => Self::Inventory,
        }
    }

    /// The service that receives the events of this side's outbox.
    pub(super) fn receiver(self) -> Self {
        if self.side() == Self::Orders { Self::Inventory } else { Self::Orders }
    }

    pub(super) fn is_relay(self) -> bool {
        self != self.side()
    }

    fn index(self) -> usize {
        Self::ALL.iter().position(|part| *part == self).unwrap_or_default()
    }

    fn program(self) -> &'static str {
        if self.is_relay() { "outbox-relay" } else { self.name() }
    }

    fn database(self) -> &'static str {
        if self.side() == Self::Orders { "orders" } else { "inventory" }
    }

    fn role(self) -> &'static str {
        match self {
            Self::Orders => "order_service",
            Self::Inventory => "inventory_service",
            _ => "outbox_relay",
        }
    }
}

pub(super) struct Site {
    /// Those of orders and of inventory.
    clusters: [Mutex<Cluster>; 2],
    servers: [Server; 2],
    pub(super) installation: Installation,
    /// In the order of [`Part::ALL`], as the links to the databases.
    units: Vec<Unit>,
    to_database: Vec<Arc<Link>>,
    /// In the order of [`Part::RELAYS`].
    to_receiver: Vec<Arc<Link>>,
    /// From clients to order-service and to inventory-service.
    clients_to: Vec<Arc<Link>>,
    /// The disk of inventory's cluster, if it could be mounted.
    pub(super) disk: Option<SmallDisk>,
    _serving: Vec<JoinSet<()>>,
}

impl Site {
    /// Starts everything. Logs and clusters are in `directory`.
    pub(super) async fn start(directory: &Path, minutes: f64) -> Result<Self> {
        postgres::remove_abandoned(&directory.join("postgres")).await?;
        let orders = start_cluster(directory.join("postgres-orders")).await?;
        let disk = SmallDisk::mount(directory, minutes).await;
        let place =
            disk.as_ref().map_or_else(|| directory.join("postgres-inventory"), |disk| disk.path().join("postgres"));
        let inventory = start_cluster(place).await?;
        let logs = directory.join("logs");
        let _ = fs::remove_dir_all(&logs);
        fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        let servers = [orders.server().clone(), inventory.server().clone()];
        for (server, part) in servers.iter().zip([Part::Orders, Part::Inventory]) {
            prepare(server, part, &logs).await?;
        }
        let installation = orders.installation().clone();
        let mut site = Self {
            clusters: [Mutex::new(orders), Mutex::new(inventory)],
            servers,
            installation,
            units: Vec::new(),
            to_database: Vec::new(),
            to_receiver: Vec::new(),
            clients_to: Vec::new(),
            disk,
            _serving: Vec::new(),
        };
        site.connect_and_start(&logs).await?;
        for part in Part::ALL {
            site.unit(part).wait_healthy(HEALTHY_LIMIT).await?;
        }
        Ok(site)
    }

    async fn connect_and_start(&mut self, logs: &Path) -> Result<()> {
        let mut addresses = Vec::new();
        for _ in Part::ALL {
            addresses.push(SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?)));
        }
        for part in Part::ALL {
            let link = self.open(
                format!("{} to its database", part.name()),
                Protocol::Postgres,
                false,
                self.server(part).socket()?,
            );
            let link = link.await?;
            self.to_database.push(link);
        }
        for relay in Part::RELAYS {
            let (name, receiver) = (format!("{} to its receiver", relay.name()), addresses[relay.receiver().index()]);
            let link = self.open(name, Protocol::Grpc, true, receiver).await?;
            self.to_receiver.push(link);
        }
        for service in [Part::Orders, Part::Inventory] {
            let (name, address) = (format!("clients to {}", service.name()), addresses[service.index()]);
            let link = self.open(name, Protocol::Grpc, false, address).await?;
            self.clients_to.push(link);
        }
        for part in Part::ALL {
            let plan = Plan {
                name: part.name().into(),
                program: part.program(),
                address: addresses[part.index()],
                environment: self.environment(part, addresses[part.index()]),
                log: logs.join(format!("{}.log", part.name())),
            };
            self.units.push(Unit::start(plan));
        }
        Ok(())
    }

    async fn open(
        &mut self,
        name: String,
        protocol: Protocol,
        delivers: bool,
        server: SocketAddr,
    ) -> Result<Arc<Link>> {
        let (link, serving) = Link::open(name, protocol, delivers, server).await?;
        self._serving.push(serving);
        Ok(link)
    }

    fn environment(&self, part: Part, listen: SocketAddr) -> Vec<(String, String)> {
        let database = self.server(part).through(self.to_database(part).address);
        // By this name the trigger knows which process has leased an event, and which one settles it.
        let name = format!("{}.{START}", part.name());
        let url = format!("{}?application_name={name}", database.url_for(part.role(), part.database()));
        let mut environment = settings();
        let mut set = |name: &str, value: String| environment.push((name.into(), value));
        for name in ["ORDERS_DATABASE_URL", "INVENTORY_DATABASE_URL", "RELAY_DATABASE_URL"] {
            set(name, url.clone());
        }
        for name in ["ORDER_SERVICE_LISTEN", "INVENTORY_SERVICE_LISTEN", "RELAY_LISTEN"] {
            set(name, listen.to_string());
        }
        if !part.is_relay() {
            set("DATABASE_CONNECTIONS", POOL.to_string());
        } else {
            let subscription = if part.side() == Part::Orders { "inventory" } else { "orders" };
            set("RELAY_ROUTES", format!("{subscription}=http://{}", self.to_receiver(part).address));
            set("RELAY_SOURCE", part.side().name().into());
        }
        environment
    }

    pub(super) fn unit(&self, part: Part) -> &Unit {
        &self.units[part.index()]
    }

    pub(super) fn cluster(&self, part: Part) -> &Mutex<Cluster> {
        &self.clusters[part.side().index()]
    }

    fn server(&self, part: Part) -> &Server {
        &self.servers[part.side().index()]
    }

    pub(super) fn to_database(&self, part: Part) -> &Arc<Link> {
        &self.to_database[part.index()]
    }

    /// The link of a relay.
    pub(super) fn to_receiver(&self, relay: Part) -> &Arc<Link> {
        let index = Part::RELAYS.iter().position(|part| *part == relay).unwrap_or_default();
        &self.to_receiver[index]
    }

    /// The link to a service.
    pub(super) fn clients_to(&self, service: Part) -> &Arc<Link> {
        &self.clients_to[service.side().index()]
    }

    pub(super) fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.to_database.iter().chain(&self.to_receiver).chain(&self.clients_to)
    }

    /// The addresses for clients: the services through their proxies, the databases without.
    pub(super) fn target(&self) -> Result<Target> {
        Ok(Target {
            order_service: format!("http://{}", self.clients_to(Part::Orders).address).parse()?,
            inventory_service: format!("http://{}", self.clients_to(Part::Inventory).address).parse()?,
            databases: Databases {
                orders_database_url: self.server(Part::Orders).superuser_url("orders").parse()?,
                inventory_database_url: self.server(Part::Inventory).superuser_url("inventory").parse()?,
                // Nobody subscribes loyalty there, so this database is never opened.
                loyalty_database_url: self.server(Part::Inventory).superuser_url("loyalty").parse()?,
            },
        })
    }

    /// Connects to the database of a process as superuser, without a proxy.
    pub(super) async fn connect(&self, part: Part) -> Result<PgConnection> {
        let url = self.superuser_url(part);
        PgConnection::connect(&url).await.with_context(|| format!("cannot connect to the database of {}", part.name()))
    }

    pub(super) fn superuser_url(&self, part: Part) -> String {
        self.server(part).superuser_url(part.database())
    }

    /// The URL of the database of a process, for a role that is not superuser.
    pub(super) fn owner_url(&self, part: Part) -> String {
        let owner = if part.side() == Part::Orders { "orders_owner" } else { "inventory_owner" };
        self.server(part).url_for(owner, part.database())
    }

    /// The URL of the outbox of a process, for an operator.
    pub(super) fn relay_url(&self, part: Part) -> String {
        self.server(part).url_for("outbox_relay", part.database())
    }

    /// Stops the processes, the relays first.
    pub(super) async fn stop_units(&self) -> Result<()> {
        for unit in self.units.iter().rev() {
            unit.stop().await?;
        }
        Ok(())
    }

    /// Stops the clusters.
    pub(super) async fn stop(self) -> Result<()> {
        for cluster in self.clusters {
            cluster.into_inner().stop().await?;
        }
        Ok(())
    }
}

async fn start_cluster(directory: PathBuf) -> Result<Cluster> {
    postgres::remove_abandoned(&directory).await?;
    let settings = [
        format!("max_connections={SESSIONS_MAX}"),
        // For the small disk.
        "max_wal_size=128MB".into(),
        // No side learns that a connection is in a black hole. After this time the server ends its session.
        "tcp_user_timeout=10000".into(),
    ];
    Cluster::start(Options { directory, port: None, keep: false, durable: true, settings: settings.into() }).await
}

/// Creates the roles and the database of a side, its schema, and the trigger that watches its leases.
async fn prepare(server: &Server, part: Part, logs: &Path) -> Result<()> {
    bootstrap(server).await?;
    let (database, owner) = (part.database(), format!("{}_owner", part.database()));
    create_database(server, database, EMPTY, &owner).await?;
    let url = server.url_for(&owner, database);
    let commands: &[&str] = if part == Part::Inventory { &["migrate", "seed"] } else { &["migrate"] };
    for command in commands {
        let environment = [("ORDERS_DATABASE_URL", &url), ("INVENTORY_DATABASE_URL", &url)];
        let log = logs.join(format!("{database}-{command}.log"));
        let mut process = Process::spawn(part.name(), &binary(part.name())?, [command], environment, &log)?;
        process.finish(command).await?;
    }
    let (name, pattern) =
        if part == Part::Orders { ("inventory", "orders.v1.*") } else { ("orders", "inventory.v1.*") };
    operate(&server.url_for("outbox_relay", database), &["subscribe", name, pattern, "--by", "chaos"]).await?;
    let mut connection = PgConnection::connect(&server.superuser_url(database)).await?;
    sqlx::raw_sql(include_str!("watch_leases.sql"))
        .execute(&mut connection)
        .await
        .context("cannot watch the leases")?;
    Ok(connection.close().await?)
}
