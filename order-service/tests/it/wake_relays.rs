//! Relays LISTEN: which notifications they receive, and when.

use sqlx::postgres::PgListener;
use tokio::time::timeout;

use crate::service::{LIMIT, ONE_ORDER, Service, order_once};

pub(crate) async fn listen(service: &Service, channel: &str) -> PgListener {
    let mut listener = PgListener::connect(&service.database.url_as("outbox_relay")).await.unwrap();
    listener.listen(channel).await.unwrap();
    listener
}

pub(crate) async fn hear(listener: &mut PgListener) -> String {
    timeout(LIMIT, listener.recv()).await.expect("a notification").unwrap().payload().to_owned()
}

#[tokio::test]
async fn relays_are_notified_of_a_committed_order_and_not_of_a_repeated_request() {
    let service = Service::start().await;
    let mut listener = listen(&service, outbox::CHANNEL).await;
    let request = order_once();
    service.place(request.clone()).await;
    assert_eq!(hear(&mut listener).await, "");
    assert_eq!(service.written().await, ONE_ORDER, "a relay that is notified finds the event");

    // A notification follows its answer within a round trip, so at least one of these would arrive before the test's own.
    for _ in 0..30 {
        service.place(request.clone()).await;
    }
    service.execute("SELECT pg_notify('outbox', 'of the test')").await;
    assert_eq!(hear(&mut listener).await, "of the test");
    service.end().await;
}

#[tokio::test]
async fn relays_are_notified_of_each_order() {
    let service = Service::start().await;
    let mut listener = listen(&service, outbox::CHANNEL).await;
    for _ in 0..5 {
        service.place(order_once()).await;
        hear(&mut listener).await;
    }
    service.end().await;
}
