//! The operator's command line, and dead events to operate on.

use std::{process::Output, time::Duration};

use serde_json::Value;
use sqlx::postgres::PgListener;
use tokio::{process::Command, time::timeout};
use uuid::Uuid;

use crate::{
    outbox::{NewEvent, Outbox},
    wait::AMPLE,
};

/// Runs the binary, with only the database and the operator's name in its environment.
pub(crate) struct Operator {
    url: String,
}

impl Operator {
    pub(crate) fn of(outbox: &Outbox) -> Self {
        Self::at(&outbox.relay_url())
    }

    pub(crate) fn at(url: &str) -> Self {
        Self { url: url.to_owned() }
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
        command.args(arguments).env_clear().env("RELAY_DATABASE_URL", &self.url).env("USER", "ann").kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        timeout(AMPLE, self.command(arguments).output()).await.expect("the command ends").unwrap()
    }

    /// The output of a command that succeeds, without a log.
    pub(crate) async fn does(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        assert_eq!((output.status.code(), without_progress(&output).as_str()), (Some(0), ""), "{arguments:?}");
        text(&output.stdout)
    }

    pub(crate) async fn reads(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.does(arguments).await).unwrap()
    }

    /// The single line on stderr of a command that is refused.
    pub(crate) async fn is_refused(&self, arguments: &[&str]) -> String {
        self.ends_with(1, arguments).await
    }

    /// The same, for a command with invalid arguments.
    pub(crate) async fn is_misused(&self, arguments: &[&str]) -> String {
        self.ends_with(2, arguments).await
    }

    async fn ends_with(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        let line = without_progress(&output);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(code), ""), "{arguments:?}: {line}");
        assert_eq!(line.lines().count(), 1, "{arguments:?}: {line}");
        assert!(line.starts_with("error: "), "{line}");
        line
    }
}

/// What is on stderr. A change of many events that takes longer than a second tells its progress there first.
fn without_progress(output: &Output) -> String {
    let is_progress = |line: &&str| line.starts_with("requeued ") && line.contains(" of ");
    text(&output.stderr).lines().skip_while(is_progress).collect::<Vec<_>>().join("\n")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Marks the event dead as a relay does, after 10 attempts.
pub(crate) async fn mark_dead(outbox: &Outbox, event_id: Uuid, reason: &str) {
    sqlx::query("UPDATE outbox SET attempts = 10, last_error = $2, visible_at = 'infinity' WHERE event_id = $1")
        .bind(event_id)
        .bind(reason)
        .execute(&outbox.pool)
        .await
        .unwrap();
}

/// A dead event without successors.
pub(crate) async fn insert_dead(outbox: &Outbox) -> Uuid {
    // Hidden from the start. A running relay would deliver it otherwise.
    let event_id = outbox.insert_hidden(None, Duration::from_secs(600)).await;
    mark_dead(outbox, event_id, "UNDECODABLE: no such type").await;
    event_id
}

/// Dead events of different aggregates.
pub(crate) async fn insert_many_dead(outbox: &Outbox, events: i64) {
    sqlx::query(
        "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, attempts, last_error, visible_at)
        SELECT gen_random_uuid(), 1, lpad(to_hex(n), 32, '0')::uuid, 'test.v1.Happened', '', 10, 'BUSY: later', 'infinity'
        FROM generate_series(1, $1) AS n",
    )
    .bind(events)
    .execute(&outbox.pool)
    .await
    .unwrap();
}

/// Marks all visible events dead.
pub(crate) async fn kill_requeued(outbox: &Outbox) {
    sqlx::query("UPDATE outbox SET visible_at = 'infinity', last_error = 'BUSY: later' WHERE visible_at <= now()")
        .execute(&outbox.pool)
        .await
        .unwrap();
}

pub(crate) async fn count_dead(outbox: &Outbox) -> i64 {
    let dead = "SELECT count(*) FROM outbox WHERE visible_at = 'infinity'";
    sqlx::query_scalar::<_, i64>(dead).fetch_one(&outbox.pool).await.unwrap()
}

/// A dead event and two successors: one visible, one parked for five minutes.
pub(crate) async fn insert_dead_with_successors(outbox: &Outbox) -> [NewEvent; 3] {
    let aggregate_id = Uuid::new_v4();
    let line = [1, 2, 3].map(|sequence| NewEvent::of(aggregate_id, sequence));
    outbox.insert(&line).await;
    mark_dead(outbox, line[0].event_id, "UNDECODABLE: no such type").await;
    sqlx::query("UPDATE outbox SET visible_at = now() + interval '5 min' WHERE event_id = $1")
        .bind(line[2].event_id)
        .execute(&outbox.pool)
        .await
        .unwrap();
    line
}

pub(crate) async fn make_older(outbox: &Outbox, event_id: Uuid, hours: i32) {
    sqlx::query("UPDATE outbox SET created_at = created_at - make_interval(hours => $2) WHERE event_id = $1")
        .bind(event_id)
        .bind(hours)
        .execute(&outbox.pool)
        .await
        .unwrap();
}

pub(crate) async fn attempts_before_requeue(outbox: &Outbox, event_id: Uuid) -> i32 {
    sqlx::query_scalar::<_, i32>("SELECT attempts_before_requeue FROM outbox WHERE event_id = $1")
        .bind(event_id)
        .fetch_one(&outbox.pool)
        .await
        .unwrap()
}

pub(crate) async fn count_discarded(outbox: &Outbox) -> i64 {
    sqlx::query_scalar::<_, i64>("SELECT count(*) FROM outbox_discarded").fetch_one(&outbox.pool).await.unwrap()
}

/// Receives the notifications that relays receive.
pub(crate) struct Listening(PgListener);

impl Listening {
    pub(crate) async fn to(outbox: &Outbox) -> Self {
        let mut listener = PgListener::connect_with(&outbox.pool).await.unwrap();
        listener.listen("outbox").await.unwrap();
        Self(listener)
    }

    pub(crate) async fn hears(&mut self) {
        timeout(AMPLE, self.0.recv()).await.expect("relays are notified").unwrap();
    }
}
