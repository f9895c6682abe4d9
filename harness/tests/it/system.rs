//! The real binaries on databases of their own: killed under load, then audited; and an audit of damaged databases.

use std::{future::Future, net::SocketAddr, process::Stdio, time::Duration};

use harness::{
    audit::audit,
    replay::replay,
    stress::{Load, count_missing, place_orders, wait_until_delivered},
    system::{Service, stop},
};
use sqlx::{PgPool, Postgres, QueryBuilder};
use testkit::{
    http::{get, sum_metric},
    processes::{Process, free_port},
};
use tokio::{
    process::Command,
    time::{Instant, sleep},
};

use crate::site::Site;

const LOAD: Load = Load { orders: 1500, concurrency: 16, retry_for: Duration::from_secs(30) };
const DRAIN_LIMIT: Duration = Duration::from_secs(180);
const KILLS: u32 = 4;

/// A system of its own for one test.
struct System {
    site: Site,
    services: Vec<(Service, Process)>,
}

impl System {
    async fn start() -> Self {
        // Short, because a test waits for the leases of a killed relay to expire.
        Self::start_on(Site::prepare(&[("RELAY_LEASE_SECONDS", "2")]).await).await
    }

    async fn start_on(site: Site) -> Self {
        let mut services = Vec::new();
        for service in site.layout.services() {
            services.push((service, site.layout.start(service).await.unwrap()));
        }
        Self { site, services }
    }

    fn process(&mut self, service: Service) -> &mut Process {
        &mut self.services.iter_mut().find(|(other, _)| *other == service).unwrap().1
    }

    /// Places the load while `trouble` runs. Afterwards nothing may be lost or applied twice.
    async fn survives(mut self, trouble: impl AsyncFnOnce(&mut Self, &PgPool)) {
        let target = self.site.layout.target().unwrap();
        let load = tokio::spawn(async move { place_orders(&target, LOAD).await });
        let observer = self.site.orders.pool().await;
        trouble(&mut self, &observer).await;
        let placed = load.await.unwrap();
        let placed = placed.unwrap_or_else(|error| panic!("{error}\n{}", self.process(Service::Orders).log_tail(20)));
        assert_eq!(placed.order_ids.len(), LOAD.orders as usize);
        let databases = self.site.layout.target().unwrap().databases;
        assert_eq!(count_missing(&databases, &placed.order_ids).await.unwrap(), 0, "acknowledged means committed");
        self.ends_clean().await;
    }

    /// Does each damage to the running system. The audit must then have a new finding that says what is wrong.
    async fn is_found(&self, damages: &[(&str, Side, &str)]) {
        let databases = self.site.layout.target().unwrap().databases;
        let (mut known, mut missed) = (Vec::new(), Vec::new());
        for (says, side, damage) in damages {
            let database = match side {
                Side::Orders => &self.site.orders,
                Side::Inventory => &self.site.inventory,
                Side::Loyalty => self.site.loyalty(),
            };
            execute(&database.pool().await, damage).await;
            let findings = audit(&databases).await.unwrap().findings;
            let is_new = |found: &&String| found.contains(says) && !known.contains(*found);
            if !findings.iter().any(|found| is_new(&found)) {
                missed.push(format!("no new {says:?} in {findings:?}"));
            }
            known = findings;
        }
        assert_eq!(missed, [""; 0]);
    }

    async fn kill(&mut self) {
        for (_, process) in &mut self.services {
            process.kill().await.unwrap();
        }
    }

    async fn ends_clean(self) {
        let target = self.site.layout.target().unwrap();
        wait_until_delivered(&target.databases, DRAIN_LIMIT).await.unwrap();
        let audit = audit(&target.databases).await.unwrap();
        assert_eq!(audit.findings, [""; 0]);
        let confirmed: i64 = sqlx::query_scalar("SELECT count(*) FROM orders WHERE status = 'CONFIRMED'")
            .fetch_one(&self.site.orders.pool().await)
            .await
            .unwrap();
        assert_eq!(confirmed, i64::from(LOAD.orders), "every answer arrived");
        assert_eq!(
            (audit.orders, audit.reserved, audit.dead),
            (LOAD.orders as usize, LOAD.orders as usize, 0),
            "each request id placed one order, each order was reserved, nothing died"
        );
        stop(self.services.into_iter().map(|(_, process)| process)).await.unwrap();
    }

    /// Kills the process and starts it again, several times, each after a further share of the orders is placed.
    async fn kill_under_load(&mut self, service: Service, observer: &PgPool) {
        for kill in 1..=KILLS {
            wait_for_orders(observer, LOAD.orders * kill / (KILLS + 1)).await;
            self.process(service).kill().await.unwrap();
            *self.process(service) = self.site.layout.start(service).await.unwrap();
        }
    }
}

