//! Subscriptions: each receiver gets every event that it subscribed, in its own queue.

use std::net::SocketAddr;

use sqlx::Connection;
use testkit::processes::free_port;
use tonic::Code;
use uuid::Uuid;

use crate::{
    binary::Binary,
    operator::{Operator, mark_dead},
    outbox::{NewEvent, Outbox},
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::until,
};

const CREATED: &str = "orders.v1.OrderCreated";
const CANCELLED: &str = "orders.v1.OrderCancelled";

async fn start(outbox: &Outbox, routes: &[(&str, SocketAddr)]) -> Relay {
    let routes: Vec<_> = routes.iter().map(|(name, address)| format!("{name}=http://{address}")).collect();
    let routes: Vec<_> = routes.iter().map(String::as_str).collect();
    Relay::start_with_routes(&outbox.relay_url(), &routes, &[]).await
}

fn sorted(mut ids: Vec<Uuid>) -> Vec<Uuid> {
    ids.sort_unstable();
    ids
}

async fn count(outbox: &Outbox, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&outbox.pool).await.unwrap()
}

async fn wait_for_a_log(relay: &Binary, text: &str) -> String {
    let log = || std::fs::read_to_string(relay.log_file()).unwrap();
    until(text, async || log().contains(text)).await;
    log()
}

#[tokio::test]
async fn every_subscriber_gets_every_event_of_its_pattern_and_no_other() {
    let outbox = Outbox::without_subscriptions().await;
    let patterns = [("all", "orders.v1.*"), ("created", CREATED), ("odd", "order_svc.*"), ("every", "*")];
    for (name, pattern) in patterns {
        outbox.subscribe(name, pattern).await;
    }
    let created = outbox.enqueue(CREATED, 150).await;
    let cancelled = outbox.enqueue(CANCELLED, 150).await;
    let odd = outbox.enqueue("order_svc.v1.Moved", 1).await;
    let similar = outbox.enqueue("order-svc.v1.Moved", 1).await;
    let other = outbox.enqueue("orders_v1.OrderCreated", 1).await;
    let mut receivers = Vec::new();
    for _ in patterns {
        receivers.push(Receiver::start(Reply::apply).await);
    }
    let routes: Vec<_> = patterns.iter().zip(&receivers).map(|((name, _), to)| (*name, to.address)).collect();
    let relay = start(&outbox, &routes).await;
    outbox.wait_until_empty().await;
    relay.stop().await;

    let received: Vec<_> = receivers.iter().map(|receiver| sorted(receiver.read(Log::ids))).collect();
    assert_eq!(received[0], sorted([&*created, &cancelled].concat()));
    assert_eq!(received[1], created);
    assert_eq!(received[2], odd);
    assert_eq!(received[3], sorted([created, cancelled, odd, similar, other].concat()));
}

#[tokio::test]
async fn a_subscriber_that_is_down_delays_no_other() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("away", "*").await;
    outbox.subscribe("there", "*").await;
    let receiver = Receiver::start(Reply::apply).await;
    let away = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let relay = start(&outbox, &[("away", away), ("there", receiver.address)]).await;
    let ids = outbox.enqueue(CREATED, 300).await;
    until("all of the other's are delivered", async || outbox.count().await == 300).await;
    let expected = [("away".to_owned(), "DOWN".to_owned()), ("there".to_owned(), "OPEN".to_owned())];
    until("both routes are announced", async || outbox.route_states().await == expected).await;
    relay.stop().await;
    assert_eq!(sorted(receiver.read(Log::ids)), ids);
    assert!(outbox.rows().await.iter().all(|row| row.attempts == 0 && row.visible));
}

