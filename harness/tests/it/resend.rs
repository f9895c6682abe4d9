//! A database is restored to an earlier state, and `resend` brings back what it has lost. The real binaries.

use std::{
    collections::{BTreeSet, HashMap},
    process::Output,
    time::Duration,
};

use harness::{
    audit::audit,
    stress::{Load, place_orders, wait_until_delivered},
    system::{Service, stop},
};
use proto::orders::v1::CancelOrderRequest;
use sqlx::PgPool;
use testkit::processes::{Process, binary};
use tokio::process::Command;
use uuid::Uuid;

use crate::site::Site;

const LIMIT: Duration = Duration::from_secs(60);
const SINCE: &str = "2020-01-01T00:00:00Z";

struct System {
    site: Site,
    processes: HashMap<&'static str, Process>,
}

impl System {
    async fn start() -> Self {
        let site = Site::prepare(&[("DATABASE_ACQUIRE_MS", "20000")]).await;
        // Events that are as old as the subscription might not be for it.
        for database in [&site.orders, &site.inventory] {
            let earlier = "UPDATE outbox_subscriptions SET created_at = created_at - interval '1 minute'";
            execute(&database.pool().await, earlier).await;
        }
        let mut system = Self { site, processes: HashMap::new() };
        for service in system.site.layout.services() {
            system.launch(service).await;
        }
        system
    }

    async fn launch(&mut self, service: Service) {
        self.processes.insert(service.name(), self.site.layout.start(service).await.unwrap());
    }

    async fn end(&mut self, services: &[Service]) {
        let ended: Vec<_> = services.iter().filter_map(|service| self.processes.remove(service.name())).collect();
        stop(ended).await.unwrap();
    }

    /// Places orders and waits until they are answered.
    async fn place(&self, orders: u32) -> Vec<Uuid> {
        let target = self.site.layout.target().unwrap();
        let placed = place_orders(&target, Load { orders, concurrency: 8, retry_for: LIMIT }).await.unwrap();
        self.wait_until_delivered().await;
        placed.order_ids.iter().map(|id| id.parse().unwrap()).collect()
    }

    async fn cancel(&self, order_id: Uuid) {
        let request = CancelOrderRequest { request_id: String::new(), order_id: order_id.into() };
        self.site.layout.target().unwrap().orders().unwrap().cancel_order(request).await.unwrap();
    }

    async fn wait_until_delivered(&self) {
        let databases = self.site.layout.target().unwrap().databases;
        wait_until_delivered(&databases, LIMIT).await.unwrap();
    }

    async fn findings(&self) -> Vec<String> {
        audit(&self.site.layout.target().unwrap().databases).await.unwrap().findings
    }

    /// Runs `resend` of a service, and returns its output.
    async fn resend(&self, service: Service, flags: &[&str]) -> String {
        let layout = &self.site.layout;
        let (role, database, subscription, receiver) = match service {
            Service::Orders => ("order_service", &layout.orders, "inventory", layout.inventory_events),
            _ => ("inventory_service", &layout.inventory, "orders", layout.order_events),
        };
        let (url, receiver) = (layout.server.url_for(role, database), format!("http://{receiver}"));
        let mut command = Command::new(binary(service.name()).unwrap());
        command.args(["resend", "--subscription", subscription, "--receiver", &receiver, "--since", SINCE]).args(flags);
        command.env("ORDERS_DATABASE_URL", &url).env("INVENTORY_DATABASE_URL", &url);
        let Output { status, stdout, stderr } = command.output().await.unwrap();
        let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
        assert_eq!((status.code(), stderr.as_str()), (Some(0), ""), "{stdout}");
        stdout
    }
}

/// The orders and sequences of the events that are lost, by the output of `resend`.
fn lost(output: &str) -> BTreeSet<(Uuid, i32)> {
    let of_line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        assert_eq!((fields[0], fields[6]), ("event", "lost"), "{line}");
        (fields[3].parse().unwrap(), fields[4].parse().unwrap())
    };
    output.lines().filter(|line| line.starts_with("event ")).map(of_line).collect()
}

async fn execute(database: &PgPool, sql: &'static str) {
    sqlx::raw_sql(sql).execute(database).await.unwrap();
}

const SEND: [&str; 4] = ["--by", "ann", "--reason", "restored"];

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_of_inventory_exactly_its_lost_events_are_sent_again_and_nothing_is_wrong() {
    let mut system = System::start().await;
    let kept = system.place(20).await;
    let both = [Service::Inventory, Service::InventoryRelay];
    system.end(&both).await;
    let (name, copy) = (system.site.layout.inventory.clone(), format!("{}_copy", system.site.layout.inventory));
    let server = &system.site.layout.server;
    testkit::bootstrap::create_database(server, &copy, &name, "inventory_owner").await.unwrap();
    for service in both {
        system.launch(service).await;
    }
    let gone = system.place(15).await;
    for order_id in [kept[0], kept[1], gone[0]] {
        system.cancel(order_id).await;
    }
    system.wait_until_delivered().await;
    assert_eq!(system.findings().await, [""; 0]);

    system.end(&both).await;
    system.restore(&name, &copy).await;
    for service in both {
        system.launch(service).await;
    }
    assert!(!system.findings().await.is_empty(), "the audit finds what is lost");
    let expected: BTreeSet<(Uuid, i32)> =
        gone.iter().map(|id| (*id, 1)).chain([kept[0], kept[1], gone[0]].map(|id| (id, 2))).collect();
    let shown = system.resend(Service::Orders, &["--dry-run"]).await;
    assert_eq!(lost(&shown), expected);
    assert!(shown.contains("18 lost, none enqueued, since this was a dry run; 20 applied"), "{shown}");

    let sent = system.resend(Service::Orders, &SEND).await;
    assert_eq!(lost(&sent), expected);
    assert!(sent.contains("18 lost, 18 enqueued"), "{sent}");
    system.wait_until_delivered().await;
    assert_eq!(system.findings().await, [""; 0]);
    let again = system.resend(Service::Orders, &SEND).await;
    assert!(again.starts_with("0 lost, 0 enqueued; 38 applied"), "{again}");
    let all = system.site.layout.services();
    system.end(&all).await;
}

