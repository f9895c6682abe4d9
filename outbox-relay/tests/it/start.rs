//! Start: the relay waits for its database, and refuses one without the schema.

use chassis::DatabaseUrl;
use chassis::RunError;
use testkit::TestDatabase;

use crate::{
    line::Line,
    outbox::Outbox,
    receiver::{Receiver, Reply},
    relay::Relay,
};

#[tokio::test]
async fn it_refuses_a_database_without_the_schema_and_says_what_to_do() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start_on(&database.url_as("outbox_relay"), receiver.address, &[]).await;
    let refusal = relay.end().await.unwrap_err();
    assert!(matches!(refusal, RunError::Schema(_)), "{refusal:?}");
    let message = refusal.to_string();
    assert!(message.contains("lacks migration 1") && message.contains("run the `migrate` command"), "{message}");
}

#[tokio::test]
async fn two_routes_for_one_subscription_are_an_error_of_the_command_line() {
    let outbox = Outbox::create().await;
    let routes = ["all=http://127.0.0.1:1", "all=http://127.0.0.1:2"];
    let refusal = Relay::start_with_routes(&outbox.relay_url(), &routes, &[]).await.end().await.unwrap_err();
    assert!(matches!(&refusal, RunError::Arguments(text) if text.contains("two routes for all")), "{refusal:?}");
}

#[tokio::test]
async fn routes_that_it_could_not_deliver_to_safely_are_refused() {
    let outbox = Outbox::create().await;
    for (route, says) in [
        ("all=http://inventory:1", "http://inventory:1/ is not on this machine"),
        ("all=http://10.0.0.1:1", "http://10.0.0.1:1/ is not on this machine"),
        ("all=https://localhost:1", "https://localhost:1/ needs --tls-ca-file"),
    ] {
        let refusal = Relay::start_with_routes(&outbox.relay_url(), &[route], &[]).await.end().await.unwrap_err();
        assert!(matches!(&refusal, RunError::Tls(error) if error.to_string().starts_with(says)), "{refusal:?}");
    }
}

#[tokio::test]
async fn it_waits_for_a_database_that_is_not_there_yet() {
    let outbox = Outbox::create().await;
    outbox.insert_unrelated(3).await;
    let url: DatabaseUrl = outbox.relay_url().parse().unwrap();
    let mut line = Line::to(url.hosts()[0].get_host(), url.hosts()[0].get_port()).await;
    let url = format!("postgres://outbox_relay:outbox_relay@{}/{}", line.address, outbox.database.name());
    let receiver = Receiver::start(Reply::apply).await;

    outbox.allow_connections(false).await;
    let relay = Relay::start_on(&url, receiver.address, &[]).await;
    // The second call shows that the first was refused.
    line.wait_for_calls(2).await;
    assert!(!relay.has_ended());
    outbox.allow_connections(true).await;
    outbox.wait_until_empty().await;
    relay.stop().await;
}

#[tokio::test]
async fn it_stops_on_request_while_it_waits_for_a_database() {
    let outbox = Outbox::create().await;
    // This listener closes every connection.
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("postgres://outbox_relay@{}/{}", listener.local_addr().unwrap(), outbox.database.name());
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start_on(&url, receiver.address, &[]).await;
    drop(listener.accept().await.unwrap());
    relay.stop().await;
}
