//! The retention within which duplicates are recognised, and events that are older.

use std::time::{Duration, Instant};

use inventory_service::MIGRATORS;
use proto::events::v1::{DescribeRequest, event_receiver_client::EventReceiverClient};
use sqlx::{Postgres, QueryBuilder};
use testkit::TestDatabase;

use crate::{
    inventory::{Inventory, eventually},
    orders::{hours_ago, order},
};

const DAY: [&str; 2] = ["--retention-hours", "24"];

/// Sets columns of the inbox's memory.
async fn set_pruned(inventory: &Inventory, columns: &str) {
    let mut update = QueryBuilder::<Postgres>::new("UPDATE inbox_pruned SET ");
    update.push(columns).build().execute(&inventory.pool).await.unwrap();
}

#[tokio::test]
async fn the_receiver_reports_its_retention() {
    let inventory = Inventory::serve(&DAY).await;
    let mut client = EventReceiverClient::new(inventory.client.events.clone());
    let description = client.describe(DescribeRequest {}).await.unwrap().into_inner();
    let retention = Duration::try_from(description.retention.unwrap()).unwrap();
    assert_eq!(retention, Duration::from_secs(24 * 3600));
    inventory.stop().await;
}

#[tokio::test]
async fn an_event_older_than_the_retention_is_rejected_and_the_rest_of_its_batch_applied() {
    let inventory = Inventory::serve(&DAY).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let (old, young) = (hours_ago(&order(&[("MUG", 1)]), 25), hours_ago(&order(&[("MUG", 2)]), 23));

    let outcomes = inventory.client.deliver([&old, &young, &old]).await.unwrap();

    assert_eq!(outcomes, ["REJECTED STALE", "APPLIED", "REJECTED STALE"]);
    assert!(!inventory.is_in_inbox(&old).await);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 8);
    inventory.stop().await;
}

#[tokio::test]
async fn an_old_event_that_is_still_in_the_inbox_is_a_duplicate() {
    let inventory = Inventory::serve(&DAY).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 1)]);
    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["APPLIED"]);
    assert_eq!(inventory.client.deliver([&hours_ago(&event, 30)]).await.unwrap(), ["DUPLICATE"]);
    inventory.stop().await;
}

#[tokio::test]
async fn ids_are_pruned_once_no_event_that_old_is_accepted() {
    let inventory = Inventory::serve(&DAY).await;
    let sql = "INSERT INTO processed_messages
        SELECT gen_random_uuid(), now() - make_interval(hours => hours)
        FROM generate_series(1, 2500), unnest(ARRAY[1, 24, 26]) AS hours";
    sqlx::query(sql).execute(&inventory.pool).await.unwrap();

    // The margin for clocks that differ is an hour.
    let kept = "SELECT count(*) FROM processed_messages";
    eventually("the oldest are pruned", async || inventory.count(kept).await == 5000).await;
    let wrongly = "SELECT count(*) FROM processed_messages WHERE processed_at < now() - interval '25 hours'";
    assert_eq!(inventory.count(wrongly).await, 0);
    let remembered = "SELECT round(extract(epoch FROM now() - until) / 3600)::bigint FROM inbox_pruned";
    assert_eq!(inventory.count(remembered).await, 26);
    sqlx::query("DELETE FROM processed_messages").execute(&inventory.pool).await.unwrap();
    inventory.stop().await;
}

/// An operator raises the retention, and the relay's maximum age with it. Ids that were pruned before stay stale.
#[tokio::test]
async fn an_event_pruned_under_a_shorter_retention_is_stale_under_a_longer_one() {
    let inventory = Inventory::serve(&["--retention-hours", "168"]).await;
    inventory.put_in(&[("MUG", 10)]).await;
    set_pruned(&inventory, "until = now() - interval '25 hours'").await;
    let (pruned, young) = (hours_ago(&order(&[("MUG", 1)]), 30), hours_ago(&order(&[("MUG", 2)]), 23));
    assert_eq!(inventory.client.deliver([&pruned, &young]).await.unwrap(), ["REJECTED STALE", "APPLIED"]);
    inventory.stop().await;
}

