//! A transaction that fails leaves nothing, no matter how far it got.

use tonic::Code;

use crate::service::{NOTHING, ONE_ORDER, Refusal, Service, order_once, refusal};

const REFUSING: &str = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE 'secret of the database'; END $$";
/// Ends the session that the trigger runs in, as a crash of the server would. The session dies in the sleep.
const CUTTING: &str = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
    $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5); RETURN NEW; END $$";

const AT_ORDER: &str = "CREATE TRIGGER t AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION refuse()";
const AT_ITEMS: &str = "CREATE TRIGGER t AFTER INSERT ON order_items FOR EACH ROW EXECUTE FUNCTION refuse()";
const AT_EVENT: &str = "CREATE TRIGGER t AFTER INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION refuse()";
const AT_COMMIT: &str = "CREATE CONSTRAINT TRIGGER t AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse()";

/// Places an order while the database fails at one point, then places it again without that failure.
async fn fails_and_leaves_nothing(function: &'static str, trigger: &'static str) -> Refusal {
    let service = Service::start().await;
    let request = order_once();
    service.execute(function).await;
    service.execute(trigger).await;
    let refused = refusal(service.orders().create_order(request.clone()).await);
    assert_eq!(service.written().await, NOTHING);

    service.execute("DROP FUNCTION refuse CASCADE").await;
    service.place(request).await;
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
    refused
}

fn is_internal_and_reveals_nothing(refused: &Refusal) {
    refused.is(Code::Internal, "INTERNAL");
    assert_eq!(refused.retry_after, None, "repeating does not help");
    for inside in ["secret", "refuse", "outbox", "order_items", "INSERT", "P0001"] {
        assert!(!refused.text.contains(inside), "{inside} in {refused:?}");
    }
}

#[tokio::test]
async fn a_failed_order_leaves_nothing() {
    is_internal_and_reveals_nothing(&fails_and_leaves_nothing(REFUSING, AT_ORDER).await);
}

#[tokio::test]
async fn failed_items_leave_neither_order_nor_event() {
    is_internal_and_reveals_nothing(&fails_and_leaves_nothing(REFUSING, AT_ITEMS).await);
}

#[tokio::test]
async fn a_failed_event_leaves_no_order() {
    is_internal_and_reveals_nothing(&fails_and_leaves_nothing(REFUSING, AT_EVENT).await);
}

#[tokio::test]
async fn a_failed_commit_leaves_nothing() {
    is_internal_and_reveals_nothing(&fails_and_leaves_nothing(REFUSING, AT_COMMIT).await);
}

#[tokio::test]
async fn a_session_cut_between_order_and_event_leaves_neither_and_asks_to_retry() {
    fails_and_leaves_nothing(CUTTING, AT_ITEMS).await.asks_to_retry();
}

#[tokio::test]
async fn a_session_cut_before_the_commit_leaves_nothing_and_asks_to_retry() {
    fails_and_leaves_nothing(CUTTING, AT_COMMIT).await.asks_to_retry();
}
