//! What operators have done, and undoing it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    operator::{
        Listening, Operator, count_dead, count_discarded, insert_dead, insert_dead_with_successors, insert_many_dead,
        make_older, mark_dead,
    },
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
};

/// The deeds, newest first, without their times.
async fn deeds(operator: &Operator) -> Vec<Value> {
    let mut list = operator.reads(&["deeds", "--json"]).await;
    let mut deeds = list["deeds"].take();
    for deed in deeds.as_array_mut().unwrap() {
        assert!(deed["time"].as_str().unwrap().starts_with("20"), "{deed}");
        deed.as_object_mut().unwrap().remove("time");
    }
    deeds.as_array().unwrap().clone()
}

#[tokio::test]
async fn each_deed_says_who_did_what_and_why() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    assert_eq!(operator.does(&["deeds"]).await, "no deeds\n");
    let event_id = insert_dead(&outbox).await.to_string();
    operator.does(&["dead", "discard", &event_id, "--reason", "a typo", "--by", "Bob B."]).await;
    operator.does(&["dead", "restore", &event_id, "--reason", "none after all"]).await;
    operator.does(&["dead", "requeue", "--all", "--yes", "--code", "UNDECODABLE"]).await;
    operator.does(&["subscribe", "billing", "b.*"]).await;
    operator.does(&["pause", "--subscription", "billing", "--reason", "moving"]).await;
    operator.does(&["resume", "--subscription", "billing", "--by", "bob"]).await;
    operator.does(&["unsubscribe", "billing", "--reason", "no more"]).await;

    let deeds = deeds(&operator).await;
    let said: Vec<_> = deeds
        .iter()
        .map(|of| {
            ["deed_id", "kind", "done_by", "reason", "subscription", "events", "can_undo"].map(|key| of[key].clone())
        })
        .collect();
    assert_eq!(
        json!(said),
        json!([
            [7, "KIND_UNSUBSCRIBE", "ann", "no more", "billing", 0, false],
            [6, "KIND_RESUME", "bob", "", "billing", 0, true],
            [5, "KIND_PAUSE", "ann", "moving", "billing", 0, true],
            [4, "KIND_SUBSCRIBE", "ann", "", "billing", 0, false],
            [3, "KIND_REQUEUE", "ann", "", "", 1, true],
            [2, "KIND_RESTORE", "ann", "none after all", "", 1, true],
            [1, "KIND_DISCARD", "Bob B.", "a typo", "", 1, true],
        ])
    );
    let about = |index: usize| deeds[index]["about"].as_str().unwrap();
    assert_eq!((about(4), about(6)), ("all dead events with UNDECODABLE", &*format!("event {event_id}")));
    assert!(about(1).starts_with("paused since 20") && about(1).ends_with("by ann: moving"), "{}", about(1));
    let of_event = operator.reads(&["deeds", "--json", "--event", &event_id]).await;
    assert_eq!(of_event["deeds"].as_array().unwrap().len(), 3);
    let page = operator.does(&["deeds", "--limit", "1"]).await;
    assert!(page.contains("unsubscribe") && page.contains("no more") && !page.contains("moving"), "{page}");
}

#[tokio::test]
async fn a_deed_that_is_refused_or_finds_nothing_is_not_recorded() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let (waiting, old) = (outbox.insert_one().await, insert_dead(&outbox).await);
    make_older(&outbox, old, 200).await;
    let (waiting, old) = (waiting.to_string(), old.to_string());
    operator.is_refused(&["dead", "discard", &old, &waiting, "--reason", "typo"]).await;
    operator.is_refused(&["dead", "requeue", &old]).await;
    operator.does(&["dead", "requeue", "--all", "--yes"]).await;
    operator.is_refused(&["dead", "restore", &old]).await;
    operator.is_refused(&["resume"]).await;
    operator.is_refused(&["undo", "1"]).await;
    operator.is_misused(&["undo", "0"]).await;
    assert_eq!(deeds(&operator).await, Vec::<Value>::new());
    assert_eq!(count_dead(&outbox).await, 1);
}

