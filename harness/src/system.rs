//! The whole system: PostgreSQL, and order-service, inventory-service, loyalty-service and two relays as processes.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use tokio::process::Command;
use tonic::transport::{Channel, Endpoint};

use crate::{
    identities::{CUSTOMERS, Identities},
    target::{self, Databases, Target},
};
use chassis::{Tls, TlsFiles, connect_lazily};
use testkit::{
    bootstrap::{bootstrap, create_databases},
    postgres::{self, Cluster, FixedPort, Options, Server},
    processes::{Process, binary, free_port},
};

/// The first of the five ports that `harness up` uses by default.
pub const FIRST_PORT: u16 = 50051;
/// How much more the port for operators of a service is than its port.
const OPS_OFFSET: u16 = 1000;
/// How much more the port for relays of a service is than its port.
const EVENTS_OFFSET: u16 = 2000;
const HEALTHY_LIMIT: Duration = Duration::from_secs(20);
/// No process of an earlier version works on these databases, so nothing has to be kept for one.
const MIGRATE: [&str; 2] = ["migrate", "--contract"];
/// More than the drain time of a process (5 s).
const GRACE: Duration = Duration::from_secs(8);

/// Which PostgreSQL server the system uses.
#[derive(clap::Args, Clone, Debug)]
pub struct ServerArguments {
    /// Superuser's URL of an existing server, instead of a private one
    #[arg(long, env = "POSTGRES_URL", hide_env_values = true, value_name = "URL")]
    postgres_url: Option<String>,
}

impl ServerArguments {
    /// Whether [`Self::provide`] starts a private server.
    pub(crate) fn is_private(&self) -> bool {
        self.postgres_url.as_deref().is_none_or(str::is_empty)
    }

    /// A server with the roles and databases of this project. A private one is in `directory`, which is deleted at the end
    /// unless `keep` is set, and listens on `port`, or on any free one.
    ///
    /// # Errors
    /// If there is no server and none can be started; the error says what to do.
    pub async fn provide(
        &self,
        directory: &Path,
        keep: bool,
        port: Option<FixedPort>,
    ) -> Result<(Server, Option<Cluster>)> {
        let options = Options { directory: directory.into(), port, keep, durable: true, settings: Vec::new() };
        let (server, cluster) = postgres::provide(self.postgres_url.as_deref(), options).await?;
        bootstrap(&server).await?;
        create_databases(&server).await?;
        Ok((server, cluster))
    }
}

/// Where the parts of a system are.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The server of all databases.
    pub server: Server,
    /// Name of the orders database.
    pub orders: String,
    /// Name of the inventory database.
    pub inventory: String,
    /// Address of order-service.
    pub order_service: SocketAddr,
    /// Where order-service takes events.
    pub order_events: SocketAddr,
    /// Address of inventory-service.
    pub inventory_service: SocketAddr,
    /// Where inventory-service takes events.
    pub inventory_events: SocketAddr,
    /// Address of the relay of the orders database.
    pub orders_relay: SocketAddr,
    /// Address of the relay of the inventory database.
    pub inventory_relay: SocketAddr,
    /// loyalty-service, which the system also works without.
    pub loyalty: Option<Loyalty>,
    /// Directory of the log files.
    pub logs: PathBuf,
    /// The certificates of all processes, and what they may do. Without them the processes speak without TLS.
    pub identities: Option<Identities>,
    /// More environment variables for each process.
    pub settings: Vec<(String, String)>,
    /// Directory of the programs, if they are not those beside this one.
    pub programs: Option<PathBuf>,
    /// Whether the services listen for operators too, on ports that are 1000 more than theirs. The relays always do,
    /// on their own.
    pub serves_ops: bool,
    /// Where the processes look for the databases, as `host:port,host:port`: several servers, of which one can write.
    /// If empty, they connect to [`Self::server`].
    pub hosts: String,
}

/// Where loyalty-service is.
#[derive(Clone, Debug)]
pub struct Loyalty {
    /// Name of its database.
    pub database: String,
    /// Its address.
    pub address: SocketAddr,
    /// Where it takes events.
    pub events: SocketAddr,
}

/// One of the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// order-service.
    Orders,
    /// inventory-service.
    Inventory,
    /// loyalty-service.
    Loyalty,
    /// The relay that delivers the events of orders to inventory-service and loyalty-service.
    OrdersRelay,
    /// The relay that delivers inventory's replies to order-service.
    InventoryRelay,
}

