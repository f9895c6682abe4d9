//! What the roles may do in the inventory database. What they need, the other tests do as these roles.

use inventory_service::MIGRATORS;
use testkit::TestDatabase;

/// A new right needs a reason: a statement of the service.
const RIGHTS: &str = "\
DATABASE: CONNECT
FUNCTION outbox_enqueue: EXECUTE
FUNCTION outbox_resend: EXECUTE
SCHEMA public: USAGE
TABLE _inventory_migrations: SELECT
TABLE _outbox_migrations: SELECT
TABLE inbox_pruned: INSERT, SELECT, UPDATE
TABLE outbox: SELECT (aggregate_id, sequence, subscription_id)
TABLE outbox_discarded: SELECT (event_id, subscription_id)
TABLE outbox_subscriptions: SELECT (created_at, ended_at, name, subscription_id, type_like)
TABLE processed_messages: DELETE, INSERT, SELECT
TABLE reservations: INSERT (cancelled_at, cancelled_by, derived_ids, event_id, order_id, rejection, status), SELECT, UPDATE (cancelled_at, cancelled_by, derived_ids, status)
TABLE stock: INSERT, SELECT, UPDATE (available)
TABLE stock_ledger: INSERT (delta, kind, reference, sku), SELECT";

const REFUSED: [(&str, &str); 29] = [
    (
        "inventory_service",
        "INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload)
        VALUES (1, gen_random_uuid(), 1, gen_random_uuid(), 'inventory.v1.StockReserved', '')",
    ),
    ("inventory_service", "UPDATE outbox SET visible_at = now()"),
    ("inventory_service", "DELETE FROM outbox"),
    ("inventory_service", "SELECT payload FROM outbox"),
    ("inventory_service", "SELECT payload FROM outbox_discarded"),
    ("inventory_service", "SELECT outbox_restore(gen_random_uuid(), NULL, '')"),
    ("inventory_service", "UPDATE outbox_subscriptions SET ended_at = now()"),
    ("inventory_service", "SELECT FROM outbox_routes"),
    ("inventory_service", "SELECT FROM outbox_resent"),
    ("inventory_service", "DELETE FROM stock"),
    ("inventory_service", "UPDATE stock SET sku = 'other'"),
    ("inventory_service", "UPDATE stock_ledger SET delta = 1"),
    ("inventory_service", "DELETE FROM stock_ledger"),
    (
        "inventory_service",
        "INSERT INTO stock_ledger (reference, kind, sku, delta, created_at)
        VALUES (gen_random_uuid(), 'OPENING', 'a', 1, now())",
    ),
    ("inventory_service", "UPDATE reservations SET order_id = gen_random_uuid()"),
    ("inventory_service", "UPDATE reservations SET event_id = gen_random_uuid()"),
    ("inventory_service", "DELETE FROM reservations"),
    ("inventory_service", "TRUNCATE stock_ledger"),
    ("inventory_service", "UPDATE processed_messages SET processed_at = now()"),
    ("inventory_service", "DELETE FROM inbox_pruned"),
    ("inventory_service", "CREATE TABLE mine ()"),
    ("inventory_service", "CREATE TEMPORARY TABLE mine ()"),
    ("inventory_service", "ALTER TABLE stock DROP CONSTRAINT stock_available_not_negative"),
    ("inventory_service", "ALTER ROLE outbox_relay PASSWORD 'mine'"),
    ("inventory_service", "SET ROLE inventory_owner"),
    ("outbox_relay", "SELECT FROM stock"),
    ("outbox_relay", "SELECT FROM stock_ledger"),
    ("outbox_relay", "SELECT FROM reservations"),
    ("outbox_relay", "SELECT FROM _inventory_migrations"),
];

#[tokio::test]
async fn the_service_has_these_rights_and_no_other() {
    let database = TestDatabase::create("inventory_owner", &MIGRATORS).await;
    assert_eq!(database.rights_of("inventory_service").await, RIGHTS);
}

#[tokio::test]
async fn the_relay_has_no_right_here_that_it_lacks_in_any_outbox() {
    let alone = TestDatabase::create("inventory_owner", &MIGRATORS[..1]).await;
    let inventory = TestDatabase::create("inventory_owner", &MIGRATORS).await;
    assert_eq!(inventory.rights_of("outbox_relay").await, alone.rights_of("outbox_relay").await);
}

#[tokio::test]
async fn both_roles_are_refused_everything_else() {
    let database = TestDatabase::create("inventory_owner", &MIGRATORS).await;
    for (role, statement) in REFUSED {
        assert_eq!(database.sqlstate(role, statement).await, "42501", "{role}: {statement}");
    }
}
