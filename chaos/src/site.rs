//! The system under test: two durable clusters, the seven processes, and a proxy between every two that talk.

use std::{
    fmt, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use sqlx::{Connection, PgConnection};
use tokio::{sync::Mutex, task::JoinSet};
use tonic::transport::Uri;

use super::{
    certificates::Certificates,
    disk::SmallDisk,
    entrance::Entrance,
    proxy::Link,
    stream::Ends,
    unit::{Plan, START, Unit},
    wire::Protocol,
};
use chassis::{Tls, TlsFiles};
use harness::{
    identities::{CUSTOMERS, OPERATORS},
    system::{Service, operate},
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
/// Failures after which an event is dead. There are few, so that an outage would bury sound events if it were charged to
/// them. An event may crash its receiver three times, and meet as many other faults.
const ATTEMPTS: u32 = 6;
/// The connections of a service. There are few, so that a fault can use all of them.
pub(super) const POOL: u32 = 4;

/// Small limits, so that a run of minutes meets all that a system meets in months. All other settings have their
/// defaults.
fn settings() -> Vec<(String, String)> {
    [
        ("RELAY_LEASE_SECONDS", LEASE.as_secs().to_string()),
        ("RELAY_ATTEMPTS", ATTEMPTS.to_string()),
        ("RELAY_BACK_OFF_MS", "100".into()),
        ("RELAY_BACK_OFF_MAX_MS", "1000".into()),
        ("ORDER_SERVICE_QUEUE", "256".into()),
        ("DATABASE_WORK_MS", "2500".into()),
        ("BATCHES_AT_ONCE", POOL.to_string()),
        ("LAME_DUCK_SECONDS", "1".into()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// One of the seven processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Orders,
    Inventory,
    Loyalty,
    OrdersRelay1,
    OrdersRelay2,
    InventoryRelay1,
    InventoryRelay2,
}

impl Part {
    pub(super) const ALL: [Self; 7] = [
        Self::Orders,
        Self::Inventory,
        Self::Loyalty,
        Self::OrdersRelay1,
        Self::OrdersRelay2,
        Self::InventoryRelay1,
        Self::InventoryRelay2,
    ];
    pub(super) const SERVICES: [Self; 3] = [Self::Orders, Self::Inventory, Self::Loyalty];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Orders => "order-service",
            Self::Inventory => "inventory-service",
            Self::Loyalty => "loyalty-service",
            Self::OrdersRelay1 => "orders-relay-1",
            Self::OrdersRelay2 => "orders-relay-2",
            Self::InventoryRelay1 => "inventory-relay-1",
            Self::InventoryRelay2 => "inventory-relay-2",
        }
    }

    /// The name in its certificate. The relays of an outbox have one between them, as the policy demands.
    pub(super) fn identity(self) -> &'static str {
        match self {
            Self::OrdersRelay1 | Self::OrdersRelay2 => Service::OrdersRelay.name(),
            Self::InventoryRelay1 | Self::InventoryRelay2 => Service::InventoryRelay.name(),
            service => service.name(),
        }
    }

    /// The service whose database it uses.
    pub(super) fn side(self) -> Self {
        match self {
            Self::Orders | Self::OrdersRelay1 | Self::OrdersRelay2 => Self::Orders,
            Self::Inventory | Self::InventoryRelay1 | Self::InventoryRelay2 => Self::Inventory,
            Self::Loyalty => Self::Loyalty,
        }
    }

    /// The service in whose cluster its database is.
    fn cluster(self) -> Self {
        if self.side() == Self::Orders { Self::Orders } else { Self::Inventory }
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

    pub(super) fn database(self) -> &'static str {
        match self.side() {
            Self::Orders => "orders",
            Self::Inventory => "inventory",
            _ => "loyalty",
        }
    }

    fn role(self) -> &'static str {
        match self {
            Self::Orders => "order_service",
            Self::Inventory => "inventory_service",
            Self::Loyalty => "loyalty_service",
            _ => "outbox_relay",
        }
    }
}

/// The way from a relay to a receiver of its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) relay: Part,
    pub(super) receiver: Part,
}