/// The relay's role is that of operators.
#[tokio::test]
async fn nobody_who_does_deeds_can_change_or_delete_one() {
    let outbox = Outbox::create().await;
    Operator::of(&outbox).does(&["pause", "--reason", "moving"]).await;
    let role = sqlx::PgPool::connect(&outbox.relay_url()).await.unwrap();
    for sql in [
        "UPDATE outbox_deeds SET done_by = 'bob'",
        "INSERT INTO outbox_deeds (done_at, done_by, kind, reason, about, can_undo)
            VALUES (now() - interval '1 day', 'bob', 'pause', '', '', false)",
        "DELETE FROM outbox_deeds",
        "UPDATE outbox_deed_events SET sequence = 2",
        "DELETE FROM outbox_deed_events",
        "UPDATE outbox_discarded SET refused = false",
        "TRUNCATE outbox_deeds CASCADE",
    ] {
        let refused = sqlx::query(sql).execute(&role).await.unwrap_err();
        assert_eq!(refused.as_database_error().unwrap().code().unwrap(), "42501", "{sql}");
    }
}

#[tokio::test]
async fn requeued_events_that_no_relay_has_taken_are_dead_again() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let mut ids = [Uuid::nil(); 4];
    for id in &mut ids {
        *id = insert_dead(&outbox).await;
    }
    let [untried, leased, failed, delivered] = ids;
    operator.does(&["dead", "requeue", "--all", "--yes"]).await;
    for (event_id, change) in [
        (leased, "UPDATE outbox SET lease_token = gen_random_uuid(), visible_at = now() + '1 h' WHERE event_id = $1"),
        (failed, "UPDATE outbox SET failures = 1, visible_at = now() + '1 h' WHERE event_id = $1"),
        (delivered, "DELETE FROM outbox WHERE event_id = $1"),
    ] {
        sqlx::query(change).bind(event_id).execute(&outbox.pool).await.unwrap();
    }
    let said = operator.does(&["undo", "1", "--reason", "the wrong type"]).await;
    assert_eq!(said, "undid deed 1 as ann (deed 2): 1 event was changed back; 3 events stay as they are\n");
    let dead: Vec<_> = outbox.rows().await.into_iter().filter(|row| row.dead).map(|row| row.event_id).collect();
    assert_eq!(dead, [untried]);
    let shown = operator.reads(&["dead", "show", "--json", &untried.to_string()]).await;
    assert_eq!(shown["event"]["reason"], "UNDECODABLE: no such type");

    let listed = deeds(&operator).await;
    let undo = &listed[0];
    assert_eq!((&undo["kind"], &undo["undoes"], &undo["events"]), (&json!("KIND_UNDO"), &json!(1), &json!(1)));
    assert_eq!((&undo["about"], &undo["can_undo"]), (&json!("requeue all dead events"), &json!(false)));
    assert_eq!(listed[1]["undone_by"], json!(2));
    let line = operator.is_refused(&["undo", "2"]).await;
    assert!(line.contains("do that one again instead"), "{line}");

    // The second requeue is not the first one's to undo.
    operator.does(&["dead", "requeue", &untried.to_string()]).await;
    let line = operator.is_refused(&["undo", "1"]).await;
    assert!(line.contains("deed 1 has nothing left to undo"), "{line}");
    assert_eq!(count_dead(&outbox).await, 0);
    operator.does(&["undo", "3"]).await;
    assert_eq!(count_dead(&outbox).await, 1);
}

/// To wait for it could mean a deadlock: a settlement locks its rows in another order.
#[tokio::test]
async fn an_event_that_is_being_leased_while_its_requeue_is_undone_is_left_to_the_relay() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let (event_id, other) = (insert_dead(&outbox).await, insert_dead(&outbox).await);
    operator.does(&["dead", "requeue", "--all", "--yes"]).await;
    let mut leasing = outbox.pool.begin().await.unwrap();
    sqlx::query("UPDATE outbox SET lease_token = gen_random_uuid(), visible_at = now() + '1 h' WHERE event_id = $1")
        .bind(event_id)
        .execute(&mut *leasing)
        .await
        .unwrap();
    let said = operator.does(&["undo", "1"]).await;
    assert!(said.contains("1 event was changed back; 1 event stays as it is"), "{said}");
    leasing.commit().await.unwrap();
    assert!(outbox.row(event_id).await.unwrap().lease_token.is_some());
    assert!(outbox.row(other).await.unwrap().dead);
}