/// One subscriber refuses the first event of an aggregate for good. The second event waits for it in that subscription,
/// and in no other.
#[tokio::test]
async fn each_subscription_has_its_own_sequence_and_dead_letters() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("picky", "*").await;
    outbox.subscribe("easy", "*").await;
    let aggregate_id = Uuid::new_v4();
    let events = [NewEvent::of(aggregate_id, 1), NewEvent::of(aggregate_id, 2)];
    let (picky, easy) = (Receiver::start(Reply::apply).await, Receiver::start(Reply::apply).await);
    picky.follow(|events| Reply::each(events, crate::receiver::rejected));
    let relay = start(&outbox, &[("picky", picky.address), ("easy", easy.address)]).await;
    outbox.enqueue_as(CREATED, &events).await;
    until("the easy one has both", async || easy.read(|log| log.ids().len()) == 2).await;
    outbox.wait_for_dead(1).await;
    until("one event waits", async || outbox.count().await == 2).await;
    assert_eq!(easy.read(Log::ids), [events[0].event_id, events[1].event_id]);
    assert_eq!(picky.read(Log::ids), [events[0].event_id]);

    let operator = Operator::of(&outbox);
    let list = operator.reads(&["dead", "list", "--json"]).await;
    assert_eq!((&list["dead_events"][0]["subscription"], &list["total_size"]), (&"picky".into(), &1.into()));
    let of_easy = operator.reads(&["dead", "list", "--json", "--subscription", "easy"]).await;
    assert_eq!(of_easy["total_size"], 0);
    let id = events[0].event_id.to_string();
    assert!(
        operator
            .is_refused(&["dead", "requeue", &id, "--subscription", "easy"])
            .await
            .contains("is not in the outbox: it was delivered")
    );
    let unknown = operator.is_misused(&["dead", "requeue", &id, "--subscription", "nobody"]).await;
    assert!(unknown.contains("nobody has subscribed nobody; there are easy, picky"), "{unknown}");
    picky.follow(Reply::apply);
    operator.does(&["dead", "requeue", &id, "--subscription", "picky"]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(easy.read(Log::ids).len(), 2);
}

#[tokio::test]
async fn an_event_without_a_subscription_is_kept_shown_and_goes_to_the_first_that_is_made_for_its_type() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("cancelled", CANCELLED).await;
    let created = outbox.enqueue(CREATED, 20).await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Binary::start_on_route(&outbox, &format!("cancelled=http://{}", receiver.address), &[]);
    let log = wait_for_a_log(&relay, "no subscription takes these events").await;
    let warning = log.lines().find(|line| line.contains("no subscription takes")).unwrap();
    assert!(warning.contains("\"orders.v1.OrderCreated\",\"events\":20") && warning.contains("WARN"), "{warning}");
    let operator = Operator::of(&outbox);
    assert_eq!(operator.reads(&["status", "--json"]).await["unrouted"], 20);
    assert!(operator.does(&["status"]).await.contains("UNROUTED 20 of the waiting events match no subscription"));

    let said = operator.does(&["subscribe", "created", CREATED]).await;
    assert_eq!(
        said,
        format!(
            "created is subscribed from now on to {CREATED}, and 20 events that waited go to the \
                              subscriptions made for them\n"
        )
    );
    operator.does(&["subscribe", "later", "*"]).await;
    let second = Receiver::start(Reply::apply).await;
    let other = start(&outbox, &[("created", second.address)]).await;
    outbox.wait_until_empty().await;
    assert_eq!(sorted(second.read(Log::ids)), created);
    other.stop().await;
}

