//! The doctor, on real outboxes.

use proto::relay::v1::{DiagnoseRequest, finding::Severity, relay_admin_client::RelayAdminClient};

use crate::{
    binary::Binary,
    operator::Operator,
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
