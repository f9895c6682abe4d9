//! Requeueing dead events.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use testkit::processes::free_port;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    operator::{
        Listening, Operator, attempts_before_requeue, count_dead, insert_dead, insert_dead_with_successors,
        insert_many_dead, make_older, mark_dead, text,
    },
    outbox::{NewEvent, Outbox, Row},
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::{AMPLE, until},
};

#[tokio::test]
async fn a_requeued_event_keeps_its_id_and_its_history_and_is_delivered() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await;
    let said = Operator::of(&outbox).does(&["dead", "requeue", &event_id.to_string()]).await;
    assert!(said.contains("requeued 1 event"), "{said}");
    let expected = Row {
        event_id,
        attempts: 10,
        failures: 0,
        lease_token: None,
        last_error: Some("UNDECODABLE: no such type".into()),
        visible: true,
        dead: false,
    };
    assert_eq!(outbox.rows().await, [expected]);
    assert_eq!(attempts_before_requeue(&outbox, event_id).await, 10);

    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), [event_id]);
}

#[tokio::test]
async fn successors_of_a_requeued_event_follow_at_once_and_in_sequence() {
    let outbox = Outbox::create().await;
    let line = insert_dead_with_successors(&outbox).await;
    let mut relays = Listening::to(&outbox).await;
    let said = Operator::of(&outbox).does(&["dead", "requeue", &line[0].event_id.to_string()]).await;
    assert!(said.contains("freed 2"), "{said}");
    relays.hears().await;
    assert!(outbox.rows().await.iter().all(|row| row.visible));

    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), line.map(|event| event.event_id));
}

/// It is enqueued after the requeue has looked for successors, and parked by a relay that still sees the event as dead.
#[tokio::test]
async fn a_successor_enqueued_while_a_requeue_commits_does_not_stay_parked() {
    let outbox = Outbox::create().await;
    let dead = insert_dead(&outbox).await;
    sqlx::raw_sql(
        "CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER linger AFTER UPDATE ON outbox DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
            WHEN (OLD.visible_at = 'infinity') EXECUTE FUNCTION linger()",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    let mut commit_later = outbox.pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(1)").execute(&mut *commit_later).await.unwrap();
    // It parks and does nothing else, since its receiver does not exist.
    let nowhere = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let relay = Relay::start(&outbox, nowhere, &[]).await;
    let aggregate_id = sqlx::query_scalar("SELECT aggregate_id FROM outbox").fetch_one(&outbox.pool).await.unwrap();
    let successor = NewEvent::of(aggregate_id, 2);
    let (operator, event_id) = (Operator::of(&outbox), dead.to_string());
    let arguments = ["dead", "requeue", &event_id];
    let enqueue = async {
        let commits = "SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event = 'advisory'";
        let committing = async || sqlx::query_scalar::<_, i64>(commits).fetch_one(&outbox.pool).await.unwrap() == 1;
        until("the requeue commits", committing).await;
        outbox.insert(&[successor]).await;
        let is_parked = async || outbox.row(successor.event_id).await.is_some_and(|row| !row.visible);
        until("the successor is parked", is_parked).await;
        commit_later.rollback().await.unwrap();
    };
    tokio::join!(operator.does(&arguments), enqueue);
    assert!(outbox.row(successor.event_id).await.unwrap().visible);
    relay.stop().await;
}

#[tokio::test]
async fn a_requeue_waits_for_a_successor_that_is_being_parked_and_frees_it() {
    let outbox = Outbox::create().await;
    let [dead, second, _] = insert_dead_with_successors(&outbox).await;
    let mut parking = outbox.pool.begin().await.unwrap();
    sqlx::query("UPDATE outbox SET visible_at = now() + interval '5 min' WHERE event_id = $1")
        .bind(second.event_id)
        .execute(&mut *parking)
        .await
        .unwrap();
    let (operator, dead) = (Operator::of(&outbox), dead.event_id.to_string());
    let arguments = ["dead", "requeue", &dead];
    let waits = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND usename = 'outbox_relay' AND wait_event_type = 'Lock'";
    let park = async {
        let waiting = async || sqlx::query_scalar::<_, i64>(waits).fetch_one(&outbox.pool).await.unwrap() == 1;
        until("the requeue waits", waiting).await;
        parking.commit().await.unwrap();
    };
    tokio::join!(operator.does(&arguments), park);
    assert!(outbox.row(second.event_id).await.unwrap().visible);
}