/// The first event's transaction does not see the subscription, and commits after it was made. The second event has a
/// row for the subscription. It must not overtake the first.
#[tokio::test]
async fn an_event_enqueued_while_its_subscription_is_made_is_neither_lost_nor_overtaken() {
    let outbox = Outbox::without_subscriptions().await;
    let receiver = Receiver::start(Reply::apply).await;
    let mut first = outbox.pool.begin().await.unwrap();
    let (aggregate_id, ids) = (Uuid::new_v4(), [Uuid::now_v7(), Uuid::now_v7()]);
    let enqueue =
        "SELECT outbox_enqueue(ARRAY[$1::uuid], ARRAY[$2::integer], ARRAY[$3::uuid], ARRAY['a.v1.B'], ARRAY[''::bytea],
        ARRAY[NULL], ARRAY[NULL])";
    sqlx::query(enqueue).bind(aggregate_id).bind(1).bind(ids[0]).execute(&mut *first).await.unwrap();
    let operator = Operator::of(&outbox);
    assert_eq!(operator.does(&["subscribe", "all", "*"]).await, "all is subscribed from now on to *\n");
    // Without relays that look for such events, it would stay unrouted.
    first.commit().await.unwrap();
    sqlx::query(enqueue).bind(aggregate_id).bind(2).bind(ids[1]).execute(&outbox.pool).await.unwrap();
    assert_eq!(count(&outbox, "SELECT count(*) FROM outbox WHERE subscription_id = 0").await, 1);
    let relay = start(&outbox, &[("all", receiver.address)]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), ids);
}

#[tokio::test]
async fn a_route_to_a_name_that_nobody_subscribed_ends_with_2_and_lists_those_there_are() {
    let outbox = Outbox::without_subscriptions().await;
    let operator = Operator::of(&outbox);
    let serve = ["serve", "--source", "orders", "--ops-listen", "127.0.0.1:0", "--route"];
    let arguments = |route| [&serve[..], &[route]].concat();
    let relay =
        operator.command(&arguments("loyalty=http://localhost:1")).env("RUST_LOG", "off").output().await.unwrap();
    let said = String::from_utf8(relay.stderr).unwrap();
    assert_eq!(relay.status.code(), Some(2), "{said}");
    assert!(said.contains("nobody has subscribed loyalty; there is no subscription: subscribe it with"), "{said}");
    operator.does(&["subscribe", "inventory", "orders.v1.*"]).await;
    operator.does(&["subscribe", "billing", "*"]).await;
    let relay =
        operator.command(&arguments("loyalty=http://localhost:1,billing=http://localhost:2")).output().await.unwrap();
    let said = String::from_utf8(relay.stderr).unwrap();
    assert_eq!(relay.status.code(), Some(2), "{said}");
    assert!(
        said.contains("loyalty; there are billing, inventory: subscribe it with `outbox-relay subscribe loyalty"),
        "{said}"
    );
    let old = operator.is_misused(&arguments("orders.v1.*=http://a:1")).await;
    assert!(old.contains("outbox-relay subscribe inventory 'orders.v1.*'"), "{old}");
}

#[tokio::test]
async fn an_address_under_a_name_that_is_no_longer_read_ends_with_2_and_names_the_new_one() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    for old in ["RELAY_LISTEN", "RELAY_METRICS_LISTEN"] {
        let mut serve = operator.command(&["serve", "--source", "orders", "--route", "loyalty=http://a:1"]);
        let relay = serve.env("RUST_LOG", "off").env(old, "127.0.0.1:0").output().await.unwrap();
        let said = String::from_utf8(relay.stderr).unwrap();
        assert_eq!(relay.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("{old} is no longer read; give RELAY_OPS_LISTEN")), "{said}");
    }
}

#[tokio::test]
async fn a_second_relay_with_another_url_for_a_subscription_is_refused_and_told_of_the_first() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("inventory", "*").await;
    outbox.subscribe("loyalty", "*").await;
    let (first, second) = (Receiver::start(Reply::apply).await, Receiver::start(Reply::apply).await);
    let relay = start(&outbox, &[("inventory", first.address)]).await;
    outbox.wait_for_route_state("OPEN").await;
    let relay_id: Uuid =
        sqlx::query_scalar("SELECT relay_id FROM outbox_routes").fetch_one(&outbox.pool).await.unwrap();

    let refused = start(&outbox, &[("loyalty", second.address), ("inventory", second.address)]).await.end().await;
    let said = refused.unwrap_err().to_string();
    for part in [&relay_id.to_string(), "subscription inventory", &format!("http://{}", first.address)] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(count(&outbox, "SELECT count(*) FROM outbox_routes").await, 1, "it has announced nothing");
    let replica = start(&outbox, &[("inventory", first.address)]).await;
    until("a replica runs", async || outbox.route_states().await.len() == 2).await;
    replica.stop().await;
    relay.stop().await;
    let moved = start(&outbox, &[("inventory", second.address)]).await;
    outbox.wait_for_route_state("OPEN").await;
    moved.stop().await;
}

