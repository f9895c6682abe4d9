//! The journey of an event, and why it waits.

use outbox::EventId;
use proto::{
    events::v1::Outcome,
    relay::v1::{GetJourneyRequest, relay_admin_client::RelayAdminClient},
};
use serde_json::Value;
use tonic::Code;
use uuid::Uuid;

use crate::{
    binary::Binary,
    operator::Operator,
    outbox::{NewEvent, Outbox},
    receiver::{Receiver, Reply, applied, id_of, result},
    wait::until,
};

const TYPE: &str = "test.v1.Happened";

/// Three events of a subject, with the ids that services derive.
fn line(subject: Uuid) -> [NewEvent; 3] {
    [1, 2, 3].map(|sequence| NewEvent {
        event_id: EventId::derive(TYPE, subject.into(), sequence).uuid(),
        ..NewEvent::of(subject, sequence)
    })
}

fn kinds(event: &Value) -> Vec<&str> {
    event["causes"].as_array().unwrap().iter().map(|cause| cause["kind"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn an_operator_sees_what_was_applied_what_died_what_waits_behind_it_and_what_was_discarded() {
    let (outbox, subject) = (Outbox::create().await, Uuid::now_v7());
    let events = line(subject);
    let [first, second, third] = events.each_ref().map(|event| event.event_id);
    let receiver = Receiver::start(move |events| {
        Reply::each(events, |event| {
            if id_of(event) == second { result(event, Outcome::Rejected, "BAD", "no") } else { applied(event) }
        })
    })
    .await;
    outbox.insert(&events).await;
    let relay = Binary::start(&outbox, &receiver, &[]);
    // Relays tell of their routes once a second.
    let open = "SELECT EXISTS (SELECT FROM outbox_routes WHERE state = 'OPEN')";
    until("the first is applied, the second dead, and the route told to be open", async || {
        outbox.row(first).await.is_none()
            && outbox.row(second).await.is_some_and(|row| row.dead)
            && sqlx::query_scalar(open).fetch_one(&outbox.pool).await.unwrap()
    })
    .await;

    let operator = Operator::of(&outbox);
    let (subject, third) = (subject.to_string(), third.to_string());
    let journey = operator.reads(&["journey", "--json", &subject]).await;
    let left = journey["events"].as_array().unwrap();
    assert_eq!(left.iter().map(|event| event["sequence"].as_i64().unwrap()).collect::<Vec<_>>(), [2, 3], "{journey}");
    assert_eq!((&left[0]["state"], kinds(&left[0])), (&"STATE_DEAD".into(), vec!["KIND_DEAD"]), "{journey}");
    assert_eq!(kinds(&left[1]), ["KIND_BEHIND"], "{journey}");
    assert_eq!(left[1]["causes"][0]["event_id"], second.to_string(), "{journey}");
    let [of_first] = &journey["applied"].as_array().unwrap()[..] else { panic!("{journey}") };
    assert_eq!((&of_first["event_id"], &of_first["sequence"]), (&first.to_string().into(), &1.into()), "{journey}");
    assert_eq!((&of_first["subscription"], &journey["unanswered"]), (&"all".into(), &Value::Array(vec![])));

    // The same by the id of an event, dead or not, and in words.
    for id in [second.to_string(), third.clone()] {
        assert_eq!(operator.reads(&["journey", "--json", &id]).await["events"], journey["events"]);
    }
    let text = operator.does(&["journey", &subject]).await;
    let behind = format!(
        "3 {TYPE} for all: waiting\n  {third}\n  behind event {second}, the subject's number 2, which is dead\n"
    );
    assert!(text.starts_with(&format!("subject {subject}\n")) && text.contains(&behind), "{text}");
    assert!(text.contains("dead: BAD: no; once the cause is mended, `outbox-relay dead requeue "), "{text}");
    assert!(text.contains("APPLIED") && text.contains(&first.to_string()), "{text}");
    let why = operator.does(&["why", &third]).await;
    assert!(why.contains(&behind) && !why.contains("APPLIED"), "{why}");

    // By the relay.
    let mut admin = RelayAdminClient::connect(format!("http://{}", relay.ops)).await.unwrap();
    let asked = admin.get_journey(GetJourneyRequest { id: subject.clone() }).await.unwrap().into_inner();
    assert_eq!((asked.events.len(), asked.applied.len()), (2, 1), "{asked:?}");
    let bad = admin.get_journey(GetJourneyRequest { id: "x".into() }).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument, "{bad}");
    let unknown = admin.get_journey(GetJourneyRequest { id: Uuid::new_v4().into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");

    // A discarded event stays in the journey, and the one behind it goes on.
    operator.does(&["dead", "discard", &second.to_string(), "--reason", "a test"]).await;
    until("the third is applied", async || outbox.rows().await.is_empty()).await;
    let text = operator.does(&["journey", &subject]).await;
    assert!(text.contains("2 test.v1.Happened for all: discarded\n"), "{text}");
    assert!(text.contains(": a test; `outbox-relay dead restore` brings it back\n"), "{text}");
    assert!(text.contains(&third), "{text}");
    let unknown = operator.is_refused(&["journey", &Uuid::new_v4().to_string()]).await;
    assert!(unknown.contains("neither the outbox nor a receiver has it on record"), "{unknown}");

    // While the receiver is away, the rest is told.
    let address = receiver.address;
    drop(receiver);
    let text = operator.does(&["journey", &subject]).await;
    assert!(text.contains(&format!("no answer: all at http://{address}/: ")), "{text}");
}

#[tokio::test]
async fn why_says_who_paused_and_that_no_relay_delivers() {
    let outbox = Outbox::create().await;
    let event = outbox.insert_one().await;
    let operator = Operator::of(&outbox);
    operator.does(&["pause", "--reason", "a move"]).await;
    let why = operator.does(&["why", &event.to_string()]).await;
    assert!(why.contains("all subscriptions are paused since ") && why.contains(" by ann: a move;"), "{why}");
    assert!(why.contains("no relay that delivers all has reported for 10 s: start one with --route all=URL"), "{why}");
    let text = operator.does(&["journey", &Uuid::new_v4().to_string()]).await;
    assert!(text.contains("no answer: all: no relay that delivers it has reported for 10 s\n"), "{text}");
    let gone = operator.does(&["why", &Uuid::new_v4().to_string()]).await;
    assert_eq!(
        gone,
        "nothing of it is left in this outbox: it was handled, or never enqueued here\n`outbox-relay journey` asks receivers; their own events, such as answers, are in their outboxes\n"
    );
}