impl Route {
    pub(super) const ALL: [Self; 6] = [
        Self { relay: Part::OrdersRelay1, receiver: Part::Inventory },
        Self { relay: Part::OrdersRelay2, receiver: Part::Inventory },
        Self { relay: Part::OrdersRelay1, receiver: Part::Loyalty },
        Self { relay: Part::OrdersRelay2, receiver: Part::Loyalty },
        Self { relay: Part::InventoryRelay1, receiver: Part::Orders },
        Self { relay: Part::InventoryRelay2, receiver: Part::Orders },
    ];

    /// Those from any relay to a receiver.
    pub(super) fn to(receiver: Part) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |route| route.receiver == receiver)
    }

    /// Those of a relay.
    pub(super) fn of(relay: Part) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |route| route.relay == relay)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.relay.name(), self.receiver.name())
    }
}

/// The subscriptions of each outbox, with their receivers and patterns. One is called like the database of its receiver.
const SUBSCRIPTIONS: [(Part, Part, &str); 3] = [
    (Part::Orders, Part::Inventory, "orders.v1.*"),
    (Part::Orders, Part::Loyalty, "orders.v1.*"),
    (Part::Inventory, Part::Orders, "inventory.v1.*"),
];

/// Where a process listens. A relay, which takes no events, listens at the first only.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    callers: SocketAddr,
    relays: SocketAddr,
}

pub(super) struct Site {
    /// That of orders, and that of inventory and loyalty.
    clusters: [Mutex<Cluster>; 2],
    servers: [Server; 2],
    pub(super) installation: Installation,
    /// In the order of [`Part::ALL`], as the links to the databases.
    units: Vec<Unit>,
    to_database: Vec<Arc<Link>>,
    /// In the order of [`Route::ALL`].
    to_receiver: Vec<Arc<Link>>,
    /// From clients to the services, in the order of [`Part::SERVICES`].
    clients_to: Vec<Arc<Link>>,
    /// Where the services take events, in the same order.
    events: [SocketAddr; 3],
    /// Without them all speak without TLS.
    pub(super) certificates: Option<Certificates>,
    /// The disk of the cluster of inventory and loyalty, if it could be mounted.
    pub(super) disk: Option<SmallDisk>,
    _serving: Vec<JoinSet<()>>,
}

