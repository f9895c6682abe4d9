//! What the roles may do in the orders database. What they need, the other tests do as these roles.

use order_service::MIGRATORS;
use testkit::TestDatabase;

/// A new right needs a reason: a statement of the service.
const RIGHTS: &str = "\
DATABASE: CONNECT
FUNCTION outbox_enqueue: EXECUTE
FUNCTION outbox_resend: EXECUTE
SCHEMA public: USAGE
TABLE _orders_migrations: SELECT
TABLE _outbox_migrations: SELECT
TABLE inbox_pruned: INSERT, SELECT, UPDATE
TABLE order_items: INSERT, SELECT
TABLE orders: INSERT (currency_code, customer_id, derived_ids, order_id, request_id, total_minor), SELECT, UPDATE (cancel_request_id, cancelled_at, derived_ids, rejection, status)
TABLE outbox: SELECT (aggregate_id, sequence, subscription_id)
TABLE outbox_discarded: SELECT (event_id, subscription_id)
TABLE outbox_subscriptions: SELECT (created_at, ended_at, name, subscription_id, type_like)
TABLE processed_messages: DELETE, INSERT, SELECT";

const REFUSED: [(&str, &str); 42] = [
    (
        "order_service",
        "INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload)
        VALUES (1, gen_random_uuid(), 1, gen_random_uuid(), 'orders.v1.OrderCreated', '')",
    ),
    ("order_service", "UPDATE outbox SET visible_at = now()"),
    ("order_service", "DELETE FROM outbox"),
    ("order_service", "SELECT payload FROM outbox"),
    ("order_service", "SELECT payload FROM outbox_discarded"),
    ("order_service", "DELETE FROM outbox_discarded"),
    ("order_service", "SELECT outbox_restore(gen_random_uuid(), NULL, '')"),
    ("order_service", "SELECT outbox_refuse(gen_random_uuid(), '', '')"),
    ("order_service", "INSERT INTO outbox_subscriptions (name, pattern, created_by) VALUES ('a', '*', 'bob')"),
    ("order_service", "UPDATE outbox_subscriptions SET ended_at = now()"),
    ("order_service", "INSERT INTO outbox_pauses (subscription_id, paused_by, reason) VALUES (0, 'bob', '')"),
    ("order_service", "SELECT FROM outbox_routes"),
    ("order_service", "SELECT FROM outbox_deeds"),
    ("order_service", "SELECT FROM outbox_resent"),
    ("order_service", "DELETE FROM orders"),
    ("order_service", "UPDATE orders SET total_minor = 0"),
    ("order_service", "UPDATE orders SET customer_id = 'bob'"),
    (
        "order_service",
        "INSERT INTO orders (order_id, customer_id, currency_code, total_minor, status)
        VALUES (gen_random_uuid(), 'bob', 'EUR', 1, 'CONFIRMED')",
    ),
    ("order_service", "UPDATE order_items SET unit_price_minor = 0"),
    ("order_service", "DELETE FROM order_items"),
    ("order_service", "TRUNCATE orders, order_items"),
    ("order_service", "UPDATE processed_messages SET processed_at = now()"),
    ("order_service", "DELETE FROM inbox_pruned"),
    ("order_service", "DELETE FROM _orders_migrations"),
    ("order_service", "CREATE TABLE mine ()"),
    ("order_service", "CREATE TEMPORARY TABLE mine ()"),
    ("order_service", "CREATE FUNCTION mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'"),
    ("order_service", "CREATE SCHEMA mine"),
    ("order_service", "ALTER TABLE orders ADD COLUMN mine text"),
    ("order_service", "DROP TABLE order_items"),
    ("order_service", "CREATE DATABASE mine"),
    ("order_service", "ALTER ROLE outbox_relay PASSWORD 'mine'"),
    ("order_service", "SET ROLE orders_owner"),
    ("order_service", "COPY orders TO PROGRAM 'cat'"),
    ("outbox_relay", "SELECT FROM orders"),
    ("outbox_relay", "UPDATE orders SET status = 'CONFIRMED'"),
    ("outbox_relay", "SELECT FROM order_items"),
    ("outbox_relay", "SELECT FROM _orders_migrations"),
    // Migration 0001 of orders once gave it the right to change every column.
    ("outbox_relay", "UPDATE outbox SET payload = ''"),
    ("outbox_relay", "UPDATE outbox SET event_type = ''"),
    ("outbox_relay", "UPDATE outbox SET aggregate_id = gen_random_uuid()"),
    ("outbox_relay", "UPDATE outbox SET sequence = 1"),
];

#[tokio::test]
async fn the_service_has_these_rights_and_no_other() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    assert_eq!(database.rights_of("order_service").await, RIGHTS);
}

/// Beside what it has in every outbox.
#[tokio::test]
async fn the_relay_may_refuse_an_order_and_do_nothing_else_to_orders() {
    let alone = TestDatabase::create("orders_owner", &MIGRATORS[..1]).await;
    let orders = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let (alone, orders) = (alone.rights_of("outbox_relay").await, orders.rights_of("outbox_relay").await);
    let more: Vec<_> = orders.lines().filter(|line| !alone.lines().any(|other| other == *line)).collect();
    assert_eq!(more, ["FUNCTION outbox_refuse: EXECUTE"]);
}

#[tokio::test]
async fn both_roles_are_refused_everything_else() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    for (role, statement) in REFUSED {
        assert_eq!(database.sqlstate(role, statement).await, "42501", "{role}: {statement}");
    }
}
