//! The subcommand `demo`: shows the pattern step by step, with an explanation of each.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use prost::{Message, Name};
use proto::{
    events::v1::{DeliverRequest, Event, Outcome, event_receiver_client::EventReceiverClient},
    inventory::v1::StockReserved,
    loyalty::v1::{GetBalanceRequest, loyalty_service_client::LoyaltyServiceClient},
    orders::v1::{
        CancelOrderRequest, CreateOrderRequest, Order, OrderCreated, OrderItem, OrderStatus, WatchOrderRequest,
    },
};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::{
    audit::audit,
    identities::{CUSTOMERS, Identities},
    interrupt::unless_interrupted,
    replay::{available, name, replay, wait_until_applied},
    stress::{Load, count_dead, place_orders, wait_until_delivered},
    system::{Layout, ServerArguments, Service, stop},
    target::Target,
};
use testkit::{
    certificates::Authority,
    processes::{Process, free_port},
};
use tonic::Code;

const DIRECTORY: &str = "target/demo/postgres";
const LOGS: &str = "target/demo/logs";
const CERTIFICATES: &str = "target/demo/certificates";
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
const LOG_LIMIT: Duration = Duration::from_secs(5);
const SKU: &str = "MUG";
const CUSTOMER: &str = "ann";
const ORDERS_AT_ONCE: u32 = 50;
/// Workers and batch of each relay, smaller than the defaults: one default lease would take all fifty events.
const WORKERS: u64 = 5;
const BATCH: u64 = 10;

const NEXT: &str = "
  The demo has stopped all of this. Where to look next:
     make up              starts a system that keeps running, and prints how to call it, operate it and measure it
     docs/console.md      its console, at http://127.0.0.1:50053/console/: flow, dead events, journeys, deeds
     docs/operating.md    what an operator does: status, journey, why, dead letters, pause, undo
     docs/metrics.md      the metrics of each process, with alerts and a dashboard; docs/traces.md for traces
     make chaos           breaks the system in every way known, and counts what is lost
";

/// Inventory's events by worker.
type Shares = BTreeMap<u64, u64>;

/// Show the pattern step by step, in a few seconds
///
/// Starts a system of its own on free ports, places orders, delivers an event twice, audits, and stops everything.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// With mutual TLS and a policy: each process has a certificate of its own, and may do what its name may
    #[arg(long)]
    secure: bool,
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    unless_interrupted(async { show(&arguments).await.map(|()| ExitCode::SUCCESS) }).await
}

async fn show(arguments: &Arguments) -> Result<()> {
    let (server, cluster) = arguments.server.provide(Path::new(DIRECTORY), false, None).await?;
    // The relay's log tells which worker delivered which events. The log of an earlier demo would be counted too.
    if let Err(error) = fs::remove_dir_all(LOGS)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).context(LOGS);
    }
    let mut layout = Layout::on_free_ports(server, "orders", "inventory", Path::new(LOGS))?;
    layout = layout.with_loyalty("loyalty", [free_port()?, free_port()?]);
    layout.settings.push(("RUST_LOG".into(), "info,outbox_relay=debug".into()));
    layout.settings.push(("RELAY_WORKERS".into(), WORKERS.to_string()));
    layout.settings.push(("RELAY_BATCH".into(), BATCH.to_string()));
    if arguments.secure {
        layout.identities = Some(Identities::make(Path::new(CERTIFICATES), &Authority::new()?)?);
    }
    layout.prepare().await?;
    let target = layout.target()?;

    println!("\n  The transactional outbox: services with a database each, and a relay for each that sends events.\n");
    println!("     {:<18} {:<12} {}", "PostgreSQL", "", layout.server.address());
    let mut processes = vec![start(&layout, Service::Inventory).await?, start(&layout, Service::Orders).await?];
    let (order_id, before) = show_commit(&target).await?;
    processes.push(show_delivery(&layout, &target, order_id, before).await?);
    processes.push(show_reply(&layout, &target, order_id).await?);
    processes.push(show_second_subscriber(&layout, &target).await?);
    show_rejection(&target).await?;
    show_cancellation(&target, order_id, before).await?;
    show_dead_letter(&layout, &target).await?;
    show_workers(&layout, &target).await?;
    show_replay(&target).await?;
    show_audit(&target).await?;
    show_journey(&layout, order_id).await?;
    if let Some(identities) = &layout.identities {
        show_denials(&layout, &target, identities, order_id).await?;
    }

    stop(processes).await?;
    if let Some(cluster) = cluster {
        cluster.stop().await?;
    }
    println!("{NEXT}");
    Ok(())
}

