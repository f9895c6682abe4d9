//! The command `status`.

use std::{process::Stdio, time::Duration};

use serde_json::{Value, json};
use testkit::TestDatabase;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStdout, Command},
    time::{Instant, timeout},
};
use uuid::Uuid;

use crate::{
    operator::{Operator, insert_dead_with_successors, make_older, mark_dead},
    outbox::{NewEvent, Outbox},
    wait::AMPLE,
};

const HOUR: Duration = Duration::from_secs(3600);

async fn execute(outbox: &Outbox, sql: &'static str) {
    sqlx::raw_sql(sql).execute(&outbox.pool).await.unwrap();
}

#[tokio::test]
async fn every_event_is_counted_once_by_its_state() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(5).await;
    // An expired lease does not count.
    outbox.insert_hidden(Some(Uuid::new_v4()), Duration::ZERO).await;
    outbox.insert_hidden(Some(Uuid::new_v4()), HOUR).await;
    for _ in 0..2 {
        outbox.insert_hidden(None, HOUR).await;
    }
    execute(&outbox, "UPDATE outbox SET attempts = 1 WHERE visible_at > now() AND lease_token IS NULL").await;
    insert_dead_with_successors(&outbox).await;
    // A requeued event waits like any other.
    execute(
        &outbox,
        "UPDATE outbox SET attempts = 3, attempts_before_requeue = 3 WHERE lease_token IS NOT NULL AND visible_at <= now()",
    )
    .await;
    let other = outbox.insert_one().await;
    let retype = sqlx::query("UPDATE outbox SET event_type = 'a.v1.Other' WHERE event_id = $1").bind(other);
    retype.execute(&outbox.pool).await.unwrap();
    mark_dead(&outbox, other, "gone").await;

    let status = Operator::of(&outbox).reads(&["status", "--json"]).await;
    let numbers = ["waiting", "held_back", "leased", "backing_off", "dead"].map(|key| status[key].as_i64().unwrap());
    assert_eq!(numbers, [8, 2, 1, 2, 2]);
    assert_eq!(
        status["types"],
        json!([
            {"type": "a.v1.Other", "waiting": 0, "leased": 0, "backing_off": 0, "dead": 1},
            {"type": "test.v1.Happened", "waiting": 8, "leased": 1, "backing_off": 2, "dead": 1},
        ])
    );
}

#[tokio::test]
async fn the_age_of_the_oldest_event_ignores_dead_ones() {
    let outbox = Outbox::create().await;
    let ids = outbox.insert_unrelated(3).await;
    make_older(&outbox, ids[0], 9).await;
    mark_dead(&outbox, ids[0], "gone").await;
    make_older(&outbox, ids[1], 2).await;
    let status = Operator::of(&outbox).reads(&["status", "--json"]).await;
    let oldest = status["oldest_seconds"].as_f64().unwrap();
    assert!((7200.0..7300.0).contains(&oldest), "{oldest}");
}

#[tokio::test]
async fn an_empty_outbox_has_a_status_with_the_same_keys() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let status = operator.reads(&["status", "--json"]).await;
    let keys: Vec<_> = status.as_object().unwrap().keys().map(String::as_str).collect();
    let numbers = ["waiting", "held_back", "leased", "backing_off", "dead"];
    let lists = ["in_per_second", "out_per_second", "routes", "types", "failing", "subscriptions", "unrouted"];
    let expected = [&["time"], &numbers[..], &lists].concat();
    assert_eq!(keys, expected, "and neither a pause nor an oldest event");
    assert!(numbers.iter().all(|key| status[*key] == 0));
    assert!(status["time"].as_str().unwrap().ends_with('Z'));

    let page = operator.does(&["status"]).await;
    assert!(page.starts_with("waiting") && page.contains("no relay has reported"), "{page}");
}

#[tokio::test]
async fn the_status_shows_only_routes_of_relays_that_reported_recently() {
    let outbox = Outbox::create().await;
    execute(
        &outbox,
        "INSERT INTO outbox_routes (relay_id, route, receiver, state, since, seen_at) VALUES
            ('00000000-0000-4000-8000-000000000001', 'orders.v1.*', 'http://inventory:52052', 'DOWN',
                '2026-01-02 03:04:05Z', now()),
            ('00000000-0000-4000-8000-000000000002', '*', 'http://gone:1', 'OPEN', now(), now() - interval '1 min');
        UPDATE outbox_routes SET reason = 'no reply' WHERE state = 'DOWN'",
    )
    .await;
    let operator = Operator::of(&outbox);
    let status = operator.reads(&["status", "--json"]).await;
    let expected = json!([{
        "relay_id": "00000000-0000-4000-8000-000000000001",
        "route": "orders.v1.*",
        "receiver": "http://inventory:52052",
        "state": "DOWN",
        "state_time": "2026-01-02T03:04:05Z",
        "reason": "no reply",
        "delivered": 0,
    }]);
    assert_eq!(status["routes"], expected);
    let page = operator.does(&["status"]).await;
    assert!(
        page.contains("orders.v1.*") && page.contains("DOWN") && page.contains("no reply") && !page.contains("gone"),
        "{page}"
    );
}

