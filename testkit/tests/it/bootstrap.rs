use std::env;

use sqlx::{Connection, PgConnection};
use testkit::{
    Scratch, TestDatabase,
    bootstrap::{bootstrap, create_databases, protect_schema},
    postgres::{Cluster, Options, Server, can_test_clusters},
};
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

#[tokio::test]
async fn no_role_of_a_process_can_take_every_session_of_a_server() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let options = Options {
        directory: scratch.join("cluster"),
        port: None,
        keep: false,
        durable: false,
        settings: vec!["max_connections=100".into()],
    };
    let cluster = Cluster::start(options).await.unwrap();
    bootstrap(cluster.server()).await.unwrap();
    create_databases(cluster.server()).await.unwrap();
    let connect = async |role: &str| PgConnection::connect(&cluster.server().url_for(role, "orders")).await;
    let mut held = Vec::new();
    let refused = loop {
        match connect("order_service").await {
            Ok(session) => held.push(session),
            Err(refused) => break refused,
        }
    };
    assert_eq!(
        refused.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref(),
        Some("53300"),
        "{refused}"
    );
    assert_eq!(held.len(), 66);
    for other in ["outbox_relay", "orders_owner"] {
        connect(other).await.unwrap();
    }
    cluster.stop().await.unwrap();
}

/// As on PostgreSQL 14, and on servers that were upgraded from earlier versions.
#[tokio::test]
async fn where_everybody_could_create_tables_the_bootstrap_ends_that() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    let give = "GRANT CREATE ON SCHEMA public TO PUBLIC; ALTER SCHEMA public OWNER TO CURRENT_USER";
    sqlx::raw_sql(give).execute(&database.pool().await).await.unwrap();
    assert_eq!(database.sqlstate("order_service", "CREATE TABLE first ()").await, "00000");
    let server = Server::parse(&env::var("POSTGRES_URL").unwrap()).unwrap();
    protect_schema(&server, database.name()).await.unwrap();
    assert_eq!(database.sqlstate("order_service", "CREATE TABLE second ()").await, "42501");
    assert_eq!(database.sqlstate("orders_owner", "CREATE TABLE third ()").await, "00000");
}
