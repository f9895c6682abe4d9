//! Listing, showing and discarding dead events.

use prost::Message;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use proto::orders::v1::{OrderCreated, OrderItem};
use serde_json::json;
use sqlx::types::time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    operator::{Listening, Operator, count_discarded, insert_dead, insert_dead_with_successors, mark_dead},
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
};

async fn set_payload(outbox: &Outbox, event_id: Uuid, event_type: &str, payload: &[u8]) {
    sqlx::query("UPDATE outbox SET event_type = $2, payload = $3 WHERE event_id = $1")
        .bind(event_id)
        .bind(event_type)
        .bind(payload)
        .execute(&outbox.pool)
        .await
        .unwrap();
}

async fn insert_dead_order(outbox: &Outbox) -> Uuid {
    let event_id = insert_dead(outbox).await;
    let items = vec![OrderItem { sku: "MUG".into(), quantity: 2, unit_price_minor: 1250 }];
    let order = OrderCreated { order_id: Uuid::nil().into(), items, total_minor: 2500, ..OrderCreated::default() };
    set_payload(outbox, event_id, "orders.v1.OrderCreated", &order.encode_to_vec()).await;
    event_id
}

#[tokio::test]
async fn a_list_begins_with_the_newest_and_says_how_many_are_older() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    assert_eq!(operator.does(&["dead", "list"]).await, "no dead events\n");
    outbox.insert_unrelated(3).await;
    let [oldest, ..] = insert_dead_with_successors(&outbox).await;
    let order = insert_dead_order(&outbox).await;
    let newest = insert_dead(&outbox).await;

    let list = operator.reads(&["dead", "list", "--json"]).await;
    let ids: Vec<_> = list["dead_events"].as_array().unwrap().iter().map(|event| event["event_id"].clone()).collect();
    assert_eq!(list.as_object().unwrap().keys().collect::<Vec<_>>(), ["dead_events", "total_size"]);
    assert_eq!(ids, [newest, order, oldest.event_id].map(|id| json!(id.to_string())));
    let last = &list["dead_events"][2];
    assert_eq!((&last["held_back"], &last["attempts"], &last["sequence"]), (&json!(2), &json!(10), &json!(1)));
    assert_eq!(last["subject"], oldest.aggregate_id.to_string());
    assert_eq!((&last["type"], &last["reason"]), (&json!("test.v1.Happened"), &json!("UNDECODABLE: no such type")));
    assert!(last["age_seconds"].as_f64().unwrap() >= 0.0 && last["create_time"].is_string());

    let page = operator.does(&["dead", "list", "--limit", "1"]).await;
    assert!(page.contains(&newest.to_string()) && page.contains("2 older"), "{page}");
    let of_type = operator.reads(&["dead", "list", "--json", "--type", "orders.v1.OrderCreated"]).await;
    assert_eq!((&of_type["total_size"], &of_type["dead_events"][0]["event_id"]), (&json!(1), &ids[1]));
}

#[tokio::test]
async fn control_characters_in_a_reason_are_replaced() {
    let outbox = Outbox::create().await;
    let event_id = outbox.insert_one().await;
    mark_dead(&outbox, event_id, "BAD: \u{1b}[2J\nnext line").await;
    let operator = Operator::of(&outbox);
    for arguments in [&["dead", "list"][..], &["dead", "show", &event_id.to_string()]] {
        let page = operator.does(arguments).await;
        assert!(page.contains("\u{FFFD}[2J\u{FFFD}next line") && !page.contains('\u{1b}'), "{page}");
    }
}

#[tokio::test]
async fn the_payload_of_an_order_is_shown_as_json() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead_order(&outbox).await.to_string();
    let operator = Operator::of(&outbox);
    let shown = operator.reads(&["dead", "show", "--json", &event_id]).await;
    let payload = json!({
        "orderId": "00000000-0000-0000-0000-000000000000",
        "items": [{"sku": "MUG", "quantity": 2, "unitPriceMinor": "1250"}],
        "totalMinor": "2500",
    });
    assert_eq!(shown["payload"], payload);
    assert_eq!((&shown["event"]["event_id"], &shown["event"]["attempts"]), (&json!(event_id), &json!(10)));
    assert!(shown["data"].is_string() && shown.get("payload_json").is_none(), "{shown}");

    let page = operator.does(&["dead", "show", &event_id]).await;
    assert!(page.contains("\"sku\": \"MUG\"") && page.contains("UNDECODABLE: no such type"), "{page}");
}

