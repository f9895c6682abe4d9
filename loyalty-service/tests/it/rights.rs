//! What the roles may do in the loyalty database. What they need, the other tests do as these roles.

use loyalty_service::MIGRATORS;
use testkit::TestDatabase;

/// A new right needs a reason: a statement of the service.
const RIGHTS: &str = "\
DATABASE: CONNECT
SCHEMA public: USAGE
TABLE _loyalty_migrations: SELECT
TABLE _outbox_migrations: SELECT
TABLE inbox_pruned: INSERT, SELECT, UPDATE
TABLE points: INSERT, SELECT, UPDATE (cancelled_at, cancelled_by)
TABLE processed_messages: DELETE, INSERT, SELECT";

const REFUSED: [(&str, &str); 15] = [
    ("loyalty_service", "SELECT outbox_enqueue('{}', '{}', '{}', '{}', '{}', '{}', '{}')"),
    ("loyalty_service", "SELECT outbox_resend(1::smallint, '{}', '{}', '{}', '{}', '{}', '{}', '', '')"),
    ("loyalty_service", "SELECT FROM outbox"),
    (
        "loyalty_service",
        "INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload)
        VALUES (1, gen_random_uuid(), 1, gen_random_uuid(), 'loyalty.v1.Awarded', '')",
    ),
    ("loyalty_service", "SELECT FROM outbox_subscriptions"),
    ("loyalty_service", "UPDATE points SET points = 1000000"),
    ("loyalty_service", "UPDATE points SET customer_id = 'bob'"),
    ("loyalty_service", "DELETE FROM points"),
    ("loyalty_service", "UPDATE processed_messages SET processed_at = now()"),
    ("loyalty_service", "DELETE FROM inbox_pruned"),
    ("loyalty_service", "CREATE TABLE mine ()"),
    ("loyalty_service", "CREATE TEMPORARY TABLE mine ()"),
    ("loyalty_service", "SET ROLE loyalty_owner"),
    ("outbox_relay", "SELECT FROM points"),
    ("outbox_relay", "SELECT FROM _loyalty_migrations"),
];

#[tokio::test]
async fn the_service_has_these_rights_and_no_other() {
    let database = TestDatabase::create("loyalty_owner", &MIGRATORS).await;
    assert_eq!(database.rights_of("loyalty_service").await, RIGHTS);
}

#[tokio::test]
async fn the_relay_has_no_right_here_that_it_lacks_in_any_outbox() {
    let alone = TestDatabase::create("loyalty_owner", &MIGRATORS[..1]).await;
    let loyalty = TestDatabase::create("loyalty_owner", &MIGRATORS).await;
    assert_eq!(loyalty.rights_of("outbox_relay").await, alone.rights_of("outbox_relay").await);
}

#[tokio::test]
async fn both_roles_are_refused_everything_else() {
    let database = TestDatabase::create("loyalty_owner", &MIGRATORS).await;
    for (role, statement) in REFUSED {
        assert_eq!(database.sqlstate(role, statement).await, "42501", "{role}: {statement}");
    }
}