async fn start(layout: &Layout, service: Service) -> Result<Process> {
    let process = layout.start(service).await?;
    println!("     {:<18} pid {:<8} {}", service.name(), process.pid(), layout.address(service)?);
    Ok(process)
}

async fn show_commit(target: &Target) -> Result<(Uuid, i64)> {
    println!("\n  1. One transaction commits an order and its event.");
    let before = available(target, SKU).await?;
    let order = place(target, 3).await?;
    println!("     CreateOrder 3 × {SKU} → order {}, {}", order.order_id, status_name(order.status()));
    let order_id: Uuid = order.order_id.parse()?;
    let row = sqlx::query!(
        "-- demo: show outbox rows
        SELECT event_id, event_type, sequence, length(payload) AS bytes, string_agg(name, ' and ' ORDER BY name) AS names
        FROM outbox JOIN outbox_subscriptions USING (subscription_id)
        WHERE aggregate_id = $1
        GROUP BY event_id, event_type, sequence, payload",
        order_id
    )
    .fetch_one(&mut target.databases.orders().await?)
    .await?;
    println!(
        "     its outbox rows: event {}, {}, sequence {}, {} bytes, for {}",
        row.event_id,
        row.event_type,
        row.sequence,
        row.bytes.unwrap_or_default(),
        row.names.unwrap_or_default()
    );
    println!(
        "     No relay runs yet. The event waits in the outbox, and the stock of {SKU} is still {}.",
        available(target, SKU).await?
    );
    Ok((order_id, before))
}

async fn place(target: &Target, quantity: i32) -> Result<Order> {
    let request = CreateOrderRequest {
        request_id: Uuid::new_v4().into(),
        customer_id: CUSTOMER.into(),
        currency_code: "EUR".into(),
        items: vec![OrderItem { sku: SKU.into(), quantity, unit_price_minor: 1250 }],
    };
    Ok(target.orders()?.create_order(request).await?.into_inner())
}

/// Watches the order until its status is final.
async fn watch(target: &Target, order_id: &str) -> Result<Order> {
    let request = WatchOrderRequest { order_id: order_id.into() };
    let mut watch = target.orders()?.watch_order(request).await?.into_inner();
    let mut last = None;
    while let Some(order) =
        timeout(DRAIN_LIMIT, watch.message()).await.context("the order still has no final status")??
    {
        last = Some(order);
    }
    last.context("the watch ended without an answer")
}

fn status_name(status: OrderStatus) -> &'static str {
    status.as_str_name().trim_start_matches("ORDER_STATUS_")
}

async fn show_delivery(layout: &Layout, target: &Target, order_id: Uuid, before: i64) -> Result<Process> {
    println!("\n  2. The relay leases the row, delivers its event over gRPC, and deletes the row.");
    let relay = start(layout, Service::OrdersRelay).await?;
    wait_until_applied(target, order_id).await?;
    let after = available(target, SKU).await?;
    println!("     one transaction of inventory-service deducted stock and wrote the reply: {SKU} {before} → {after}");
    ensure!(before - after == 3, "stock of {SKU} went {before} → {after} for an order of 3");
    Ok(relay)
}

async fn show_reply(layout: &Layout, target: &Target, order_id: Uuid) -> Result<Process> {
    println!(
        "\n  3. The reply comes back the same way: the outbox of inventory-service, a second relay, order-service."
    );
    let relay = start(layout, Service::InventoryRelay).await?;
    let order = watch(target, &order_id.to_string()).await?;
    println!("     WatchOrder: PENDING → {}", status_name(order.status()));
    ensure!(order.status() == OrderStatus::Confirmed, "the order became {}", status_name(order.status()));
    Ok(relay)
}

/// The order is CONFIRMED by now, so inventory has had its event.
async fn show_second_subscriber(layout: &Layout, target: &Target) -> Result<Process> {
    println!(
        "\n  4. A second subscriber has a queue of its own. loyalty-service has not run so far, and nobody waited for it."
    );
    let table = layout.operate(Service::OrdersRelay, &["subscriptions"]).await?;
    show_output("outbox-relay subscriptions", &table);
    let process = start(layout, Service::Loyalty).await?;
    wait_until_delivered(&target.databases, DRAIN_LIMIT).await?;
    let mut client = LoyaltyServiceClient::new(layout.connect(Service::Loyalty, CUSTOMERS)?);
    let balance = client.get_balance(GetBalanceRequest { customer_id: CUSTOMER.into() }).await?.into_inner();
    println!("     GetBalance → {CUSTOMER} has {} points", balance.points);
    ensure!(balance.points > 0, "loyalty-service has awarded no points");
    Ok(process)
}

