//! A PostgreSQL server with TLS.

use testkit::{
    OwnServer, Scratch,
    certificates::{Authority, replace},
};

use crate::{
    outbox::Outbox,
    receiver::{Receiver, Reply},
    relay::Relay,
    wait::until,
};

#[tokio::test]
async fn a_relay_delivers_the_events_of_a_server_whose_certificate_is_verified() {
    let Some(server) = OwnServer::start().await else { return };
    let (scratch, authority) = (Scratch::new(), Authority::new().unwrap());
    server.speak_tls(&authority.sign(&["127.0.0.1"]).unwrap(), authority.pem()).await;
    let ca = scratch.join("ca.pem");
    replace(&ca, authority.pem()).unwrap();
    let (outbox, receiver) = (Outbox::create_at(&server).await, Receiver::start(Reply::apply).await);
    let url = format!("{}?sslmode=verify-full&sslrootcert={}", outbox.relay_url(), ca.display());
    outbox.insert_unrelated(3).await;
    let relay = Relay::start_on(&url, receiver.address, &[]).await;
    until("the events are delivered", async || outbox.rows().await.is_empty()).await;
    let in_clear =
        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'outbox_relay' AND NOT ssl";
    assert_eq!(sqlx::query_scalar::<_, i64>(in_clear).fetch_one(&outbox.pool).await.unwrap(), 0);
    relay.stop().await;
}