impl Service {
    /// All of them. Receivers come before the relays, whose first delivery would fail otherwise.
    pub const ALL: [Self; 5] = [Self::Inventory, Self::Orders, Self::Loyalty, Self::OrdersRelay, Self::InventoryRelay];

    /// The name of the process and of its log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Orders => "order-service",
            Self::Inventory => "inventory-service",
            Self::Loyalty => "loyalty-service",
            Self::OrdersRelay => "orders-relay",
            Self::InventoryRelay => "inventory-relay",
        }
    }

    /// Its port, if the first of the five is `first`.
    pub fn port_from(self, first: u16) -> u16 {
        match self {
            Self::Orders => first,
            Self::Inventory => first + 1,
            Self::OrdersRelay => first + 2,
            Self::InventoryRelay => first + 3,
            Self::Loyalty => first + 4,
        }
    }

    /// Its port for operators, if this is its port.
    pub(crate) fn ops_port(self, port: u16) -> u16 {
        if self.owns_database() { port + OPS_OFFSET } else { port }
    }

    /// Its port for relays, if this is its port.
    pub(crate) fn events_port(self, port: u16) -> u16 {
        if self.owns_database() { port + EVENTS_OFFSET } else { port }
    }

    pub(crate) fn owns_database(self) -> bool {
        !matches!(self, Self::OrdersRelay | Self::InventoryRelay)
    }

    /// The binary's name.
    fn binary(self) -> &'static str {
        match self {
            Self::Orders => "order-service",
            Self::Inventory => "inventory-service",
            Self::Loyalty => "loyalty-service",
            Self::OrdersRelay | Self::InventoryRelay => "outbox-relay",
        }
    }
}

impl Layout {
    /// The databases `orders`, `inventory` and `loyalty`, and the five ports from `first`.
    pub fn on_ports_from(first: u16, server: Server, logs: &Path) -> Self {
        use Service::{Inventory, InventoryRelay, Orders, OrdersRelay};
        let ports = [Orders, Inventory, OrdersRelay, InventoryRelay].map(|service| service.port_from(first));
        let events = [Orders, Inventory].map(|service| service.events_port(service.port_from(first)));
        let loyalty = Service::Loyalty.port_from(first);
        Self::new(server, ["orders", "inventory"], ports, events, logs)
            .with_loyalty("loyalty", [loyalty, Service::Loyalty.events_port(loyalty)])
    }

    /// Two databases of any name, and any free ports, without loyalty-service.
    ///
    /// # Errors
    /// If no port is free.
    pub fn on_free_ports(server: Server, orders: &str, inventory: &str, logs: &Path) -> Result<Self> {
        let ports = [free_port()?, free_port()?, free_port()?, free_port()?];
        let events = [free_port()?, free_port()?];
        Ok(Self::new(server, [orders, inventory], ports, events, logs))
    }

    fn new(server: Server, [orders, inventory]: [&str; 2], ports: [u16; 4], events: [u16; 2], logs: &Path) -> Self {
        let [order_service, inventory_service, orders_relay, inventory_relay] = ports.map(on_loopback);
        let [order_events, inventory_events] = events.map(on_loopback);
        Self {
            server,
            orders: orders.into(),
            inventory: inventory.into(),
            order_service,
            order_events,
            inventory_service,
            inventory_events,
            orders_relay,
            inventory_relay,
            loyalty: None,
            logs: logs.to_owned(),
            identities: None,
            settings: Vec::new(),
            programs: None,
            serves_ops: false,
            hosts: String::new(),
        }
    }

    /// The same system with loyalty-service, on a port for callers and one for relays.
    #[must_use]
    pub fn with_loyalty(self, database: &str, ports: [u16; 2]) -> Self {
        let [address, events] = ports.map(on_loopback);
        let loyalty = Loyalty { database: database.into(), address, events };
        Self { loyalty: Some(loyalty), ..self }
    }

    /// The processes of this system, in the order of [`Service::ALL`].
    pub fn services(&self) -> Vec<Service> {
        let is_here = |service: &Service| self.loyalty.is_some() || *service != Service::Loyalty;
        Service::ALL.into_iter().filter(is_here).collect()
    }

