//! What an operator does to an outbox: a file per deed, with its SQL. The command line does it straight on the database,
//! so that it works when nothing is up; `grpc.rs` does the same for programs. Both answer in the words of the contract.

mod command_line;
mod decode;
mod discard;
mod list_dead;
mod pause;
mod print;
mod refuse;
mod requeue;
mod show_dead;
mod status;

use std::ops::RangeInclusive;

use sqlx::{Connection, PgConnection, Postgres, Transaction};
use uuid::Uuid;

pub use command_line::{Command, CommandError, run};
pub use decode::{Descriptors, DescriptorsError};
pub use requeue::MaxAge;

pub(crate) use discard::discard;
pub(crate) use list_dead::{Page, list_dead};
pub(crate) use pause::{pause, resume};
pub(crate) use refuse::{OperateError, Reason};
pub(crate) use requeue::{Which, requeue};
pub(crate) use show_dead::show_dead;
pub(crate) use status::{SAMPLE, read_status, read_totals};

/// Where an event stands, or stood, in the sequence of its aggregate.
#[derive(Clone, Copy, Debug)]
struct Place {
    aggregate_id: Uuid,
    sequence: i32,
}

/// Begins a transaction whose commit is durable. That of the relay's role is not, since losing a lease only delivers an
/// event again; but what an operator was told is done has to stay done.
async fn begin_durable(connection: &mut PgConnection) -> Result<Transaction<'_, Postgres>, sqlx::Error> {
    let mut tx = connection.begin().await?;
    sqlx::query!(
        "-- operate: commit durably
        SET LOCAL synchronous_commit = on"
    )
    .execute(&mut *tx)
    .await?;
    Ok(tx)
}

/// Makes visible what waits for nothing but the events at these places, which are about to go, or gone; returns how many
/// those are.
///
/// Rows that are visible already are written too. A relay parks successors of an event that is dead in *its* snapshot;
/// one it parks at this moment is waited for here, and one it is about to park is not where its snapshot says any more,
/// so that it leaves it alone. Were visible rows passed over, such a row would stay hidden for minutes.
async fn free_successors(connection: &mut PgConnection, places: &[Place]) -> Result<u64, sqlx::Error> {
    let aggregate_ids: Vec<_> = places.iter().map(|place| place.aggregate_id).collect();
    let sequences: Vec<_> = places.iter().map(|place| place.sequence).collect();
    let freed = sqlx::query!(
        "-- operate: free successors
        UPDATE outbox
        SET visible_at = now()
        FROM unnest($1::uuid[], $2::integer[]) AS freeing (aggregate_id, sequence)
        WHERE outbox.aggregate_id = freeing.aggregate_id
          AND outbox.sequence > freeing.sequence
          AND lease_token IS NULL
          AND visible_at < 'infinity'",
        &aggregate_ids,
        &sequences,
    )
    .execute(connection)
    .await?;
    Ok(freed.rows_affected())
}

/// To be called after the commit. A successor that was committed after [`free_successors`] had looked can have been parked
/// by a relay that did not see this commit yet. Whoever parks from now on sees it, and what was parked before is freed
/// here. If this fails the row comes back by itself, within minutes, so it is none of the operator's.
async fn free_late_successors(connection: &mut PgConnection, places: &[Place]) {
    if let Err(cause) = free_successors(connection, places).await {
        tracing::warn!(%cause, "an event that was enqueued at this moment may wait for some minutes");
    }
}

/// To be called after the commit. A relay that is not told looks by itself within its poll interval, so a failure here is
/// none of the operator's.
async fn wake_relays(connection: &mut PgConnection) {
    if let Err(cause) = outbox::notify(connection, outbox::CHANNEL).await {
        tracing::warn!(%cause, "relays not notified; they poll meanwhile");
    }
}

/// Characters of a name: of who does something, or of an event type.
pub(crate) const NAME_CHARS: RangeInclusive<usize> = 1..=200;
/// Characters of a reason.
pub(crate) const REASON_CHARS: RangeInclusive<usize> = 1..=1000;

/// Text that a person wrote and others will read, without the blanks round it. Control characters are refused: Postgres
/// cannot hold all of them, and terminals obey them.
///
/// # Errors
/// What it must be, as the rest of a sentence that begins with its name.
pub(crate) fn check_text(text: &str, chars: RangeInclusive<usize>) -> Result<String, String> {
    let text = text.trim();
    if !chars.contains(&text.chars().count()) || text.chars().any(char::is_control) {
        let (least, most) = chars.into_inner();
        return Err(format!("must be {least} to {most} characters, none of them control characters"));
    }
    Ok(text.to_owned())
}

fn count(rows: u64) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}
