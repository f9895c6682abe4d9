//! A pooler that shares sessions before the relay's database.

use std::{env, time::Duration};

use testkit::{pgbouncer, pgbouncer::PgBouncer, postgres::Server};

use crate::{
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::until,
};

/// `None`, and a line that says why, if there is no PgBouncer that carries prepared statements.
async fn pooler() -> Option<PgBouncer> {
    let Some(program) = pgbouncer::find(|version| version >= (1, 21)) else {
        eprintln!("skipped: there is no PgBouncer 1.21 (.ci/install-pgbouncer builds one for $PGBOUNCER)");
        return None;
    };
    let server = Server::parse(&env::var("POSTGRES_URL").unwrap()).unwrap();
    Some(PgBouncer::start(&program, &server, "transaction").await.unwrap())
}

/// Sessions that listen, and advisory locks that are held.
async fn owned_sessions(outbox: &Outbox) -> (i64, i64) {
    let count = "SELECT (SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND query LIKE 'LISTEN%'),
        (SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
            WHERE datname = current_database() AND locktype = 'advisory')";
    sqlx::query_as(count).fetch_one(&outbox.pool).await.unwrap()
}

#[tokio::test]
async fn it_polls_often_and_leaves_nothing_in_sessions_of_others() {
    let Some(pooler) = pooler().await else { return };
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let url = pooler.url_for("outbox_relay", outbox.database.name());
    let relay = Relay::start_on(&url, receiver.address, &["--poll-ms", "60000"]).await;
    let mut event_ids = Vec::new();
    for _ in 0..20 {
        event_ids.push(outbox.insert_one().await);
        outbox.notify().await;
        outbox.wait_until_empty_within(Duration::from_secs(5)).await;
        assert_eq!(owned_sessions(&outbox).await, (0, 0));
    }
    assert_eq!(pooler.listened_channels("outbox_relay", outbox.database.name()).await, 0);
    relay.stop().await;
    assert_eq!(receiver.read(Log::ids), event_ids);
}

#[tokio::test]
async fn it_listens_to_the_database_itself_and_shows_there_that_it_lives_if_told_where_it_is() {
    let Some(pooler) = pooler().await else { return };
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let url = pooler.url_for("outbox_relay", outbox.database.name());
    let flags = ["--poll-ms", "60000", "--listen-database-url", &outbox.relay_url()];
    let relay = Relay::start_on(&url, receiver.address, &flags).await;
    until("it listens, and holds its lock", async || owned_sessions(&outbox).await == (1, 1)).await;
    outbox.insert_one().await;
    outbox.notify().await;
    outbox.wait_until_empty_within(Duration::from_secs(5)).await;
    relay.stop().await;
}
