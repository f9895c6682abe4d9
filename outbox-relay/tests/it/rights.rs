//! What the relay's role may do, which is also that of operators. What it needs, the other tests do as this role.

use testkit::TestDatabase;

use crate::outbox::Outbox;

const ROLE: &str = "outbox_relay";

/// A new right needs a reason: a statement of the relay, or of an operator's command.
const RIGHTS: &str = "\
DATABASE: CONNECT
FUNCTION outbox_restore: EXECUTE
MEMBER OF pg_read_all_stats
SCHEMA public: USAGE
TABLE _outbox_migrations: SELECT
TABLE outbox: DELETE, SELECT, UPDATE (attempted_at, attempts, attempts_before_requeue, charged_at, created_at, failures, last_error, lease_token, subscription_id, visible_at)
TABLE outbox_deed_events: INSERT (aggregate_id, deed_id, event_id, sequence, subscription_id), SELECT
TABLE outbox_deeds: INSERT (about, can_undo, done_by, kind, reason, subscription_id, undoes), SELECT
TABLE outbox_discarded: INSERT (aggregate_id, attempts, created_at, discarded_by, event_id, event_type, last_error, payload, reason, refused, sequence, subscription_id, traceparent, tracestate), SELECT, UPDATE (attempts, created_at, discarded_at, discarded_by, last_error, reason)
TABLE outbox_paces: DELETE, INSERT (events_per_second, reason, set_by, subscription_id), SELECT, UPDATE (events_per_second, reason, set_at, set_by)
TABLE outbox_pauses: DELETE, INSERT (paused_by, reason, subscription_id), SELECT
TABLE outbox_routes: DELETE, INSERT (delivered, hidden_seconds_max, holds_lock, paces_read_at, reason, receiver, relay_id, route, state), SELECT, UPDATE (delivered, holds_lock, paces_read_at, reason, seen_at, since, state)
TABLE outbox_subscriptions: INSERT, SELECT, UPDATE (ended_at, ended_by, max_age_seconds, reason)";

const REFUSED: [&str; 50] = [
    // What an event says, whose it is, and where it stands in line.
    "UPDATE outbox SET payload = ''",
    "UPDATE outbox SET visible_at = now(), payload = ''",
    "UPDATE outbox SET event_type = 'orders.v1.OrderCancelled'",
    "UPDATE outbox SET aggregate_id = gen_random_uuid()",
    "UPDATE outbox SET sequence = sequence + 1",
    "UPDATE outbox SET event_id = gen_random_uuid()",
    "UPDATE outbox SET traceparent = ''",
    "UPDATE outbox SET tracestate = ''",
    // A new event.
    "INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload)
        VALUES (1, gen_random_uuid(), 1, gen_random_uuid(), 'test.v1.Happened', '')",
    "SELECT outbox_enqueue('{}', '{}', '{}', '{}', '{}', '{}', '{}')",
    "SELECT outbox_resend(1::smallint, '{}', '{}', '{}', '{}', '{}', '{}', '', '')",
    "TRUNCATE outbox",
    // What was put away.
    "DELETE FROM outbox_discarded",
    "UPDATE outbox_discarded SET payload = ''",
    "UPDATE outbox_discarded SET event_type = ''",
    "UPDATE outbox_discarded SET refused = false",
    "INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload,
        last_error, discarded_at, discarded_by, reason)
        VALUES (gen_random_uuid(), 1, gen_random_uuid(), 1, now(), 0, '', '', '', now(), '', '')",
    // What operators have done.
    "UPDATE outbox_deeds SET done_by = 'bob'",
    "DELETE FROM outbox_deeds",
    "INSERT INTO outbox_deeds (done_at, done_by, kind, reason, about, can_undo) VALUES (now(), 'bob', 'pause', '', '', false)",
    "UPDATE outbox_deed_events SET sequence = 2",
    "DELETE FROM outbox_deed_events",
    "UPDATE outbox_pauses SET paused_by = 'bob'",
    "INSERT INTO outbox_pauses (subscription_id, paused_at, paused_by, reason) VALUES (1, now(), 'bob', '')",
    "UPDATE outbox_paces SET subscription_id = 0",
    "INSERT INTO outbox_paces (subscription_id, events_per_second, set_at, set_by, reason) VALUES (1, 1, now(), 'bob', '')",
    // Who gets which events.
    "DELETE FROM outbox_subscriptions",
    "UPDATE outbox_subscriptions SET pattern = '*'",
    "UPDATE outbox_subscriptions SET name = 'other'",
    "DO 'BEGIN LOCK TABLE outbox_subscriptions IN SHARE ROW EXCLUSIVE MODE; END'",
    "UPDATE outbox_routes SET receiver = 'http://elsewhere'",
    "INSERT INTO outbox_routes (relay_id, route, receiver, state, seen_at) VALUES (gen_random_uuid(), '', '', '', now())",
    // The inbox, and what was sent again.
    "SELECT FROM processed_messages",
    "DELETE FROM processed_messages",
    "SELECT FROM inbox_pruned",
    "SELECT FROM outbox_resent",
    // The schema.
    "UPDATE _outbox_migrations SET checksum = ''",
    "CREATE TABLE mine ()",
    "CREATE TEMPORARY TABLE mine ()",
    "CREATE FUNCTION mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "CREATE SCHEMA mine",
    "ALTER TABLE outbox DISABLE TRIGGER USER",
    "CREATE INDEX ON outbox (event_type)",
    "DROP TABLE outbox_resent",
    // The server.
    "CREATE DATABASE mine",
    "CREATE ROLE mine",
    "ALTER ROLE order_service PASSWORD 'mine'",
    "SET ROLE orders_owner",
    "SET session_replication_role = replica",
    "COPY outbox TO PROGRAM 'cat'",
];

#[tokio::test]
async fn the_relay_has_these_rights_and_no_other() {
    let outbox = Outbox::create().await;
    assert_eq!(outbox.database.rights_of(ROLE).await, RIGHTS);
}

#[tokio::test]
async fn the_relay_is_refused_everything_else() {
    let outbox = Outbox::create().await;
    for statement in REFUSED {
        assert_eq!(outbox.database.sqlstate(ROLE, statement).await, "42501", "{statement}");
    }
}

/// Whoever has the relay's password reaches every outbox of the server. Services of others do not.
#[tokio::test]
async fn a_role_connects_only_to_databases_that_it_works_in() {
    for (owner, may) in [
        ("orders_owner", ["order_service", "orders_owner"]),
        ("inventory_owner", ["inventory_service", "inventory_owner"]),
        ("loyalty_owner", ["loyalty_service", "loyalty_owner"]),
    ] {
        let database = TestDatabase::create(owner, &[]).await;
        for role in [
            "order_service",
            "orders_owner",
            "inventory_service",
            "inventory_owner",
            "loyalty_service",
            "loyalty_owner",
        ] {
            let expected = if may.contains(&role) { "00000" } else { "42501" };
            assert_eq!(database.sqlstate(role, "SELECT").await, expected, "{role} in a database of {owner}");
        }
        assert_eq!(database.sqlstate(ROLE, "SELECT").await, "00000");
    }
}
