//! Routes: which receiver gets an event, and that routes do not delay each other.

use std::{net::SocketAddr, time::Duration};

use testkit::processes::free_port;
use uuid::Uuid;

use crate::{
    binary::Binary,
    outbox::{NewEvent, Outbox},
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::until,
};

async fn start(outbox: &Outbox, routes: &[(&str, SocketAddr)]) -> Relay {
    let routes: Vec<_> = routes.iter().map(|(pattern, address)| format!("{pattern}=http://{address}")).collect();
    let routes: Vec<_> = routes.iter().map(String::as_str).collect();
    Relay::start_with_routes(&outbox.relay_url(), &routes, &[]).await
}

fn sorted(mut ids: Vec<Uuid>) -> Vec<Uuid> {
    ids.sort_unstable();
    ids
}

#[tokio::test]
async fn an_event_takes_the_first_route_that_matches_and_stays_if_none_does() {
    let outbox = Outbox::create().await;
    let exact = outbox.insert_of_type("orders.v1.OrderCreated", 150).await;
    let prefix = outbox.insert_of_type("orders.v1.OrderCancelled", 150).await;
    let unrouted = outbox.insert_of_type("orders_v1.OrderCreated", 1).await;
    let other = outbox.insert_of_type("order_svc.v1.Moved", 1).await;
    let almost = outbox.insert_of_type("order-svc.v1.Moved", 1).await;
    let (first, second) = (Receiver::start(Reply::apply).await, Receiver::start(Reply::apply).await);
    let routes =
        [("orders.v1.OrderCreated", first.address), ("orders.v1.*", second.address), ("order_svc.*", second.address)];
    let relay = start(&outbox, &routes).await;
    until("all but the unrouted events are delivered", async || outbox.count().await == 2).await;
    outbox.insert_of_type("orders.v1.OrderCreated", 1).await;
    until("the relay has leased again", async || outbox.count().await == 2).await;
    let states: Vec<_> = outbox.route_states().await;
    relay.stop().await;

    assert_eq!(sorted(first.read(Log::ids))[..150], exact);
    assert_eq!(sorted(second.read(Log::ids)), sorted([prefix, other].concat()));
    let left: Vec<_> = outbox.rows().await.iter().map(|row| row.event_id).collect();
    assert_eq!(left, sorted([unrouted, almost].concat()));
    assert_eq!(states.iter().map(|(route, _)| &**route).collect::<Vec<_>>().len(), 3);
}

#[tokio::test]
async fn events_without_a_route_are_warned_about() {
    let outbox = Outbox::create().await;
    outbox.insert_of_type("orders.v2.OrderCreated", 3).await;
    outbox.insert_of_type("orders.v1.OrderCreated", 1).await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Binary::start_on_route(&outbox, &format!("orders.v1.*=http://{}", receiver.address), &[]);
    let log = || std::fs::read_to_string(relay.log_file()).unwrap();
    until("there is a warning", async || log().contains("no route of this relay takes these events")).await;
    let log = log();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("no route of this relay")).collect();
    assert!(warnings.len() == 1, "{warnings:?}");
    assert!(
        warnings[0].contains("\"orders.v2.OrderCreated\",\"events\":3") && warnings[0].contains("WARN"),
        "{warnings:?}"
    );
}

#[tokio::test]
async fn an_unavailable_receiver_does_not_delay_another() {
    let outbox = Outbox::create().await;
    outbox.insert_of_type("a.v1.Happened", 300).await;
    let receiver = Receiver::start(Reply::apply).await;
    let away = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let relay = start(&outbox, &[("a.*", away), ("*", receiver.address)]).await;
    let ids = outbox.insert_of_type("b.v1.Happened", 300).await;
    until("all of the other's are delivered", async || outbox.count().await == 300).await;
    let expected = [("*".to_owned(), "OPEN".to_owned()), ("a.*".to_owned(), "DOWN".to_owned())];
    until("both routes are announced", async || outbox.route_states().await == expected).await;
    relay.stop().await;
    assert_eq!(sorted(receiver.read(Log::ids)), ids);
    assert!(outbox.rows().await.iter().all(|row| row.attempts == 0 && row.visible));
}

#[tokio::test]
async fn the_sequence_of_an_aggregate_holds_across_routes() {
    let outbox = Outbox::create().await;
    let aggregate_id = Uuid::new_v4();
    let events = [NewEvent::of(aggregate_id, 1), NewEvent::of(aggregate_id, 2)];
    outbox.insert(&events).await;
    sqlx::query("UPDATE outbox SET event_type = 'b.v1.Happened' WHERE sequence = 2")
        .execute(&outbox.pool)
        .await
        .unwrap();
    let (first, second) = (Receiver::start(Reply::apply).await, Receiver::start(Reply::apply).await);
    first.describe(|| Err(tonic::Code::Unavailable));
    let relay = start(&outbox, &[("test.*", first.address), ("b.*", second.address)]).await;
    let other = outbox.insert_of_type("b.v1.Happened", 1).await;
    outbox.wait_until_gone(other[0]).await;
    assert_eq!(second.read(Log::ids), other, "the second event waits for the first");
    first.describe(|| Ok(Some(Duration::from_secs(7 * 24 * 3600))));
    outbox.wait_until_empty().await;
    relay.stop().await;
    assert_eq!(second.read(Log::ids), [other[0], events[1].event_id]);
}

#[tokio::test]
async fn no_relay_leases_from_a_paused_outbox_even_if_it_starts_later() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = start(&outbox, &[("*", receiver.address)]).await;
    outbox.wait_for_a_later_event().await;
    let pause = "INSERT INTO outbox_pause (paused_by, reason) VALUES ('ann', 'to see')";
    sqlx::query(pause).execute(&outbox.pool).await.unwrap();
    let ids = outbox.insert_unrelated(10).await;
    let later = start(&outbox, &[("*", receiver.address)]).await;
    let looked = "SELECT count(*) FROM outbox_routes, outbox_pause WHERE seen_at > paused_at + interval '2 s'";
    let relays = async || sqlx::query_scalar::<_, i64>(looked).fetch_one(&outbox.pool).await.unwrap();
    until("both relays have looked for two seconds", async || relays().await == 2).await;
    let rows = outbox.rows().await;
    assert!(rows.len() == 10 && rows.iter().all(|row| row.lease_token.is_none() && row.visible), "{rows:?}");
    sqlx::query("DELETE FROM outbox_pause").execute(&outbox.pool).await.unwrap();
    outbox.wait_until_empty().await;
    relay.stop().await;
    later.stop().await;
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 1)));
}
