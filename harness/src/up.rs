//! The subcommand `up`: the whole system in the foreground, until Ctrl-C.

use std::{
    env,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail};
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    time::sleep,
};

use crate::{
    identities::{CUSTOMERS, Identities},
    system::{FIRST_PORT, Layout, ServerArguments, Service, stop},
    target,
};
use testkit::{
    certificates::Authority,
    ports::claim,
    postgres::{Cluster, FixedPort, Server},
    processes::Process,
};
use uuid::Uuid;

/// Directory of the private server, which is kept.
const DIRECTORY: &str = "target/postgres";
const LOGS: &str = "target/logs";
const CERTIFICATES: &str = "target/up";
const POSTGRES_PORT: u16 = 5433;
/// How long to wait for a port that is taken: longer than Linux keeps the port of a closed connection (a minute).
const PORT_PATIENCE: Duration = Duration::from_secs(75);
/// Pause between two looks at the processes.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// Run the whole system in the foreground, and print how to use it
///
/// Starts PostgreSQL, order-service, inventory-service, loyalty-service and two relays as separate processes. Keeps the data
/// for the next run. Waits for ports that are taken. Ctrl-C ends everything.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// Port of the private PostgreSQL server [default: 5433, or N+5 with --ports-from]
    #[arg(long, env = "POSTGRES_PORT", value_name = "PORT")]
    port: Option<u16>,
    /// First of the ports of order-service, inventory-service, the two relays, loyalty-service and PostgreSQL [default: 50051
    /// to 50055 and 5433]. The services' ports for operators are 1000 more than theirs, and those for relays 2000 more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=63530))]
    ports_from: Option<u16>,
    /// With mutual TLS and a policy: each process has a certificate of its own, and may do what its name may. They are made
    /// anew at each start
    #[arg(long)]
    secure: bool,
}

impl Arguments {
    fn first_port(&self) -> u16 {
        self.ports_from.unwrap_or(FIRST_PORT)
    }

    fn postgres_port(&self) -> u16 {
        self.port.or(self.ports_from.map(|first| first + 5)).unwrap_or(POSTGRES_PORT)
    }

    /// A private server on a service's port would wait for this program, which holds that port for the service.
    fn refuse_shared_port(&self) -> Result<()> {
        if !self.server.is_private() {
            return Ok(());
        }
        let (first, port) = (self.first_port(), self.postgres_port());
        match Service::ALL.into_iter().find(|service| ports_of(*service, first).contains(&port)) {
            Some(service) => bail!(
                "--port {port} is also the port of {}: choose another with --port or POSTGRES_PORT",
                service.name()
            ),
            None => Ok(()),
        }
    }
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    arguments.refuse_shared_port()?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (cluster, mut processes) = select! {
        started = start(&arguments) => started?,
        // Dropping the start ends what it has started so far.
        _ = interrupt.recv() => return Ok(ExitCode::from(130)),
        _ = terminate.recv() => return Ok(ExitCode::from(143)),
    };
    let watched = select! {
        died = watch(&mut processes) => died,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };
    println!("\nup: ending");
    let stopped = stop(processes).await;
    if let Some(cluster) = cluster {
        cluster.stop().await?;
    }
    watched.and(stopped).map(|()| ExitCode::SUCCESS)
}

async fn start(arguments: &Arguments) -> Result<(Option<Cluster>, Vec<Process>)> {
    println!("up: starting");
    let first = arguments.first_port();
    let claims = claim_ports(first).await?;
    let postgres = FixedPort { number: arguments.postgres_port(), patience: PORT_PATIENCE };
    let (server, cluster) = arguments.server.provide(Path::new(DIRECTORY), true, Some(postgres)).await?;
    println!("up: {:<18} {}", "PostgreSQL", server.address());
    let mut layout = layout_on(first, server);
    if arguments.secure {
        layout.identities = Some(Identities::make(Path::new(CERTIFICATES), &Authority::new()?)?);
    }
    layout.prepare().await?;
    let mut processes = Vec::new();
    let mut claims = claims.into_iter();
    for service in Service::ALL {
        for claimed in claims.by_ref().take(ports_of(service, first).len()) {
            drop(claimed);
        }
        let process = layout.start(service).await?;
        println!("up: {:<18} {}  pid {}", service.name(), layout.address(service)?, process.pid());
        processes.push(process);
    }
    println!("{}", usage(&layout, &program()?));
    Ok((cluster, processes))
}

