//! The operator's commands, straight on the database.

use std::{
    collections::{BTreeSet, VecDeque},
    io::{self, IsTerminal, Write},
    time::Duration,
};

use chassis::DatabaseUrl;
use clap::{Args, Subcommand};
use proto::relay::v1::{OutboxStatus, dead_event_content::Payload};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::{
    Descriptors, MaxAge, NAME_CHARS, OperateError, Page, REASON_CHARS, SAMPLE, Which, check_text, decode::answer,
    discard, list_dead, list_dead::count_dead, pause, print, read_status, read_totals, refuse::describe, requeue,
    resume, show_dead,
};

/// How long making the connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long the server works on one statement: longer than it does for a relay, since counting a million rows takes a
/// while on a busy server.
const STATEMENT_LIMIT: &str = "30s";
/// How long an answer is waited for, of a server or network that does not keep the limit above.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Readings that a watcher's rates are taken over, a second each.
const WATCHED_READINGS: usize = 10;

/// What an operator can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what is in the outbox, how fast it comes and goes, and who relays it
    ///
    /// in and out are events enqueued, and events delivered or discarded, per second. They come from the statistics of the
    /// database server, to which its sessions add about once a second each: over the second that `status` takes they jump;
    /// --watch takes them over the last ten. Enqueuings that were rolled back are among them.
    #[command(after_long_help = "Every event is one of:
  waiting      may be taken now, or waits for an earlier event of its aggregate
  leased       is being delivered
  backing off  failed, and is tried again later
  dead         is not tried again until you requeue it

Examples:
  outbox-relay status
  outbox-relay status --watch
  outbox-relay status --json | jq .dead")]
    Status(StatusArguments),
    /// List, show, requeue or discard dead events
    #[command(subcommand)]
    Dead(DeadCommand),
    /// Have all relays of this outbox lease nothing more, until `resume`
    ///
    /// What is leased is still delivered. The pause is a row in the database: it outlives every process, and holds for
    /// relays that start later. Services go on enqueuing.
    #[command(after_long_help = "Example:
  outbox-relay pause --reason 'inventory is being moved'")]
    Pause(PauseArguments),
    /// End the pause
    Resume(Outbox),
}

/// The outbox to work on.
#[derive(Args, Debug)]
pub struct Outbox {
    /// The database with the outbox, as the role outbox_relay: postgres://user:password@host:5432/database.
    #[arg(long, env = "RELAY_DATABASE_URL", hide_env_values = true)]
    database_url: DatabaseUrl,
}

/// Arguments of `status`.
#[derive(Args, Debug)]
pub struct StatusArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Print JSON: the fields of relay.v1.OutboxStatus.
    #[arg(long)]
    json: bool,
    /// Again every second, until Ctrl-C; with --json, a line each.
    #[arg(long)]
    watch: bool,
}

/// What can be done with dead events.
#[derive(Debug, Subcommand)]
pub enum DeadCommand {
    /// List dead events, newest first
    ///
    /// By the time they were enqueued. "holds back" counts the later events of the same aggregate, which wait.
    #[command(after_long_help = "Examples:
  outbox-relay dead list
  outbox-relay dead list --type orders.v1.OrderCreated --limit 500
  outbox-relay dead list --json | jq -r '.dead_events[].event_id'")]
    List(ListArguments),
    /// Show one dead event with all it carries
    ///
    /// The payload is decoded by its type, where a descriptor of that is known: those of orders and inventory are built in,
    /// for others name a file. What cannot be decoded is shown as it is.
    #[command(after_long_help = "Examples:
  outbox-relay dead show 0192f0c1-2345-7abc-8def-0123456789ab
  buf build -o ours.binpb && outbox-relay dead show --descriptors ours.binpb 0192f0c1-2345-7abc-8def-0123456789ab
  outbox-relay dead show --json 0192f0c1-2345-7abc-8def-0123456789ab | jq .payload")]
    Show(ShowArguments),
    /// Have dead events delivered again, and let go what they held back
    ///
    /// They keep their ids, so a receiver that had one after all drops it, and their attempts and reasons, as history: they
    /// have all attempts before them again. Named events are requeued all, or, if one cannot be, none. Events older than
    /// --max-age-hours stay dead: their receivers may not remember whether they had them.
    #[command(after_long_help = "Examples:
  outbox-relay dead requeue 0192f0c1-2345-7abc-8def-0123456789ab
  outbox-relay dead requeue --all --type orders.v1.OrderCreated
  outbox-relay dead requeue --all --yes")]
    Requeue(RequeueArguments),
    /// Give a dead event up, and let go what it held back
    ///
    /// It is moved to the table outbox_discarded, whole, with who did it, when and why.
    #[command(after_long_help = "Example:
  outbox-relay dead discard 0192f0c1-2345-7abc-8def-0123456789ab --reason 'test order of the pilot'")]
    Discard(DiscardArguments),
}

