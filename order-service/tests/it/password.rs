//! A password that is in a file.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use chassis::DatabaseUrl;
use order_service::MIGRATORS;
use testkit::{OwnServer, Scratch, TestDatabase};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::service::{Service, eventually, order, refusal, settings};

const END_SESSIONS: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'order_service'";

/// Replaces a file at once, and lets nobody else read it.
fn write(file: &Path, text: &str) {
    let new = file.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).unwrap();
    opened.write_all(text.as_bytes()).unwrap();
    fs::rename(new, file).unwrap();
}

#[tokio::test]
async fn a_new_password_needs_no_restart() {
    let Some(server) = OwnServer::start().await else { return };
    let (scratch, database) = (Scratch::new(), server.database("orders_owner", &MIGRATORS).await);
    let file = scratch.join("password");
    server.execute("ALTER ROLE order_service PASSWORD 'the first'").await;
    write(&file, "the first\n");
    let service = Service::start_on(database, &["--database-password-file", file.to_str().unwrap()]).await;
    service.place(order()).await;

    server.execute("ALTER ROLE order_service PASSWORD 'the second'").await;
    server.execute(END_SESSIONS).await;
    service.becomes(ServingStatus::NotServing).await;
    for _ in 0..5 {
        refusal(service.orders().create_order(order()).await).asks_to_retry();
    }
    write(&file, "the second\n");
    eventually("orders are placed again", async || service.orders().create_order(order()).await.is_ok()).await;
    service.becomes(ServingStatus::Serving).await;
    service.end().await;
}

#[tokio::test]
async fn a_file_without_a_password_is_refused_by_name_and_read_again() {
    let (scratch, database) = (Scratch::new(), TestDatabase::create("orders_owner", &[]).await);
    let file = scratch.join("password");
    let settings = settings(&database, &["--database-password-file", file.to_str().unwrap()]);
    let url: DatabaseUrl = settings.database_url.with_password_file(&settings.database.password_file);
    let refused = async |says: &str| {
        let error = url.connect().await.unwrap_err();
        let shown = format!("{error} {error:?} {url:?}");
        assert!(shown.contains(file.to_str().unwrap()) && shown.contains(says), "{shown}");
        assert!(!shown.contains("a secret"), "{shown}");
    };
    refused("No such file").await;
    write(&file, "");
    refused("is empty").await;
    write(&file, "a secret\nand more");
    refused("one line").await;
    write(&file, "a secret");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    refused("everybody may read").await;

    write(&file, "a secret");
    let error = url.connect().await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("28P01"), "the URL's password is not used");
    assert!(!format!("{error} {error:?}").contains("a secret"), "{error:?}");
    // The password of the role, for a group too.
    write(&file, "order_service");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    url.connect().await.unwrap();
}
