//! Part 1: how many orders per second `CreateOrder` accepts.
//!
//! Each round compares it with pgbench, which commits the same rows with one order per transaction. And it compares it
//! with an upper bound of two rates: gRPC alone (a process that answers at once, see [`super::noop`]) and inserts alone
//! (many orders per transaction, see [`super::grouped_inserts`]). The bound assumes that the two alternate: `1 / (1 /
//! gRPC + 1 / inserts)`.
//!
//! No relay runs meanwhile. The acknowledged orders are counted after every measurement, then the tables are emptied.
//! At the end, the orders of the last measurement are delivered, answered and audited.

use std::{collections::BTreeMap, net::TcpStream, time::Duration};

use anyhow::{Result, ensure};
use serde_json::json;
use sqlx::PgConnection;
use tokio::time::{Instant, sleep};

use super::{
    closed_loop::{self, Load},
    grouped_inserts,
    pgbench::{self, Until},
    plot,
    quantiles::{Latencies, P50, P99, median},
    report::{Report, Table, number},
    requests::Shape,
    site::{Site, finish, start},
};
use harness::{
    stress::wait_until_delivered,
    system::{Layout, Service},
};
use testkit::processes::{Process, free_port};

const CALLS: [u32; 4] = [1, 16, 64, 256];
const CLIENTS: [u32; 3] = [1, 16, 64];
/// Each is also measured with two subscriptions, so that every event has two rows.
const CALLS_TWICE: [u32; 2] = [64, 256];
const SUBSCRIBE: &str = "INSERT INTO outbox_subscriptions (name, pattern, created_by) VALUES ('second', '*', 'bench')";
const UNSUBSCRIBE: &str = "DELETE FROM outbox_subscriptions WHERE name = 'second'";
const NOOP_CALLS: u32 = 256;
const DRAIN_LIMIT: Duration = Duration::from_secs(180);
const EMPTY: &str = "TRUNCATE orders, order_items, outbox";

/// The rounds of each variant.
#[derive(Default)]
struct Measured(BTreeMap<String, Vec<Round>>);

#[derive(Clone, Copy)]
struct Round {
    rate: f64,
    p50: f64,
    p99: f64,
}

impl Round {
    fn of(rate: f64, latencies: &Latencies) -> Self {
        Self { rate, p50: latencies.at(P50), p99: latencies.at(P99) }
    }
}

impl Measured {
    fn add(&mut self, variant: String, round: Round) {
        println!("bench: 1  {variant:<28} {:>8}/s  p50 {:>6} ms", number(round.rate), number(round.p50));
        self.0.entry(variant).or_default().push(round);
    }

    fn median(&self, variant: &str, of: impl Fn(&Round) -> f64) -> f64 {
        median(&self.0.get(variant).into_iter().flatten().map(of).collect::<Vec<_>>())
    }

    fn rate(&self, variant: &str) -> f64 {
        self.median(variant, |round| round.rate)
    }
}

fn calls(at_once: u32) -> String {
    format!("CreateOrder, {at_once} at once")
}

fn clients(clients: u32) -> String {
    format!("pgbench, {clients} at once")
}

fn subscribed_twice(at_once: u32) -> String {
    format!("two subscriptions, {at_once} at once")
}

const NOOP: &str = "gRPC alone, 256 at once";
const GROUPED: &str = "grouped inserts, 2 at once";