/// Arguments of `dead list`.
#[derive(Args, Debug)]
pub struct ListArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Events to show at most.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    limit: u16,
    /// Only events of this type: a full protobuf name, such as orders.v1.OrderCreated.
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_name)]
    event_type: Option<String>,
    /// Print JSON: the events and their number on all pages, as in relay.v1.ListDeadEventsResponse.
    #[arg(long)]
    json: bool,
}

/// Arguments of `dead show`.
#[derive(Args, Debug)]
pub struct ShowArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// The event.
    event_id: String,
    /// Descriptors of your own events: an encoded FileDescriptorSet with all imports.
    #[arg(long, env = "RELAY_DESCRIPTORS", value_name = "FILE")]
    descriptors: Option<Descriptors>,
    /// Print JSON: the fields of relay.v1.DeadEventContent, with the payload as `payload`.
    #[arg(long)]
    json: bool,
}

/// Arguments of `dead requeue`.
#[derive(Args, Debug)]
pub struct RequeueArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// The events.
    #[arg(value_name = "EVENT_ID", required_unless_present = "all", conflicts_with = "all")]
    event_ids: Vec<String>,
    /// All dead events instead: asks first, on a terminal.
    #[arg(long)]
    all: bool,
    /// With --all, only events of this type.
    #[arg(long = "type", value_name = "TYPE", conflicts_with = "event_ids", value_parser = parse_name)]
    event_type: Option<String>,
    /// With --all, do not ask.
    #[arg(long, conflicts_with = "event_ids")]
    yes: bool,
    #[command(flatten)]
    max_age: MaxAge,
}

/// Arguments of `dead discard`.
#[derive(Args, Debug)]
pub struct DiscardArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// The event.
    event_id: String,
    /// Why, for those who look for it later.
    #[arg(long, value_parser = parse_reason)]
    reason: String,
    /// Who does it.
    #[arg(long, env = "USER", value_parser = parse_name)]
    by: String,
}

/// Arguments of `pause`.
#[derive(Args, Debug)]
pub struct PauseArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Why, for those who wonder.
    #[arg(long, value_parser = parse_reason)]
    reason: String,
    /// Who does it.
    #[arg(long, env = "USER", value_parser = parse_name)]
    by: String,
}

fn parse_name(text: &str) -> Result<String, String> {
    check_text(text, NAME_CHARS)
}

fn parse_reason(text: &str) -> Result<String, String> {
    check_text(text, REASON_CHARS)
}

/// Why a command failed: a line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No connection was made.
    #[error("cannot connect to {database}: {why}; is it up, and does --database-url or RELAY_DATABASE_URL name it?")]
    Connect {
        /// Where to.
        database: String,
        /// Why not.
        why: String,
    },
    /// What was asked for does not apply, or was not confirmed; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// The database.
    #[error("{}", explain(.0))]
    Database(sqlx::Error),
    /// The database was asked and has not answered.
    #[error(
        "the database has not answered for {ANSWER_LIMIT:?}: it may or may not have done it; look before you repeat it"
    )]
    NoAnswer,
    /// Reading or writing what an operator types or sees.
    #[error("cannot use the terminal: {0}")]
    Terminal(#[from] io::Error),
    /// An answer that has no JSON.
    #[error("cannot show this as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<sqlx::Error> for CommandError {
    fn from(cause: sqlx::Error) -> Self {
        Self::Database(cause)
    }
}

impl From<OperateError> for CommandError {
    fn from(error: OperateError) -> Self {
        match error {
            OperateError::Database(cause) => Self::Database(cause),
            refused @ (OperateError::NotApplicable(_) | OperateError::AlreadyPaused(_) | OperateError::NotPaused) => {
                Self::Refused(refused.to_string())
            }
        }
    }
}

fn explain(cause: &sqlx::Error) -> String {
    let code = cause.as_database_error().and_then(sqlx::error::DatabaseError::code);
    match code.as_deref() {
        // No such table, no such column.
        Some("42P01" | "42703") => format!(
            "the database has no outbox of this version: run the `migrate` command of the service that owns it ({cause})"
        ),
        // Not allowed.
        Some("42501") => format!("this role may not: connect as outbox_relay ({cause})"),
        // Cut off by the limit.
        Some("57014") => format!("the database took over {STATEMENT_LIMIT}; nothing was changed ({cause})"),
        _ => format!("the database failed: {cause}"),
    }
}

