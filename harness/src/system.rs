//! The whole system as separate processes: order-service, inventory-service and a relay each way, beside a PostgreSQL
//! server.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use crate::target::{Databases, Target};
use testkit::{
    bootstrap::{bootstrap, create_databases},
    postgres::{self, Cluster, Options, Server},
    processes::{Process, binary, free_port},
};

const HEALTHY_LIMIT: Duration = Duration::from_secs(20);
/// A process ends by itself within its drain time of 5 s.
const GRACE: Duration = Duration::from_secs(8);

/// Which PostgreSQL server the system is to use.
#[derive(clap::Args, Clone, Debug)]
pub struct ServerArguments {
    /// A superuser's URL of an existing server, to be used instead of a private one
    #[arg(long, env = "POSTGRES_URL", hide_env_values = true, value_name = "URL")]
    postgres_url: Option<String>,
    /// Port of the private server
    #[arg(long, env = "POSTGRES_PORT", default_value_t = 5433)]
    port: u16,
}

impl ServerArguments {
    /// A server with our roles and databases; the private one in `directory`, which is deleted at the end unless `keep`.
    ///
    /// # Errors
    /// When there is none and none can be started; the error says what to do.
    pub async fn provide(&self, directory: &Path, keep: bool) -> Result<(Server, Option<Cluster>)> {
        let options =
            Options { directory: directory.into(), port: Some(self.port), keep, durable: true, settings: Vec::new() };
        let (server, cluster) = postgres::provide(self.postgres_url.as_deref(), options).await?;
        bootstrap(&server).await?;
        create_databases(&server).await?;
        Ok((server, cluster))
    }
}

/// Where the system's parts are.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The server of both databases.
    pub server: Server,
    /// Name of the orders database.
    pub orders: String,
    /// Name of the inventory database.
    pub inventory: String,
    /// Where order-service listens.
    pub order_service: SocketAddr,
    /// Where inventory-service listens.
    pub inventory_service: SocketAddr,
    /// Where the relay of the orders database listens.
    pub orders_relay: SocketAddr,
    /// Where the relay of the inventory database listens.
    pub inventory_relay: SocketAddr,
    /// Where logs go.
    pub logs: PathBuf,
    /// What else to set for the processes, by environment variable.
    pub settings: Vec<(String, String)>,
}

/// One of the four processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Takes orders.
    Orders,
    /// Keeps stock.
    Inventory,
    /// Carries the events of orders to inventory.
    OrdersRelay,
    /// Carries inventory's answers back.
    InventoryRelay,
}

impl Service {
    /// All of them, receivers first, so that no relay begins by finding nobody there.
    pub const ALL: [Self; 4] = [Self::Inventory, Self::Orders, Self::OrdersRelay, Self::InventoryRelay];

    /// What the process is called; the name of its log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Orders => "order-service",
            Self::Inventory => "inventory-service",
            Self::OrdersRelay => "orders-relay",
            Self::InventoryRelay => "inventory-relay",
        }
    }

    /// The binary's name.
    fn binary(self) -> &'static str {
        match self {
            Self::Orders => "order-service",
            Self::Inventory => "inventory-service",
            Self::OrdersRelay | Self::InventoryRelay => "outbox-relay",
        }
    }
}