async fn wait_for_orders(observer: &PgPool, orders: u32) {
    wait_until(|| async {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM orders").fetch_one(observer).await.unwrap();
        count >= i64::from(orders)
    })
    .await;
}

async fn wait_until<F: Future<Output = bool>>(condition: impl Fn() -> F) {
    for _ in 0..6000 {
        if condition().await {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("waited for a minute");
}

#[tokio::test(flavor = "multi_thread")]
async fn order_service_killed_under_load_loses_and_doubles_nothing() {
    let trouble =
        async |system: &mut System, observer: &PgPool| system.kill_under_load(Service::Orders, observer).await;
    System::start().await.survives(trouble).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_of_orders_killed_under_load_loses_and_doubles_nothing() {
    let trouble =
        async |system: &mut System, observer: &PgPool| system.kill_under_load(Service::OrdersRelay, observer).await;
    System::start().await.survives(trouble).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_of_inventory_killed_under_load_loses_and_doubles_nothing() {
    let trouble =
        async |system: &mut System, observer: &PgPool| system.kill_under_load(Service::InventoryRelay, observer).await;
    System::start().await.survives(trouble).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inventory_service_killed_under_load_loses_and_doubles_nothing() {
    let trouble =
        async |system: &mut System, observer: &PgPool| system.kill_under_load(Service::Inventory, observer).await;
    System::start().await.survives(trouble).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn database_sessions_terminated_under_load_lose_and_double_nothing() {
    let trouble = async |system: &mut System, observer: &PgPool| {
        for share in 1..=KILLS {
            wait_for_orders(observer, LOAD.orders * share / (KILLS + 1)).await;
            for database in [system.site.orders.name(), system.site.inventory.name()] {
                sqlx::query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = $1 AND usename IN ('order_service', 'inventory_service', 'outbox_relay')",
                )
                .bind(database)
                .execute(observer)
                .await
                .unwrap();
            }
        }
    };
    System::start().await.survives(trouble).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_restarted_under_load_loses_and_doubles_nothing() {
    let trouble = async |system: &mut System, observer: &PgPool| {
        for (position, service) in system.site.layout.services().into_iter().enumerate() {
            let share = u32::try_from(position + 1).unwrap();
            wait_for_orders(observer, LOAD.orders * share / 5).await;
            let exit = system.process(service).terminate(Duration::from_secs(8)).await.unwrap();
            assert!(exit.status.success() && !exit.killed, "{service:?} {exit:?}");
            *system.process(service) = system.site.layout.start(service).await.unwrap();
        }
    };
    System::start().await.survives(trouble).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_down_costs_no_event_an_attempt() {
    let mut system = System::start().await;
    let target = system.site.layout.target().unwrap();
    system.process(Service::Inventory).kill().await.unwrap();
    place_orders(&target, LOAD).await.unwrap();
    let orders = system.site.orders.pool().await;
    let (waiting, attempts): (i64, i64) =
        sqlx::query_as("SELECT count(*), sum(attempts) FROM outbox").fetch_one(&orders).await.unwrap();
    assert_eq!((waiting, attempts), (i64::from(LOAD.orders), 0));
    *system.process(Service::Inventory) = system.site.layout.start(Service::Inventory).await.unwrap();
    system.ends_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_delivered_twice_deducts_stock_once() {
    let system = System::start().await;
    let replay = replay(&system.site.layout.target().unwrap(), "MUG").await.unwrap();
    replay.check().unwrap();
    stop(system.services.into_iter().map(|(_, process)| process)).await.unwrap();
}

#[derive(Clone, Copy)]
enum Side {
    Orders,
    Inventory,
    Loyalty,
}

/// What the audit's finding says; the database; and the damage.
const DAMAGES: &[(&str, Side, &str)] = &[
    ("UNBALANCED: MUG", Side::Inventory, "UPDATE stock SET available = available - 1 WHERE sku = 'MUG'"),
    (
        "LOST: ",
        Side::Inventory,
        "DELETE FROM reservations WHERE order_id = (SELECT order_id FROM reservations ORDER BY order_id LIMIT 1)",
    ),
    ("WRONG: event ", Side::Inventory, "INSERT INTO processed_messages VALUES (gen_random_uuid())"),
    (
        "PHANTOM: events ",
        Side::Orders,
        "INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload, visible_at)
        VALUES (1, gen_random_uuid(), 1, gen_random_uuid(), 'orders.v1.OrderCreated', '', now() + interval '10 minutes')",
    ),
    (
        "WRONG: order ",
        Side::Inventory,
        // It was cancelled but has not returned its stock.
        "UPDATE reservations SET cancelled_by = event_id, cancelled_at = now()
        WHERE order_id = (SELECT order_id FROM reservations WHERE status = 'RESERVED' ORDER BY order_id LIMIT 1 OFFSET 9)",
    ),
    (
        "WRONG: order ",
        Side::Orders,
        "UPDATE order_items SET quantity = quantity + 1 WHERE order_id = (SELECT max(order_id::text)::uuid FROM orders)",
    ),
    (
        "PHANTOM: ",
        Side::Inventory,
        "INSERT INTO reservations VALUES (gen_random_uuid(), gen_random_uuid(), 'REJECTED', 'of no order')",
    ),
    (
        "LOST: ",
        Side::Inventory,
        // As if only its cancellation had been applied.
        "WITH one AS (SELECT order_id FROM reservations WHERE status = 'RESERVED' ORDER BY order_id LIMIT 1),
            ledger AS (DELETE FROM stock_ledger WHERE reference IN (SELECT order_id FROM one))
        UPDATE reservations SET status = 'RELEASED', event_id = NULL, cancelled_by = event_id, cancelled_at = now()
        WHERE order_id IN (SELECT order_id FROM one)",
    ),
    ("WRONG: order ", Side::Inventory, "DELETE FROM processed_messages"),
    (
        "DISAGREE: ",
        Side::Orders,
        "UPDATE orders SET status = 'PENDING' WHERE order_id = (SELECT max(order_id::text)::uuid FROM orders)",
    ),
    (
        "DISAGREE: ",
        Side::Orders,
        "UPDATE orders SET status = 'CANCELLED' WHERE order_id = (SELECT max(order_id::text)::uuid FROM orders)",
    ),
    (
        "DISAGREE: ",
        Side::Orders,
        "DELETE FROM orders WHERE order_id = (SELECT max(order_id::text)::uuid FROM orders WHERE status = 'CONFIRMED')",
    ),
    (
        "UNBALANCED: NO-SUCH-SKU ",
        Side::Inventory,
        "INSERT INTO stock_ledger VALUES (gen_random_uuid(), 'RESERVATION', 'NO-SUCH-SKU', -1)",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_finds_what_is_lost_phantom_wrong_or_unbalanced() {
    let mut system = System::start().await;
    let target = system.site.layout.target().unwrap();
    let few = Load { orders: 20, ..LOAD };
    place_orders(&target, few).await.unwrap();
    wait_until_delivered(&target.databases, DRAIN_LIMIT).await.unwrap();
    assert_eq!(audit(&target.databases).await.unwrap().findings, [""; 0]);

    let harness = |arguments: &[&str]| {
        let (server, site) = (&system.site.layout.server, &system.site);
        let mut harness = Command::new(env!("CARGO_BIN_EXE_harness"));
        harness.args(arguments).kill_on_drop(true);
        harness.env("ORDERS_DATABASE_URL", server.url_for("orders_owner", site.orders.name()));
        harness.env("INVENTORY_DATABASE_URL", server.url_for("inventory_owner", site.inventory.name()));
        harness
    };
    let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let arguments = ["audit", "--every", "1", "--ops-listen", &address.to_string()];
    let _again = harness(&arguments).stdout(Stdio::null()).spawn().unwrap();
    let violations = async || {
        let (_, page) = get(address, "/metrics").await.ok()?;
        let is_told =
            sum_metric::<u64>(&page, "outbox_audits_total", &[("outcome", "clean")]).is_some_and(|ended| ended > 0);
        sum_metric::<f64>(&page, "outbox_audit_violations", &[]).filter(|_| is_told)
    };
    until("the background audit is clean", async || violations().await == Some(0.0)).await;

    system.is_found(DAMAGES).await;
    until("the background audit finds it", async || violations().await.is_some_and(|found| found > 0.0)).await;
    let printed = harness(&["audit"]).output().await.unwrap();
    let stdout = String::from_utf8(printed.stdout).unwrap();
    assert_eq!(printed.status.code(), Some(1), "{stdout}");
    assert!(stdout.contains("audit: FOUND PHANTOM: order "), "{stdout}");
    system.kill().await;
}

/// What the audit's finding says; the database; and the damage.
const LOYALTY_DAMAGES: &[(&str, Side, &str)] = &[
    (
        " has not reached loyalty and has no event on its way",
        Side::Loyalty,
        "DELETE FROM points WHERE order_id = (SELECT min(order_id::text)::uuid FROM points)",
    ),
    (
        " has points and was never committed",
        Side::Loyalty,
        "INSERT INTO points VALUES ('ffffffff-ffff-4fff-bfff-ffffffffffff', 'ann', 1, gen_random_uuid(), now())",
    ),
    (
        " points for stress-",
        Side::Loyalty,
        "UPDATE points SET points = points + 1
        WHERE order_id = (SELECT order_id FROM points ORDER BY order_id OFFSET 2 LIMIT 1)",
    ),
    (
        " points for mallory",
        Side::Loyalty,
        "UPDATE points SET customer_id = 'mallory'
        WHERE order_id = (SELECT order_id FROM points ORDER BY order_id OFFSET 3 LIMIT 1)",
    ),
    (
        " is in loyalty's inbox and has changed no points",
        Side::Loyalty,
        "INSERT INTO processed_messages VALUES (gen_random_uuid())",
    ),
    (", which loyalty's inbox lacks", Side::Loyalty, "DELETE FROM processed_messages"),
];

/// The same, of damages that the audit looks at for longer, since an event might be on its way.
const LOYALTY_DISAGREEMENTS: &[(&str, Side, &str)] = &[
    (
        " is CANCELLED, and its points still count",
        Side::Orders,
        "UPDATE orders SET status = 'CANCELLED'
        WHERE order_id = (SELECT order_id FROM orders ORDER BY order_id OFFSET 5 LIMIT 1)",
    ),
    (
        " is CONFIRMED, and its points were taken back",
        Side::Loyalty,
        "UPDATE points SET cancelled_by = event_id, cancelled_at = now()
        WHERE order_id = (SELECT order_id FROM points ORDER BY order_id OFFSET 6 LIMIT 1)",
    ),
    (
        " has not reached loyalty and has no event on its way",
        Side::Loyalty,
        // As if only its cancellation had been applied.
        "UPDATE points SET customer_id = NULL, points = 0, event_id = NULL, awarded_at = NULL, cancelled_by = event_id,
            cancelled_at = now()
        WHERE order_id = (SELECT order_id FROM points ORDER BY order_id OFFSET 7 LIMIT 1)",
    ),
];

/// The first event of the first order, as if an operator had discarded it for one of its subscribers.
const DISCARD_FIRST: &str =
    "INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts,
        event_type, payload, last_error, discarded_by, reason)
    SELECT gen_random_uuid(), subscription_id, (SELECT order_id FROM orders ORDER BY order_id LIMIT 1), 1, now(), 1,
        'orders.v1.OrderCreated', '', 'failed', 'test', 'test'
    FROM outbox_subscriptions WHERE name = ";

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_finds_what_is_lost_phantom_or_wrong_in_loyalty() {
    let mut system = System::start_on(Site::prepare_with_loyalty(&[]).await).await;
    let target = system.site.layout.target().unwrap();
    let databases = &target.databases;
    place_orders(&target, Load { orders: 20, ..LOAD }).await.unwrap();
    wait_until_delivered(databases, DRAIN_LIMIT).await.unwrap();
    // The orders are as young as the subscription. Of such an order, loyalty need not know.
    let orders = system.site.orders.pool().await;
    execute(&orders, "UPDATE outbox_subscriptions SET created_at = created_at - interval '1 minute'").await;
    let clean = audit(databases).await.unwrap();
    assert_eq!((clean.findings, clean.points.unwrap().awarded), (Vec::new(), 20));

    system.is_found(LOYALTY_DAMAGES).await;

    let count_lost = async || {
        let audit = audit(databases).await.unwrap();
        let is_lost = |found: &&String| found.contains(" has not reached loyalty");
        (audit.findings.iter().filter(is_lost).count(), audit.points.map(|points| points.discarded))
    };
    assert_eq!(count_lost().await, (1, Some(0)));
    execute(&orders, &format!("{DISCARD_FIRST}'inventory'")).await;
    assert_eq!(count_lost().await, (1, Some(0)), "what inventory has lost does not excuse loyalty");
    execute(&orders, &format!("{DISCARD_FIRST}'loyalty'")).await;
    assert_eq!(count_lost().await, (0, Some(1)));

    system.is_found(LOYALTY_DISAGREEMENTS).await;
    assert_eq!(count_lost().await.0, 1);
    execute(&orders, "UPDATE outbox_subscriptions SET created_at = now()").await;
    assert_eq!(count_lost().await.0, 0, "this order is older than the subscription");
    execute(&orders, "UPDATE outbox_subscriptions SET ended_at = now(), ended_by = 'test', reason = 'test'").await;
    assert_eq!(count_lost().await.1, None);
    system.kill().await;
}

async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + DRAIN_LIMIT;
    while !holds().await {
        assert!(Instant::now() < deadline, "{what}: not within {DRAIN_LIMIT:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

async fn execute(database: &PgPool, sql: &str) {
    sqlx::raw_sql(QueryBuilder::<Postgres>::new(sql).into_sql()).execute(database).await.unwrap();
}