/// Its rows in `outbox_routes` stay behind, and its lock does not.
#[tokio::test]
async fn a_relay_that_was_killed_does_not_keep_its_subscription_from_another_url() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("inventory", "*").await;
    let (first, second) = (Receiver::start(Reply::apply).await, Receiver::start(Reply::apply).await);
    let killed = Binary::start_on_route(&outbox, &format!("inventory=http://{}", first.address), &[]);
    let held = "SELECT count(*) FROM outbox_routes WHERE holds_lock AND state = 'OPEN'";
    until("it shows that it lives", async || count(&outbox, held).await == 1).await;
    drop(killed);
    let free = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database =
        (SELECT oid FROM pg_database WHERE datname = current_database())";
    until("its session has ended", async || count(&outbox, free).await == 0).await;
    let relay = start(&outbox, &[("inventory", second.address)]).await;
    let id = outbox.enqueue(CREATED, 1).await;
    until("the other receives", async || second.read(Log::ids) == id).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_subscription_that_ends_leaves_its_events_discarded_and_its_relay_ended_and_the_others_alone() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("stays", "*").await;
    outbox.subscribe("goes", "*").await;
    let receiver = Receiver::start(Reply::apply).await;
    receiver.describe(|| Err(Code::Unavailable));
    let relay = start(&outbox, &[("goes", receiver.address)]).await;
    until("it has taken its subscription up", async || count(&outbox, "SELECT count(*) FROM outbox_routes").await == 1)
        .await;
    let ids = outbox.enqueue(CREATED, 6000).await;
    mark_dead_of(&outbox, "goes", ids[0]).await;
    let operator = Operator::of(&outbox);
    assert!(operator.is_misused(&["unsubscribe", "other", "--reason", "gone"]).await.contains("there are goes, stays"));
    let said = operator.does(&["unsubscribe", "goes", "--reason", "it is gone"]).await;
    assert_eq!(said, "goes is subscribed no more; 6000 events were discarded as ann\n");
    let ended = relay.end().await.unwrap_err().to_string();
    assert!(ended.contains("subscription goes has ended") && ended.contains("has no other"), "{ended}");
    assert_eq!(outbox.count().await, 6000);
    let discarded =
        "SELECT count(*) FROM outbox_discarded WHERE discarded_by = 'ann' AND reason = 'unsubscribed: it is gone'
        AND subscription_id = 2 AND event_type = 'orders.v1.OrderCreated'";
    assert_eq!(count(&outbox, discarded).await, 6000);
    outbox.enqueue(CREATED, 1).await;
    assert_eq!(count(&outbox, "SELECT count(*) FROM outbox WHERE subscription_id = 2").await, 0);

    // The name is free again, for another subscription.
    assert!(operator.is_refused(&["subscribe", "stays", CREATED]).await.contains("stays is subscribed to * already"));
    assert_eq!(operator.does(&["subscribe", "stays", "*"]).await, "stays is subscribed already to *\n");
    operator.does(&["subscribe", "goes", CREATED]).await;
    outbox.enqueue(CREATED, 1).await;
    assert_eq!(count(&outbox, "SELECT count(*) FROM outbox WHERE subscription_id = 3").await, 1);
    let shown = operator.reads(&["subscriptions", "--json"]).await;
    assert_eq!(
        (&shown[0]["name"], &shown[0]["waiting"], &shown[1]["waiting"]),
        (&"goes".into(), &1.into(), &6002.into())
    );
}

