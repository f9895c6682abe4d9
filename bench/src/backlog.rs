//! A backlog that is drained several times: placed once through order-service, and restored before each drain.
//!
//! A drain begins when the relay, which is up and paused, is told to resume. It ends when the outbox is empty. The
//! relay's own metrics say how much is left, since counting rows would take processor time from the system under test.
//! The relay of the answers does not run, so only one direction is measured.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sqlx::PgConnection;
use tokio::time::{Instant, sleep, timeout};

use super::{
    closed_loop::fill,
    report::Report,
    requests::Shape,
    site::{Site, finish, start},
};
use harness::{
    identities::{Identities, OPERATORS},
    stress::wait_until_delivered,
    system::{Layout, Service, stop},
};
use testkit::{
    bootstrap::{EMPTY, create_database},
    http,
    processes::{Process, free_port},
};

const SAMPLE_PAUSE: Duration = Duration::from_millis(25);
const DRAIN_LIMIT: Duration = Duration::from_secs(180);
const PAUSE: [&str; 5] = ["pause", "--by", "bench", "--reason", "bench"];
const RESUME: [&str; 3] = ["resume", "--by", "bench"];
const OPEN_LIMIT: Duration = Duration::from_secs(10);

const KEEP_ORDERS: &str = "-- bench: keep the backlog
    CREATE TABLE bench_backlog AS SELECT * FROM outbox ORDER BY visible_at";
const KEEP_INVENTORY: &str = "-- bench: keep the stock
    CREATE TABLE bench_stock AS SELECT * FROM stock;
    CREATE TABLE bench_ledger AS SELECT * FROM stock_ledger";
const RESTORE_INVENTORY: &str = "-- bench: restore the stock
    TRUNCATE processed_messages, reservations, outbox, stock_ledger, stock;
    INSERT INTO stock SELECT * FROM bench_stock;
    INSERT INTO stock_ledger SELECT * FROM bench_ledger";
/// Each event that waits, once more for loyalty-service.
const SUBSCRIBE_TWICE: &str = "-- bench: subscribe the backlog twice
    INSERT INTO outbox (subscription_id, aggregate_id, event_id, visible_at, created_at, sequence, event_type, payload)
    SELECT loyalty.subscription_id, aggregate_id, event_id, visible_at, waiting.created_at, sequence, event_type, payload
    FROM outbox AS waiting, outbox_subscriptions AS loyalty
    WHERE loyalty.name = 'loyalty'";
const FORGET_POINTS: &str = "-- bench: forget the points
    TRUNCATE processed_messages, points";
/// Executed one by one, since VACUUM cannot run in a transaction.
const VACUUM: [&str; 2] = ["VACUUM (ANALYZE)", "CHECKPOINT"];

/// Orders whose events wait in the outbox.
#[derive(Debug)]
pub(super) struct Backlog {
    layout: Layout,
    /// The same system with loyalty-service as a second subscriber.
    subscribed_twice: Option<Layout>,
    processes: Vec<Process>,
    orders: PgConnection,
    inventory: PgConnection,
}

/// The result of a drain.
#[derive(Clone, Debug, Default)]
pub(super) struct Drained {
    /// Events per second.
    pub(super) rate: f64,
    /// Seconds since the beginning, and the events left.
    pub(super) samples: Vec<(f64, u64)>,
}

impl Backlog {
    /// Places the orders, in new databases with this name.
    pub(super) async fn place(site: &Site, name: &str, orders: u64, shape: Shape) -> Result<Self> {
        let layout = site.databases(name).await?;
        let processes = start(&layout, &[Service::Inventory, Service::Orders]).await?;
        shape.add_stock(&layout.target()?).await?;
        let (mut orders_database, mut inventory) =
            (site.connect(&layout.orders).await?, site.connect(&layout.inventory).await?);
        fill(layout.order_service, orders, shape).await?;
        sqlx::raw_sql(KEEP_ORDERS).execute(&mut orders_database).await?;
        sqlx::raw_sql(KEEP_INVENTORY).execute(&mut inventory).await?;
        layout.operate(Service::OrdersRelay, &PAUSE).await?;
        Ok(Self { layout, subscribed_twice: None, processes, orders: orders_database, inventory })
    }

    /// The name of the loyalty database.
    fn loyalty(&self) -> String {
        format!("{}_loyalty", self.layout.orders)
    }

    /// Adds loyalty-service as a second subscriber, for [`Self::drain_twice`].
    pub(super) async fn subscribe_loyalty(&mut self) -> Result<()> {
        let database = self.loyalty();
        create_database(&self.layout.server, &database, EMPTY, "loyalty_owner").await?;
        let twice = self.layout.clone().with_loyalty(&database, [free_port()?, free_port()?]);
        twice.prepare().await?;
        self.processes.extend(start(&twice, &[Service::Loyalty]).await?);
        self.subscribed_twice = Some(twice);
        Ok(())
    }

