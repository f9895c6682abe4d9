//! A customer is erased from the orders and from loyalty, and the audit is clean after each step. The real binaries.

use std::{collections::HashMap, time::Duration};

use harness::{
    audit::audit,
    stress::{Load, place_orders, wait_until_delivered},
    system::{Service, stop},
};
use sqlx::PgPool;
use testkit::processes::{Process, binary};
use tokio::process::Command;
use uuid::Uuid;

use crate::site::Site;

const LIMIT: Duration = Duration::from_secs(60);
/// Two customers of the load, who order in each hundred orders. No other customer's id begins with theirs.
const ONE: &str = "stress-42";
const OTHER: &str = "stress-57";

struct System {
    site: Site,
    processes: HashMap<&'static str, Process>,
}

impl System {
    async fn start() -> Self {
        let site = Site::prepare_with_loyalty(&[("DATABASE_ACQUIRE_MS", "20000")]).await;
        // An order that is as old as the subscription might not be for loyalty.
        let earlier = "UPDATE outbox_subscriptions SET created_at = created_at - interval '1 minute'";
        sqlx::query(earlier).execute(&site.orders.pool().await).await.unwrap();
        let mut system = Self { site, processes: HashMap::new() };
        for service in system.site.layout.services() {
            system.launch(service).await;
        }
        system
    }

    async fn launch(&mut self, service: Service) {
        self.processes.insert(service.name(), self.site.layout.start(service).await.unwrap());
    }

    async fn place(&self, orders: u32) {
        let target = self.site.layout.target().unwrap();
        place_orders(&target, Load { orders, concurrency: 8, retry_for: LIMIT }).await.unwrap();
    }

    async fn settle(&self) {
        let databases = self.site.layout.target().unwrap().databases;
        wait_until_delivered(&databases, LIMIT).await.unwrap();
    }

    /// Erases the customer with the command of the service, and audits.
    async fn erase(&self, service: Service, customer: &str) {
        let layout = &self.site.layout;
        let (variable, role, database) = match service {
            Service::Orders => ("ORDERS_DATABASE_URL", "orders_owner", self.site.orders.name()),
            _ => ("LOYALTY_DATABASE_URL", "loyalty_owner", self.site.loyalty().name()),
        };
        let mut command = Command::new(binary(service.name()).unwrap());
        command.args(["erase-customer", customer, "--by", "bob", "--reason", "request 12"]);
        let output = command.env(variable, layout.server.url_for(role, database)).output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(self.findings().await, [""; 0], "after {customer} was erased by {}", service.name());
    }

    async fn findings(&self) -> Vec<String> {
        audit(&self.site.layout.target().unwrap().databases).await.unwrap().findings
    }

    async fn operate(&self, arguments: &[&str]) {
        self.site.layout.operate(Service::OrdersRelay, arguments).await.unwrap();
    }

    async fn assert_gone(&self, customer: &str) {
        for database in [&self.site.orders, &self.site.inventory, self.site.loyalty()] {
            assert_eq!(database.tables_that_hold(customer).await, [""; 0], "{customer} in {}", database.name());
        }
    }
}

/// The event of an order of the customer that waits for loyalty is refused, as if for good.
async fn kill_an_event(orders: &PgPool) -> String {
    let dead = "UPDATE outbox SET visible_at = 'infinity', last_error = 'refused'
        WHERE aggregate_id = (SELECT min(order_id::text)::uuid FROM orders JOIN outbox ON aggregate_id = order_id
                WHERE customer_id = $1)
            AND subscription_id = (SELECT subscription_id FROM outbox_subscriptions WHERE name = 'loyalty')
        RETURNING event_id";
    let event_id: Uuid = sqlx::query_scalar(dead).bind(ONE).fetch_one(orders).await.unwrap();
    event_id.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_customer_is_erased_everywhere_in_either_order_and_a_discarded_event_can_still_be_delivered() {
    let mut system = System::start().await;
    system.place(100).await;
    system.settle().await;
    stop(system.processes.remove(Service::OrdersRelay.name())).await.unwrap();
    system.place(100).await;
    let event_id = kill_an_event(&system.site.orders.pool().await).await;
    system.operate(&["dead", "discard", &event_id, "--reason", "given up", "--by", "bob"]).await;
    system.launch(Service::OrdersRelay).await;
    system.settle().await;
    assert_eq!(system.findings().await, [""; 0]);
    for customer in [ONE, OTHER] {
        assert!(!system.site.loyalty().tables_that_hold(customer).await.is_empty());
    }

    system.erase(Service::Orders, ONE).await;
    system.erase(Service::Loyalty, ONE).await;
    system.erase(Service::Loyalty, OTHER).await;
    system.erase(Service::Orders, OTHER).await;

    system.operate(&["dead", "restore", &event_id, "--by", "bob"]).await;
    system.operate(&["dead", "requeue", &event_id, "--by", "bob"]).await;
    system.settle().await;
    let audit = audit(&system.site.layout.target().unwrap().databases).await.unwrap();
    assert_eq!((audit.findings, audit.dead, audit.points.unwrap().awarded), (Vec::new(), 0, 200));
    for customer in [ONE, OTHER] {
        system.assert_gone(customer).await;
    }
    stop(system.processes.into_values()).await.unwrap();
}