#[tokio::test]
async fn a_payload_that_cannot_be_decoded_is_shown_as_bytes_with_the_reason() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await;
    set_payload(&outbox, event_id, "orders.v1.OrderCreated", b"\xff\xff\x01").await;
    let (operator, event_id) = (Operator::of(&outbox), event_id.to_string());
    let page = operator.does(&["dead", "show", &event_id]).await;
    assert!(page.contains("not a orders.v1.OrderCreated: ") && page.contains("ffff01"), "{page}");
    let shown = operator.reads(&["dead", "show", "--json", &event_id]).await;
    assert_eq!(shown["data"], "//8B");
    assert!(shown["undecodable"].as_str().unwrap().contains("not a orders.v1.OrderCreated"), "{shown}");
}

/// Descriptors of `test.v1.Happened { string what = 1; }`, in a file that is deleted with the test.
fn descriptors() -> tempfile::Path {
    let field = FieldDescriptorProto {
        name: Some("what".into()),
        number: Some(1),
        label: Some(Label::Optional.into()),
        r#type: Some(Type::String.into()),
        ..FieldDescriptorProto::default()
    };
    let message = DescriptorProto { name: Some("Happened".into()), field: vec![field], ..DescriptorProto::default() };
    let file = FileDescriptorProto {
        name: Some("test.proto".into()),
        package: Some("test.v1".into()),
        syntax: Some("proto3".into()),
        message_type: vec![message],
        ..FileDescriptorProto::default()
    };
    tempfile::write(&FileDescriptorSet { file: vec![file] }.encode_to_vec())
}

/// Temporary files.
mod tempfile {
    use std::path::PathBuf;

    pub(super) struct Path(PathBuf);

    impl Path {
        pub(super) fn name(&self) -> &str {
            self.0.to_str().unwrap()
        }
    }

    impl Drop for Path {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    pub(super) fn write(content: &[u8]) -> Path {
        let path = std::env::temp_dir().join(format!("outbox-relay-{}", uuid::Uuid::new_v4().simple()));
        std::fs::write(&path, content).unwrap();
        Path(path)
    }
}

#[tokio::test]
async fn a_type_outside_the_contract_is_decoded_with_its_descriptors() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await;
    set_payload(&outbox, event_id, "test.v1.Happened", b"\x0a\x04rain").await;
    let (operator, event_id) = (Operator::of(&outbox), event_id.to_string());
    let page = operator.does(&["dead", "show", &event_id]).await;
    assert!(page.contains("--descriptors") && page.contains("0a047261696e"), "{page}");
    let file = descriptors();
    let shown = operator.reads(&["dead", "show", "--json", "--descriptors", file.name(), &event_id]).await;
    assert_eq!(shown["payload"], json!({"what": "rain"}));

    let garbage = tempfile::write(b"\xff\xff\xff");
    let line = operator.is_misused(&["dead", "show", "--descriptors", garbage.name(), &event_id]).await;
    assert!(line.contains("is not a complete FileDescriptorSet"), "{line}");
    let line = operator.is_misused(&["dead", "show", "--descriptors", "/nowhere", &event_id]).await;
    assert!(line.contains("cannot read /nowhere"), "{line}");
}

#[tokio::test]
async fn a_discarded_event_is_kept_whole_with_name_reason_and_time() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead_order(&outbox).await;
    let kept = "SELECT (event_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
        tracestate, last_error)::text FROM outbox";
    let before = sqlx::query_scalar::<_, String>(kept).fetch_one(&outbox.pool).await.unwrap();
    let begin = outbox.clock().await;
    let said = Operator::of(&outbox)
        .does(&["dead", "discard", &event_id.to_string(), "--reason", " test order of the pilot ", "--by", "Bob B."])
        .await;
    assert!(said.contains(&event_id.to_string()), "{said}");

    assert_eq!(outbox.count().await, 0);
    let kept = "SELECT (event_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
        tracestate, last_error)::text FROM outbox_discarded";
    assert_eq!(sqlx::query_scalar::<_, String>(kept).fetch_one(&outbox.pool).await.unwrap(), before);
    let (by, reason, at): (String, String, OffsetDateTime) =
        sqlx::query_as("SELECT discarded_by, reason, discarded_at FROM outbox_discarded")
            .fetch_one(&outbox.pool)
            .await
            .unwrap();
    assert_eq!((by.as_str(), reason.as_str()), ("Bob B.", "test order of the pilot"));
    assert!(at >= begin && at <= outbox.clock().await);
}

