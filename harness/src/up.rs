//! The subcommand `up`: the whole system in the foreground, until Ctrl-C.

use std::{path::Path, process::ExitCode, time::Duration};

use anyhow::{Result, bail};
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    time::sleep,
};

use crate::system::{Layout, ServerArguments, Service, stop};
use testkit::{postgres::Cluster, processes::Process};

/// What the private server keeps from one `up` to the next.
const DIRECTORY: &str = "target/postgres";
const LOGS: &str = "target/logs";
/// How often the processes are looked after.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// Run the whole system in the foreground, and say how to use it
///
/// PostgreSQL, order-service, inventory-service and a relay each way, as separate processes on the ports of the README.
/// Data stays from one run to the next. Ctrl-C ends it all.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (cluster, mut processes) = select! {
        started = start(&arguments) => started?,
        // What is started so far ends with the future that started it.
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
    let (server, cluster) = arguments.server.provide(Path::new(DIRECTORY), true).await?;
    let layout = Layout::standard(server, Path::new(LOGS));
    layout.prepare().await?;
    let mut processes = Vec::new();
    for service in Service::ALL {
        let process = layout.start(service).await?;
        println!("up: {:<18} {}  pid {}", service.name(), layout.address(service), process.pid());
        processes.push(process);
    }
    print_usage(&layout);
    Ok((cluster, processes))
}

fn print_usage(layout: &Layout) {
    let (orders, inventory) = (layout.order_service, layout.inventory_service);
    println!(
        r#"up: everything is up; logs are in {LOGS}

  Place an order:
    grpcurl -plaintext -d '{{"customer_id":"ann","currency_code":"EUR","items":[{{"sku":"MUG","quantity":2,"unit_price_minor":1250}}]}}' \
      {orders} orders.v1.OrderService/CreateOrder
  See its stock go:
    grpcurl -plaintext -d '{{"sku":"MUG"}}' {inventory} inventory.v1.InventoryService/GetStock
  See it confirmed, and cancel it, by its order_id:
    grpcurl -plaintext -d '{{"order_id":"…"}}' {orders} orders.v1.OrderService/WatchOrder
    grpcurl -plaintext -d '{{"order_id":"…"}}' {orders} orders.v1.OrderService/CancelOrder
  Load it:
    ghz --config harness/ghz.json {orders}
  Load it, check every reply, and audit:
    target/release/harness stress --orders 5000 --concurrency 50
  Audit:
    target/release/harness audit

  Ctrl-C ends it all; the data stays for the next time."#
    );
}

/// Returns when a process ended by itself, which none should.
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