    /// Drains that many events, each to both subscribers. The rate counts deliveries.
    pub(super) async fn drain_twice(&mut self, site: &Site, events: u64) -> Result<Drained> {
        let layout = self.subscribed_twice.clone().context("there is no second subscriber")?;
        self.restore(events).await?;
        sqlx::raw_sql(FORGET_POINTS).execute(&mut site.connect(&self.loyalty()).await?).await?;
        for statement in [SUBSCRIBE_TWICE].into_iter().chain(VACUUM) {
            sqlx::raw_sql(statement).execute(&mut self.orders).await?;
        }
        self.drain_restored(&layout, 2 * events, 2, None).await
    }

    /// Restores the oldest events, and inventory as it was before any of them.
    async fn restore(&mut self, events: u64) -> Result<()> {
        sqlx::raw_sql(RESTORE_INVENTORY).execute(&mut self.inventory).await?;
        sqlx::raw_sql("TRUNCATE outbox").execute(&mut self.orders).await?;
        sqlx::query("INSERT INTO outbox SELECT * FROM bench_backlog ORDER BY visible_at LIMIT $1")
            .bind(i64::try_from(events)?)
            .execute(&mut self.orders)
            .await?;
        for statement in VACUUM {
            for connection in [&mut self.orders, &mut self.inventory] {
                sqlx::raw_sql(statement).execute(connection).await?;
            }
        }
        Ok(())
    }

    /// Drains that many events by a relay with these settings, for at most `time` if it is given.
    pub(super) async fn drain(
        &mut self,
        events: u64,
        settings: &[(&str, &str)],
        time: Option<Duration>,
    ) -> Result<Drained> {
        self.restore(events).await?;
        let mut layout = self.layout.clone();
        layout.settings.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self.drain_restored(&layout, events, 1, time).await
    }

    /// Drains that many events by processes with these certificates, or by such without TLS.
    pub(super) async fn drain_by(&mut self, events: u64, identities: Option<&Identities>) -> Result<Drained> {
        stop(std::mem::take(&mut self.processes)).await?;
        self.layout.identities = identities.cloned();
        self.processes = start(&self.layout, &[Service::Inventory, Service::Orders]).await?;
        self.drain(events, &[], None).await
    }

    async fn drain_restored(
        &mut self,
        layout: &Layout,
        events: u64,
        routes: u64,
        time: Option<Duration>,
    ) -> Result<Drained> {
        let relay = layout.start(Service::OrdersRelay).await?;
        timeout(OPEN_LIMIT, wait_until_open(layout, routes))
            .await
            .context("the relay did not open its route in time")??;

        let begin = Instant::now();
        layout.operate(Service::OrdersRelay, &RESUME).await?;
        let mut samples = vec![(0.0, events)];
        let drained = loop {
            let handled = read_metric(layout, "outbox_relay_events_total", ("outcome", "handled")).await?;
            let elapsed = begin.elapsed();
            samples.push((elapsed.as_secs_f64(), events.saturating_sub(handled)));
            if handled >= events || time.is_some_and(|time| elapsed >= time) {
                break Drained { rate: handled as f64 / elapsed.as_secs_f64(), samples };
            }
            ensure!(elapsed < DRAIN_LIMIT, "{} events are left after {DRAIN_LIMIT:?}", events - handled);
            sleep(SAMPLE_PAUSE).await;
        };
        layout.operate(Service::OrdersRelay, &PAUSE).await?;
        stop([relay]).await?;
        if time.is_none() {
            let left: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox").fetch_one(&mut self.orders).await?;
            ensure!(left == 0, "the relay reported the drain as finished, and {left} events are left");
        }
        Ok(drained)
    }

    /// Delivers the answers of the last drain, which must have been of the whole backlog. Then audits.
    pub(super) async fn finish(mut self, report: &mut Report) -> Result<()> {
        let layout = self.subscribed_twice.as_ref().unwrap_or(&self.layout);
        layout.operate(Service::OrdersRelay, &RESUME).await?;
        self.processes.extend(start(layout, &[Service::OrdersRelay, Service::InventoryRelay]).await?);
        wait_until_delivered(&layout.target()?.databases, DRAIN_LIMIT).await?;
        finish(layout, self.processes, report).await
    }
}

async fn wait_until_open(layout: &Layout, routes: u64) -> Result<()> {
    while read_metric(layout, "outbox_relay_route_state", ("state", "OPEN")).await.unwrap_or(0) < routes {
        sleep(SAMPLE_PAUSE).await;
    }
    Ok(())
}

/// The sum of a metric of the relay over all samples with this label.
async fn read_metric(layout: &Layout, name: &str, label: (&str, &str)) -> Result<u64> {
    let (address, files) = (layout.address(Service::OrdersRelay)?, layout.files_of(OPERATORS));
    let page = http::get_by(&files, address, "/metrics").await.context("cannot read the metrics of the relay")?;
    Ok(http::sum_metric(&page, name, &[label]).unwrap_or_default())
}