fn layout_on(first: u16, server: Server) -> Layout {
    Layout { serves_ops: true, ..Layout::on_ports_from(first, server, Path::new(LOGS)) }
}

/// The ports of a service for callers, operators and relays, which are one if it is a relay.
fn ports_of(service: Service, first: u16) -> Vec<u16> {
    let port = service.port_from(first);
    let mut ports = vec![port, service.ops_port(port), service.events_port(port)];
    ports.dedup();
    ports
}

/// Claims the ports of [`Service::ALL`]. Holding them until each process starts keeps outgoing connections, such as those to
/// PostgreSQL meanwhile, from getting one.
///
/// Claims them in order. If all were claimed at once, two runs that start together could each hold ports that the other waits
/// for. In order, the run that loses the first port waits there and holds none.
async fn claim_ports(first: u16) -> Result<Vec<TcpListener>> {
    let deadline = Instant::now() + PORT_PATIENCE;
    let mut claims = Vec::new();
    let ports = Service::ALL
        .into_iter()
        .flat_map(|service| ports_of(service, first).into_iter().map(move |port| (service, port)));
    for (service, port) in ports {
        let left = deadline.saturating_duration_since(Instant::now());
        let claimed = claim(port, service.name(), left).await;
        claims.push(
            claimed.map_err(|error| anyhow!("{error}: stop that process, or choose other ports with --ports-from"))?,
        );
    }
    Ok(claims)
}

/// This program as a person types it in the current directory.
fn program() -> Result<String> {
    let path = env::current_exe()?;
    let typed = match path.strip_prefix(env::current_dir()?) {
        Ok(name) if name.components().count() == 1 => Path::new(".").join(name),
        Ok(relative) => relative.to_owned(),
        Err(_) => path,
    };
    Ok(typed.display().to_string())
}

const NOT_OPTIMISED: &str = "
  These programs are not optimised. To measure them, end this and run `make up PROFILE=release`.
";

/// Whether these programs are built for speed, as the directory tells that cargo names after the profile.
fn is_optimised(program: &str) -> bool {
    let directory = Path::new(program).parent().and_then(Path::file_name);
    !directory.is_some_and(|name| name == "local" || name == "debug")
}

fn usage(layout: &Layout, program: &str) -> String {
    let (orders, inventory) = (layout.order_service, layout.inventory_service);
    let grpcurl = grpcurl_as(layout, CUSTOMERS);
    let balance = layout.loyalty.as_ref().map(|loyalty| balance_usage(&grpcurl, loyalty.address)).unwrap_or_default();
    let (addresses, request_id) = (exports(layout), Uuid::new_v4());
    let relay = Path::new(program).with_file_name("outbox-relay");
    let (metrics, console) = (metrics_usage(layout), console_usage(layout));
    let (relay, outbox) = (relay.display(), layout.server.url_for("outbox_relay", &layout.orders));
    let (load, denied) = (load_usage(layout), denied_usage(layout));
    let speed = if is_optimised(program) { "" } else { NOT_OPTIMISED };
    format!(
        r#"up: everything is up; logs are in {LOGS}

  Place an order:
    {grpcurl} -d '{{"request_id":"{request_id}","customer_id":"ann","currency_code":"EUR","items":[{{"sku":"MUG","quantity":2,"unit_price_minor":1250}}]}}' \
      {orders} orders.v1.OrderService/CreateOrder
  Look at the stock:
    {grpcurl} -d '{{"sku":"MUG"}}' {inventory} inventory.v1.InventoryService/GetStock
{balance}  Watch the order, and cancel it, by its order_id:
    {grpcurl} -d '{{"order_id":"…"}}' {orders} orders.v1.OrderService/WatchOrder
    {grpcurl} -d '{{"order_id":"…"}}' {orders} orders.v1.OrderService/CancelOrder
  Look at the outbox, as an operator does, and at the metrics of each process:
    RELAY_DATABASE_URL='{outbox}' {relay} status
    open {console} in a browser (to act there, see docs/console.md)
{metrics}{denied}{load}{addresses}  Put load on it, check every reply, and audit:
    {program} stress --orders 5000 --concurrency 50
  Audit:
    {program} audit
{speed}
  Ctrl-C ends everything. The data is kept."#
    )
}