impl Layout {
    /// The ports of the README.
    pub fn standard(server: Server, logs: &Path) -> Self {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            server,
            orders: "orders".into(),
            inventory: "inventory".into(),
            order_service: local(50051),
            inventory_service: local(50052),
            orders_relay: local(50053),
            inventory_relay: local(50054),
            logs: logs.to_owned(),
            settings: Vec::new(),
        }
    }

    /// Ports that are free at this moment, and databases of any name.
    ///
    /// # Errors
    /// When no port is free.
    pub fn on_free_ports(server: Server, orders: &str, inventory: &str, logs: &Path) -> Result<Self> {
        let local = || Ok::<_, anyhow::Error>(SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?)));
        Ok(Self {
            orders: orders.into(),
            inventory: inventory.into(),
            order_service: local()?,
            inventory_service: local()?,
            orders_relay: local()?,
            inventory_relay: local()?,
            ..Self::standard(server, logs)
        })
    }

    /// How the subcommands that work on a running system find this one.
    ///
    /// # Errors
    /// When an address is no part of a URL, which none of ours is.
    pub fn target(&self) -> Result<Target> {
        Ok(Target {
            order_service: format!("http://{}", self.order_service).parse()?,
            inventory_service: format!("http://{}", self.inventory_service).parse()?,
            databases: Databases {
                orders_database_url: self.server.url_for("orders_owner", &self.orders).parse()?,
                inventory_database_url: self.server.url_for("inventory_owner", &self.inventory).parse()?,
            },
        })
    }

    /// Brings both schemas up to date and puts demo stock in, once.
    ///
    /// # Errors
    /// When one of the commands fails; the error shows what it printed.
    pub async fn prepare(&self) -> Result<()> {
        let orders = self.server.url_for("orders_owner", &self.orders);
        let inventory = self.server.url_for("inventory_owner", &self.inventory);
        self.run_once(Service::Orders, "migrate", &orders).await?;
        self.run_once(Service::Inventory, "migrate", &inventory).await?;
        self.run_once(Service::Inventory, "seed", &inventory).await
    }

    async fn run_once(&self, service: Service, command: &str, url: &str) -> Result<()> {
        let mut process =
            self.spawn(service, command, &[("ORDERS_DATABASE_URL", url), ("INVENTORY_DATABASE_URL", url)])?;
        process.finish(command).await
    }

    /// Starts one of the processes and waits until it is healthy.
    ///
    /// # Errors
    /// When it is not in time; the error shows the end of its log.
    pub async fn start(&self, service: Service) -> Result<Process> {
        let (role, database) = match service {
            Service::Orders => ("order_service", &self.orders),
            Service::Inventory => ("inventory_service", &self.inventory),
            Service::OrdersRelay => ("outbox_relay", &self.orders),
            Service::InventoryRelay => ("outbox_relay", &self.inventory),
        };
        let url = self.server.url_for(role, database);
        let listen = self.address(service).to_string();
        let (source, events, receiver) = match service {
            Service::InventoryRelay => (Service::Inventory, "inventory.v1.*", self.order_service),
            _ => (Service::Orders, "orders.v1.*", self.inventory_service),
        };
        let routes = format!("{events}=http://{receiver}");
        let environment = [
            ("ORDERS_DATABASE_URL", url.as_str()),
            ("INVENTORY_DATABASE_URL", &url),
            ("RELAY_DATABASE_URL", &url),
            ("ORDER_SERVICE_LISTEN", &listen),
            ("INVENTORY_SERVICE_LISTEN", &listen),
            ("RELAY_LISTEN", &listen),
            ("RELAY_ROUTES", &routes),
            ("RELAY_SOURCE", source.name()),
        ];
        let mut process = self.spawn(service, "serve", &environment)?;
        process.wait_healthy(self.address(service), HEALTHY_LIMIT).await?;
        Ok(process)
    }

    /// Runs an operator's command of `outbox-relay` on the outbox of a relay, and returns what it prints.
    ///
    /// # Errors
    /// When the command fails; the error shows its message.
    pub async fn operate(&self, relay: Service, arguments: &[&str]) -> Result<String> {
        let database = if relay == Service::InventoryRelay { &self.inventory } else { &self.orders };
        operate(&self.server.url_for("outbox_relay", database), arguments).await
    }

    fn spawn(&self, service: Service, command: &str, environment: &[(&str, &str)]) -> Result<Process> {
        fs::create_dir_all(&self.logs).with_context(|| self.logs.display().to_string())?;
        let environment = environment.iter().copied();
        let settings = self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let program = binary(service.binary())?;
        Process::spawn(service.name(), &program, [command], environment.chain(settings), &self.log(service))
    }

    /// The file with what a process has logged.
    pub fn log(&self, service: Service) -> PathBuf {
        self.logs.join(format!("{}.log", service.name()))
    }

    /// Where a process listens.
    pub fn address(&self, service: Service) -> SocketAddr {
        match service {
            Service::Orders => self.order_service,
            Service::Inventory => self.inventory_service,
            Service::OrdersRelay => self.orders_relay,
            Service::InventoryRelay => self.inventory_relay,
        }
    }
}

/// Runs an operator's command of `outbox-relay` on the outbox of a database, and returns what it prints.
///
/// # Errors
/// When the command fails; the error shows its message.
pub async fn operate(database_url: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(binary("outbox-relay")?);
    command.args(arguments).env("RELAY_DATABASE_URL", database_url);
    let output = command.kill_on_drop(true).output().await.context("cannot run outbox-relay")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "outbox-relay {} failed: {said}", arguments.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

/// Ends the processes, all at once, as an operator would; each gets its time, whatever becomes of the others.
///
/// # Errors
/// When one did not end by itself in its time, or not with success.
pub async fn stop(processes: impl IntoIterator<Item = Process>) -> Result<()> {
    let mut ending = tokio::task::JoinSet::new();
    for mut process in processes {
        ending.spawn(async move {
            let exit = process.terminate(GRACE).await?;
            ensure!(!exit.killed, "{} did not end within {GRACE:?} of SIGTERM and was killed", process.name());
            ensure!(exit.status.success(), "{} ended with {}: {}", process.name(), exit.status, process.log_tail(5));
            Ok(())
        });
    }
    let ended: Vec<Result<()>> = ending.join_all().await;
    ended.into_iter().collect()
}
