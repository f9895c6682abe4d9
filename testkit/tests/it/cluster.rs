//! Private clusters.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::Path,
    time::Duration,
};

use sqlx::{Connection, PgConnection};
use testkit::{
    bootstrap::{bootstrap, create_databases},
    postgres::{Cluster, FixedPort, Options, can_test_clusters},
    processes::free_port,
};
use tokio::process::Command;

use testkit::Scratch;

fn options(directory: &Path, keep: bool) -> Options {
    Options { directory: directory.join("cluster"), port: None, keep, durable: true, settings: Vec::new() }
}

async fn number(url: &str, sql: &'static str) -> i64 {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap()
}

#[tokio::test]
async fn a_cluster_recovers_from_a_crash_with_all_commits() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let mut cluster = Cluster::start(options(&scratch, false)).await.unwrap();
    let url = cluster.server().superuser_url("postgres");
    let mut session = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("CREATE TABLE kept AS SELECT 42::bigint AS number").execute(&mut session).await.unwrap();
    cluster.crash().await.unwrap();
    assert!(session.ping().await.is_err() && PgConnection::connect(&url).await.is_err());
    // The second time nothing is to be recovered.
    for _ in 0..2 {
        cluster.recover().await.unwrap();
        assert_eq!(number(&url, "SELECT number FROM kept").await, 42);
    }
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_cluster_keeps_its_data_if_asked_to() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let cluster = Cluster::start(options(&scratch, true)).await.unwrap();
    bootstrap(cluster.server()).await.unwrap();
    for _ in 0..2 {
        create_databases(cluster.server()).await.unwrap();
    }
    cluster.stop().await.unwrap();

    // The pid file of an old crash, whose number another program has by now.
    let mut bystander = Command::new("sleep").arg("60").kill_on_drop(true).spawn().unwrap();
    fs::write(scratch.join("cluster/data/postmaster.pid"), format!("{}\n", bystander.id().unwrap())).unwrap();

    let cluster = Cluster::start(options(&scratch, false)).await.unwrap();
    assert!(bystander.try_wait().unwrap().is_none());
    for (role, database) in
        [("order_service", "orders"), ("inventory_service", "inventory"), ("loyalty_service", "loyalty")]
    {
        let url = cluster.server().url_for(role, database);
        assert_eq!(number(&url, "SELECT 1::bigint").await, 1);
    }
    cluster.stop().await.unwrap();
    assert!(!scratch.join("cluster").exists());
}

#[tokio::test]
async fn a_dropped_cluster_leaves_nothing_behind() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let cluster = Cluster::start(options(&scratch, false)).await.unwrap();
    let url = cluster.server().url().to_owned();
    let _session = PgConnection::connect(&url).await.unwrap();
    drop(cluster);
    assert!(!scratch.join("cluster").exists());
    assert!(PgConnection::connect(&url).await.is_err());
}

#[tokio::test]
async fn a_cluster_that_cannot_start_says_why() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let port = free_port().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let fixed = FixedPort { number: port, patience: Duration::ZERO };
    let at_port = Options { port: Some(fixed), ..options(&scratch, true) };
    let message = Cluster::start(at_port.clone()).await.unwrap_err().to_string();
    assert!(message.contains(&port.to_string()) && message.contains("--port"), "{message}");
    drop(listener);

    let cluster = Cluster::start(at_port.clone()).await.unwrap();
    let message = Cluster::start(at_port.clone()).await.unwrap_err().to_string();
    assert!(message.contains("another harness"), "{message}");
    cluster.stop().await.unwrap();

    fs::write(scratch.join("cluster/data/PG_VERSION"), "9\n").unwrap();
    let message = Cluster::start(at_port).await.unwrap_err().to_string();
    assert!(message.contains("is of PostgreSQL 9"), "{message}");
}

#[tokio::test]
async fn a_directory_with_other_files_is_refused() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    fs::write(scratch.join("letter"), "dear").unwrap();
    let in_use = Options { directory: scratch.clone(), port: None, keep: false, durable: true, settings: Vec::new() };
    let message = Cluster::start(in_use).await.unwrap_err().to_string();
    assert!(message.contains("another directory"), "{message}");
    assert!(scratch.join("letter").exists());
}