#[tokio::test]
async fn a_discard_frees_the_later_events_at_once() {
    let outbox = Outbox::create().await;
    let [dead, second, third] = insert_dead_with_successors(&outbox).await;
    let mut relays = Listening::to(&outbox).await;
    let discard = ["dead", "discard", &dead.event_id.to_string(), "--reason", "typo"];
    let said = Operator::of(&outbox).does(&discard).await;
    assert!(said.contains("as ann") && said.contains("freed 2"), "{said}");
    relays.hears().await;
    assert!(outbox.row(third.event_id).await.unwrap().visible);

    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, &[]).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), [second.event_id, third.event_id]);
}

#[tokio::test]
async fn only_dead_events_can_be_shown_or_discarded_and_a_refusal_names_the_state() {
    let outbox = Outbox::create().await;
    let operator = Operator::of(&outbox);
    let (waiting, unknown) = (outbox.insert_one().await, Uuid::now_v7());
    let leased = outbox.insert_hidden(Some(Uuid::new_v4()), std::time::Duration::from_secs(3600)).await;
    for (event_id, state) in [(waiting, "it is waiting"), (leased, "it is leased"), (unknown, "is not in the outbox")] {
        let event_id = event_id.to_string();
        for arguments in [&["dead", "show", &event_id][..], &["dead", "discard", &event_id, "--reason", "why not"]] {
            let line = operator.is_refused(arguments).await;
            assert!(line.contains(&event_id) && line.contains(state), "{line}");
        }
    }
    assert!(operator.is_misused(&["dead", "show", "17"]).await.contains("not an id: \"17\""));
    assert_eq!((outbox.count().await, count_discarded(&outbox).await), (2, 0));
}

#[tokio::test]
async fn a_second_discard_names_the_first_operator() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await.to_string();
    let operator = Operator::of(&outbox);
    operator.does(&["dead", "discard", &event_id, "--reason", "a typo", "--by", "bob"]).await;
    let line = operator.is_refused(&["dead", "discard", &event_id, "--reason", "another"]).await;
    assert!(line.contains("was discarded by bob at 20") && line.contains("a typo"), "{line}");
    assert_eq!(count_discarded(&outbox).await, 1);
}

#[tokio::test]
async fn no_event_is_discarded_without_a_reason() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await.to_string();
    let operator = Operator::of(&outbox);
    operator.is_misused(&["dead", "discard", &event_id]).await;
    let line = operator.is_misused(&["dead", "discard", &event_id, "--reason", "  "]).await;
    assert!(line.contains("--reason") && line.contains("must be 1 to 1000 characters"), "{line}");
    assert_eq!(count_discarded(&outbox).await, 0);
}

#[tokio::test]
async fn an_operators_changes_are_durable_though_other_commits_of_the_role_are_not() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await.to_string();
    sqlx::raw_sql(
        "CREATE TABLE commits (synchronous text);
        CREATE FUNCTION record_commit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
            $$BEGIN INSERT INTO public.commits VALUES (current_setting('synchronous_commit')); RETURN NULL; END$$;
        CREATE TRIGGER record_commit AFTER UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION record_commit();
        CREATE TRIGGER record_commit AFTER INSERT ON outbox_discarded FOR EACH ROW EXECUTE FUNCTION record_commit();
        CREATE TRIGGER record_commit AFTER INSERT OR DELETE ON outbox_pauses
            FOR EACH ROW EXECUTE FUNCTION record_commit()",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    let operator = Operator::of(&outbox);
    operator.does(&["dead", "requeue", &event_id]).await;
    mark_dead(&outbox, event_id.parse().unwrap(), "again").await;
    operator.does(&["dead", "discard", &event_id, "--reason", "typo"]).await;
    operator.does(&["pause", "--reason", "moving"]).await;
    operator.does(&["resume"]).await;
    let commits = sqlx::query_scalar::<_, String>("SELECT synchronous FROM commits");
    // The commit of the test itself is among them.
    assert_eq!(commits.fetch_all(&outbox.pool).await.unwrap(), ["on"; 5]);
}

/// A row as it is in the outbox, but for its last error.
async fn dead_row(outbox: &Outbox) -> String {
    let row = "SELECT (subscription_id, event_id, aggregate_id, sequence, created_at, attempts, event_type, payload,
        traceparent, tracestate, visible_at)::text FROM outbox";
    sqlx::query_scalar(row).fetch_one(&outbox.pool).await.unwrap()
}