/// The console of the orders' outbox.
fn console_usage(layout: &Layout) -> String {
    let address = layout.ops_address(Service::OrdersRelay).ok().flatten();
    address.map(|address| layout.url_of(address) + "/console/").unwrap_or_default()
}

/// The pages of all processes, in one line.
fn metrics_usage(layout: &Layout) -> String {
    let addresses = layout.services().into_iter().filter_map(|service| layout.ops_address(service).ok().flatten());
    let ports: Vec<String> = addresses.map(|address| address.port().to_string()).collect();
    let (scheme, trust) = match &layout.identities {
        Some(identities) => ("https", format!(" --cacert {}", identities.ca_file().display())),
        None => ("http", String::new()),
    };
    format!("    curl -s{trust} '{scheme}://127.0.0.1:{{{}}}/metrics'\n", ports.join(","))
}

/// grpcurl with the certificate of this name, if there is one.
fn grpcurl_as(layout: &Layout, name: &str) -> String {
    let Some(identities) = &layout.identities else { return "grpcurl -plaintext".into() };
    let (ca, own) = (identities.ca_file(), identities.own_file(name));
    let (ca, own) = (ca.display(), own.display());
    format!("grpcurl -cacert {ca} -cert {own} -key {own}")
}

/// ghz knows no certificates by its configuration.
fn load_usage(layout: &Layout) -> String {
    if layout.identities.is_some() {
        return String::new();
    }
    format!("  Put load on it:\n    ghz --config harness/ghz.json {}\n", layout.order_service)
}

fn denied_usage(layout: &Layout) -> String {
    let Some(identities) = &layout.identities else { return String::new() };
    let grpcurl = grpcurl_as(layout, Service::OrdersRelay.name());
    let policy = identities.policy_file();
    format!(
        r"  See that a relay may not read orders, as {} says:
    {grpcurl} -import-path proto -proto orders/v1/order_service.proto {} orders.v1.OrderService/ListOrders
",
        policy.display(),
        layout.order_service,
    )
}

fn balance_usage(grpcurl: &str, loyalty: SocketAddr) -> String {
    format!(
        r#"  Look at the customer's points:
    {grpcurl} -d '{{"customer_id":"ann"}}' {loyalty} loyalty.v1.LoyaltyService/GetBalance
"#
    )
}

/// How to tell the other subcommands where this system is, if it is not where they look by default.
fn exports(layout: &Layout) -> String {
    let variables = layout.target_variables().into_iter().zip(target::DEFAULTS);
    let variables = variables.filter(|((_, value), (_, default))| value != default).map(|(variable, _)| variable);
    let tls = layout.identities.as_ref().map(|identities| {
        [("TLS_CERT_FILE", identities.own_file(CUSTOMERS)), ("TLS_CA_FILE", identities.ca_file())]
            .map(|(name, file)| (name, file.display().to_string()))
    });
    let others: Vec<String> = variables
        .chain(tls.into_iter().flatten())
        .map(|(name, value)| format!("    export {name}='{value}'\n"))
        .collect();
    if others.is_empty() {
        return String::new();
    }
    format!("  Tell the next two commands where the system is, in the same shell:\n{}", others.concat())
}

