use chassis::{DatabaseUrl, MigrateArguments, RunError, SchemaError};
use order_service::MIGRATORS;
use testkit::TestDatabase;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::service::{LIMIT, ONE_ORDER, Service, order, settings, sockets};

async fn migrate(database: &TestDatabase) {
    let url: DatabaseUrl = database.url_as("orders_owner").parse().unwrap();
    chassis::migrate(&url, &MIGRATORS, &MigrateArguments::default(), &CancellationToken::new()).await.unwrap();
}

async fn serves(database: TestDatabase) {
    let service = Service::start_on(database, &[]).await;
    service.place(order()).await;
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

/// Why the service refuses to serve this database.
async fn refused(database: &TestDatabase) -> RunError {
    let run = order_service::run(sockets().await, settings(database, &[]), CancellationToken::new());
    timeout(LIMIT, run).await.expect("an end").unwrap_err()
}

#[tokio::test]
async fn migrating_twice_is_migrating_once() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    migrate(&database).await;
    migrate(&database).await;
    serves(database).await;
}

#[tokio::test]
async fn two_may_migrate_at_once() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    tokio::join!(migrate(&database), migrate(&database));
    serves(database).await;
}

#[tokio::test]
async fn a_database_that_was_never_migrated_is_refused_and_the_error_names_the_command() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    let error = refused(&database).await;
    assert!(matches!(error, RunError::Schema(SchemaError::Missing(_))), "{error:?}");
    assert!(error.to_string().contains("run the `migrate` command"), "{error}");
}

#[tokio::test]
async fn an_incomplete_migration_is_refused_and_the_error_names_the_command() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS[..1]).await;
    let error = refused(&database).await;
    assert!(error.to_string().contains("run the `migrate` command"), "{error}");
}

#[tokio::test]
async fn a_changed_migration_is_refused() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let pool = database.pool().await;
    sqlx::raw_sql("UPDATE _orders_migrations SET checksum = 'other'").execute(&pool).await.unwrap();
    let error = refused(&database).await;
    assert!(matches!(error, RunError::Schema(SchemaError::Different(_))), "{error:?}");
}

#[tokio::test]
async fn a_database_with_newer_migrations_is_served() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let pool = database.pool().await;
    sqlx::raw_sql(
        "INSERT INTO _orders_migrations (version, description, success, checksum, execution_time)
        VALUES (9999, 'of the next version', true, 'any', 0)",
    )
    .execute(&pool)
    .await
    .unwrap();
    serves(database).await;
}