async fn mark_dead_of(outbox: &Outbox, subscription: &str, event_id: Uuid) {
    sqlx::query(
        "UPDATE outbox SET attempts = 10, last_error = 'NO: never', visible_at = 'infinity'
        WHERE event_id = $1 AND subscription_id = (SELECT subscription_id FROM outbox_subscriptions WHERE name = $2)",
    )
    .bind(event_id)
    .bind(subscription)
    .execute(&outbox.pool)
    .await
    .unwrap();
}

/// Rows of a transaction that still saw the subscription come after the command has looked.
#[tokio::test]
async fn rows_that_come_after_the_end_of_their_subscription_are_discarded_by_a_relay() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("stays", "*").await;
    outbox.subscribe("goes", "*").await;
    let mut late = outbox.pool.begin().await.unwrap();
    let enqueue = "SELECT outbox_enqueue(ARRAY[gen_random_uuid()], ARRAY[1], ARRAY[gen_random_uuid()], ARRAY['a.v1.B'],
        ARRAY[''::bytea], ARRAY[NULL], ARRAY[NULL])";
    sqlx::query(enqueue).execute(&mut *late).await.unwrap();
    Operator::of(&outbox).does(&["unsubscribe", "goes", "--reason", "gone"]).await;
    late.commit().await.unwrap();
    assert_eq!(outbox.count().await, 2);
    let receiver = Receiver::start(Reply::apply).await;
    let relay = start(&outbox, &[("stays", receiver.address)]).await;
    outbox.wait_until_empty().await;
    assert_eq!(count(&outbox, "SELECT count(*) FROM outbox_discarded").await, 1);
    relay.stop().await;
}

#[tokio::test]
async fn a_pause_of_one_subscription_leaves_the_others_running() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("runs", "*").await;
    outbox.subscribe("rests", "*").await;
    let (runs, rests) = (Receiver::start(Reply::apply).await, Receiver::start(Reply::apply).await);
    let relay = start(&outbox, &[("runs", runs.address), ("rests", rests.address)]).await;
    until("both are open", async || {
        outbox.route_states().await.iter().filter(|(_, state)| state == "OPEN").count() == 2
    })
    .await;
    let operator = Operator::of(&outbox);
    let paused = operator.does(&["pause", "--subscription", "rests", "--reason", "to see"]).await;
    assert!(paused.starts_with("paused rests since ") && paused.ends_with(" by ann: to see (deed 1)\n"), "{paused}");
    let ids = outbox.enqueue(CREATED, 50).await;
    until("the other gets all", async || outbox.count().await == 50).await;
    assert_eq!((sorted(runs.read(Log::ids)), rests.read(Log::ids)), (ids.clone(), Vec::new()));
    let status = operator.reads(&["status", "--json"]).await;
    assert_eq!(status["subscriptions"][0]["pause"]["reason"], "to see");
    assert!(status["pause"].is_null());
    assert!(operator.does(&["status"]).await.contains("PAUSED rests since "));
    let refused = operator.is_refused(&["resume"]).await;
    assert!(refused.contains("not paused; `resume --subscription rests` would end the pause of rests"), "{refused}");
    operator.does(&["resume", "--subscription", "rests"]).await;
    outbox.wait_until_empty().await;
    assert_eq!(sorted(rests.read(Log::ids)), ids);
    relay.stop().await;
}

