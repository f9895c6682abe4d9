//! The subcommand `stress`: many orders at once, every reply checked, and the audit at the end.

use std::{
    collections::HashSet,
    error::Error,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use proto::orders::v1::{CreateOrderRequest, Order, OrderItem, OrderStatus, order_service_client::OrderServiceClient};
use sqlx::PgConnection;
use tokio::{task::JoinSet, time::sleep};
use tonic::{Code, Request, transport::Channel};
use uuid::Uuid;

use crate::{
    audit::audit,
    target::{Databases, Target},
};

/// Of the demo stock: what there is plenty of.
const SKUS: [&str; 5] = ["COFFEE-BEANS", "FILTER-PAPER", "GRINDER", "KETTLE", "MUG"];
/// Pause before a call is repeated.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long one call may take before it counts as failed.
const CALL_LIMIT: Duration = Duration::from_secs(10);
const CALLERS_PER_CONNECTION: u32 = 64;

/// Place many orders at once, check every reply, wait until all are delivered, and audit
///
/// Works on a system that is up (`make up`, `docker-compose up`) and exits with 1 when a reply was wrong, an order was not
/// delivered in time, or the audit found anything.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Orders to place
    #[arg(long, short = 'n', default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    orders: u32,
    /// Calls under way at once
    #[arg(long, short = 'c', default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: u32,
    /// Seconds a call that fails for want of a service, or of room in it, is repeated, with its request id; 0: a failure is a
    /// failure
    #[arg(long, default_value_t = 0)]
    retry_seconds: u64,
    /// Seconds within which both outboxes have to be empty after the last order
    #[arg(long, default_value_t = 60)]
    drain_seconds: u64,
    #[command(flatten)]
    target: Target,
}

/// Load to put on a system.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Orders to place.
    pub orders: u32,
    /// Calls under way at once.
    pub concurrency: u32,
    /// For how long a call that finds no service, or one that is overloaded, is repeated with its request id. Such a call may
    /// have been carried out though it was not answered.
    pub retry_for: Duration,
}

/// What became of a load: every order acknowledged, its reply as it should be.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Ids of the orders, all different.
    pub order_ids: HashSet<String>,
    /// From the first call to the last reply.
    pub elapsed: Duration,
    /// How long each call took, repetitions included, shortest first.
    pub latencies: Vec<Duration>,
}

impl Placed {
    /// The latency that `share` (0 to 1) of the calls did not exceed.
    pub fn percentile(&self, share: f64) -> Duration {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a rank among latencies that fit into memory"
        )]
        let rank = (self.latencies.len() as f64 * share).ceil() as usize;
        self.latencies.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    let Arguments { orders, concurrency, retry_seconds, drain_seconds, target } = arguments;
    let load = Load { orders, concurrency, retry_for: Duration::from_secs(retry_seconds) };
    let dead_before = count_dead(&target.databases).await?;
    let placed = place_orders(&target, load).await?;
    println!(
        "stress: {orders} orders, {concurrency} at a time, all acknowledged in {:.1?} ({:.0}/s); p50 {:.1?}, p99 {:.1?}, max {:.1?}",
        placed.elapsed,
        f64::from(orders) / placed.elapsed.as_secs_f64(),
        placed.percentile(0.5),
        placed.percentile(0.99),
        placed.percentile(1.0),
    );
    let missing = count_missing(&target.databases, &placed.order_ids).await?;
    ensure!(missing == 0, "{missing} orders were acknowledged and are not in the database");
    let drained = wait_until_delivered(&target.databases, Duration::from_secs(drain_seconds)).await?;
    println!("stress: both outboxes were empty {drained:.1?} after the last reply");
    let audit = audit(&target.databases).await?;
    audit.print();
    let died = count_dead(&target.databases).await? - dead_before;
    ensure!(died <= 0, "{died} events died meanwhile: see `outbox-relay dead list`");
    Ok(if audit.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Places the orders and checks every reply.
///
/// # Errors
/// The first reply that is not what it should be.
pub async fn place_orders(target: &Target, load: Load) -> Result<Placed> {
    let bar = progress_bar(load.orders.into(), "orders placed");
    let next = Arc::new(AtomicU32::new(0));
    let started = Instant::now();
    let mut callers = JoinSet::new();
    let mut client = target.orders();
    for caller in 0..load.concurrency {
        // One connection carries a limited number of calls at once.
        if caller % CALLERS_PER_CONNECTION == 0 {
            client = target.orders();
        }
        callers.spawn(place_until_done(client.clone(), load, next.clone(), bar.clone()));
    }
    let mut placed = Placed { order_ids: HashSet::new(), elapsed: Duration::ZERO, latencies: Vec::new() };
    while let Some(caller) = callers.join_next().await {
        for (order_id, latency) in caller?? {
            ensure!(
                placed.order_ids.insert(order_id.clone()),
                "two requests were answered with the same order {order_id}"
            );
            placed.latencies.push(latency);
        }
    }
    placed.elapsed = started.elapsed();
    placed.latencies.sort_unstable();
    bar.finish_and_clear();
    Ok(placed)
}

/// One caller: takes the next order nobody has taken, until there is none.
async fn place_until_done(
    mut client: OrderServiceClient<Channel>,
    load: Load,
    next: Arc<AtomicU32>,
    bar: ProgressBar,
) -> Result<Vec<(String, Duration)>> {
    let mut placed = Vec::new();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= load.orders {
            return Ok(placed);
        }
        let started = Instant::now();
        let request = request(number);
        let order = place_order(&mut client, &request, load.retry_for).await?;
        check_reply(&request, &order)?;
        placed.push((order.order_id, started.elapsed()));
        bar.inc(1);
    }
}