#[tokio::test]
async fn a_discarded_event_comes_back_as_dead_as_it_was_and_says_who_did_what() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead_order(&outbox).await.to_string();
    let operator = Operator::of(&outbox);
    let before = dead_row(&outbox).await;
    for _ in 0..2 {
        operator.does(&["dead", "discard", &event_id, "--reason", "a typo", "--by", "bob"]).await;
        assert_eq!(outbox.count().await, 0);
        let said = operator.does(&["dead", "restore", &event_id]).await;
        assert!(said.contains(&event_id) && said.contains("dead again"), "{said}");
        assert_eq!((dead_row(&outbox).await, count_discarded(&outbox).await), (before.clone(), 0));
    }
    let why = operator.reads(&["dead", "show", "--json", &event_id]).await["event"]["reason"].to_string();
    for part in ["UNDECODABLE: no such type (discarded by bob at 20", ": a typo; restored by ann at 20"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let line = operator.is_refused(&["dead", "restore", &event_id]).await;
    assert!(line.contains("is not among the discarded events"), "{line}");
    operator.does(&["dead", "requeue", &event_id]).await;
    assert!(outbox.rows().await[0].visible);
}

#[tokio::test]
async fn an_event_that_is_too_old_or_whose_subscription_has_ended_does_not_come_back() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await.to_string();
    let operator = Operator::of(&outbox);
    operator.does(&["dead", "discard", &event_id, "--reason", "a typo"]).await;
    sqlx::raw_sql("UPDATE outbox_discarded SET created_at = now() - interval '145 hours'")
        .execute(&outbox.pool)
        .await
        .unwrap();
    let line = operator.is_refused(&["dead", "restore", &event_id]).await;
    assert!(line.contains("is 145 hours old; after 144 its receiver may not remember"), "{line}");
    sqlx::raw_sql("UPDATE outbox_discarded SET created_at = now()").execute(&outbox.pool).await.unwrap();
    operator.does(&["unsubscribe", "all", "--reason", "no more"]).await;
    let line = operator.is_refused(&["dead", "restore", &event_id]).await;
    assert!(line.contains("subscription that has ended"), "{line}");
    assert_eq!((outbox.count().await, count_discarded(&outbox).await), (0, 1));
}

/// Refuses what is not of the type bad.v1.Event, and remembers it.
const REFUSALS: &str = "CREATE TABLE refusals (aggregate_id uuid, reason text);
    CREATE FUNCTION outbox_refuse(aggregate_id uuid, event_type text, reason text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER AS $$
    BEGIN
        INSERT INTO public.refusals VALUES (aggregate_id, reason);
        RETURN CASE WHEN event_type = 'bad.v1.Event' THEN 'it was delivered by hand' END;
    END
    $$";

#[tokio::test]
async fn a_refusal_and_its_discard_are_committed_together_or_not_at_all() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await;
    let operator = Operator::of(&outbox);
    let id = event_id.to_string();
    let discard = ["dead", "discard", &id, "--refuse", "--reason", "not sold here"];
    let line = operator.is_refused(&discard).await;
    assert!(line.contains("defines no function outbox_refuse"), "{line}");

    sqlx::raw_sql(REFUSALS).execute(&outbox.pool).await.unwrap();
    let count = async || {
        let refusals: i64 = sqlx::query_scalar("SELECT count(*) FROM refusals").fetch_one(&outbox.pool).await.unwrap();
        (outbox.count().await, count_discarded(&outbox).await, refusals)
    };
    set_payload(&outbox, event_id, "bad.v1.Event", b"").await;
    let line = operator.is_refused(&discard).await;
    assert!(line.contains("it was delivered by hand"), "{line}");
    assert_eq!(count().await, (1, 0, 0));

    set_payload(&outbox, event_id, "good.v1.Event", b"").await;
    operator.does(&["dead", "discard", &id, "--reason", "without"]).await;
    operator.does(&["dead", "restore", &id]).await;
    assert_eq!(count().await, (1, 0, 0));
    let said = operator.does(&discard).await;
    assert!(said.contains("refused what it tells of"), "{said}");
    assert_eq!(count().await, (0, 1, 1));
    let (aggregate_id, reason): (Uuid, String) = sqlx::query_as(
        "SELECT refusals.aggregate_id, refusals.reason FROM refusals JOIN outbox_discarded USING (aggregate_id)",
    )
    .fetch_one(&outbox.pool)
    .await
    .unwrap();
    assert_eq!((aggregate_id.is_nil(), reason.as_str()), (false, "not sold here"));
    let line = operator.is_refused(&["dead", "restore", &id]).await;
    assert!(line.contains("with a refusal"), "{line}");
    assert_eq!(count().await, (0, 1, 1));
}
