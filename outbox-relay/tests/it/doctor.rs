//! The doctor, on real outboxes.

use proto::relay::v1::{DiagnoseRequest, finding::Severity, relay_admin_client::RelayAdminClient};

use crate::{
    binary::Binary,
    operator::{Operator, insert_dead},
    outbox::Outbox,
    receiver::{Receiver, Reply},
    wait::until,
};

#[tokio::test]
async fn it_finds_a_sound_outbox_sound_and_then_each_thing_that_is_broken() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Binary::start(&outbox, &receiver, &[]);
    let operator = Operator::of(&outbox);
    until("the route is open", async || {
        let status = operator.reads(&["status", "--json"]).await;
        status["routes"][0]["state"] == "OPEN"
    })
    .await;
    let text = operator.does(&["doctor"]).await;
    assert!(text.lines().all(|line| line.starts_with("OK ")), "{text}");
    for about in
        ["server: PostgreSQL ", "schema: ", "rights: ", "clocks: ", "horizon: ", "subscription all: ", "receiver http"]
    {
        assert!(text.contains(about), "{about} in {text}");
    }
    let mut admin = RelayAdminClient::connect(format!("http://{}", relay.ops)).await.unwrap();
    let diagnosis = admin.diagnose(DiagnoseRequest {}).await.unwrap().into_inner();
    assert!(diagnosis.findings.iter().all(|finding| finding.severity() == Severity::Ok), "{diagnosis:?}");

    let subscribed = outbox.subscribe("nobody", "test.v1.*").await;
    for sql in [
        "ALTER TABLE outbox SET (autovacuum_enabled = false)",
        "REVOKE DELETE ON outbox FROM outbox_relay",
        "DELETE FROM _outbox_migrations WHERE version = 19",
    ] {
        sqlx::query(sql).execute(&outbox.pool).await.unwrap();
    }
    operator.does(&["pause", "--subscription", "all", "--reason", "a move"]).await;
    assert_eq!(subscribed, 2);
    let output = operator.command(&["doctor"]).output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    for found in [
        "FAULT    autovacuum: it is off",
        "FAULT    rights: outbox_relay lacks DELETE on outbox",
        "FAULT    schema: the database lacks migration 19",
        "FAULT    subscription nobody: no relay that delivers it has reported for 10 s\n         start a relay with --route nobody=URL",
        "WARNING  subscription all: paused since ",
    ] {
        assert!(text.contains(found), "{found} in {text}");
    }
    assert!(text.starts_with("FAULT"), "the worst first: {text}");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "error: there are 4 faults\n");
}

/// A canary in each place where a secret may be.
#[tokio::test]
async fn a_bundle_says_what_is_wrong_and_holds_no_secret() {
    let outbox = Outbox::create().await;
    let event_id = insert_dead(&outbox).await;
    sqlx::query("UPDATE outbox SET payload = 'canary-of-a-payload', traceparent = 'canary-of-a-trace'")
        .execute(&outbox.pool)
        .await
        .unwrap();
    let operator = Operator::of(&outbox);
    operator.does(&["dead", "requeue", &event_id.to_string(), "--reason", "it is mended"]).await;
    let file = std::env::temp_dir().join(format!("bundle-{}", uuid::Uuid::new_v4().simple()));
    let doctor = operator.command(&["doctor", "--bundle", file.to_str().unwrap()]).output().await.unwrap();
    // Nobody delivers the subscription, which is a fault.
    assert_eq!(doctor.status.code(), Some(1), "{doctor:?}");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    // Passwords in tests are the names of their roles.
    assert!(!text.contains("canary") && !text.contains("outbox_relay:outbox_relay"), "{text}");
    let bundle: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(bundle["server"]["settings"]["max_connections"].is_string(), "{text}");
    assert_eq!(bundle["deeds"]["deeds"][0]["reason"], "it is mended");
    assert_eq!(bundle["status"]["subscriptions"][0]["name"], "all");
    assert!(bundle["diagnosis"]["findings"].as_array().unwrap().iter().any(|of| of["severity"] == "SEVERITY_FAULT"));
    let tables = bundle["server"]["tables"].as_array().unwrap();
    assert!(tables.iter().any(|table| table["table"] == "outbox_discarded"), "{text}");
    let nowhere = operator.command(&["doctor", "--bundle", "/nowhere/bundle.json"]).output().await.unwrap();
    let said = String::from_utf8(nowhere.stderr).unwrap();
    assert!(nowhere.status.code() == Some(1) && said.contains("cannot write /nowhere/bundle.json"), "{said}");
}