/// Places one order; repeats the call, with the same request id, while no service is found.
async fn place_order(
    client: &mut OrderServiceClient<Channel>,
    content: &CreateOrderRequest,
    retry_for: Duration,
) -> Result<Order> {
    let started = Instant::now();
    loop {
        let mut request = Request::new(content.clone());
        request.set_timeout(CALL_LIMIT);
        let status = match client.create_order(request).await {
            Ok(order) => return Ok(order.into_inner()),
            Err(status) => status,
        };
        // A status with a source was made here, of a broken connection; its code says nothing.
        let may_pass = status.source().is_some()
            || matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::ResourceExhausted);
        if !may_pass || started.elapsed() >= retry_for {
            bail!("CreateOrder was answered {:?}: {}", status.code(), status.message());
        }
        sleep(RETRY_PAUSE).await;
    }
}

fn request(number: u32) -> CreateOrderRequest {
    let item = |number: u32| OrderItem {
        sku: SKUS[number as usize % SKUS.len()].into(),
        quantity: 1 + (number % 3).cast_signed(),
        unit_price_minor: 100 + i64::from(number % 900),
    };
    CreateOrderRequest {
        request_id: Uuid::new_v4().into(),
        customer_id: format!("stress-{}", number % 100),
        currency_code: "EUR".into(),
        items: vec![item(number), item(number / 5 + 1)],
    }
}

/// Whether the order is what was asked for.
///
/// # Errors
/// When it is not; the error says in what.
pub fn check_reply(request: &CreateOrderRequest, order: &Order) -> Result<()> {
    let total: i64 = request.items.iter().map(|item| item.unit_price_minor * i64::from(item.quantity)).sum();
    // A call that is repeated finds its order as it stands by then.
    let status = matches!(order.status(), OrderStatus::Pending | OrderStatus::Confirmed);
    ensure!(
        status
            && order.total_minor == total
            && order.items == request.items
            && order.customer_id == request.customer_id,
        "the order is not what was asked for: {request:?} was answered {order:?}"
    );
    Ok(())
}

/// How many of the orders are not in the database, though they were acknowledged.
///
/// # Errors
/// When it cannot be read.
pub async fn count_missing(databases: &Databases, order_ids: &HashSet<String>) -> Result<usize> {
    let order_ids = order_ids.iter().map(|id| Ok(id.parse()?)).collect::<Result<Vec<Uuid>>>()?;
    let found = sqlx::query_scalar!(
        r#"-- stress: acknowledged orders
        SELECT count(*) AS "found!" FROM orders WHERE order_id = ANY ($1)"#,
        &order_ids
    )
    .fetch_one(&mut databases.orders().await?)
    .await?;
    Ok(order_ids.len() - usize::try_from(found)?)
}

/// Dead events in both outboxes.
///
/// # Errors
/// When a database cannot be read.
pub async fn count_dead(databases: &Databases) -> Result<i64> {
    let mut dead = 0;
    for mut database in [databases.orders().await?, databases.inventory().await?] {
        dead += sqlx::query_scalar!(
            r#"-- stress: dead events
            SELECT count(*) AS "dead!" FROM outbox WHERE visible_at = 'infinity'"#
        )
        .fetch_one(&mut database)
        .await?;
    }
    Ok(dead)
}

/// Events that wait in an outbox to be delivered: not those that are dead, or wait for one that is.
async fn count_waiting(database: &mut PgConnection) -> Result<u64> {
    let waiting = sqlx::query_scalar!(
        r#"-- stress: waiting events
        SELECT count(*) AS "waiting!" FROM outbox AS waiting
        WHERE visible_at < 'infinity' AND (sequence = 1 OR NOT EXISTS (
            SELECT FROM outbox AS earlier
            WHERE earlier.aggregate_id = waiting.aggregate_id AND earlier.sequence < waiting.sequence
                AND earlier.visible_at = 'infinity'))"#
    )
    .fetch_one(database)
    .await?;
    Ok(waiting.unsigned_abs())
}

/// Waits until nothing but dead events is in either outbox, and returns how long that took. The orders' is read first:
/// an answer is committed before its order's event goes.
///
/// # Errors
/// When there still is after `limit`.
pub async fn wait_until_delivered(databases: &Databases, limit: Duration) -> Result<Duration> {
    let (mut orders, mut inventory) = (databases.orders().await?, databases.inventory().await?);
    let started = Instant::now();
    let mut most = 0;
    let bar = progress_bar(0, "events delivered");
    loop {
        let waiting = count_waiting(&mut orders).await? + count_waiting(&mut inventory).await?;
        if waiting == 0 {
            bar.finish_and_clear();
            return Ok(started.elapsed());
        }
        ensure!(started.elapsed() < limit, "{waiting} events are still in the outboxes after {limit:?}");
        most = waiting.max(most);
        bar.set_length(most);
        bar.set_position(most - waiting);
        sleep(Duration::from_millis(20)).await;
    }
}

/// Draws on a terminal only; `message` says what is counted.
fn progress_bar(length: u64, message: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} ({per_sec}, {eta} left)");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(message)
}