/// Measures, prints and plots.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let layout = site.databases("create").await?;
    let plain = site.databases("plain").await?;
    let mut orders = site.connect(&layout.orders).await?;
    let mut plain_orders = site.connect(&plain.orders).await?;
    sqlx::raw_sql(include_str!("../sql/ids.sql")).execute(&mut plain_orders).await?;
    let groups = site.size(800, 200);
    let mut processes = start(&layout, &[Service::Inventory, Service::Orders]).await?;
    Shape::USUAL.add_stock(&layout.target()?).await?;
    let (noop, noop_process) = start_noop(site).await?;

    let mut measured = Measured::default();
    for round in 1..=site.rounds() {
        println!("bench: 1  round {round}");
        for at_once in CALLS {
            if CALLS_TWICE.contains(&at_once) {
                sqlx::raw_sql(SUBSCRIBE).execute(&mut orders).await?;
                begin_empty(site, &mut orders).await?;
                let variant = subscribed_twice(at_once);
                measure_calls(site, layout.order_service, at_once, variant, &mut measured, report).await?;
                sqlx::raw_sql(UNSUBSCRIBE).execute(&mut orders).await?;
            }
            begin_empty(site, &mut orders).await?;
            let acknowledged =
                measure_calls(site, layout.order_service, at_once, calls(at_once), &mut measured, report).await?;
            check_placed(&mut orders, acknowledged, report).await?;
        }
        let bytes = payload_bytes(&mut orders).await?;
        for count in CLIENTS {
            begin_empty(site, &mut plain_orders).await?;
            measure_pgbench(site, &plain, count, bytes, &mut measured).await?;
        }
        begin_empty(site, &mut plain_orders).await?;
        measure_grouped(site, &plain, bytes, groups, &mut measured).await?;
        measure_calls(site, noop, NOOP_CALLS, NOOP.into(), &mut measured, report).await?;
    }
    drop(noop_process);
    report_figures(&measured, report);
    plot::throughput(site.directory(), &points(&measured, &CALLS, calls), &points(&measured, &CLIENTS, clients))?;

    println!("bench: 1  delivering the last orders");
    processes.extend(start(&layout, &[Service::OrdersRelay, Service::InventoryRelay]).await?);
    wait_until_delivered(&layout.target()?.databases, DRAIN_LIMIT).await?;
    finish(&layout, processes, report).await
}

/// Every measurement begins with empty tables after a checkpoint. If tables kept their rows, the fastest variant would
/// have the largest indexes.
async fn begin_empty(site: &Site, database: &mut PgConnection) -> Result<()> {
    sqlx::raw_sql(EMPTY).execute(database).await?;
    site.checkpoint().await
}

async fn start_noop(site: &Site) -> Result<(std::net::SocketAddr, Process)> {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let arguments = ["noop".to_owned(), format!("--listen={address}")];
    let log = site.directory().join("logs/noop.log");
    let mut process =
        Process::spawn("noop", &std::env::current_exe()?, arguments, std::iter::empty::<(&str, &str)>(), &log)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while TcpStream::connect(address).is_err() {
        ensure!(process.is_running() && Instant::now() < deadline, "noop did not start: {}", process.log_tail(5));
        sleep(Duration::from_millis(20)).await;
    }
    Ok((address, process))
}

/// Returns the number of acknowledged orders.
async fn measure_calls(
    site: &Site,
    address: std::net::SocketAddr,
    at_once: u32,
    variant: String,
    measured: &mut Measured,
    report: &mut Report,
) -> Result<u64> {
    let (warm_up, time) = times(site);
    let answered = closed_loop::call(address, Load { at_once, warm_up, time, shape: Shape::USUAL }).await?;
    report.failed(&variant, &answered.failures);
    measured.add(variant, Round::of(answered.rate, &answered.latencies));
    Ok(answered.acknowledged)
}

/// Every acknowledged order must exist, otherwise the rate means nothing. There may be more orders, since a failed call
/// may have placed its order.
async fn check_placed(orders: &mut PgConnection, acknowledged: u64, report: &mut Report) -> Result<()> {
    let placed: i64 = sqlx::query_scalar(
        "-- bench: count orders
        SELECT count(*) FROM orders",
    )
    .fetch_one(orders)
    .await?;
    let missing = acknowledged.saturating_sub(placed.unsigned_abs());
    if missing > 0 {
        report.wrong(&format!("{missing} orders were acknowledged and do not exist"), missing);
    }
    Ok(())
}

