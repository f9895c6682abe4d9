//! The rule by which events are charged: only with a witness, so an outage costs nobody an attempt, whatever it looks
//! like. Describe answers all along, as it does in services that do not ask their database for it.

use std::sync::Arc;

use proto::events::v1::{Event, EventResult};
use sqlx::types::time::OffsetDateTime;
use tonic::Code;
use uuid::Uuid;

use crate::{
    operator::Operator,
    outbox::Outbox,
    receiver::{Receiver, Reply, applied, id_of, retry},
    relay::Relay,
    wait::until,
};

type Answer = Arc<dyn Fn(&[Event]) -> Reply + Send + Sync>;

/// Lets the receiver answer everything like this until the relay has tried for a while. Then it works again.
async fn assert_costs_nothing(what: &str, state: &str, answer: Answer) {
    let outbox = Outbox::create().await;
    outbox.record_charges().await;
    let ids = outbox.insert_unrelated(50).await;
    let receiver = Receiver::start(move |events| answer(events)).await;
    // A single attempt kills an event.
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "1", "--workers", "2"]).await;
    outbox.wait_for_route_state(state).await;
    let tried = receiver.read(|log| log.deliveries.len());
    receiver.wait_for_deliveries(tried + 20).await;
    receiver.follow(Reply::apply);
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(outbox.charges().await, Vec::<Uuid>::new(), "{what}");
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) > 0)), "{what}");
}

/// Handlers that raise in grpcio, grpc-go, grpc-js and grpc-java answer UNKNOWN. A Go handler that returns the error of
/// its own context answers DEADLINE_EXCEEDED.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_costs_no_attempt_whatever_code_it_has() {
    let codes = [Code::Unknown, Code::DeadlineExceeded, Code::Internal, Code::ResourceExhausted, Code::Unavailable];
    for code in codes {
        assert_costs_nothing(&format!("{code:?}"), "DOWN", Arc::new(move |_| Reply::Refuse(code))).await;
    }
    assert_costs_nothing("RETRY", "DOWN", Arc::new(|events| Reply::each(events, retry))).await;
}

/// As a receiver with a fault in its code does.
#[tokio::test]
async fn an_answer_without_a_result_for_any_event_bars_the_route_with_that_reason_and_costs_no_attempt() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(5).await;
    let receiver = Receiver::start(|events| {
        let stranger = |event: &Event| EventResult { event_id: Uuid::new_v4().to_string(), ..applied(event) };
        Reply::each(events, stranger)
    })
    .await;
    let relay = Relay::start(&outbox, receiver.address, &["--attempts", "1"]).await;
    outbox.wait_for_route_state("BARRED").await;
    until("the events are back", async || outbox.rows().await.iter().all(|row| row.lease_token.is_none())).await;
    assert!(outbox.rows().await.iter().all(|row| (row.attempts, row.failures, row.dead) == (0, 0, false)));
    receiver.follow(Reply::apply);
    outbox.wait_until_empty().await;
    relay.stop().await;
}

/// Nothing else is there to be delivered, so nothing shows whether the event is at fault or the receiver.
#[tokio::test]
async fn a_single_event_is_charged_only_after_an_hour_and_is_shown_meanwhile() {
    let outbox = Outbox::create().await;
    let event_id = outbox.insert_one().await;
    let receiver = Receiver::start(|_| Reply::Refuse(Code::Internal)).await;
    let flags = ["--attempts", "1", "--back-off-ms", "1", "--back-off-max-ms", "1"];
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    receiver.wait_for_deliveries(10).await;
    let row = outbox.row(event_id).await.unwrap();
    assert!((row.attempts, row.dead) == (0, false) && row.failures > 0, "{row:?}");
    let operator = Operator::of(&outbox);
    let status = operator.reads(&["status", "--json"]).await;
    let failing = &status["failing"][0];
    assert_eq!(
        (failing["reason"].as_str(), failing["events"].as_i64()),
        (Some("Internal: as the test wants it"), Some(1))
    );
    let page = operator.does(&["status"]).await;
    assert!(page.contains("FAILING") && page.contains("as the test wants it"), "{page}");
    let listed = operator.reads(&["dead", "list", "--failing", "--json"]).await;
    assert_eq!(listed["dead_events"][0]["event_id"].as_str(), Some(event_id.to_string().as_str()));
    assert!(operator.does(&["dead", "list"]).await.contains("no dead events"));

    sqlx::query("UPDATE outbox SET created_at = now() - interval '2 hours'").execute(&outbox.pool).await.unwrap();
    let described = receiver.read(|log| log.described);
    let dead = outbox.wait_for_dead(1).await;
    relay.stop().await;
    assert_eq!((dead[0].event_id, dead[0].attempts), (event_id, 1));
    assert!(receiver.read(|log| log.described) >= described + 2, "the receiver was asked before and after");
}