/// As a clock leaves it that ran a year ahead for long, and was set right.
#[tokio::test]
async fn a_time_in_the_future_until_which_ids_were_pruned_rejects_nothing_and_is_corrected() {
    let inventory = Inventory::serve(&DAY).await;
    inventory.put_in(&[("MUG", 10)]).await;
    // Another process's pruner, so that this one corrects nothing yet.
    let mut other = inventory.pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(122550254464888)").execute(&mut *other).await.unwrap();
    set_pruned(&inventory, "until = now() + interval '1 year'").await;
    let (first, second, third) =
        (order(&[("MUG", 1)]), hours_ago(&order(&[("MUG", 1)]), 23), hours_ago(&order(&[("MUG", 1)]), 23));
    let old = hours_ago(&order(&[("MUG", 1)]), 25);
    let outcomes = inventory.client.deliver([&first, &second, &old]).await.unwrap();
    assert_eq!(outcomes, ["APPLIED", "APPLIED", "REJECTED STALE"]);

    other.rollback().await.unwrap();
    let corrected = "SELECT count(*) FROM inbox_pruned WHERE until < now() - interval '24.9 hours'";
    eventually("the time is corrected", async || inventory.count(corrected).await == 1).await;
    let outcomes = inventory.client.deliver([&first, &third, &old]).await.unwrap();
    assert_eq!(outcomes, ["DUPLICATE", "APPLIED", "REJECTED STALE"]);
    assert_eq!(inventory.client.get_stock("MUG").await.unwrap(), 7);
    inventory.stop().await;
}

/// With an inbox whose clock is behind that of the server. It has one before any service has run: if the server's clock
/// jumps ahead before the first move, the inbox must not begin with that.
async fn serve_behind(interval: &str) -> Inventory {
    let database = TestDatabase::create("inventory_owner", &MIGRATORS).await;
    let sql = "UPDATE inbox_pruned SET clock = now() - $1::text::interval";
    let set = sqlx::query(sql).bind(interval).execute(&database.pool().await).await.unwrap();
    assert_eq!(set.rows_affected(), 1, "a new inbox has a clock");
    Inventory::serve_on(database, &DAY).await
}

/// This id is old by any clock. So the pruner has been there, for all ids that are to be pruned, once it is gone.
async fn record_old_id_and_see_it_pruned(inventory: &Inventory) {
    let old = "INSERT INTO processed_messages VALUES (gen_random_uuid(), now() - interval '1 year')";
    sqlx::query(old).execute(&inventory.pool).await.unwrap();
    let ids = "SELECT count(*) FROM processed_messages WHERE processed_at < now() - interval '360 days'";
    eventually("the old id is pruned", async || inventory.count(ids).await == 0).await;
}

/// As when the server's clock has jumped ten days ahead. If the inbox forgot ids by that, the events of the hour before
/// would be stale once the clock is set right.
#[tokio::test]
async fn a_clock_that_jumps_ahead_makes_no_event_old_and_forgets_none() {
    let inventory = serve_behind("10 days").await;
    inventory.put_in(&[("MUG", 10)]).await;
    let applied = hours_ago(&order(&[("MUG", 1)]), 240);
    assert_eq!(inventory.client.deliver([&applied]).await.unwrap(), ["APPLIED"]);
    let sql = "UPDATE processed_messages SET processed_at = now() - interval '10 days 1 hour'";
    sqlx::query(sql).execute(&inventory.pool).await.unwrap();
    record_old_id_and_see_it_pruned(&inventory).await;

    let young = hours_ago(&order(&[("MUG", 2)]), 240);
    assert_eq!(inventory.client.deliver([&applied, &young]).await.unwrap(), ["DUPLICATE", "APPLIED"]);
    inventory.stop().await;
}