/// The function runs with its owner's rights. A table of the same name in the caller's temporary schema must not get the
/// events, and its triggers must not run as the owner.
#[tokio::test]
async fn a_temporary_table_cannot_take_the_place_of_the_outbox() {
    let outbox = Outbox::create().await;
    // The bootstrap takes the right to make temporary tables away. An installation may have it still.
    let grant = "GRANT EXECUTE ON FUNCTION outbox_enqueue TO order_service;
        DO 'BEGIN EXECUTE format(''GRANT TEMPORARY ON DATABASE %I TO order_service'', current_database()); END'";
    sqlx::raw_sql(grant).execute(&outbox.pool).await.unwrap();
    let mut service = sqlx::PgConnection::connect(&outbox.database.url_as("order_service")).await.unwrap();
    sqlx::raw_sql(
        "CREATE TEMPORARY TABLE outbox (event_id uuid); CREATE TEMPORARY TABLE outbox_subscriptions (a integer)",
    )
    .execute(&mut service)
    .await
    .unwrap();
    let enqueue = "SELECT outbox_enqueue(ARRAY[gen_random_uuid()], ARRAY[1], ARRAY[gen_random_uuid()], ARRAY['a.v1.B'],
        ARRAY[''::bytea], ARRAY[NULL], ARRAY[NULL])";
    sqlx::query(enqueue).execute(&mut service).await.unwrap();
    assert_eq!(outbox.count().await, 1);
    let refused = sqlx::query("INSERT INTO public.outbox (event_id) SELECT event_id FROM pg_temp.outbox")
        .execute(&mut service)
        .await;
    assert!(refused.unwrap_err().to_string().contains("permission denied"));
}

#[tokio::test]
async fn an_event_that_is_dead_in_two_subscriptions_is_listed_twice_and_discarded_in_both() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("one", "*").await;
    outbox.subscribe("two", "*").await;
    let ids = outbox.enqueue(CREATED, 3).await;
    for id in &ids {
        mark_dead(&outbox, *id, "NO: never").await;
    }
    let operator = Operator::of(&outbox);
    let list = operator.reads(&["dead", "list", "--json"]).await;
    assert_eq!((list["dead_events"].as_array().unwrap().len(), &list["total_size"]), (6, &6.into()));
    let id = ids[1].to_string();
    operator.does(&["dead", "discard", &id, "--reason", "a test", "--subscription", "two"]).await;
    assert_eq!(count(&outbox, "SELECT count(*) FROM outbox_discarded WHERE subscription_id = 2").await, 1);
    operator.does(&["dead", "discard", &id, "--reason", "a test"]).await;
    operator.does(&["dead", "discard", &ids[0].to_string(), "--reason", "a test"]).await;
    assert_eq!(count(&outbox, "SELECT count(*) FROM outbox_discarded").await, 4);
    assert!(
        operator
            .does(&["dead", "requeue", "--all", "--yes", "--subscription", "one"])
            .await
            .starts_with("requeued 1 event")
    );
    assert_eq!(
        count(&outbox, "SELECT count(*) FROM outbox WHERE visible_at = 'infinity' AND subscription_id = 2").await,
        1
    );
}

/// It waits for nobody, and the route stays open.
#[tokio::test]
async fn a_later_event_of_a_type_that_another_subscription_takes_does_not_wait() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("away", CREATED).await;
    outbox.subscribe("there", CANCELLED).await;
    let aggregate_id = Uuid::new_v4();
    let events = [NewEvent::of(aggregate_id, 1), NewEvent::of(aggregate_id, 2)];
    outbox.enqueue_as(CREATED, &events[..1]).await;
    outbox.enqueue_as(CANCELLED, &events[1..]).await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = start(&outbox, &[("there", receiver.address)]).await;
    until("it is delivered", async || receiver.read(Log::ids) == [events[1].event_id]).await;
    relay.stop().await;
    assert_eq!(outbox.count().await, 1);
}