/// The receiver is up for everybody else. Once the event is known to fail, it is tried beside the others. Its back-off is
/// ended by hand, so that the receiver has taken another event since its last attempt each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_over_which_a_proxy_loses_patience_does_not_close_the_route_again_and_again() {
    let outbox = Outbox::create().await;
    let fatal = outbox.insert_one().await;
    let receiver = Receiver::start(move |events| match events.iter().any(|event| id_of(event) == fatal) {
        true => Reply::Refuse(Code::Unavailable),
        false => Reply::apply(events),
    })
    .await;
    // What one worker's connection has shown is no witness for another's.
    let flags = ["--workers", "1", "--attempts", "100", "--back-off-ms", "600000", "--back-off-max-ms", "86400000"];
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    let failed = async |failures: i32| {
        until("it has failed", async || outbox.row(fatal).await.unwrap().failures == failures).await;
        outbox.wait_for_a_later_event().await;
    };
    failed(1).await;
    outbox.wait_for_route_state("OPEN").await;
    let described = receiver.read(|log| log.described);
    assert!(described > 1, "the first failure closed the route");
    for failures in 2..=6 {
        sqlx::query("UPDATE outbox SET visible_at = now() WHERE event_id = $1")
            .bind(fatal)
            .execute(&outbox.pool)
            .await
            .unwrap();
        failed(failures).await;
    }
    relay.stop().await;
    assert_eq!(receiver.read(|log| log.described), described, "the route was closed again");
    let row = outbox.row(fatal).await.unwrap();
    assert_eq!((row.attempts, row.last_error.as_deref()), (5, Some("Unavailable: as the test wants it")));
}

/// Such as a receiver that was configured for 64 KiB, or nginx before it with its 1 MiB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_refuses_large_messages_gets_smaller_ones_and_its_route_stays_open() {
    const LIMIT: usize = 64 * 1024;
    let outbox = Outbox::create().await;
    outbox.record_charges().await;
    let ids = outbox.insert_unrelated(1000).await;
    let enlarge = "UPDATE outbox SET payload = decode(repeat('00', 4000), 'hex')";
    sqlx::query(enlarge).execute(&outbox.pool).await.unwrap();
    let receiver = Receiver::start(|events| {
        let bytes: usize = events.iter().map(|event| event.data.len() + 300).sum();
        if bytes > LIMIT { Reply::Refuse(Code::ResourceExhausted) } else { Reply::apply(events) }
    })
    .await;
    let flags = ["--attempts", "1", "--workers", "1", "--batch", "500"];
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    outbox.wait_for_route_state("OPEN").await;
    let opened = sqlx::query_scalar::<_, OffsetDateTime>("SELECT since FROM outbox_routes");
    let opened = opened.fetch_one(&outbox.pool).await.unwrap();
    outbox.wait_until_empty().await;
    let state = sqlx::query_as::<_, (String, OffsetDateTime)>("SELECT state, since FROM outbox_routes");
    assert_eq!(state.fetch_one(&outbox.pool).await.unwrap(), ("OPEN".into(), opened));
    relay.stop().await;
    assert_eq!(outbox.charges().await, Vec::<Uuid>::new());
    let sizes = receiver.read(|log| log.deliveries.iter().map(|delivery| delivery.events.len()).collect::<Vec<_>>());
    let fit = LIMIT / 4300;
    let last_refused = sizes.iter().rposition(|size| *size > fit).unwrap();
    assert!(sizes.len() - last_refused > 500 / fit, "it learned nothing: {sizes:?}");
    assert!(sizes.iter().filter(|size| **size <= fit).all(|size| *size > fit / 4 || *size < 500 % fit), "{sizes:?}");
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) > 0)));
}