/// Returns when a process has ended by itself, which is an error.
async fn watch(processes: &mut [Process]) -> Result<()> {
    loop {
        for process in &mut *processes {
            if let Some(status) = process.exit_status()? {
                bail!("{} ended ({status}); its log ends in\n{}", process.name(), process.log_tail(10));
            }
        }
        sleep(WATCH_INTERVAL).await;
    }
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

    fn parse(flags: &[&str]) -> Arguments {
        CommandLine::try_parse_from([&["up"], flags].concat()).expect("sound flags").arguments
    }

    fn ports(flags: &[&str]) -> (u16, u16) {
        let arguments = parse(flags);
        (arguments.first_port(), arguments.postgres_port())
    }

    #[test]
    fn ports_from_moves_all_ports_except_one_that_is_given() {
        // Given by a variable, it would be the same.
        if env::var_os("POSTGRES_PORT").is_none() {
            assert_eq!(ports(&[]), (50051, 5433));
            assert_eq!(ports(&["--ports-from", "60000"]), (60000, 60005));
            assert_eq!(ports(&["--ports-from", "63530"]), (63530, 63535));
        }
        assert_eq!(ports(&["--port", "7000"]), (50051, 7000));
        assert_eq!(ports(&["--ports-from", "60000", "--port", "7000"]), (60000, 7000));
        assert!(CommandLine::try_parse_from(["up", "--ports-from", "63531"]).is_err());
    }

    #[test]
    fn a_private_server_on_the_port_of_a_service_is_refused() {
        let checked = |flags: &[&str], url| parse(&[flags, &["--postgres-url", url]].concat()).refuse_shared_port();
        let own = ["--port", "50052"];
        let message = checked(&own, "").expect_err("a shared port").to_string();
        assert!(message.starts_with("--port 50052 is also the port of inventory-service: choose another"), "{message}");
        assert!(checked(&own, "postgres://elsewhere").is_ok(), "an existing server has a port already");
        for (port, refused) in
            [("5999", false), ("6000", true), ("6004", true), ("6005", false), ("7004", true), ("8001", true)]
        {
            assert_eq!(checked(&["--ports-from", "6000", "--port", port], "").is_err(), refused, "{port}");
        }
    }

    fn layout_at(first: u16, postgres: u16) -> Layout {
        let server = Server::parse(&format!("postgres://postgres:postgres@127.0.0.1:{postgres}")).expect("a URL");
        layout_on(first, server)
    }

    fn usage_at(first: u16, postgres: u16) -> String {
        usage(&layout_at(first, postgres), "target/release/harness")
    }

    #[test]
    fn usage_names_the_addresses_that_are_not_the_default() {
        let standard = usage_at(FIRST_PORT, POSTGRES_PORT);
        assert!(standard.contains(" 127.0.0.1:50051 orders.v1.OrderService/CreateOrder"), "{standard}");
        assert!(standard.contains("    target/release/harness audit\n"), "{standard}");
        assert!(standard.contains("'http://127.0.0.1:{51052,51051,51055,50053,50054}/metrics'"), "{standard}");
        assert!(!standard.contains("export"), "{standard}");
        assert!(!standard.contains("PROFILE=release"), "{standard}");
        assert!(usage(&layout_at(FIRST_PORT, POSTGRES_PORT), "target/local/harness").contains("PROFILE=release"));

        let moved = usage_at(60000, 60005);
        assert!(moved.contains(" 127.0.0.1:60001 inventory.v1.InventoryService/GetStock"), "{moved}");
        assert!(moved.contains(" 127.0.0.1:60004 loyalty.v1.LoyaltyService/GetBalance"), "{moved}");
        for export in [
            "    export ORDER_SERVICE_URL='http://127.0.0.1:60000'\n",
            "    export INVENTORY_SERVICE_URL='http://127.0.0.1:60001'\n",
            "    export ORDER_EVENTS_URL='http://127.0.0.1:62000'\n",
            "    export INVENTORY_EVENTS_URL='http://127.0.0.1:62001'\n",
            "    export ORDERS_DATABASE_URL='postgres://orders_owner:orders_owner@127.0.0.1:60005/orders'\n",
            "    export INVENTORY_DATABASE_URL='postgres://inventory_owner:inventory_owner@127.0.0.1:60005/inventory'\n",
            "    export LOYALTY_DATABASE_URL='postgres://loyalty_owner:loyalty_owner@127.0.0.1:60005/loyalty'\n",
        ] {
            assert!(moved.contains(export), "{export} in {moved}");
        }
        let other_server = usage_at(FIRST_PORT, 5432);
        assert_eq!(other_server.matches("export").count(), 3, "{other_server}");
    }
}