/// Events 1 and 3 have joined, and event 2 has not: `subscribe` was stopped between two pieces. No event passes it.
#[tokio::test]
async fn a_run_does_not_pass_over_an_event_that_is_still_unrouted() {
    let outbox = Outbox::create().await;
    let aggregate_id = Uuid::new_v4();
    let events = [1, 2, 3].map(|sequence| NewEvent::of(aggregate_id, sequence));
    outbox.insert(&events).await;
    let lock = "UPDATE outbox SET subscription_id = 0 WHERE sequence = 2";
    sqlx::query(lock).execute(&outbox.pool).await.unwrap();
    // A relay would let it join within a second. So it is kept from that until the first event was delivered.
    let mut holding = outbox.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM outbox WHERE sequence = 2 FOR UPDATE").execute(&mut *holding).await.unwrap();
    let receiver = Receiver::start(Reply::apply).await;
    let relay = start(&outbox, &[("all", receiver.address)]).await;
    receiver.wait("the first event", |log| log.ids().contains(&events[0].event_id)).await;
    outbox.wait_for_a_later_event().await;
    assert_eq!(receiver.read(|log| log.times(events[2].event_id)), 0);
    holding.rollback().await.unwrap();
    outbox.wait_until_empty().await;
    relay.stop().await;
    let of_line = |log: &Log| {
        log.ids().into_iter().filter(|id| events.iter().any(|event| event.event_id == *id)).collect::<Vec<_>>()
    };
    assert_eq!(receiver.read(of_line), events.map(|event| event.event_id));
}

/// Its maintenance may be busy for long. Its lock shows that it lives.
#[tokio::test]
async fn a_relay_that_has_not_reported_for_long_and_holds_its_lock_keeps_its_subscription() {
    let outbox = Outbox::create().await;
    let (first, second) = (Receiver::start(Reply::apply).await, Receiver::start(Reply::apply).await);
    let relay = Binary::start(&outbox, &first, &[]);
    let held = "SELECT count(*) FROM outbox_routes WHERE holds_lock";
    until("it shows that it lives", async || count(&outbox, held).await == 1).await;
    relay.process.suspend().await.unwrap();
    sqlx::query("UPDATE outbox_routes SET seen_at = now() - interval '1 minute'").execute(&outbox.pool).await.unwrap();
    let refused = start(&outbox, &[("all", second.address)]).await.end().await;
    assert!(refused.unwrap_err().to_string().contains("two receivers would share its events"));
}

/// The pause of all must not take its place.
#[tokio::test]
async fn a_subscription_that_does_not_exist_cannot_be_paused_or_resumed() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    operator.does(&["pause", "--reason", "of all"]).await;
    assert!(
        operator.is_misused(&["pause", "--subscription", "other", "--reason", "a"]).await.contains("there are all")
    );
    assert!(operator.is_misused(&["resume", "--subscription", "other"]).await.contains("there are all"));
    let refused = operator.is_refused(&["resume", "--subscription", "all"]).await;
    assert!(refused.contains("not paused; `resume` would end the pause of all"), "{refused}");
    assert!(operator.does(&["subscriptions"]).await.contains("PAUSED since "));
    assert_eq!(count(&outbox, "SELECT count(*) FROM outbox_pauses WHERE subscription_id = 0").await, 1);
}

#[tokio::test]
async fn the_other_routes_of_a_relay_go_on_when_a_subscription_ends() {
    let outbox = Outbox::without_subscriptions().await;
    outbox.subscribe("stays", "*").await;
    outbox.subscribe("goes", "*").await;
    let (stays, goes) = (Receiver::start(Reply::apply).await, Receiver::start(Reply::apply).await);
    let relay = start(&outbox, &[("stays", stays.address), ("goes", goes.address)]).await;
    outbox.enqueue(CREATED, 10).await;
    outbox.wait_until_empty().await;
    Operator::of(&outbox).does(&["unsubscribe", "goes", "--reason", "gone"]).await;
    let only = [("stays".to_owned(), "OPEN".to_owned())];
    until("its route has ended", async || outbox.route_states().await == only).await;
    let ids = outbox.enqueue(CREATED, 10).await;
    outbox.wait_until_empty().await;
    assert!(!relay.has_ended());
    relay.stop().await;
    assert!(stays.read(|log| ids.iter().all(|id| log.times(*id) == 1)));
    assert_eq!(goes.read(|log| log.ids().len()), 10);
}
