use proto::events::v1::Event;
use tonic::{Code, Status};

use crate::{client::refusal, inventory::Inventory, orders::order};

/// No movement of the SKU CURSED can be written.
pub(crate) const FAIL_THE_STATEMENT: &str = "
    CREATE FUNCTION curse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'stock_ledger is cursed'; END $$;
    CREATE TRIGGER curse BEFORE INSERT ON stock_ledger
        FOR EACH ROW WHEN (NEW.sku = 'CURSED') EXECUTE FUNCTION curse()";
/// The same, but only the commit fails.
const FAIL_THE_COMMIT: &str = "
    CREATE FUNCTION curse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'stock_ledger is cursed'; END $$;
    CREATE CONSTRAINT TRIGGER curse AFTER INSERT ON stock_ledger DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.sku = 'CURSED') EXECUTE FUNCTION curse()";
/// The same, as a failure that may pass: a race that the transaction lost.
const FAIL_FOR_NOW: &str = "
    CREATE FUNCTION curse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'stock_ledger is cursed' USING ERRCODE = 'serialization_failure'; END $$;
    CREATE TRIGGER curse BEFORE INSERT ON stock_ledger
        FOR EACH ROW WHEN (NEW.sku = 'CURSED') EXECUTE FUNCTION curse()";

/// Delivers a batch while `curse` is active, then without it. First the batch must leave nothing, then all is applied.
/// Returns the failure.
async fn fail_then_apply(curse: &'static str) -> Status {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10), ("CURSED", 10)]).await;
    let events: [Event; 4] =
        [order(&[("MUG", 2)]), order(&[("MUG", 1), ("CURSED", 3)]), order(&[("MUG", 99)]), order(&[("MUG", 3)])];
    let before = inventory.contents().await;
    sqlx::raw_sql(curse).execute(&inventory.pool).await.unwrap();

    let mut failures = Vec::new();
    for _ in 0..3 {
        failures.push(inventory.client.deliver(&events).await.unwrap_err());
    }

    assert_eq!(inventory.contents().await, before);
    // The connection is still usable: it is not stuck in the failed transaction.
    assert_eq!(inventory.client.deliver(&[order(&[("MUG", 1)])]).await.unwrap(), ["APPLIED"]);

    sqlx::raw_sql("DROP FUNCTION curse CASCADE").execute(&inventory.pool).await.unwrap();
    assert_eq!(inventory.client.deliver(&events).await.unwrap(), ["APPLIED"; 4]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 3);
    assert_eq!(inventory.client.get_stock("CURSED").await.unwrap(), 7);
    inventory.stop().await;
    failures.pop().unwrap()
}

/// Details are encoded, but text in them stays readable.
fn assert_tells_nothing_of_the_database(status: &Status) {
    let told = format!("{} {}", status.message(), String::from_utf8_lossy(status.details())).to_lowercase();
    for secret in ["curse", "ledger", "insert", "plpgsql", "trigger", "stock_", "p0001", "40001"] {
        assert!(!told.contains(secret), "{secret} in {told}");
    }
}

#[tokio::test]
async fn a_batch_one_of_whose_statements_fails_leaves_nothing_and_can_come_again() {
    let status = fail_then_apply(FAIL_THE_STATEMENT).await;
    assert_eq!((refusal(&status), status.message()), ("Internal INTERNAL".to_owned(), "internal error"));
    assert_tells_nothing_of_the_database(&status);
}

#[tokio::test]
async fn a_batch_whose_commit_fails_is_not_answered_as_applied() {
    let status = fail_then_apply(FAIL_THE_COMMIT).await;
    assert_eq!((refusal(&status), status.message()), ("Internal INTERNAL".to_owned(), "internal error"));
    assert_tells_nothing_of_the_database(&status);
}

#[tokio::test]
async fn a_failure_that_may_pass_is_answered_with_a_time_to_retry() {
    let status = fail_then_apply(FAIL_FOR_NOW).await;
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(refusal(&status), "Unavailable DATABASE_UNAVAILABLE");
    assert_tells_nothing_of_the_database(&status);
}

/// A missing right is an operator's to mend. If the answer blamed the events, a relay would count attempts against them
/// until they are dead.
#[tokio::test]
async fn a_missing_right_is_answered_as_an_outage() {
    let inventory = Inventory::serve(&[]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 1)]);
    let revoke = "REVOKE INSERT ON processed_messages FROM inventory_service";
    sqlx::raw_sql(revoke).execute(&inventory.pool).await.unwrap();

    let status = inventory.client.deliver([&event]).await.unwrap_err();
    assert_eq!(refusal(&status), "Unavailable DATABASE_UNAVAILABLE");
    assert_tells_nothing_of_the_database(&status);

    sqlx::raw_sql("GRANT INSERT ON processed_messages TO inventory_service").execute(&inventory.pool).await.unwrap();
    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["APPLIED"]);
    inventory.stop().await;
}