/// A running `status --watch`, and its output line by line.
struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    fn start(operator: &Operator) -> Self {
        let mut command = operator.command(&["status", "--watch", "--json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    async fn next(&mut self) -> Value {
        let line = timeout(AMPLE, self.lines.next_line()).await.expect("a line").unwrap();
        serde_json::from_str(&line.expect("one more line")).unwrap()
    }

    async fn interrupt(mut self) -> Option<i32> {
        let id = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-INT", &id]).status().await.unwrap().success());
        timeout(AMPLE, self.child.wait()).await.expect("it ends").unwrap().code()
    }
}

#[tokio::test]
async fn watch_prints_a_line_per_second_with_the_rates_until_it_is_interrupted() {
    let outbox = Outbox::create().await;
    let mut watch = Watch::start(&Operator::of(&outbox));
    let (mut came, mut went) = (0.0, 0.0);
    let deadline = Instant::now() + AMPLE;
    while came == 0.0 || went == 0.0 {
        assert!(Instant::now() < deadline, "rates: {came} in, {went} out");
        outbox.insert_unrelated(100).await;
        execute(&outbox, "DELETE FROM outbox").await;
        let status = watch.next().await;
        came = status["in_per_second"].as_f64().unwrap();
        went = status["out_per_second"].as_f64().unwrap();
    }
    // A hundred per second. Some readings may include those of several seconds.
    assert!(came <= 400.0 && went <= 400.0, "{came} {went}");
    assert_eq!(watch.interrupt().await, Some(0));
}

#[tokio::test]
async fn watch_reports_an_outage_of_the_database_and_goes_on() {
    let outbox = Outbox::create().await;
    let mut watch = Watch::start(&Operator::of(&outbox));
    watch.next().await;
    outbox.allow_connections(false).await;
    let mut complaints = BufReader::new(watch.child.stderr.take().unwrap()).lines();
    let complaint = timeout(AMPLE, complaints.next_line()).await.expect("a complaint").unwrap().unwrap();
    assert!(complaint.starts_with("error: cannot connect"), "{complaint}");

    outbox.allow_connections(true).await;
    outbox.insert_one().await;
    while watch.next().await["waiting"] == 0 {}
    assert_eq!(watch.interrupt().await, Some(0));
}

#[tokio::test]
async fn an_unreachable_database_is_named_without_the_password() {
    let closed = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let line = Operator::at(&format!("postgres://outbox_relay:secret@{address}/orders")).is_refused(&["status"]).await;
    assert!(line.contains(&format!("cannot connect to outbox_relay@{address}/orders")), "{line}");
    assert!(line.contains("is it up") && !line.contains("secret"), "{line}");
}

#[tokio::test]
async fn a_server_that_accepts_and_stays_silent_is_abandoned() {
    let silent = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("postgres://outbox_relay@{}/orders", silent.local_addr().unwrap());
    let line = Operator::at(&url).is_refused(&["dead", "list"]).await;
    assert!(line.contains("no answer within 5s"), "{line}");
}

#[tokio::test]
async fn a_database_without_the_schema_is_reported_as_such() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    let line = Operator::at(&database.url_as("outbox_relay")).is_refused(&["dead", "list"]).await;
    assert!(line.contains("run the `migrate` command"), "{line}");
}

#[tokio::test]
async fn a_missing_right_is_reported_as_such() {
    let outbox = Outbox::create().await;
    let line = Operator::at(&outbox.database.url_as("order_service")).is_refused(&["dead", "list"]).await;
    assert!(line.contains("connect as outbox_relay"), "{line}");
}

#[tokio::test]
async fn a_successor_of_an_event_that_is_not_dead_does_not_count_as_held_back() {
    let outbox = Outbox::create().await;
    let aggregate_id = Uuid::new_v4();
    outbox.insert(&[1, 2].map(|sequence| NewEvent::of(aggregate_id, sequence))).await;
    let status = Operator::of(&outbox).reads(&["status", "--json"]).await;
    assert_eq!((&status["waiting"], &status["held_back"]), (&json!(2), &json!(0)));
}