#[tokio::test]
async fn either_all_named_events_are_requeued_or_none_and_each_obstacle_is_named() {
    let outbox = Outbox::create().await;
    let (dead, other, waiting) = (insert_dead(&outbox).await, insert_dead(&outbox).await, outbox.insert_one().await);
    let unknown = Uuid::now_v7();
    let before = outbox.rows().await;
    let operator = Operator::of(&outbox);
    let [dead, other, waiting, unknown] = [dead, other, waiting, unknown].map(|id| id.to_string());
    let line = operator.is_refused(&["dead", "requeue", &dead, &waiting, &unknown]).await;
    assert!(line.contains(&format!("event {waiting} is not dead: it is waiting")), "{line}");
    assert!(line.contains(&format!("event {unknown} is not in the outbox")), "{line}");
    assert!(!line.contains(&dead), "{line}");
    let line = operator.is_misused(&["dead", "requeue", &dead, "x", "y"]).await;
    assert!(line.contains("not ids: \"x\", \"y\""), "{line}");
    assert_eq!(outbox.rows().await, before);

    // Named twice, the second time in upper case.
    let said = operator.does(&["dead", "requeue", &dead, &dead.to_uppercase(), &other]).await;
    assert!(said.contains("requeued 2 events"), "{said}");
    let line = operator.is_refused(&["dead", "requeue", &dead]).await;
    assert!(line.contains("it was requeued, and is waiting"), "{line}");
}

#[tokio::test]
async fn an_event_older_than_the_age_limit_stays_dead() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await;
    make_older(&outbox, event_id, 145).await;
    let (operator, event_id) = (Operator::of(&outbox), event_id.to_string());
    let line = operator.is_refused(&["dead", "requeue", &event_id]).await;
    assert!(line.contains("145 hours old; after 144 its receiver"), "{line}");
    assert!(outbox.rows().await[0].dead);
    // A relay has learned that the receiver remembers for longer.
    sqlx::query("UPDATE outbox_subscriptions SET max_age_seconds = 146 * 3600").execute(&outbox.pool).await.unwrap();
    operator.does(&["dead", "requeue", &event_id]).await;
    assert!(outbox.rows().await[0].visible);
}

#[tokio::test]
async fn a_requeue_of_all_skips_events_that_are_too_old_and_needs_confirmation() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let line = operator.is_refused(&["dead", "requeue", "--all", "--yes"]).await;
    assert!(line.contains("there are no dead events"), "{line}");
    let (young, old, leased) = (insert_dead(&outbox).await, insert_dead(&outbox).await, Uuid::new_v4());
    make_older(&outbox, old, 200).await;
    outbox.insert_hidden(Some(leased), Duration::from_secs(600)).await;
    let before = outbox.rows().await;

    let line = operator.is_refused(&["dead", "requeue", "--all"]).await;
    assert!(line.contains("would requeue 2 events") && line.contains("--yes"), "{line}");
    assert_eq!(outbox.rows().await, before);
    let said = operator.does(&["dead", "requeue", "--all", "--yes"]).await;
    assert!(said.contains("requeued 1 event,") && said.contains("too old, and still dead: 1 event"), "{said}");
    assert!(outbox.row(young).await.unwrap().visible && outbox.row(old).await.unwrap().dead);
    assert!(outbox.rows().await.iter().any(|row| row.lease_token == Some(leased)));
}

#[tokio::test]
async fn ctrl_c_ends_a_requeue_of_all_between_two_pieces_and_the_next_one_goes_on() {
    let outbox = Outbox::create().await;
    insert_many_dead(&outbox, 12_000).await;
    // In the second of three pieces.
    let mut other = outbox.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM outbox WHERE event_id = '00000000-0000-0000-0000-000000001b58' FOR UPDATE")
        .execute(&mut *other)
        .await
        .unwrap();
    let operator = Operator::of(&outbox);
    let mut command = operator.command(&["dead", "requeue", "--all", "--yes"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
        AND usename = 'outbox_relay' AND wait_event_type = 'Lock' AND query_start < now() - interval '1 s'";
    let waiting = async || sqlx::query_scalar::<_, i64>(waits).fetch_one(&outbox.pool).await.unwrap() == 1;
    until("the second piece has waited for a second", waiting).await;
    assert_eq!(count_dead(&outbox).await, 7000, "the first piece is committed");
    let pid = Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    other.rollback().await.unwrap();

    let output = timeout(AMPLE, child.wait_with_output()).await.expect("the command ends").unwrap();
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(130), &b""[..]), "{said}");
    // On a slow machine the first piece has a line of progress as well.
    let lines: Vec<_> = said.lines().filter(|line| *line != "requeued 5,000 of 12,000").collect();
    assert_eq!(
        lines,
        [
            "requeued 10,000 of 12,000",
            "error: interrupted: 10000 events were requeued (deed 1); repeat the command for the rest"
        ]
    );
    assert_eq!(count_dead(&outbox).await, 2000);
    let said = operator.does(&["dead", "requeue", "--all", "--yes"]).await;
    assert!(said.contains("requeued 2000 events"), "{said}");
    assert_eq!(count_dead(&outbox).await, 0);
}

