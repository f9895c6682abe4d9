//! The subcommand `stress`: places many orders at once, checks every reply, and audits at the end.

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
use chassis::explain;
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

/// The SKUs of the demo stock that do not run out.
const SKUS: [&str; 5] = ["COFFEE-BEANS", "FILTER-PAPER", "GRINDER", "KETTLE", "MUG"];
/// Pause before a call is retried.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Timeout of a call.
const CALL_LIMIT: Duration = Duration::from_secs(10);
const CALLERS_PER_CONNECTION: u32 = 64;

/// Place many orders at once, check every reply, wait until all are delivered, and audit
///
/// Needs a running system (`make up`, `docker-compose up`). Exits with 1 if a reply is wrong, an order is not delivered in
/// time, or the audit has findings.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Number of orders
    #[arg(long, short = 'n', default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    orders: u32,
    /// Calls at the same time
    #[arg(long, short = 'c', default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: u32,
    /// Seconds for which a call is retried, with the same request id, if the service is unavailable or overloaded; 0 for none
    #[arg(long, default_value_t = 0)]
    retry_seconds: u64,
    /// Seconds after the last order within which both outboxes must be empty
    #[arg(long, default_value_t = 60)]
    drain_seconds: u64,
    #[command(flatten)]
    target: Target,
}

/// How many orders to place, and how.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Number of orders.
    pub orders: u32,
    /// Calls at the same time.
    pub concurrency: u32,
    /// For how long a call is retried if the service is unavailable or overloaded. The retry has the same request id, because
    /// the service may have placed the order without answering.
    pub retry_for: Duration,
}

/// The result of a load: every order was acknowledged with the right reply.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Ids of the orders, all different.
    pub order_ids: HashSet<String>,
    /// Time from the first call to the last reply.
    pub elapsed: Duration,
    /// Duration of each call, retries included, shortest first.
    pub latencies: Vec<Duration>,
}

impl Placed {
    /// The latency that this share (0 to 1) of the calls did not exceed.
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
    ensure!(died <= 0, "{died} events became dead letters: see `outbox-relay dead list`");
    Ok(if audit.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Places the orders and checks every reply.
///
/// # Errors
/// The first reply that is wrong.
pub async fn place_orders(target: &Target, load: Load) -> Result<Placed> {
    let bar = progress_bar(load.orders.into(), "orders placed");
    let next = Arc::new(AtomicU32::new(0));
    let started = Instant::now();
    let mut callers = JoinSet::new();
    let mut client = target.orders()?;
    for caller in 0..load.concurrency {
        // A connection has a limit of concurrent calls.
        if caller % CALLERS_PER_CONNECTION == 0 {
            client = target.orders()?;
        }
        callers.spawn(place_until_done(client.clone(), load, next.clone(), bar.clone()));
    }
    let mut placed = Placed { order_ids: HashSet::new(), elapsed: Duration::ZERO, latencies: Vec::new() };
    while let Some(caller) = callers.join_next().await {
        for (order_id, latency) in caller?? {
            ensure!(placed.order_ids.insert(order_id.clone()), "two requests have the same order {order_id}");
            placed.latencies.push(latency);
        }
    }
    placed.elapsed = started.elapsed();
    placed.latencies.sort_unstable();
    bar.finish_and_clear();
    Ok(placed)
}

/// One caller: places the next order until all are placed.
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
        let (order, _) = place_order(&mut client, &request, load.retry_for).await?;
        placed.push((order.order_id, started.elapsed()));
        bar.inc(1);
    }
}

/// Places one order, and checks the reply. Retries the call, with the same request id, while the service is unavailable or
/// overloaded. Returns how often.
pub(crate) async fn place_order(
    client: &mut OrderServiceClient<Channel>,
    content: &CreateOrderRequest,
    retry_for: Duration,
) -> Result<(Order, u32)> {
    let started = Instant::now();
    for retries in 0.. {
        let mut request = Request::new(content.clone());
        request.set_timeout(CALL_LIMIT);
        let status = match client.create_order(request).await {
            Ok(order) => {
                let order = order.into_inner();
                check_reply(content, &order)?;
                return Ok((order, retries));
            }
            Err(status) => status,
        };
        // A status with a source comes from a broken connection, not from the service, and its code means nothing.
        let may_pass = status.source().is_some()
            || matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::ResourceExhausted);
        if !may_pass || started.elapsed() >= retry_for {
            bail!("CreateOrder failed with {}", explain(&status));
        }
        sleep(RETRY_PAUSE).await;
    }
    unreachable!("the loop ends by a return")
}

/// An order of two items whose stock does not run out.
pub(crate) fn request(number: u32) -> CreateOrderRequest {
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

/// Checks that the order is the one that was requested.
///
/// # Errors
/// If it differs; the error shows both.
pub fn check_reply(request: &CreateOrderRequest, order: &Order) -> Result<()> {
    let total: i64 = request.items.iter().map(|item| item.unit_price_minor * i64::from(item.quantity)).sum();
    // A retried call returns the order with its present status.
    let status = matches!(order.status(), OrderStatus::Pending | OrderStatus::Confirmed);
    ensure!(
        status
            && order.total_minor == total
            && order.items == request.items
            && order.customer_id == request.customer_id,
        "the order is not the one requested: the answer to {request:?} was {order:?}"
    );
    Ok(())
}

/// How many of these acknowledged orders are not in the database.
///
/// # Errors
/// If it cannot be read.
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
/// If a database cannot be read.
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

/// Events in an outbox that are still to be delivered: no dead ones, and none that wait for a dead one.
async fn count_waiting(database: &mut PgConnection) -> Result<u64> {
    let waiting = sqlx::query_scalar!(
        r#"-- stress: waiting events
        SELECT count(*) AS "waiting!" FROM outbox AS waiting
        WHERE visible_at < 'infinity' AND (sequence = 1 OR NOT EXISTS (
            SELECT FROM outbox AS earlier
            WHERE earlier.aggregate_id = waiting.aggregate_id
                AND earlier.subscription_id = waiting.subscription_id AND earlier.sequence < waiting.sequence
                AND earlier.visible_at = 'infinity'))"#
    )
    .fetch_one(database)
    .await?;
    Ok(waiting.unsigned_abs())
}

/// Waits until both outboxes have nothing to deliver, and returns how long that took. Reads the orders' outbox first: a reply
/// is committed before the event that caused it is deleted, so none is missed between the two reads.
///
/// # Errors
/// If events are left after `limit`.
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

/// Draws on a terminal only. `message` names what is counted.
fn progress_bar(length: u64, message: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} ({per_sec}, {eta} left)");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(message)
}