impl System {
    /// Puts the copy in the place of the database.
    async fn restore(&self, name: &str, copy: &str) {
        let mut connection = self.site.layout.server.connect().await.unwrap();
        for statement in
            [format!("DROP DATABASE {name} WITH (FORCE)"), format!("ALTER DATABASE {copy} RENAME TO {name}")]
        {
            sqlx::QueryBuilder::<sqlx::Postgres>::new(statement)
                .build()
                .persistent(false)
                .execute(&mut connection)
                .await
                .unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_orders_has_lost_are_sent_again() {
    let mut system = System::start().await;
    let orders = system.site.orders.pool().await;
    let kept = system.place(10).await;
    system.cancel(kept[0]).await;
    system.wait_until_delivered().await;
    execute(&orders, "CREATE TABLE before AS SELECT message_id FROM processed_messages").await;
    let gone = system.place(5).await;
    // As a restore to a time at which the orders were placed, and not answered yet.
    execute(
        &orders,
        "DELETE FROM processed_messages WHERE message_id NOT IN (SELECT message_id FROM before);
        UPDATE orders SET status = 'PENDING' WHERE order_id IN (SELECT order_id FROM orders ORDER BY created_at DESC LIMIT 5)",
    )
    .await;
    assert!(!system.findings().await.is_empty(), "the audit finds what is lost");

    let sent = system.resend(Service::Inventory, &SEND).await;
    assert_eq!(lost(&sent), gone.iter().map(|id| (*id, 1)).collect());
    assert!(sent.contains("5 lost, 5 enqueued; 11 applied"), "{sent}");
    system.wait_until_delivered().await;
    assert_eq!(system.findings().await, [""; 0]);
    let again = system.resend(Service::Inventory, &SEND).await;
    assert!(again.starts_with("0 lost, 0 enqueued; 16 applied"), "{again}");
    let all = system.site.layout.services();
    system.end(&all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_whose_event_is_discarded_with_a_refusal_is_rejected_and_the_audit_is_clean() {
    let mut system = System::start().await;
    system.end(&[Service::OrdersRelay]).await;
    let target = system.site.layout.target().unwrap();
    place_orders(&target, Load { orders: 2, concurrency: 1, retry_for: LIMIT }).await.unwrap();
    let orders = system.site.orders.pool().await;
    execute(&orders, "UPDATE outbox SET visible_at = 'infinity', last_error = 'dead'").await;
    let dead: Vec<Uuid> =
        sqlx::query_scalar("SELECT event_id FROM outbox ORDER BY event_id").fetch_all(&orders).await.unwrap();
    // Inventory has applied the first one, but its answer to the relay was lost.
    execute(
        &orders,
        "UPDATE outbox SET visible_at = now() WHERE event_id = (SELECT min(event_id::text)::uuid FROM outbox)",
    )
    .await;
    system.end(&[Service::InventoryRelay]).await;
    system.launch(Service::OrdersRelay).await;
    let inventory = system.site.inventory.pool().await;
    wait_for(&inventory, "SELECT count(*) = 1 FROM reservations").await;
    wait_for(&orders, "SELECT count(*) = 1 FROM outbox").await;
    execute(
        &orders,
        "INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload, visible_at, last_error)
        SELECT subscription_id, order_id, 1, gen_random_uuid(), event_type, payload, 'infinity', 'no reply'
        FROM outbox, orders WHERE order_id <> aggregate_id",
    )
    .await;
    let unheard: Uuid = sqlx::query_scalar("SELECT event_id FROM outbox WHERE last_error = 'no reply'")
        .fetch_one(&orders)
        .await
        .unwrap();
    for event_id in [dead[1], unheard] {
        let discard =
            ["dead", "discard", &event_id.to_string(), "--refuse", "--reason", "not sold here", "--by", "ann"];
        system.site.layout.operate(Service::OrdersRelay, &discard).await.unwrap();
    }
    let refused = "SELECT count(*) = 2 FROM orders WHERE status = 'REJECTED' AND rejection = 'not sold here'";
    wait_for(&orders, refused).await;
    system.launch(Service::InventoryRelay).await;
    wait_for(&inventory, "SELECT count(*) = 1 FROM reservations WHERE status = 'RELEASED'").await;
    system.wait_until_delivered().await;
    let audit = audit(&target.databases).await.unwrap();
    assert_eq!((audit.findings, audit.released, audit.discarded, audit.stranded), (Vec::new(), 1, 1, 0));
    let all = system.site.layout.services();
    system.end(&all).await;
}

async fn wait_for(database: &PgPool, sql: &'static str) {
    let holds = async {
        while !sqlx::query_scalar::<_, bool>(sql).fetch_one(database).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, holds).await.unwrap_or_else(|_| panic!("not in time: {sql}"));
}