#[tokio::test]
async fn a_requeue_of_all_that_fails_says_how_many_events_were_requeued_before() {
    let outbox = Outbox::create().await;
    insert_many_dead(&outbox, 6000).await;
    sqlx::raw_sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'as the test wants it'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON outbox FOR EACH ROW
            WHEN (NEW.event_id = '00000000-0000-0000-0000-000000001770') EXECUTE FUNCTION refuse()",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    let line = Operator::of(&outbox).is_refused(&["dead", "requeue", "--all", "--yes"]).await;
    assert!(line.contains("5000 events were requeued, then:") && line.contains("as the test wants it"), "{line}");
    assert_eq!(count_dead(&outbox).await, 1000);
}

#[tokio::test]
async fn a_requeue_of_all_of_a_type_leaves_other_types_alone() {
    let outbox = Outbox::create().await;
    let (one, other) = (insert_dead(&outbox).await, insert_dead(&outbox).await);
    sqlx::query("UPDATE outbox SET event_type = 'other.v1.Thing' WHERE event_id = $1")
        .bind(other)
        .execute(&outbox.pool)
        .await
        .unwrap();
    let operator = Operator::of(&outbox);
    let line = operator.is_refused(&["dead", "requeue", "--all", "--yes", "--type", "other.v1.Thin"]).await;
    assert!(line.contains("no dead events of type other.v1.Thin"), "{line}");
    operator.does(&["dead", "requeue", "--all", "--yes", "--type", "other.v1.Thing"]).await;
    assert!(outbox.row(one).await.unwrap().dead && outbox.row(other).await.unwrap().visible);
}

#[tokio::test]
async fn invalid_arguments_are_refused_before_the_database_is_asked() {
    let operator = Operator::at("postgres://nobody@127.0.0.1:1/nowhere");
    let id = Uuid::nil().to_string();
    for arguments in [
        &["dead", "requeue"][..],
        &["dead", "requeue", "--all", &id],
        &["dead", "requeue", "--yes", &id],
        &["dead", "requeue", "--type", "a.B", &id],
        &["dead", "list", "--limit", "0"],
    ] {
        operator.is_misused(arguments).await;
    }
}

#[tokio::test]
async fn two_concurrent_requeues_of_the_same_events_apply_once() {
    let outbox = Outbox::create().await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(insert_dead(&outbox).await.to_string());
    }
    let operator = Operator::of(&outbox);
    let named: Vec<_> = ["dead", "requeue"].into_iter().chain(ids.iter().map(String::as_str)).collect();
    let reversed: Vec<_> = ["dead", "requeue"].into_iter().chain(ids.iter().rev().map(String::as_str)).collect();
    let (mut one, mut other) = (operator.command(&named), operator.command(&reversed));
    let both = async { tokio::join!(one.output(), other.output()) };
    let (one, other) = timeout(Duration::from_secs(20), both).await.expect("both end");
    let mut codes = [one.unwrap(), other.unwrap()].map(|output| output.status.code());
    codes.sort_unstable();
    assert_eq!(codes, [Some(0), Some(1)]);
}

#[tokio::test]
async fn a_requeued_event_that_dies_again_can_be_requeued_again() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await;
    let (operator, id) = (Operator::of(&outbox), event_id.to_string());
    operator.does(&["dead", "requeue", &id]).await;
    sqlx::query("UPDATE outbox SET attempts = 20").execute(&outbox.pool).await.unwrap();
    sqlx::query("UPDATE outbox SET visible_at = 'infinity'").execute(&outbox.pool).await.unwrap();
    let page = operator.does(&["dead", "show", &id]).await;
    assert!(page.contains("20, 10 of them before it was requeued"), "{page}");
    operator.does(&["dead", "requeue", &id]).await;
    assert_eq!(attempts_before_requeue(&outbox, event_id).await, 20);
}

#[tokio::test]
async fn an_event_that_is_dead_for_another_subscription_only_is_refused_with_its_state_in_this_one() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    operator.does(&["subscribe", "other", "test.v1.*"]).await;
    let event_id = outbox.enqueue("test.v1.Happened", 1).await[0];
    mark_dead(&outbox, event_id, "BUSY: later").await;
    let id = event_id.to_string();
    let requeue = ["dead", "requeue", &id, "--subscription", "other"];
    operator.does(&requeue).await;
    let line = operator.is_refused(&requeue).await;
    assert!(line.ends_with("is not dead: it was requeued, and is waiting"), "{line}");
    operator.does(&["dead", "requeue", &id, "--subscription", "all"]).await;
}