/// After a stop, or a jump that turns out to be right. A service that starts knows neither, and waits.
#[tokio::test]
async fn the_inboxs_clock_follows_the_servers_slowly() {
    let started = Instant::now();
    let inventory = serve_behind("1 hour").await;
    let behind = "SELECT round(extract(epoch FROM now() - clock))::bigint FROM inbox_pruned";
    eventually("the clock advances", async || inventory.count(behind).await < 3600).await;
    // Some seconds have passed, and the clock has gained at most as much.
    let (seconds, passed) = (inventory.count(behind).await, i64::try_from(started.elapsed().as_secs()).unwrap());
    assert!((3600 - passed - 2..3600).contains(&seconds), "{seconds} after {passed}");
    inventory.stop().await;
}

/// A second jump of the server's clock would count at once if the inbox's stayed ahead.
#[tokio::test]
async fn the_inboxs_clock_falls_at_once() {
    let inventory = serve_behind("-10 days").await;
    let ahead = "SELECT count(*) FROM inbox_pruned WHERE clock > now()";
    eventually("the clock falls", async || inventory.count(ahead).await == 0).await;
    inventory.stop().await;
}

/// As when the server's clock was set back just now, after so long that the inbox's had followed.
#[tokio::test]
async fn a_clock_ahead_of_the_servers_counts_for_nothing() {
    let inventory = serve_behind("1 hour").await;
    inventory.put_in(&[("MUG", 10)]).await;
    let moved = "SELECT count(*) FROM inbox_pruned WHERE clock > now() - interval '1 hour'";
    eventually("the clock moves", async || inventory.count(moved).await == 1).await;
    // The next move corrects this, and is due after the next pruning.
    set_pruned(&inventory, "clock = now() + interval '10 days'").await;
    let (old, young) = (hours_ago(&order(&[("MUG", 1)]), 25), hours_ago(&order(&[("MUG", 2)]), 23));
    assert_eq!(inventory.client.deliver([&old, &young]).await.unwrap(), ["REJECTED STALE", "APPLIED"]);
    record_old_id_and_see_it_pruned(&inventory).await;
    assert_eq!(inventory.client.deliver([&young]).await.unwrap(), ["DUPLICATE"]);
    inventory.stop().await;
}

/// Its sender's clock is ahead, or this server's is behind. When that is set right, the record must not look older than the
/// event.
#[tokio::test]
async fn an_event_that_is_dated_ahead_is_remembered_from_its_date() {
    let inventory = Inventory::serve(&DAY).await;
    inventory.put_in(&[("MUG", 10)]).await;
    let event = order(&[("MUG", 1)]);
    assert_eq!(inventory.client.deliver([&hours_ago(&event, -26)]).await.unwrap(), ["APPLIED"]);
    let sql = "UPDATE processed_messages SET processed_at = processed_at - interval '26 hours'";
    sqlx::query(sql).execute(&inventory.pool).await.unwrap();
    record_old_id_and_see_it_pruned(&inventory).await;
    assert_eq!(inventory.client.deliver([&event]).await.unwrap(), ["DUPLICATE"]);
    inventory.stop().await;
}

#[tokio::test]
async fn one_pruner_works_at_a_time() {
    let inventory = Inventory::serve(&DAY).await;
    // Another process's pruner, in the middle of a batch.
    let mut other = inventory.pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(122550254464888)").execute(&mut *other).await.unwrap();
    let sql = "INSERT INTO processed_messages VALUES (gen_random_uuid(), now() - interval '26 hours')";
    sqlx::query(sql).execute(&inventory.pool).await.unwrap();
    let given_up = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND usename = 'inventory_service' AND query = 'ROLLBACK'
            AND query_start > (SELECT max(processed_at) + interval '26 hours' FROM processed_messages)";
    eventually("the service's pruner finds another at work", async || inventory.count(given_up).await > 0).await;
    assert_eq!(inventory.count("SELECT count(*) FROM processed_messages").await, 1);

    other.commit().await.unwrap();
    eventually("it tries again", async || inventory.count("SELECT count(*) FROM processed_messages").await == 0).await;
    inventory.stop().await;
}