    /// This system, for the subcommands that work on a running one.
    ///
    /// # Errors
    /// If an address does not fit into a URL.
    pub fn target(&self) -> Result<Target> {
        let [
            (_, order_service),
            (_, inventory_service),
            (_, order_events),
            (_, inventory_events),
            (_, orders),
            (_, inventory),
            (_, loyalty),
        ] = self.target_variables();
        Ok(Target {
            order_service: order_service.parse()?,
            inventory_service: inventory_service.parse()?,
            order_events: order_events.parse()?,
            inventory_events: inventory_events.parse()?,
            tls: self.files_of(CUSTOMERS),
            identities: self.identities.clone(),
            databases: Databases {
                orders_database_url: orders.parse()?,
                inventory_database_url: inventory.parse()?,
                loyalty_database_url: loyalty.parse()?,
            },
        })
    }

    /// The same as environment variables with their values, in the order of [`target::DEFAULTS`].
    pub(crate) fn target_variables(&self) -> [(&'static str, String); 7] {
        let [order_service, inventory_service, order_events, inventory_events, orders, inventory, loyalty] =
            target::DEFAULTS.map(|(name, _)| name);
        // Without loyalty-service, nobody looks for its database.
        let loyalty_database = self.loyalty.as_ref().map_or("loyalty", |loyalty| &loyalty.database);
        [
            (order_service, self.url_of(self.order_service)),
            (inventory_service, self.url_of(self.inventory_service)),
            (order_events, self.url_of(self.order_events)),
            (inventory_events, self.url_of(self.inventory_events)),
            (orders, self.server.url_for("orders_owner", &self.orders)),
            (inventory, self.server.url_for("inventory_owner", &self.inventory)),
            (loyalty, self.server.url_for("loyalty_owner", loyalty_database)),
        ]
    }

    /// Migrates the databases, subscribes each service to the events that it receives, and adds the demo stock. What is
    /// there already stays.
    ///
    /// # Errors
    /// If one of the commands fails; the error shows its output.
    pub async fn prepare(&self) -> Result<()> {
        for service in self.services().into_iter().filter(|service| service.owns_database()) {
            self.start_migrate(service, &MIGRATE[1..])?.finish(MIGRATE[0]).await?;
        }
        self.subscribe_receivers().await?;
        self.seed().await
    }

    /// Starts `migrate` of a service.
    ///
    /// # Errors
    /// If the service has no database, or is not in this system.
    pub fn start_migrate(&self, service: Service, flags: &[&str]) -> Result<Process> {
        let url = match service {
            Service::Orders => self.server.url_for("orders_owner", &self.orders),
            Service::Inventory => self.server.url_for("inventory_owner", &self.inventory),
            Service::Loyalty => self.server.url_for("loyalty_owner", &self.loyalty()?.database),
            Service::OrdersRelay | Service::InventoryRelay => bail!("{} has no database", service.name()),
        };
        self.spawn_once(service, &[&MIGRATE[..1], flags].concat(), &url)
    }

    /// Subscribes each service to the events that it receives.
    ///
    /// # Errors
    /// If one of the commands fails; the error shows its output.
    pub async fn subscribe_receivers(&self) -> Result<()> {
        self.subscribe(Service::OrdersRelay, "inventory", "orders.v1.*").await?;
        self.subscribe(Service::InventoryRelay, "orders", "inventory.v1.*").await?;
        if self.loyalty.is_some() {
            self.subscribe(Service::OrdersRelay, "loyalty", "orders.v1.*").await?;
        }
        Ok(())
    }

    /// Adds the demo stock.
    ///
    /// # Errors
    /// If the command fails; the error shows its output.
    pub async fn seed(&self) -> Result<()> {
        let url = self.server.url_for("inventory_owner", &self.inventory);
        self.spawn_once(Service::Inventory, &["seed"], &url)?.finish("seed").await
    }

    async fn subscribe(&self, relay: Service, name: &str, pattern: &str) -> Result<()> {
        self.operate(relay, &["subscribe", name, pattern, "--by", "harness"]).await.map(drop)
    }

    fn spawn_once(&self, service: Service, command: &[&str], url: &str) -> Result<Process> {
        let variables =
            ["ORDERS_DATABASE_URL", "INVENTORY_DATABASE_URL", "LOYALTY_DATABASE_URL"].map(|name| (name, url));
        self.spawn(service, command, &variables)
    }

    /// Starts a process and waits until it is healthy.
    ///
    /// # Errors
    /// If it is not healthy in time, or not in this system; the error shows the end of its log.
    pub async fn start(&self, service: Service) -> Result<Process> {
        let address = self.address(service)?;
        let (role, database) = match service {
            Service::Orders => ("order_service", self.orders.as_str()),
            Service::Inventory => ("inventory_service", self.inventory.as_str()),
            Service::Loyalty => ("loyalty_service", self.loyalty()?.database.as_str()),
            Service::OrdersRelay => ("outbox_relay", self.orders.as_str()),
            Service::InventoryRelay => ("outbox_relay", self.inventory.as_str()),
        };
        let (url, listen) = (self.url_for(role, database), address.to_string());
        let events = self.events_address(service)?.unwrap_or(address).to_string();
        let source = if service == Service::InventoryRelay { Service::Inventory } else { Service::Orders };
        let routes = self.routes(service);
        let environment = [
            ("ORDERS_DATABASE_URL", url.as_str()),
            ("INVENTORY_DATABASE_URL", &url),
            ("LOYALTY_DATABASE_URL", &url),
            ("RELAY_DATABASE_URL", &url),
            ("ORDER_SERVICE_LISTEN", &listen),
            ("INVENTORY_SERVICE_LISTEN", &listen),
            ("LOYALTY_SERVICE_LISTEN", &listen),
            ("ORDER_SERVICE_EVENTS_LISTEN", &events),
            ("INVENTORY_SERVICE_EVENTS_LISTEN", &events),
            ("LOYALTY_SERVICE_EVENTS_LISTEN", &events),
            ("RELAY_ROUTES", &routes),
            ("RELAY_SOURCE", source.name()),
            // No load balancer has to learn that a process ends.
            ("LAME_DUCK_SECONDS", "0"),
        ];
        // The second name is that of earlier versions, which `harness upgrade` runs.
        let of_relay = [("RELAY_OPS_LISTEN", listen.as_str()), ("RELAY_LISTEN", &listen)];
        let of_relay = of_relay.into_iter().filter(|_| !service.owns_database());
        let mut environment: Vec<_> = environment.into_iter().chain(of_relay).collect();
        let ops = self.ops_address(service)?.map(|address| address.to_string());
        if let Some(ops) = ops.as_deref().filter(|_| service.owns_database()) {
            let names = ["ORDER_SERVICE_OPS_LISTEN", "INVENTORY_SERVICE_OPS_LISTEN", "LOYALTY_SERVICE_OPS_LISTEN"];
            environment.extend(names.map(|name| (name, ops)));
        }
        let files = self.security_variables(service)?;
        environment.extend(files.iter().map(|(name, file)| (*name, file.as_str())));
        let mut process = self.spawn(service, &["serve"], &environment)?;
        process.wait_healthy_by(&self.files_of(service.name()), address, HEALTHY_LIMIT).await?;
        Ok(process)
    }

    /// The certificates of a process or caller of this system; none if it speaks without TLS.
    pub fn files_of(&self, name: &str) -> TlsFiles {
        self.identities.as_ref().map(|identities| identities.files(name)).unwrap_or_default()
    }

    /// A connection to a process, as the one with this name.
    ///
    /// # Errors
    /// If the process is not in this system, or the certificates cannot be used.
    pub fn connect(&self, service: Service, name: &str) -> Result<Channel> {
        self.connect_to(self.address(service)?, name)
    }

    /// The same, to where a service takes events.
    ///
    /// # Errors
    /// If it is not in this system or takes none, or the certificates cannot be used.
    pub fn connect_to_events(&self, service: Service, name: &str) -> Result<Channel> {
        self.connect_to(self.events_address(service)?.context("a relay takes no events")?, name)
    }

    fn connect_to(&self, address: SocketAddr, name: &str) -> Result<Channel> {
        let endpoint = Endpoint::from_shared(self.url_of(address))?;
        Ok(connect_lazily(&endpoint, &Tls::read(&self.files_of(name))?))
    }

    /// The certificates and the policy, as environment variables of a process.
    fn security_variables(&self, service: Service) -> Result<Vec<(&'static str, String)>> {
        self.identities.as_ref().map_or_else(|| Ok(Vec::new()), |identities| identities.variables(service.name()))
    }

    fn url_for(&self, role: &str, database: &str) -> String {
        if self.hosts.is_empty() {
            return self.server.url_for(role, database);
        }
        format!("postgres://{role}:{role}@{}/{database}?target_session_attrs=read-write", self.hosts)
    }

    pub(crate) fn url_of(&self, address: SocketAddr) -> String {
        format!("{}://{address}", if self.identities.is_some() { "https" } else { "http" })
    }

    /// The routes of a relay: the subscriptions that it delivers, each with its receiver.
    fn routes(&self, relay: Service) -> String {
        if relay == Service::InventoryRelay {
            return format!("orders={}", self.url_of(self.order_events));
        }
        let inventory = format!("inventory={}", self.url_of(self.inventory_events));
        match &self.loyalty {
            Some(loyalty) => format!("{inventory},loyalty={}", self.url_of(loyalty.events)),
            None => inventory,
        }
    }

    /// Runs an operator's command of `outbox-relay` on the outbox of a relay, and returns its output.
    ///
    /// # Errors
    /// If the command fails; the error shows its message.
    pub async fn operate(&self, relay: Service, arguments: &[&str]) -> Result<String> {
        let database = if relay == Service::InventoryRelay { &self.inventory } else { &self.orders };
        let url = ("RELAY_DATABASE_URL", self.server.url_for("outbox_relay", database));
        let environment = [url].into_iter().chain(self.security_variables(relay)?).collect();
        operate_with(&self.program("outbox-relay")?, environment, arguments).await
    }

    fn spawn(&self, service: Service, command: &[&str], environment: &[(&str, &str)]) -> Result<Process> {
        fs::create_dir_all(&self.logs).with_context(|| self.logs.display().to_string())?;
        let environment = environment.iter().copied();
        let settings = self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let program = self.program(service.binary())?;
        Process::spawn(service.name(), &program, command, environment.chain(settings), &self.log(service))
    }

    fn program(&self, name: &str) -> Result<PathBuf> {
        self.programs.as_ref().map_or_else(|| binary(name), |directory| Ok(directory.join(name)))
    }

    /// The log file of a process.
    pub fn log(&self, service: Service) -> PathBuf {
        self.logs.join(format!("{}.log", service.name()))
    }

    /// Where it listens for operators, if it does.
    ///
    /// # Errors
    /// If it is not in this system.
    pub fn ops_address(&self, service: Service) -> Result<Option<SocketAddr>> {
        let mut address = self.address(service)?;
        address.set_port(service.ops_port(address.port()));
        Ok((self.serves_ops || !service.owns_database()).then_some(address))
    }

    /// Where a service takes events; `None` of a relay, which takes none.
    ///
    /// # Errors
    /// If it is not in this system.
    pub fn events_address(&self, service: Service) -> Result<Option<SocketAddr>> {
        Ok(match service {
            Service::Orders => Some(self.order_events),
            Service::Inventory => Some(self.inventory_events),
            Service::Loyalty => Some(self.loyalty()?.events),
            Service::OrdersRelay | Service::InventoryRelay => None,
        })
    }

    /// The address of a process.
    ///
    /// # Errors
    /// If the process is loyalty-service, and this system has none.
    pub fn address(&self, service: Service) -> Result<SocketAddr> {
        Ok(match service {
            Service::Orders => self.order_service,
            Service::Inventory => self.inventory_service,
            Service::Loyalty => self.loyalty()?.address,
            Service::OrdersRelay => self.orders_relay,
            Service::InventoryRelay => self.inventory_relay,
        })
    }

    fn loyalty(&self) -> Result<&Loyalty> {
        self.loyalty.as_ref().context("this system has no loyalty-service")
    }
}

fn on_loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Runs an operator's command of `outbox-relay` on the outbox of a database, and returns its output.
///
/// # Errors
/// If the command fails; the error shows its message.
pub async fn operate(database_url: &str, arguments: &[&str]) -> Result<String> {
    let environment = vec![("RELAY_DATABASE_URL", database_url.to_owned())];
    operate_with(&binary("outbox-relay")?, environment, arguments).await
}

async fn operate_with(program: &Path, environment: Vec<(&str, String)>, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).envs(environment);
    let output = command.kill_on_drop(true).output().await.context("cannot run outbox-relay")?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "outbox-relay {} failed: {message}", arguments.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

/// Ends all processes at once with SIGTERM. Each has its full grace, even if another one fails.
///
/// # Errors
/// If one did not end within its grace, or not with success.
pub async fn stop(processes: impl IntoIterator<Item = Process>) -> Result<()> {
    let mut ending = tokio::task::JoinSet::new();
    for mut process in processes {
        ending.spawn(async move {
            let exit = process.terminate(GRACE).await?;
            ensure!(!exit.killed, "{} did not end within {GRACE:?} after SIGTERM and was killed", process.name());
            ensure!(exit.status.success(), "{} ended with {}: {}", process.name(), exit.status, process.log_tail(5));
            Ok(())
        });
    }
    let ended: Vec<Result<()>> = ending.join_all().await;
    ended.into_iter().collect()
}
