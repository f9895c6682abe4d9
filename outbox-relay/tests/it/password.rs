//! A password that is in a file.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use testkit::{OwnServer, Scratch};

use crate::{
    binary::Binary,
    outbox::Outbox,
    receiver::{Receiver, Reply},
    wait::until,
};

/// Replaces a file at once. `mode` says who may read it.
fn write(file: &Path, text: &str, mode: u32) {
    let new = file.with_extension("new");
    let mut opened = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new).unwrap();
    opened.write_all(text.as_bytes()).unwrap();
    fs::rename(new, file).unwrap();
}

#[tokio::test]
async fn a_relay_waits_for_its_password_and_takes_up_a_new_one() {
    let Some(server) = OwnServer::start().await else { return };
    let (scratch, outbox) = (Scratch::new(), Outbox::create_at(&server).await);
    let (receiver, file) = (Receiver::start(Reply::apply).await, scratch.join("password"));
    server.execute("ALTER ROLE outbox_relay PASSWORD 'first-secret'").await;
    let mut relay = Binary::start(&outbox, &receiver, &["--database-password-file", file.to_str().unwrap()]);
    let log = relay.log_file();
    let logs = async |text: &str| until(text, async || fs::read_to_string(&log).unwrap().contains(text)).await;
    logs(&format!("cannot read the password file {}", file.display())).await;
    write(&file, "", 0o600);
    logs(&format!("the password file {} is empty", file.display())).await;
    write(&file, "first-secret", 0o644);
    logs(&format!("everybody may read the password file {}", file.display())).await;
    write(&file, "first-secret\n", 0o600);
    outbox.insert_unrelated(3).await;
    until("the events are delivered", async || outbox.rows().await.is_empty()).await;

    server.execute("ALTER ROLE outbox_relay PASSWORD 'second-secret'").await;
    server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'outbox_relay'").await;
    logs("password authentication failed").await;
    outbox.insert_unrelated(3).await;
    write(&file, "second-secret\n", 0o600);
    until("the events are delivered", async || outbox.rows().await.is_empty()).await;
    assert!(relay.process.is_running());
    let said = fs::read_to_string(&log).unwrap() + &relay.metrics().await;
    assert!(!said.contains("first-secret") && !said.contains("second-secret"), "{said}");
}
