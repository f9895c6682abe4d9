use std::env;

use testkit::{bootstrap::bootstrap, postgres::Server};
use tokio::task::JoinSet;

#[tokio::test]
async fn many_bootstraps_can_run_at_once() {
    let _ = testkit::TestDatabase::create("orders_owner", &[]).await; // explains itself if there is no server
    let server = Server::parse(&env::var("POSTGRES_URL").unwrap()).unwrap();
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let server = server.clone();
        tasks.spawn(async move { bootstrap(&server).await });
    }
    while let Some(outcome) = tasks.join_next().await {
        outcome.unwrap().unwrap();
    }
}

#[test]
fn urls_keep_the_parameters_of_the_server() {
    let server = Server::parse("postgres://root:secret@db.example:6000?sslmode=require&connect_timeout=3").unwrap();
    assert_eq!(server.url(), "postgres://root:secret@db.example:6000/postgres?sslmode=require&connect_timeout=3");
    assert_eq!(
        server.url_for("order_service", "orders"),
        "postgres://order_service:order_service@db.example:6000/orders?sslmode=require&connect_timeout=3"
    );
    assert_eq!(
        server.superuser_url("orders"),
        "postgres://root:secret@db.example:6000/orders?sslmode=require&connect_timeout=3"
    );
    for url in ["", "localhost", "mysql://localhost", "postgres:///x", "postgres://h/x?user=me"] {
        assert!(Server::parse(url).is_err(), "{url}");
    }
}