fn show_output(command: &str, output: &str) {
    println!("     $ {command}");
    for line in output.lines() {
        println!("       {line}");
    }
}

async fn show_rejection(target: &Target) -> Result<()> {
    println!("\n  5. An order that is too large is rejected by a reply, not by an error.");
    let placed = place(target, 1_000_000).await?;
    let order = watch(target, &placed.order_id).await?;
    println!("     CreateOrder 1000000 × {SKU} → {}: {}", status_name(order.status()), order.rejection);
    ensure!(order.status() == OrderStatus::Rejected, "the order became {}", status_name(order.status()));
    Ok(())
}

async fn show_cancellation(target: &Target, order_id: Uuid, before: i64) -> Result<()> {
    println!("\n  6. The first order is cancelled. Its events are delivered in sequence, and its stock returns.");
    let during = available(target, SKU).await?;
    let request = CancelOrderRequest { request_id: Uuid::new_v4().into(), order_id: order_id.into() };
    let order = target.orders()?.cancel_order(request).await?.into_inner();
    wait_until_delivered(&target.databases, DRAIN_LIMIT).await?;
    let after = available(target, SKU).await?;
    println!("     CancelOrder → {}; {SKU} {during} → {after}", status_name(order.status()));
    ensure!(after == before, "stock of {SKU} went {before} → {during} → {after}");
    Ok(())
}

async fn show_dead_letter(layout: &Layout, target: &Target) -> Result<()> {
    println!("\n  7. An event that cannot be applied becomes a dead letter. Other events still arrive.");
    let event_id = enqueue_poison(target).await?.to_string();
    wait_for_dead(target).await?;
    for arguments in [
        &["dead", "list"][..],
        &["dead", "show", &event_id],
        &["dead", "discard", &event_id, "--by", "demo", "--reason", "an order without items"],
    ] {
        let quoted = arguments.iter().map(|text| if text.contains(' ') { format!("'{text}'") } else { (*text).into() });
        let command = format!("outbox-relay {}", quoted.collect::<Vec<String>>().join(" "));
        show_output(&command, &layout.operate(Service::OrdersRelay, arguments).await?);
    }
    Ok(())
}

/// Writes an event that only a service with a bug would write: an order without items. It is for inventory alone, since
/// loyalty does not look at items.
async fn enqueue_poison(target: &Target) -> Result<Uuid> {
    let (order_id, event_id) = (Uuid::now_v7(), Uuid::now_v7());
    let poison = OrderCreated {
        order_id: order_id.into(),
        customer_id: "nobody".into(),
        currency_code: "EUR".into(),
        ..OrderCreated::default()
    };
    sqlx::query!(
        "-- demo: enqueue poison
        INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload)
        SELECT subscription_id, $1, 1, $2, $3, $4 FROM outbox_subscriptions WHERE name = 'inventory'",
        order_id,
        event_id,
        OrderCreated::full_name(),
        poison.encode_to_vec(),
    )
    .execute(&mut target.databases.orders().await?)
    .await?;
    Ok(event_id)
}

