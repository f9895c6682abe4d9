//! What the relay measures.

use proto::events::v1::Outcome;
use testkit::http::sum_metric;
use uuid::Uuid;

use crate::{
    binary::Binary,
    outbox::{NewEvent, Outbox},
    receiver::{Receiver, Reply, applied, id_of, result},
    wait::until,
};

#[tokio::test]
async fn an_operator_sees_each_subscriptions_events_its_oldest_age_and_why_events_died() {
    let outbox = Outbox::create().await;
    let bad = Uuid::now_v7();
    let receiver = Receiver::start(move |events| {
        Reply::each(events, |event| {
            if id_of(event) == bad {
                result(event, Outcome::Rejected, "BAD_SKU", "no such SKU")
            } else {
                applied(event)
            }
        })
    })
    .await;
    let aggregate_id = Uuid::new_v4();
    outbox.insert(&[NewEvent { event_id: bad, ..NewEvent::of(aggregate_id, 1) }, NewEvent::of(aggregate_id, 2)]).await;
    outbox.insert_unrelated(3).await;
    let unserved = outbox.subscribe("unserved", "test.v1.*").await;
    outbox.enqueue("test.v1.Happened", 1).await;
    sqlx::query("UPDATE outbox SET created_at = created_at - interval '1 h' WHERE subscription_id = $1")
        .bind(unserved)
        .execute(&outbox.pool)
        .await
        .unwrap();

    let relay = Binary::start(&outbox, &receiver, &[]);
    receiver.wait_for_deliveries(1).await;
    let metric =
        async |name: &str, labels: &[(&str, &str)]| -> Option<f64> { sum_metric(&relay.metrics().await, name, labels) };
    let all = ("subscription", "all");
    until("it has measured", async || metric("outbox_events", &[all, ("state", "dead")]).await == Some(1.0)).await;
    assert_eq!(metric("outbox_events", &[all, ("state", "waiting")]).await, Some(1.0), "the event behind the dead one");
    assert_eq!(metric("outbox_events_estimated", &[all]).await, Some(0.0));
    let age = metric("outbox_oldest_event_age_seconds", &[("subscription", "unserved")]).await;
    assert!(age.is_some_and(|age| (3600.0..3700.0).contains(&age)), "{age:?}");
    let age = metric("outbox_oldest_event_age_seconds", &[all]).await;
    assert!(age.is_some_and(|age| (0.0..60.0).contains(&age)), "{age:?}");
    let expires = metric("outbox_oldest_event_expires_in_seconds", &[all]).await;
    assert!(expires.is_some_and(|seconds| seconds > 3600.0), "{expires:?}");
    assert_eq!(metric("outbox_relay_charged_total", &[all, ("reason", "BAD_SKU")]).await, Some(1.0));
    // Of three without a predecessor, and one that came while there was a second subscription.
    assert_eq!(metric("outbox_relay_event_settled_seconds_count", &[all]).await, Some(4.0));
    assert_eq!(metric("outbox_relay_route_state", &[all, ("state", "OPEN")]).await, Some(1.0));
    assert_eq!(metric("outbox_relay_route_state", &[all]).await, Some(1.0), "one state at a time");
    let deliver = [("rpc_method", "events.v1.EventReceiver/Deliver"), ("rpc_status_code", "OK")];
    assert!(metric("rpc_client_call_duration_seconds_count", &deliver).await.is_some_and(|calls| calls >= 1.0));
    assert_eq!(metric("outbox_unrouted_events", &[]).await, Some(0.0));

    sqlx::query(
        "UPDATE outbox_subscriptions SET ended_at = now(), ended_by = 'a test', reason = 'x' WHERE name = 'unserved'",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    until("an ended subscription has no age", async || {
        metric("outbox_oldest_event_age_seconds", &[("subscription", "unserved")]).await == Some(0.0)
    })
    .await;
}