/// Carries a command out.
///
/// # Errors
/// [`CommandError`], after which nothing was changed unless it says so.
pub async fn run(command: Command) -> Result<(), CommandError> {
    let ended = match command {
        Command::Status(arguments) => show_status(arguments).await,
        Command::Dead(DeadCommand::List(arguments)) => list(arguments).await,
        Command::Dead(DeadCommand::Show(arguments)) => show(arguments).await,
        Command::Dead(DeadCommand::Requeue(arguments)) => requeue_dead(arguments).await,
        Command::Dead(DeadCommand::Discard(arguments)) => discard_dead(arguments).await,
        Command::Pause(arguments) => pause_outbox(arguments).await,
        Command::Resume(outbox) => resume_outbox(outbox).await,
    };
    match ended {
        // Whoever was reading has seen enough: `| head`.
        Err(CommandError::Terminal(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        ended => ended,
    }
}

impl Outbox {
    /// Asks the database over a connection of its own.
    async fn ask<T, E>(&self, work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>) -> Result<T, CommandError>
    where
        CommandError: From<E>,
    {
        let mut connection = self.connect().await?;
        let answer = timeout(ANSWER_LIMIT, work(&mut connection)).await;
        // A courtesy, which the log of the server is tidier for.
        drop(timeout(CONNECT_LIMIT, connection.close()).await);
        Ok(answer.map_err(|_| CommandError::NoAnswer)??)
    }

    async fn connect(&self) -> Result<PgConnection, CommandError> {
        let failed = |why: String| CommandError::Connect { database: self.database_url.to_string(), why };
        let options = self.database_url.options().application_name("outbox-relay operator");
        // As options of the connection they go before those of the role.
        let options = options.options([("statement_timeout", STATEMENT_LIMIT)]);
        match timeout(CONNECT_LIMIT, PgConnection::connect_with(&options)).await {
            Ok(connected) => connected.map_err(|cause| failed(cause.to_string())),
            Err(_) => Err(failed(format!("no answer within {CONNECT_LIMIT:?}"))),
        }
    }
}

async fn show_status(arguments: StatusArguments) -> Result<(), CommandError> {
    let StatusArguments { outbox, json, watch } = arguments;
    let mut readings = VecDeque::from([outbox.ask(read_totals).await?]);
    if !watch {
        sleep(SAMPLE).await;
        let (status, _) = outbox.ask(async |connection| read_status(connection, &readings[0]).await).await?;
        return if json { say_json(&answer(&status)?) } else { say(&print::status(&status)) };
    }
    let shutdown = chassis::shutdown_signal()?;
    while shutdown.run_until_cancelled(sleep(SAMPLE)).await.is_some() {
        // An outage is what one watches for: it is said, and the next second asks again.
        match outbox.ask(async |connection| read_status(connection, &readings[0]).await).await {
            Err(error) => eprintln!("error: {error}"),
            Ok((status, totals)) => {
                readings.push_back(totals);
                if readings.len() > WATCHED_READINGS {
                    readings.pop_front();
                }
                show_again(&status, json)?;
            }
        }
    }
    Ok(())
}

fn show_again(status: &OutboxStatus, json: bool) -> Result<(), CommandError> {
    if json {
        return say(&format!("{}\n", answer(status)?));
    }
    // To the upper left corner, and what was there is erased.
    let redraw = if io::stdout().is_terminal() { "\x1b[H\x1b[J" } else { "\n" };
    let time = status.time.unwrap_or_default();
    say(&format!("{redraw}{time}\n\n{}", print::status(status)))
}

async fn list(arguments: ListArguments) -> Result<(), CommandError> {
    let ListArguments { outbox, limit, event_type, json } = arguments;
    let page = Page { size: limit, before: Uuid::max(), event_type };
    let list = outbox.ask(async |connection| list_dead(connection, &page).await).await?;
    if !json {
        return say(&print::dead_events(&list));
    }
    let mut shown = answer(&list)?;
    if let Some(fields) = shown.as_object_mut() {
        // For callers of RelayAdmin: here it is --limit that shows more.
        fields.remove("next_page_token");
    }
    say_json(&shown)
}

async fn show(arguments: ShowArguments) -> Result<(), CommandError> {
    let ShowArguments { outbox, event_id, descriptors, json } = arguments;
    let event_id = parse_id(&event_id)?;
    let content = outbox.ask(async |connection| show_dead(connection, event_id, descriptors.as_ref()).await).await?;
    let payload: Option<Value> = match &content.payload {
        Some(Payload::PayloadJson(json)) => Some(serde_json::from_str(json)?),
        Some(Payload::Undecodable(_)) | None => None,
    };
    if !json {
        let payload = payload.map(|payload| serde_json::to_string_pretty(&payload)).transpose()?;
        return say(&print::dead_event(&content, payload.as_deref()));
    }
    let mut shown = answer(&content)?;
    if let (Some(fields), Some(payload)) = (shown.as_object_mut(), payload) {
        fields.remove("payload_json");
        fields.insert("payload".into(), payload);
    }
    say_json(&shown)
}

async fn requeue_dead(arguments: RequeueArguments) -> Result<(), CommandError> {
    let RequeueArguments { outbox, event_ids, all, event_type, yes, max_age } = arguments;
    let which = if all { Which::All { event_type } } else { Which::Named(parse_ids(&event_ids)?) };
    if let Which::All { event_type } = &which {
        confirm(&outbox, event_type.as_deref(), yes).await?;
    }
    let done = outbox.ask(async |connection| requeue(connection, &which, max_age).await).await?;
    say(&format!("requeued {}, and freed {} that waited for them\n", events(done.requeued), done.freed))?;
    if done.too_old > 0 {
        let hours = max_age.max_age_hours;
        say(&format!(
            "{} older than {hours} hours (--max-age-hours) stay dead: receivers may not remember whether they had them\n",
            events(done.too_old)
        ))?;
    }
    Ok(())
}

/// Says how many it would be, and has somebody agree to it.
async fn confirm(outbox: &Outbox, event_type: Option<&str>, yes: bool) -> Result<(), CommandError> {
    let dead = outbox.ask(async |connection| count_dead(connection, event_type).await).await?;
    let of_type = event_type.map(|event_type| format!(" of type {event_type}")).unwrap_or_default();
    if dead == 0 {
        return Err(CommandError::Refused(format!("there are no dead events{of_type}")));
    }
    if yes {
        return Ok(());
    }
    let what = format!("requeue {}{of_type}", events(dead));
    if !io::stdin().is_terminal() {
        return Err(CommandError::Refused(format!("this would {what}: say so with --yes")));
    }
    eprint!("{what}? [y/N] ");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    match line.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(CommandError::Refused("nothing was requeued".into())),
    }
}

async fn discard_dead(arguments: DiscardArguments) -> Result<(), CommandError> {
    let DiscardArguments { outbox, event_id, reason, by } = arguments;
    let event_id = parse_id(&event_id)?;
    let done = outbox.ask(async |connection| discard(connection, event_id, &by, &reason).await).await?;
    say(&format!("discarded event {event_id} as {by}, and freed {} that waited for it\n", done.freed))
}

async fn pause_outbox(arguments: PauseArguments) -> Result<(), CommandError> {
    let PauseArguments { outbox, reason, by } = arguments;
    let paused = outbox.ask(async |connection| pause(connection, &by, &reason).await).await?;
    say(&format!("paused {}\n", describe(&paused)))
}

async fn resume_outbox(outbox: Outbox) -> Result<(), CommandError> {
    let ended = outbox.ask(resume).await?;
    say(&format!("resumed; it was paused {}\n", describe(&ended)))
}

fn events(number: i64) -> String {
    if number == 1 { "1 event".into() } else { format!("{number} events") }
}

const AN_ID: &str = "it looks like 0192f0c1-2345-7abc-8def-0123456789ab";

fn parse_id(text: &str) -> Result<Uuid, CommandError> {
    Uuid::try_parse(text).map_err(|_| CommandError::Refused(format!("not an event id: {text:?}; {AN_ID}")))
}

/// Each once, in whatever number they are named.
fn parse_ids(texts: &[String]) -> Result<Vec<Uuid>, CommandError> {
    let bad: Vec<_> =
        texts.iter().filter(|text| Uuid::try_parse(text).is_err()).map(|text| format!("{text:?}")).collect();
    if !bad.is_empty() {
        return Err(CommandError::Refused(format!("not event ids: {}; {AN_ID}", bad.join(", "))));
    }
    let ids: BTreeSet<_> = texts.iter().filter_map(|text| Uuid::try_parse(text).ok()).collect();
    Ok(ids.into_iter().collect())
}

fn say(text: &str) -> Result<(), CommandError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

fn say_json(answer: &Value) -> Result<(), CommandError> {
    say(&format!("{}\n", serde_json::to_string_pretty(answer)?))
}
