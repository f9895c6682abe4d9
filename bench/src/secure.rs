//! Part 7: what mutual TLS and a policy cost, against the same system with neither. Both take turns.
//!
//! For `CreateOrder`, two processes serve one database, one of each kind. For the drain, the processes are replaced
//! before each turn. Certificates are of ECDSA with P-256, and both ends of a connection are on this machine.

use std::time::Duration;

use anyhow::Result;
use proto::orders::v1::order_service_client::OrderServiceClient;
use serde_json::json;
use tonic::transport::Channel;

use super::{
    backlog::Backlog,
    closed_loop::{self, Load},
    quantiles::median,
    report::{Report, Table, number},
    requests::{Shape, connections_for},
    site::{Site, finish, start},
};
use harness::{
    identities::{CUSTOMERS, Identities},
    stress::wait_until_delivered,
    system::{Layout, Service, stop},
};
use testkit::{certificates::Authority, processes::free_port};

const AT_ONCE: u32 = 64;
/// Short, so that what else the machine does meets both alike.
const TIME: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_millis(500);
const DRAIN_LIMIT: Duration = Duration::from_secs(180);

/// The rates without TLS, and with all of it.
#[derive(Default)]
struct Rates {
    plain: Vec<f64>,
    secure: Vec<f64>,
}

impl Rates {
    fn add(&mut self, what: &str, is_secure: bool, rate: f64) {
        let (name, rates) = if is_secure { ("mutual TLS", &mut self.secure) } else { ("no TLS", &mut self.plain) };
        println!("bench: 7  {what:<14}{name:<12}{:>8}/s", number(rate));
        rates.push(rate);
    }

    fn ratio(&self) -> f64 {
        median(&self.secure) / median(&self.plain)
    }
}

/// Measures and prints.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let identities = Identities::make(&site.directory().join("certificates"), &Authority::new()?)?;
    let calls = measure_calls(site, &identities, report).await?;
    let drains = measure_drains(site, &identities, report).await?;
    let mut table = Table::new("7. Mutual TLS and a policy", &["", "no TLS", "mutual TLS", "ratio"]);
    for (name, rates) in [("CreateOrder, 64 at once, orders/s", &calls), ("drain, events/s", &drains)] {
        let ratio = format!("{:.3}", rates.ratio());
        table.row([name.into(), number(median(&rates.plain)), number(median(&rates.secure)), ratio]);
    }
    table.print();
    report.figure("create64_secure_over_plain", calls.ratio());
    report.figure("drain_secure_over_plain", drains.ratio());
    let raw = |rates: &Rates| json!({"plain": rates.plain, "secure": rates.secure});
    report.raw("secure", json!({"create64": raw(&calls), "drain": raw(&drains)}));
    Ok(())
}

/// Who comes first changes from round to round, so that neither gains by its place.
fn turns(round: usize) -> [bool; 2] {
    if round.is_multiple_of(2) { [false, true] } else { [true, false] }
}

async fn measure_calls(site: &Site, identities: &Identities, report: &mut Report) -> Result<Rates> {
    let plain = site.databases("calls").await?;
    let mut secure = Layout { identities: Some(identities.clone()), ..plain.clone() };
    secure.order_service.set_port(free_port()?);
    secure.order_events.set_port(free_port()?);
    let mut processes = start(&plain, &[Service::Inventory, Service::Orders]).await?;
    Shape::USUAL.add_stock(&plain.target()?).await?;
    let other = start(&secure, &[Service::Orders]).await?;
    let clients = [clients(&plain)?, clients(&secure)?];
    let mut rates = Rates::default();
    let load = Load { at_once: AT_ONCE, warm_up: WARM_UP, time: TIME, shape: Shape::USUAL };
    for round in 0..site.size(16, 2) {
        for is_secure in turns(round) {
            let answered = closed_loop::call_by(&clients[usize::from(is_secure)], load).await?;
            report.failed("CreateOrder", &answered.failures);
            rates.add("CreateOrder", is_secure, answered.rate);
        }
    }
    stop(other).await?;
    processes.extend(start(&plain, &[Service::OrdersRelay, Service::InventoryRelay]).await?);
    wait_until_delivered(&plain.target()?.databases, DRAIN_LIMIT).await?;
    finish(&plain, processes, report).await?;
    Ok(rates)
}

fn clients(layout: &Layout) -> Result<Vec<OrderServiceClient<Channel>>> {
    let connect = |_| Ok(OrderServiceClient::new(layout.connect(Service::Orders, CUSTOMERS)?));
    (0..connections_for(AT_ONCE)).map(connect).collect()
}

async fn measure_drains(site: &Site, identities: &Identities, report: &mut Report) -> Result<Rates> {
    let events = site.size(100_000, 10_000);
    println!("bench: 7  placing {} orders", number(events as f64));
    let mut backlog = Backlog::place(site, "secure", events, Shape::USUAL).await?;
    let mut rates = Rates::default();
    for round in 0..site.size(6, 2) {
        for is_secure in turns(round) {
            let drained = backlog.drain_by(events, is_secure.then_some(identities)).await?;
            rates.add("drain", is_secure, drained.rate);
        }
    }
    backlog.finish(report).await?;
    Ok(rates)
}