/// The warm-up and the time that counts. pgbench runs for whole seconds, so their sum is just below one.
fn times(site: &Site) -> (Duration, Duration) {
    site.size(
        (Duration::from_millis(900), Duration::from_secs(4)),
        (Duration::from_millis(300), Duration::from_secs(1)),
    )
}

/// The mean payload length of the events of order-service, so that pgbench writes the same amount.
async fn payload_bytes(orders: &mut PgConnection) -> Result<u32> {
    let bytes: i32 = sqlx::query_scalar(
        "-- bench: read payload length
        SELECT coalesce(avg(length(payload)), 0)::integer FROM outbox",
    )
    .fetch_one(orders)
    .await?;
    Ok(bytes.unsigned_abs())
}

async fn measure_pgbench(site: &Site, plain: &Layout, count: u32, bytes: u32, measured: &mut Measured) -> Result<()> {
    let url = site.superuser_url(&plain.orders);
    let (warm_up, time) = times(site);
    let until = Until::Time { warm_up, time };
    let variables = &[("bytes", bytes)];
    let run = pgbench::Run { script: pgbench::CREATE_ORDER, url: &url, clients: count, until, variables };
    let outcome = pgbench::run(site.installation(), site.directory(), run).await?;
    measured.add(clients(count), Round::of(outcome.rate, &outcome.latencies));
    Ok(())
}

async fn measure_grouped(
    site: &Site,
    plain: &Layout,
    bytes: u32,
    groups: usize,
    measured: &mut Measured,
) -> Result<()> {
    let url = site.superuser_url(&plain.orders);
    let (rate, latencies) = grouped_inserts::run(&url, groups, usize::try_from(bytes)?).await?;
    measured.add(GROUPED.into(), Round::of(rate, &latencies));
    Ok(())
}

fn report_figures(measured: &Measured, report: &mut Report) {
    let bound = 1.0 / (1.0 / measured.rate(NOOP) + 1.0 / measured.rate(GROUPED));
    let mut table = Table::new("1. CreateOrder", &["", "orders/s", "p50 ms", "p99 ms"]);
    let variants = CALLS
        .map(calls)
        .into_iter()
        .chain(CALLS_TWICE.map(subscribed_twice))
        .chain(CLIENTS.map(clients))
        .chain([NOOP.into(), GROUPED.into()]);
    for variant in variants {
        let [p50, p99] = [|round: &Round| round.p50, |round: &Round| round.p99].map(|of| measured.median(&variant, of));
        table.row([variant.clone(), number(measured.rate(&variant)), number(p50), number(p99)]);
    }
    table.row(["upper bound: gRPC and inserts alternate".into(), number(bound)]);
    table.print();

    let plain64 = measured.rate(&clients(64));
    report.figure("create64_over_pgbench64", measured.rate(&calls(64)) / plain64);
    report.figure("create256_over_pgbench64", measured.rate(&calls(256)) / plain64);
    report.figure("create256_over_bound", measured.rate(&calls(256)) / bound);
    for (at_once, key) in CALLS_TWICE.into_iter().zip(["create64_twice_over_once", "create256_twice_over_once"]) {
        report.figure(key, measured.rate(&subscribed_twice(at_once)) / measured.rate(&calls(at_once)));
    }
    let p50 = |variant: &str| measured.median(variant, |round| round.p50);
    report.figure("lone_p50_over_plain", p50(&calls(1)) / p50(&clients(1)));
    let rounds = measured.0.iter().map(|(variant, rounds)| {
        let rounds =
            rounds.iter().map(|Round { rate, p50, p99 }| json!({ "rate": rate, "p50_ms": p50, "p99_ms": p99 }));
        (variant.clone(), rounds.collect())
    });
    let rounds: serde_json::Map<_, _> = rounds.collect();
    report.raw("create_order", json!({ "rounds": rounds, "bound": bound }));
}

fn points(measured: &Measured, concurrency: &[u32], variant: impl Fn(u32) -> String) -> Vec<(u32, f64)> {
    concurrency.iter().map(|at_once| (*at_once, measured.rate(&variant(*at_once)))).collect()
}