/// A receiver that was restored needs it, whatever an operator did to it before.
#[tokio::test]
async fn an_event_that_was_delivered_and_sent_again_is_no_longer_its_requeues_to_undo() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let (again, other) = (insert_dead(&outbox).await, insert_dead(&outbox).await);
    operator.does(&["dead", "requeue", "--all", "--yes"]).await;
    // Delivered, and sent again: once with no mark, and once held since its type is unknown.
    for reason in [None, Some("UNKNOWN_TYPE: not yet")] {
        sqlx::query(
            "UPDATE outbox SET attempts = 0, attempts_before_requeue = 0, failures = 0, last_error = $2 WHERE event_id = $1",
        )
        .bind(again)
        .bind(reason)
        .execute(&outbox.pool)
        .await
        .unwrap();
        if reason.is_none() {
            let said = operator.does(&["undo", "1"]).await;
            assert!(said.contains("1 event was changed back; 1 event stays as it is"), "{said}");
        } else {
            operator.is_refused(&["undo", "1"]).await;
        }
    }
    assert!(outbox.row(other).await.unwrap().dead && !outbox.row(again).await.unwrap().dead);
}

#[tokio::test]
async fn an_event_that_failed_without_a_charge_since_its_requeue_is_left_alone() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let event_id = insert_dead(&outbox).await;
    operator.does(&["dead", "requeue", "--all", "--yes"]).await;
    sqlx::query("UPDATE outbox SET attempted_at = now()").execute(&outbox.pool).await.unwrap();
    operator.is_refused(&["undo", "1"]).await;
    assert!(!outbox.row(event_id).await.unwrap().dead);
}

/// The subscription ends, too: its events go where the event was before.
#[tokio::test]
async fn an_event_that_was_discarded_and_sent_again_is_discarded_with_its_subscription() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let event_id = insert_dead(&outbox).await;
    operator.does(&["dead", "discard", &event_id.to_string(), "--reason", "typo"]).await;
    sqlx::query(
        "INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload)
        SELECT subscription_id, aggregate_id, sequence, event_id, event_type, payload FROM outbox_discarded",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    operator.does(&["unsubscribe", "all", "--reason", "no more"]).await;
    let reason: String =
        sqlx::query_scalar("SELECT reason FROM outbox_discarded").fetch_one(&outbox.pool).await.unwrap();
    assert_eq!((outbox.count().await, reason.as_str()), (0, "unsubscribed: no more"));
}

#[tokio::test]
async fn discarded_events_come_back_unless_they_cannot() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let [first, ..] = insert_dead_with_successors(&outbox).await;
    insert_many_dead(&outbox, 20).await;
    let mut relays = Listening::to(&outbox).await;
    let line = operator.is_refused(&["dead", "discard", "--all", "--reason", "a test"]).await;
    assert!(line.contains("discard 21 events of 21 subjects, and free 2 that wait for them: confirm"), "{line}");
    let said = operator.does(&["dead", "discard", "--all", "--yes", "--reason", "a test"]).await;
    assert_eq!(said, "discarded 21 events as ann, and freed 2 that waited for them (deed 1)\n");
    relays.hears().await;
    assert_eq!((count_dead(&outbox).await, count_discarded(&outbox).await), (0, 21));
    // One is too old by now, one was restored by hand, and one was sent again.
    sqlx::raw_sql(
        "UPDATE outbox_discarded SET created_at = now() - interval '200 h'
            WHERE event_id = '00000000-0000-0000-0000-000000000001';
        INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload)
            SELECT subscription_id, aggregate_id, sequence, event_id, event_type, payload FROM outbox_discarded
            WHERE event_id = '00000000-0000-0000-0000-000000000002'",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    operator.does(&["dead", "restore", &first.event_id.to_string()]).await;
    let said = operator.does(&["undo", "1"]).await;
    assert!(said.contains("18 events were changed back; 3 events stay"), "{said}");
    assert_eq!((count_dead(&outbox).await, count_discarded(&outbox).await), (19, 2));

    // The one that was sent again dies again, and its second discard takes the place of the first.
    let again = Uuid::from_u128(2);
    mark_dead(&outbox, again, "WORSE: than before").await;
    operator.does(&["dead", "discard", &again.to_string(), "--reason", "once more"]).await;
    let kept: (String, String) = sqlx::query_as("SELECT last_error, reason FROM outbox_discarded WHERE event_id = $1")
        .bind(again)
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
    assert_eq!(kept, ("WORSE: than before".into(), "once more".into()));
}

