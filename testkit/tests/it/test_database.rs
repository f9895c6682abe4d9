use std::{env, process::Command, time::Duration};

use sqlx::{
    Connection, PgConnection, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};
use testkit::{TestDatabase, postgres::Server};
use tokio::time::{sleep, timeout};

fn one_table() -> Migrator {
    let sql = "CREATE TABLE things (id bigint PRIMARY KEY); GRANT SELECT ON things TO order_service;".into_sql_str();
    Migrator::with_migrations(vec![Migration::new(1, "things".into(), MigrationType::Simple, sql, false)])
}

async fn exists(name: &str) -> bool {
    let server = Server::parse(&env::var("POSTGRES_URL").unwrap()).unwrap();
    let mut connection = server.connect().await.unwrap();
    let sql = "-- test: does the database exist?\nSELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)";
    sqlx::query_scalar(sql).bind(name).fetch_one(&mut connection).await.unwrap()
}

#[tokio::test]
async fn a_database_is_created_migrated_and_dropped() {
    let database = TestDatabase::create("orders_owner", &[&one_table()]).await;
    let name = database.name().to_owned();
    let pool = database.pool().await;
    let owner: String = sqlx::query_scalar("SELECT tableowner FROM pg_tables WHERE tablename = 'things'")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(owner, "orders_owner");

    let mut service = PgConnection::connect(&database.url_as("order_service")).await.unwrap();
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM things").fetch_one(&mut service).await.unwrap();
    assert_eq!(count, 0);

    assert!(exists(&name).await);
    drop(database); // though the connections above are open
    let dropped = async {
        while exists(&name).await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(20), dropped).await.expect("it is dropped");
}

#[tokio::test]
async fn the_database_of_a_failed_test_is_kept() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    let name = database.name().to_owned();
    let test = tokio::spawn(async move {
        let _database = database;
        panic!("as a failing test does");
    });
    test.await.unwrap_err();
    assert!(exists(&name).await);

    let server = Server::parse(&env::var("POSTGRES_URL").unwrap()).unwrap();
    let mut statement = sqlx::QueryBuilder::new("-- test: drop what was kept\nDROP DATABASE ");
    statement.push(&name);
    statement.build().execute(&mut server.connect().await.unwrap()).await.unwrap();
}

/// Runs a test from above in a process without a server.
#[test]
fn without_a_server_the_tests_end_with_one_line() {
    for url in ["", "postgres://postgres:postgres@127.0.0.1:1/postgres"] {
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", "test_database::a_database_is_created_migrated_and_dropped"])
            .env("POSTGRES_URL", url)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.starts_with("these tests need PostgreSQL: run `make test`"), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
