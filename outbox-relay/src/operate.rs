//! The operator's commands: a file for each, with its SQL. The command line runs them directly on the database, so it
//! works while no relay is up. `grpc.rs` offers the same to programs. Both answer with the messages of the contract.

mod arguments;
mod blast_radius;
mod bundle;
mod command_line;
mod decode;
mod deeds;
mod discard;
mod doctor;
mod journey;
mod list_dead;
mod pause;
mod print;
mod progress;
mod refuse;
mod requeue;
mod restore;
mod show_dead;
mod slow_down;
mod status;
mod subscribe;
mod undo;
mod walk;

use std::ops::RangeInclusive;

use outbox::{AggregateId, EventId};
use sqlx::{Connection, PgConnection, Postgres, Transaction};

pub use arguments::{Command, Outbox};
pub use command_line::{CommandError, run};
pub use decode::{Descriptors, DescriptorsError};

pub(crate) use decode::{answer, question};

pub(crate) use blast_radius::{group_dead, measure_blast};
pub(crate) use deeds::{Author, DeedPage, list_deeds};
pub(crate) use discard::{Discard, discard};
pub(crate) use doctor::{diagnose, read_all};
pub(crate) use journey::{ask_receivers, read_facts};
pub(crate) use list_dead::{Page, list_dead};
pub(crate) use pause::{pause, resume};
pub(crate) use refuse::{OperateError, Reason};
pub(crate) use requeue::requeue;
pub(crate) use restore::restore;
pub(crate) use show_dead::show_dead;
pub(crate) use slow_down::{RELAYS_KNOW_POLL, SetPace, SlowDown, relays_know, resume_slowly, set_pace};
pub(crate) use status::{SAMPLE, read_backlogs, read_status, read_totals};
pub(crate) use subscribe::{discard_ended, discard_piece, find_subscription, subscribe, unsubscribe};
pub(crate) use undo::{Undo, undo_piece};
pub(crate) use walk::{Change, PIECE, Walk, walk_piece};

/// Which dead or failing events a command is about. Without a field, all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) event_type: Option<String>,
    /// The name of a subscription.
    pub(crate) subscription: Option<String>,
    /// What precedes the first colon of the last reason.
    pub(crate) code: Option<String>,
}

impl Filter {
    /// A name for the list of these events, for page tokens.
    fn name(&self) -> String {
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        // None of them contains a tab.
        format!("{}\t{}\t{}", text(&self.event_type), text(&self.subscription), text(&self.code))
    }

    /// What the events have in common, for people, after a word for them. The subscription is told elsewhere.
    fn describe(&self) -> String {
        let of_type = self.event_type.as_deref().map(|event_type| format!(" of type {event_type}"));
        let with_code = self.code.as_deref().map(|code| format!(" with {code}"));
        of_type.unwrap_or_default() + &with_code.unwrap_or_default()
    }
}

/// Events that an operator has named, for people.
fn describe_named(event_ids: &[EventId]) -> String {
    match event_ids {
        [event_id] => format!("event {event_id}"),
        _ => format!("{} events by id", event_ids.len()),
    }
}

/// What a deed has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(crate) events: i64,
    /// Later events of their aggregates that are visible now.
    pub(crate) freed: i64,
}

/// The position of an event in the sequence of its aggregate, in a subscription.
#[derive(Clone, Copy, Debug)]
struct Position {
    subscription_id: i16,
    aggregate_id: AggregateId,
    sequence: i32,
}

/// Positions whose successors one statement frees. For each row it looks through the positions, so its time grows with
/// the square of their number.
const POSITIONS_MAX: usize = 500;

/// Begins a transaction whose commit is durable. By default the commits of the relay's role are not, since a lost lease
/// only causes another delivery. But a change that was reported to an operator must survive a crash.
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

/// Makes the later events visible that wait only for the events at these positions. Those are gone, or about to be
/// delivered. Returns the number of rows.
///
/// It also writes rows that are already visible. A relay parks the successors of an event that is dead in *its*
/// snapshot. If it is parking a row now, this statement waits for it. If it is about to, the row is no longer at the
/// `ctid` in its snapshot, so it leaves the row alone. Without the write, such a row would stay hidden for minutes.
///
/// The conditions are written so that only the primary key can find the rows. As a join, or by an index on
/// `visible_at`, a plan that was made over a small outbox would read all of a large one.
async fn free_successors(connection: &mut PgConnection, positions: &[Position]) -> Result<u64, sqlx::Error> {
    let mut freed = 0;
    let mut positions = positions.to_vec();
    positions.sort_unstable_by_key(|position| (position.subscription_id, position.aggregate_id, position.sequence));
    let same_subscription = positions.chunk_by(|one, next| one.subscription_id == next.subscription_id);
    for positions in same_subscription.flat_map(|positions| positions.chunks(POSITIONS_MAX)) {
        let subscription_id = positions[0].subscription_id;
        let aggregate_ids: Vec<_> = positions.iter().map(|position| position.aggregate_id).collect();
        let sequences: Vec<_> = positions.iter().map(|position| position.sequence).collect();
        let chunk = sqlx::query!(
            "-- operate: free successors
            UPDATE outbox
            SET visible_at = now()
            WHERE aggregate_id = ANY ($1)
              AND subscription_id = $3
              AND sequence > ($2::integer[])[array_position($1, aggregate_id)]
              AND lease_token IS NULL
              AND visible_at <> 'infinity'",
            &aggregate_ids as &[AggregateId],
            &sequences,
            subscription_id,
        );
        freed += chunk.execute(&mut *connection).await?.rows_affected();
    }
    Ok(freed)
}

/// Call this after the commit. A successor may have been committed after [`free_successors`] ran, and been parked by a
/// relay that did not see this commit yet. Relays that park from now on see it, and rows that were parked before are
/// freed here. On a failure such a row becomes visible by itself within minutes, so the operator gets no error.
async fn free_late_successors(connection: &mut PgConnection, positions: &[Position]) {
    if let Err(cause) = free_successors(connection, positions).await {
        tracing::warn!(%cause, "a later event that was enqueued just now may wait for some minutes");
    }
}

/// Call this after the commit of a change that has freed the successors of events at these positions.
async fn tell_of_change(connection: &mut PgConnection, positions: &[Position]) {
    free_late_successors(connection, positions).await;
    wake_relays(connection).await;
}

/// Call this after the commit. Without a notification relays poll within their interval, so the operator gets no error.
async fn wake_relays(connection: &mut PgConnection) {
    if let Err(cause) = outbox::notify(connection, outbox::CHANNEL).await {
        tracing::warn!(%cause, "cannot notify relays; they will poll");
    }
}

/// Characters of a name: of a person, or of an event type.
pub(crate) const NAME_CHARS: RangeInclusive<usize> = 1..=200;
/// Characters of a reason.
pub(crate) const REASON_CHARS: RangeInclusive<usize> = 1..=1000;
/// Characters of a reason that may be left out.
pub(crate) const OPTIONAL_REASON_CHARS: RangeInclusive<usize> = 0..=1000;

/// Trims and checks text from a person. Control characters are refused: Postgres cannot store all of them, and
/// terminals interpret them.
///
/// # Errors
/// The rule for this text, as the rest of a sentence that begins with the name of its field.
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