#[tokio::test]
async fn an_undone_restore_discards_the_event_again_and_frees_what_waited_for_it() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let [dead, second, third] = insert_dead_with_successors(&outbox).await;
    let event_id = dead.event_id.to_string();
    operator.does(&["dead", "discard", &event_id, "--reason", "a typo"]).await;
    operator.does(&["dead", "restore", &event_id]).await;
    sqlx::query("UPDATE outbox SET visible_at = now() + interval '5 min' WHERE sequence > 1")
        .execute(&outbox.pool)
        .await
        .unwrap();
    operator.does(&["undo", "2"]).await;
    assert_eq!(count_discarded(&outbox).await, 1);
    let reason: String =
        sqlx::query_scalar("SELECT reason FROM outbox_discarded").fetch_one(&outbox.pool).await.unwrap();
    assert_eq!(reason, "deed 2 was undone");
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), [second.event_id, third.event_id]);
}

#[tokio::test]
async fn a_pause_and_a_resume_are_undone_until_somebody_has_paused_or_resumed_since() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let paused = async || {
        let status = operator.reads(&["status", "--json"]).await;
        status["pause"]["reason"].as_str().map(str::to_owned)
    };
    operator.does(&["pause", "--reason", "moving"]).await;
    operator.does(&["undo", "1"]).await;
    assert_eq!(paused().await, None);
    operator.does(&["pause", "--reason", "again"]).await;
    for deed in ["1", "2"] {
        operator.is_refused(&["undo", deed]).await;
    }
    operator.does(&["resume"]).await;
    assert_eq!(operator.does(&["undo", "4", "--by", "bob"]).await, "undid deed 4 as bob (deed 5)\n");
    let reason = paused().await.unwrap();
    assert_eq!(reason, "deed 4 was undone, which had ended this pause");
    let line = operator.is_refused(&["undo", "4"]).await;
    assert!(line.contains("somebody has paused or resumed since"), "{line}");
}

#[tokio::test]
async fn dead_events_are_grouped_by_why_they_died_and_a_group_is_requeued_as_one() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    assert_eq!(operator.does(&["dead", "groups"]).await, "no dead events\n");
    insert_many_dead(&outbox, 3).await;
    let (one, other) = (insert_dead(&outbox).await, outbox.insert_hidden(None, Duration::from_secs(600)).await);
    mark_dead(&outbox, one, "UNDECODABLE: one").await;
    mark_dead(&outbox, other, "UNDECODABLE: other").await;
    let groups = operator.reads(&["dead", "groups", "--json"]).await;
    let said =
        |group: &Value| json!([group["subscription"], group["type"], group["code"], group["reason"], group["events"]]);
    let said: Vec<_> = groups["groups"].as_array().unwrap().iter().map(said).collect();
    assert_eq!(
        json!(said),
        json!([
            ["all", "test.v1.Happened", "BUSY", "BUSY: later", 3],
            ["all", "test.v1.Happened", "UNDECODABLE", "UNDECODABLE: one", 2],
        ])
    );
    let page = operator.does(&["dead", "groups"]).await;
    assert!(page.contains("UNDECODABLE: one") && page.lines().count() == 3, "{page}");
    let list = operator.reads(&["dead", "list", "--json", "--code", "UNDECODABLE"]).await;
    assert_eq!(list["total_size"], 2);
    operator.does(&["dead", "requeue", "--all", "--yes", "--code", "UNDECODABLE"]).await;
    assert_eq!(count_dead(&outbox).await, 3);
    assert!(outbox.row(one).await.unwrap().visible && outbox.row(other).await.unwrap().visible);
}

#[tokio::test]
async fn a_deed_without_a_name_asks_for_it() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    for arguments in [&["resume"][..], &["dead", "requeue", "--all", "--yes"], &["undo", "1"]] {
        let output = operator.command(arguments).env_remove("USER").output().await.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("--by <BY>"), "{said}");
    }
}

/// Right after all dead events were requeued, the statistics say that there are next to no others. A plan by these would read
/// the whole outbox for each event.
#[tokio::test]
async fn an_undo_finds_its_events_though_the_statistics_are_old() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    insert_many_dead(&outbox, 5_500).await;
    sqlx::raw_sql("ANALYZE outbox").execute(&outbox.pool).await.unwrap();
    // It may tell its progress.
    let requeued = operator.command(&["dead", "requeue", "--all", "--yes"]).output().await.unwrap();
    assert!(requeued.status.success(), "{requeued:?}");
    let began = Instant::now();
    let said = operator.does(&["undo", "1"]).await;
    assert!(said.contains("5500 events were changed back"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}