async fn wait_for_dead(target: &Target) -> Result<()> {
    let started = Instant::now();
    while count_dead(&target.databases).await? == 0 {
        ensure!(started.elapsed() < DRAIN_LIMIT, "the event is not dead after {DRAIN_LIMIT:?}");
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn show_workers(layout: &Layout, target: &Target) -> Result<()> {
    println!("\n  8. {ORDERS_AT_ONCE} orders at once. SKIP LOCKED shares inventory's events among {WORKERS} workers.");
    let already = read_shares(layout)?;
    let started = Instant::now();
    let load = Load { orders: ORDERS_AT_ONCE, concurrency: ORDERS_AT_ONCE, retry_for: Duration::ZERO };
    let placed = place_orders(target, load).await?;
    println!("     all orders acknowledged after {:.0?}, each reply checked", placed.elapsed);
    wait_until_delivered(&target.databases, DRAIN_LIMIT).await?;
    println!("     all events delivered and answered after {:.0?}", started.elapsed());
    for (worker, events) in wait_for_shares(layout, &already, load.orders.into()).await? {
        println!("     worker {worker} {events:>3}  {}", "▪".repeat(usize::try_from(events)?));
    }
    Ok(())
}

/// Inventory's events that each worker has settled since `already`. Waits until there are `expected`: a worker logs after it settles.
async fn wait_for_shares(layout: &Layout, already: &Shares, expected: u64) -> Result<Shares> {
    let started = Instant::now();
    loop {
        let mut shares = read_shares(layout)?;
        for (worker, events) in &mut shares {
            *events -= already.get(worker).copied().unwrap_or(0);
        }
        let settled: u64 = shares.values().sum();
        if settled == expected {
            return Ok(shares);
        }
        ensure!(started.elapsed() < LOG_LIMIT, "the workers settled {settled} events for {expected} orders");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Inventory's events that each worker has settled so far, from the relay's log.
fn read_shares(layout: &Layout) -> Result<Shares> {
    let path = layout.log(Service::OrdersRelay);
    let log = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut shares: Shares = (1..=WORKERS).map(|worker| (worker, 0)).collect();
    for line in log.lines() {
        let entry: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        if entry["route"] == "inventory"
            && let (Some(worker), Some(handled)) = (entry["worker"].as_u64(), entry["handled"].as_u64())
        {
            *shares.entry(worker).or_default() += handled;
        }
    }
    Ok(shares)
}

async fn show_replay(target: &Target) -> Result<()> {
    println!("\n  9. One event is delivered twice, as after a lost reply. Its stock is deducted once.");
    let replay = replay(target, SKU).await?;
    replay.check()?;
    let [before, after_first, after_second] = replay.stock;
    println!("     event {}", replay.event_id);
    println!("     1st delivery: {:<10} {SKU} {before} → {after_first}", name(Outcome::Applied));
    println!("     2nd delivery: {:<10} {SKU} {after_first} → {after_second}", name(replay.second));
    Ok(())
}

async fn show_journey(layout: &Layout, order_id: Uuid) -> Result<()> {
    println!("\n  11. An operator asks where the events of the first order are: `outbox-relay journey`.");
    let journey = layout.operate(Service::OrdersRelay, &["journey", &order_id.to_string()]).await?;
    ensure!(journey.contains("APPLIED"), "no receiver has applied the order: {journey}");
    for line in journey.lines() {
        println!("     {line}");
    }
    Ok(())
}

/// What inventory would say if it had reserved an order's stock, for whoever is not inventory's relay to say it.
///
/// # Errors
/// If the database cannot be asked for the time.
pub async fn forge_reservation(target: &Target, order_id: &str) -> Result<DeliverRequest> {
    let now = sqlx::query_scalar("-- demo: read clock\n SELECT extract(epoch FROM now())::bigint");
    let seconds = now.fetch_one(&mut target.databases.orders().await?).await?;
    let event = Event {
        id: Uuid::new_v4().into(),
        source: Service::Inventory.name().into(),
        r#type: StockReserved::full_name(),
        subject: order_id.into(),
        sequence: 1,
        time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
        data: StockReserved { order_id: order_id.into() }.encode_to_vec().into(),
        ..Event::default()
    };
    Ok(DeliverRequest { events: vec![event] })
}

/// The forged events are of an order that is confirmed already: the demo goes on, even if one were applied.
async fn show_denials(layout: &Layout, target: &Target, identities: &Identities, order_id: Uuid) -> Result<()> {
    println!("\n  12. All of this was said over mutual TLS. Each name may do what the policy says, and nothing else:");
    for line in fs::read_to_string(identities.policy_file())?.lines() {
        println!("       {line}");
    }
    let forged = forge_reservation(target, &order_id.to_string()).await?;
    println!("     Somebody says that stock is reserved, and is not inventory's relay:");
    for name in [CUSTOMERS, Service::OrdersRelay.name()] {
        let mut receiver = EventReceiverClient::new(layout.connect_to_events(Service::Orders, name)?);
        let Err(refused) = receiver.deliver(forged.clone()).await else {
            bail!("a forged event of {name} was taken");
        };
        ensure!(refused.code() == Code::PermissionDenied, "a forged event of {name}: {refused:?}");
        println!("     {name:<14} PERMISSION_DENIED: {}", refused.message());
    }
    Ok(())
}

async fn show_audit(target: &Target) -> Result<()> {
    println!("\n  10. The audit compares the databases, row by row.");
    wait_until_delivered(&target.databases, DRAIN_LIMIT).await?;
    let audit = audit(&target.databases).await?;
    for line in audit.lines() {
        println!("     {line}");
    }
    ensure!(audit.findings.is_empty() && audit.dead == 0, "the audit is not clean");
    Ok(())
}
