//! The commands `pause` and `resume`. Whether relays obey is tested in `obey_pause.rs`.

use serde_json::json;

use crate::{
    operator::{Listening, Operator},
    outbox::Outbox,
};

async fn pauses(outbox: &Outbox) -> Vec<(String, String)> {
    sqlx::query_as("SELECT paused_by, reason FROM outbox_pauses").fetch_all(&outbox.pool).await.unwrap()
}

#[tokio::test]
async fn a_pause_shows_the_operators_name_and_reason_until_it_ends() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let said = operator.does(&["pause", "--reason", "inventory is being moved", "--by", "Bob B."]).await;
    assert!(said.contains("by Bob B.: inventory is being moved"), "{said}");
    assert_eq!(pauses(&outbox).await, [("Bob B.".to_owned(), "inventory is being moved".to_owned())]);

    let status = operator.reads(&["status", "--json"]).await;
    let pause = &status["pause"];
    assert_eq!((&pause["paused_by"], &pause["reason"]), (&json!("Bob B."), &json!("inventory is being moved")));
    let since = pause["pause_time"].as_str().unwrap();
    let page = operator.does(&["status"]).await;
    assert!(page.contains(&format!("PAUSED since {since} by Bob B.: inventory is being moved")), "{page}");

    let mut relays = Listening::to(&outbox).await;
    let said = operator.does(&["resume"]).await;
    assert!(said.contains(&format!("it was paused since {since} by Bob B.")), "{said}");
    relays.hears().await;
    assert_eq!(pauses(&outbox).await, []);
    assert!(operator.reads(&["status", "--json"]).await.get("pause").is_none());
}

#[tokio::test]
async fn a_paused_outbox_cannot_be_paused_and_a_running_one_cannot_be_resumed() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    assert!(operator.is_refused(&["resume"]).await.contains("not paused"));
    operator.does(&["pause", "--reason", "first"]).await;
    let line = operator.is_refused(&["pause", "--reason", "second", "--by", "bob"]).await;
    assert!(line.contains("already paused since 20") && line.contains("by ann: first"), "{line}");
    assert_eq!(pauses(&outbox).await, [("ann".to_owned(), "first".to_owned())]);
    operator.does(&["resume"]).await;
    operator.is_refused(&["resume"]).await;
}

#[tokio::test]
async fn a_pause_needs_a_reason_and_a_name() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    operator.is_misused(&["pause"]).await;
    operator.is_misused(&["pause", "--reason", ""]).await;
    operator.is_misused(&["pause", "--reason", "line\nbreak"]).await;
    operator.is_misused(&["pause", "--reason", "good", "--by", " "]).await;
    assert_eq!(pauses(&outbox).await, []);
}