impl Site {
    /// Starts everything. Logs and clusters are in `directory`.
    pub(super) async fn start(directory: &Path, minutes: f64, secure: bool) -> Result<Self> {
        let certificates = secure.then(|| Certificates::make(&directory.join("certificates"))).transpose()?;
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
        for server in &servers {
            bootstrap(server).await?;
        }
        for part in Part::SERVICES {
            prepare(&servers[part.cluster().index()], part, &logs).await?;
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
            events: [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); 3],
            certificates,
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
        let free = || Ok::<_, anyhow::Error>(SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?)));
        let mut addresses = Vec::new();
        for _ in Part::ALL {
            addresses.push(Addresses { callers: free()?, relays: free()? });
        }
        for part in Part::ALL {
            let name = format!("{} to its database", part.name());
            let link = self.open(name, Protocol::Postgres, self.server(part).socket()?, None).await?;
            self.to_database.push(link);
        }
        let entrances = [Entrance::open().await?, Entrance::open().await?, Entrance::open().await?];
        for route in Route::ALL {
            let receiver = route.receiver.index();
            let ends = self.ends(route.relay.identity(), route.receiver)?;
            let link = Link::of_relay(route.to_string(), entrances[receiver].address, addresses[receiver].relays, ends);
            self.to_receiver.push(Arc::new(link));
        }
        for service in Part::SERVICES {
            let name = format!("clients to {}", service.name());
            let ends = self.ends(CUSTOMERS, service)?;
            let link = self.open(name, Protocol::Grpc, addresses[service.index()].callers, ends).await?;
            self.clients_to.push(link);
        }
        self.events = Part::SERVICES.map(|service| addresses[service.index()].relays);
        self.start_units(&addresses, logs)?;
        for (receiver, entrance) in Part::SERVICES.into_iter().zip(entrances) {
            let relays =
                Route::to(receiver).map(|route| (self.unit(route.relay).clone(), self.to_receiver(route).clone()));
            self._serving.push(entrance.serve(relays.collect()));
        }
        Ok(())
    }

    fn start_units(&mut self, addresses: &[Addresses], logs: &Path) -> Result<()> {
        for part in Part::ALL {
            let plan = Plan {
                name: part.name().into(),
                program: part.program(),
                address: addresses[part.index()].callers,
                tls: self.files_of(part.identity()),
                environment: self.environment(part, addresses[part.index()])?,
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
        server: SocketAddr,
        ends: Option<Ends>,
    ) -> Result<Arc<Link>> {
        let (link, serving) = Link::open(name, protocol, server, ends).await?;
        self._serving.push(serving);
        Ok(link)
    }

    /// For whom a proxy stands that is between these, if they speak with TLS.
    fn ends(&self, client: &'static str, server: Part) -> Result<Option<Ends>> {
        let Some(certificates) = &self.certificates else { return Ok(None) };
        let (client, server) = (certificates.identity(client)?, certificates.identity(server.identity())?);
        Ok(Some(Ends { client, server }))
    }

    /// The certificates of a process or caller; none without TLS.
    fn files_of(&self, name: &str) -> TlsFiles {
        self.certificates.as_ref().map(|certificates| certificates.identities.files(name)).unwrap_or_default()
    }

    /// The same, as the files have them now.
    pub(super) fn tls_of(&self, name: &str) -> Result<Tls> {
        match &self.certificates {
            Some(certificates) => certificates.tls_of(name),
            None => Ok(Tls::read(&TlsFiles::default())?),
        }
    }

    fn url_at(&self, address: SocketAddr) -> String {
        format!("{}://{address}", if self.certificates.is_some() { "https" } else { "http" })
    }

    fn environment(&self, part: Part, listen: Addresses) -> Result<Vec<(String, String)>> {
        let database = self.server(part).through(self.to_database(part).address);
        // By this name the trigger knows which process has leased an event, and which one settles it.
        let name = format!("{}.{START}", part.name());
        let url = format!("{}?application_name={name}", database.url_for(part.role(), part.database()));
        let mut environment = settings();
        let mut set = |name: &str, value: String| environment.push((name.into(), value));
        for name in ["ORDERS_DATABASE_URL", "INVENTORY_DATABASE_URL", "LOYALTY_DATABASE_URL", "RELAY_DATABASE_URL"] {
            set(name, url.clone());
        }
        for name in ["ORDER_SERVICE_LISTEN", "INVENTORY_SERVICE_LISTEN", "LOYALTY_SERVICE_LISTEN"] {
            set(name, listen.callers.to_string());
        }
        for name in ["ORDER_SERVICE_EVENTS_LISTEN", "INVENTORY_SERVICE_EVENTS_LISTEN", "LOYALTY_SERVICE_EVENTS_LISTEN"]
        {
            set(name, listen.relays.to_string());
        }
        if !part.is_relay() {
            set("DATABASE_CONNECTIONS", POOL.to_string());
        } else {
            let routes = Route::of(part).map(|route| {
                let subscription = route.receiver.database();
                format!("{subscription}={}", self.url_at(self.to_receiver(route).address))
            });
            set("RELAY_OPS_LISTEN", listen.callers.to_string());
            set("RELAY_ROUTES", routes.collect::<Vec<_>>().join(","));
            set("RELAY_SOURCE", part.side().name().into());
        }
        if let Some(certificates) = &self.certificates {
            let variables = certificates.identities.variables(part.identity())?;
            environment.extend(variables.into_iter().map(|(name, value)| (name.to_owned(), value)));
        }
        Ok(environment)
    }

    pub(super) fn unit(&self, part: Part) -> &Unit {
        &self.units[part.index()]
    }

    pub(super) fn cluster(&self, part: Part) -> &Mutex<Cluster> {
        &self.clusters[part.cluster().index()]
    }

    fn server(&self, part: Part) -> &Server {
        &self.servers[part.cluster().index()]
    }

    pub(super) fn to_database(&self, part: Part) -> &Arc<Link> {
        &self.to_database[part.index()]
    }

    pub(super) fn to_receiver(&self, route: Route) -> &Arc<Link> {
        let index = Route::ALL.iter().position(|other| *other == route).unwrap_or_default();
        &self.to_receiver[index]
    }

    /// The link to a service.
    pub(super) fn clients_to(&self, service: Part) -> &Arc<Link> {
        &self.clients_to[service.side().index()]
    }

    pub(super) fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.to_database.iter().chain(&self.to_receiver).chain(&self.clients_to)
    }

    /// Where clients find a service: at a proxy.
    pub(super) fn url_of(&self, service: Part) -> Result<Uri> {
        Ok(self.url_at(self.clients_to(service).address).parse()?)
    }

    /// Where a process listens, without a proxy. With TLS, also for whom.
    pub(super) fn listeners(&self, part: Part) -> Result<Vec<(SocketAddr, Option<Ends>)>> {
        let caller = if part.is_relay() { OPERATORS } else { CUSTOMERS };
        let mut listeners = vec![(self.unit(part).plan().address, self.ends(caller, part)?)];
        if let Some(route) = Route::to(part).next() {
            listeners.push((self.events[part.index()], self.ends(route.relay.identity(), part)?));
        }
        Ok(listeners)
    }

    /// Where a service takes events, without a proxy.
    pub(super) fn events_url_of(&self, service: Part) -> Result<Uri> {
        Ok(self.url_at(self.events[service.side().index()]).parse()?)
    }

    /// The addresses for clients: the services through their proxies, the databases without.
    pub(super) fn target(&self) -> Result<Target> {
        Ok(Target {
            order_service: self.url_of(Part::Orders)?,
            inventory_service: self.url_of(Part::Inventory)?,
            order_events: self.events_url_of(Part::Orders)?,
            inventory_events: self.events_url_of(Part::Inventory)?,
            tls: self.files_of(CUSTOMERS),
            identities: self.certificates.as_ref().map(|certificates| certificates.identities.clone()),
            databases: Databases {
                orders_database_url: self.server(Part::Orders).superuser_url("orders").parse()?,
                inventory_database_url: self.server(Part::Inventory).superuser_url("inventory").parse()?,
                loyalty_database_url: self.server(Part::Loyalty).superuser_url("loyalty").parse()?,
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
        self.server(part).url_for(&owner(part), part.database())
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

fn owner(part: Part) -> String {
    format!("{}_owner", part.database())
}

/// Creates the database of a service, its schema and subscriptions, and the trigger that watches the leases.
async fn prepare(server: &Server, part: Part, logs: &Path) -> Result<()> {
    let database = part.database();
    create_database(server, database, EMPTY, &owner(part)).await?;
    let url = server.url_for(&owner(part), database);
    let commands: &[&str] = if part == Part::Inventory { &["migrate", "seed"] } else { &["migrate"] };
    for command in commands {
        let names = ["ORDERS_DATABASE_URL", "INVENTORY_DATABASE_URL", "LOYALTY_DATABASE_URL"];
        let environment = names.map(|name| (name, &url));
        let log = logs.join(format!("{database}-{command}.log"));
        let mut process = Process::spawn(part.name(), &binary(part.name())?, [command], environment, &log)?;
        process.finish(command).await?;
    }
    for (_, receiver, pattern) in SUBSCRIPTIONS.into_iter().filter(|(of, ..)| *of == part) {
        let arguments = ["subscribe", receiver.database(), pattern, "--by", "chaos"];
        operate(&server.url_for("outbox_relay", database), &arguments).await?;
    }
    let mut connection = PgConnection::connect(&server.superuser_url(database)).await?;
    sqlx::raw_sql(include_str!("watch_leases.sql"))
        .execute(&mut connection)
        .await
        .context("cannot watch the leases")?;
    Ok(connection.close().await?)
}
