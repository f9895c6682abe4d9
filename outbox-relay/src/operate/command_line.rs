//! The operator's command line, directly on the database.

use std::{
    collections::{BTreeSet, VecDeque},
    io::{self, IsTerminal, Write},
    time::Duration,
};

use chassis::DatabaseUrl;
use clap::{Args, Subcommand};
use outbox::EventId;
use proto::relay::v1::{OutboxStatus, dead_event_content::Payload, finding::Severity};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::{
    Descriptors, Discard, Filter, NAME_CHARS, OperateError, PIECE, Page, REASON_CHARS, SAMPLE, Walk, ask_receivers,
    check_text, count,
    decode::answer,
    diagnose, discard, discard_piece, find_subscription, list_dead,
    list_dead::count_dead,
    pause, print,
    progress::Progress,
    read_all, read_backlogs, read_facts, read_status, read_totals,
    refuse::{describe, named},
    requeue,
    requeue::Requeued,
    requeue_piece, restore, resume, show_dead, subscribe, unsubscribe, wake_relays,
};
use crate::{
    route::is_name,
    subscription::{Subscription, Unrouted, adopt_piece},
};

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long the server may work on one statement. Longer than for a relay, since counting many rows takes a while on a
/// busy server.
const STATEMENT_LIMIT: &str = "30s";
/// How long to wait for an answer if the server or the network does not keep that limit.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Readings, one per second, that the rates of `--watch` span.
const WATCH_READINGS: usize = 10;

/// The operator's commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the events in the outbox, their rates, and the routes of its relays
    ///
    /// `in` counts enqueued events per second, also those that were rolled back. `out` counts events that were
    /// delivered or discarded. Both come from the statistics of the database server, to which each session reports
    /// about once a second. So they jump over the one second that `status` takes. --watch takes them over the last ten
    /// seconds.
    #[command(after_long_help = "Every event has one of these states:
  waiting      ready to be leased, or waiting for an earlier event of its aggregate
  leased       being delivered
  backing off  failed; will be retried
  dead         not retried until you requeue it

FAILING shows the reasons of events that failed and are not dead. A failure is charged to an event as an attempt only if
its receiver took another event since the event's last failure. So an outage charges next to nothing.

Examples:
  outbox-relay status
  outbox-relay status --watch
  outbox-relay status --json | jq .dead")]
    Status(StatusArguments),
    /// Make a subscription: a receiver gets the events of these types, in a queue of its own
    ///
    /// From then on, services enqueue each event of these types for this subscription too. Earlier events are not sent,
    /// but for those that matched no subscription. A relay delivers it: `outbox-relay serve --route NAME=URL`. If the
    /// subscription exists with the same pattern, nothing is changed, so a deployment can run this command each time.
    #[command(after_long_help = "Examples:
  outbox-relay subscribe inventory 'orders.v1.*'
  outbox-relay subscribe billing orders.v1.OrderCreated")]
    Subscribe(SubscribeArguments),
    /// End a subscription, and discard its events
    ///
    /// Its events move to the table outbox_discarded, with your name, the time and the reason, and cannot be brought back.
    /// Its route ends in each relay, which goes on with its other routes. Other subscriptions keep their events.
    #[command(after_long_help = "Example:
  outbox-relay unsubscribe billing --reason 'billing now reads the invoices'")]
    Unsubscribe(UnsubscribeArguments),
    /// List the subscriptions, with their patterns and backlogs
    Subscriptions(SubscriptionsArguments),
    /// Show the journey of an order, or of any subject: what is left, what was discarded, and what receivers applied
    ///
    /// Takes the id of a subject, such as an order, or of an event. What is left in the outbox is shown with why it waits.
    /// Asks the receivers of all routes which of the subject's events they have on record, for up to 2 s each. Each outbox
    /// has its own part of a journey: an order's answers are in inventory's.
    #[command(after_long_help = "Examples:
  outbox-relay journey 0192f0c1-2345-7abc-8def-0123456789ab
  outbox-relay journey --json 0192f0c1-2345-7abc-8def-0123456789ab | jq .applied")]
    Journey(JourneyArguments),
    /// Say why an event, or any event of a subject, waits
    ///
    /// For example: behind another event, leased by a relay until a time, backing off, paused by whom, or its receiver is
    /// away. Asks no receiver.
    #[command(after_long_help = "Example:
  outbox-relay why 0192f0c1-2345-7abc-8def-0123456789ab")]
    Why(JourneyArguments),
    /// Examine the outbox: what hinders it, or will, and what to do
    ///
    /// Looks at the server, the schema, the rights and settings of the role, both clocks, VACUUM and what holds it up, each
    /// subscription with its routes and pauses, and asks each receiver to describe itself. Changes nothing.
    #[command(after_long_help = "Exit code: 0 if there is no fault, 1 if there is one.

Examples:
  outbox-relay doctor
  outbox-relay doctor --json | jq '.findings[] | select(.severity == \"SEVERITY_FAULT\")'")]
    Doctor(DoctorArguments),
    /// List, show, requeue or discard dead events
    #[command(subcommand)]
    Dead(DeadCommand),
    /// Pause the outbox, or one subscription: its relays lease nothing until `resume`
    ///
    /// Events that are already leased are still delivered. The pause is a row in the database. It outlives every
    /// process, and applies to relays that start later. Services can still enqueue events.
    #[command(after_long_help = "Examples:
  outbox-relay pause --reason 'the database is being moved'
  outbox-relay pause --subscription inventory --reason 'inventory is being moved'")]
    Pause(PauseArguments),
    /// Resume the outbox, or one subscription, after a pause
    Resume(ResumeArguments),
}

/// The outbox to operate on.
#[derive(Args, Debug)]
pub struct Outbox {
    /// Database with the outbox, as the role outbox_relay: postgres://user:password@host:5432/database.
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
    /// Repeat every second until Ctrl-C. With --json, print one line each time.
    #[arg(long)]
    watch: bool,
}

/// Arguments of `doctor`.
#[derive(Args, Debug)]
pub struct DoctorArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Print JSON: the fields of relay.v1.Diagnosis.
    #[arg(long)]
    json: bool,
}

/// Arguments of `journey` and `why`.
#[derive(Args, Debug)]
pub struct JourneyArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Id of a subject, such as an order, or of an event.
    id: String,
    /// Print JSON: the fields of relay.v1.Journey.
    #[arg(long)]
    json: bool,
}

/// Arguments of `subscribe`.
#[derive(Args, Debug)]
pub struct SubscribeArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Name of the subscription: up to 63 of a-z, 0-9 and -.
    #[arg(value_parser = parse_subscription)]
    name: String,
    /// Types of events: a full protobuf name, or a prefix that ends in *, such as orders.v1.* or *.
    #[arg(value_parser = parse_pattern)]
    pattern: String,
    /// Your name, kept with the subscription.
    #[arg(long, env = "USER", value_parser = parse_name)]
    by: String,
}

/// Arguments of `unsubscribe`.
#[derive(Args, Debug)]
pub struct UnsubscribeArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Name of the subscription.
    #[arg(value_parser = parse_subscription)]
    name: String,
    /// Reason, kept with the subscription and its events.
    #[arg(long, value_parser = parse_reason)]
    reason: String,
    /// Your name, kept with the subscription and its events.
    #[arg(long, env = "USER", value_parser = parse_name)]
    by: String,
}

/// Arguments of `subscriptions`.
#[derive(Args, Debug)]
pub struct SubscriptionsArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Print JSON: a list of relay.v1.Subscription.
    #[arg(long)]
    json: bool,
}

/// The commands on dead events.
#[derive(Debug, Subcommand)]
pub enum DeadCommand {
    /// List dead events, newest first
    ///
    /// Ordered by the time of their aggregates. ATTEMPTS counts the failures that were charged, FAILURES all after
    /// which the event backed off. HOLDS BACK counts the later events of the same aggregate, which wait.
    #[command(after_long_help = "Examples:
  outbox-relay dead list
  outbox-relay dead list --failing
  outbox-relay dead list --type orders.v1.OrderCreated --limit 500
  outbox-relay dead list --json | jq -r '.dead_events[].event_id'")]
    List(ListArguments),
    /// Show one dead event with its payload and trace context
    ///
    /// The payload is decoded by the descriptor of its type. Descriptors of orders and inventory are built in; for
    /// other types pass a file with --descriptors. A payload that cannot be decoded is shown as bytes.
    #[command(after_long_help = "Examples:
  outbox-relay dead show 0192f0c1-2345-7abc-8def-0123456789ab
  buf build -o ours.binpb && outbox-relay dead show --descriptors ours.binpb 0192f0c1-2345-7abc-8def-0123456789ab
  outbox-relay dead show --json 0192f0c1-2345-7abc-8def-0123456789ab | jq .payload")]
    Show(ShowArguments),
    /// Requeue dead events, and free the later events that they held back
    ///
    /// The events keep their ids, so a receiver that has already applied one drops it. They also keep their past
    /// attempts and reasons, but have all attempts again. If one of the named events cannot be requeued, none is.
    /// Events older than six sevenths of their receiver's retention stay dead: it may not remember whether it applied them.
    ///
    /// --all requeues the oldest first, in pieces of some thousand events. Ctrl-C stops it between two pieces, with exit
    /// code 130. Repeat the command to go on with the events that are still dead.
    #[command(after_long_help = "Examples:
  outbox-relay dead requeue 0192f0c1-2345-7abc-8def-0123456789ab
  outbox-relay dead requeue --all --type orders.v1.OrderCreated
  outbox-relay dead requeue --all --yes")]
    Requeue(RequeueArguments),
    /// Discard a dead event, and free the later events that it held back
    ///
    /// The whole event moves to the table outbox_discarded, with your name, the time and the reason. `dead restore` brings
    /// it back.
    ///
    /// --refuse also ends what the event tells of, in the same transaction: an order that waits is REJECTED with your reason.
    #[command(after_long_help = "Examples:
  outbox-relay dead discard 0192f0c1-2345-7abc-8def-0123456789ab --reason 'test order of the pilot'
  outbox-relay dead discard 0192f0c1-2345-7abc-8def-0123456789ab --refuse --reason 'we no longer sell to this country'")]
    Discard(DiscardArguments),
    /// Bring a discarded event back, as dead as it was
    ///
    /// It is not delivered until you requeue it. Later events of its aggregate that are left wait for it again. An event
    /// cannot come back if its discard has refused what it tells of, if its subscription has ended, or if it is so old that
    /// its receiver may not remember whether it applied it.
    #[command(after_long_help = "Example:
  outbox-relay dead restore 0192f0c1-2345-7abc-8def-0123456789ab
  outbox-relay dead requeue 0192f0c1-2345-7abc-8def-0123456789ab")]
    Restore(RestoreArguments),
}

/// Arguments of `dead list`.
#[derive(Args, Debug)]
pub struct ListArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Show at most this many events.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    limit: u16,
    /// Show only events of this type: a full protobuf name, such as orders.v1.OrderCreated.
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_name)]
    event_type: Option<String>,
    /// Show only events of this subscription.
    #[arg(long, value_parser = parse_subscription)]
    subscription: Option<String>,
    /// Show the events that have failed and are not dead, instead of those that are.
    #[arg(long)]
    failing: bool,
    /// Print JSON: the events and their total number, as in relay.v1.ListDeadEventsResponse.
    #[arg(long)]
    json: bool,
}

/// Arguments of `dead show`.
#[derive(Args, Debug)]
pub struct ShowArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Id of the event.
    event_id: String,
    /// File with the descriptors of your own events: an encoded FileDescriptorSet with all imports. Without it only the
    /// events of orders and inventory are decoded.
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
    /// Ids of the events.
    #[arg(value_name = "EVENT_ID", required_unless_present = "all", conflicts_with = "all")]
    event_ids: Vec<String>,
    /// Requeue all dead events that are not too old. Asks for confirmation.
    #[arg(long)]
    all: bool,
    /// With --all, requeue only events of this type.
    #[arg(long = "type", value_name = "TYPE", conflicts_with = "event_ids", value_parser = parse_name)]
    event_type: Option<String>,
    /// Requeue only for this subscription. Otherwise for each in which the events are dead.
    #[arg(long, value_parser = parse_subscription)]
    subscription: Option<String>,
    /// With --all, do not ask. Required if stdin is not a terminal.
    #[arg(long, conflicts_with = "event_ids")]
    yes: bool,
}

/// Arguments of `dead discard`.
#[derive(Args, Debug)]
pub struct DiscardArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Id of the event.
    event_id: String,
    /// Discard it only for this subscription. Otherwise for each in which it is dead.
    #[arg(long, value_parser = parse_subscription)]
    subscription: Option<String>,
    /// Reason, kept with the event.
    #[arg(long, value_parser = parse_reason)]
    reason: String,
    /// Also refuse what the event tells of, for this reason. Customers read it. It cannot be undone.
    #[arg(long)]
    refuse: bool,
    /// Your name, kept with the event.
    #[arg(long, env = "USER", value_parser = parse_name)]
    by: String,
}

/// Arguments of `dead restore`.
#[derive(Args, Debug)]
pub struct RestoreArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Id of the event.
    event_id: String,
    /// Restore it only for this subscription. Otherwise for each in which it was discarded.
    #[arg(long, value_parser = parse_subscription)]
    subscription: Option<String>,
    /// Your name, kept with the event.
    #[arg(long, env = "USER", value_parser = parse_name)]
    by: String,
}

/// Arguments of `pause`.
#[derive(Args, Debug)]
pub struct PauseArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Pause only this subscription.
    #[arg(long, value_parser = parse_subscription)]
    subscription: Option<String>,
    /// Reason, shown in the status.
    #[arg(long, value_parser = parse_reason)]
    reason: String,
    /// Your name, shown in the status.
    #[arg(long, env = "USER", value_parser = parse_name)]
    by: String,
}

/// Arguments of `resume`.
#[derive(Args, Debug)]
pub struct ResumeArguments {
    #[command(flatten)]
    outbox: Outbox,
    /// Resume only this subscription.
    #[arg(long, value_parser = parse_subscription)]
    subscription: Option<String>,
}

fn parse_subscription(text: &str) -> Result<String, String> {
    let named = is_name(text).then(|| text.to_owned());
    named.ok_or_else(|| "must be up to 63 of a-z, 0-9 and -, and not begin with -".to_owned())
}

fn parse_pattern(text: &str) -> Result<String, String> {
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._".contains(&byte));
    let valid = !text.is_empty() && text.len() <= 200 && plain(text.strip_suffix('*').unwrap_or(text));
    valid
        .then(|| text.to_owned())
        .ok_or_else(|| "must be a full event type or a prefix that ends in *, such as orders.v1.* or *".to_owned())
}

fn parse_name(text: &str) -> Result<String, String> {
    check_text(text, NAME_CHARS)
}

fn parse_reason(text: &str) -> Result<String, String> {
    check_text(text, REASON_CHARS)
}

/// Why a command failed, on one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The database cannot be reached.
    #[error("cannot connect to {database}: {why}; is it up, and does --database-url or RELAY_DATABASE_URL name it?")]
    Connect {
        /// The database, without the password.
        database: String,
        /// The cause.
        why: String,
    },
    /// The command does not apply, or was not confirmed. Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// An argument names something that does not exist. Nothing was changed.
    #[error("{0}")]
    Arguments(String),
    /// The database failed.
    #[error("{}", explain(.0))]
    Database(sqlx::Error),
    /// The database got the command and has not answered.
    #[error(
        "no answer from the database within {ANSWER_LIMIT:?}: the command may have been carried out; check before you repeat \
         it"
    )]
    NoAnswer,
    /// A signal came between two pieces of a requeue of all.
    #[error("interrupted: {} requeued; repeat the command to requeue the rest", were(*.requeued))]
    Interrupted {
        /// Events that were requeued.
        requeued: i64,
    },
    /// A requeue of all failed after some of its pieces.
    #[error("{} requeued, then: {cause}; repeat the command to requeue the rest", were(*.requeued))]
    Unfinished {
        /// Events that were requeued.
        requeued: i64,
        /// Why the next piece failed.
        cause: Box<CommandError>,
    },
    /// The terminal, or a pipe in its place, failed.
    #[error("cannot use the terminal: {0}")]
    Terminal(#[from] io::Error),
    /// The answer has no JSON form.
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
            unknown @ OperateError::NoSubscription { .. } => Self::Arguments(unknown.to_string()),
            refused @ (OperateError::NotApplicable(_)
            | OperateError::AlreadyPaused(_)
            | OperateError::NotPaused(_)
            | OperateError::OtherPattern { .. }
            | OperateError::NoRefusals
            | OperateError::NotRefused(_)
            | OperateError::OlderVersion) => Self::Refused(refused.to_string()),
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
        Some("42501") => format!("this role lacks a right: connect as outbox_relay ({cause})"),
        // Cancelled by the limit.
        Some("57014") => format!("a statement took longer than {STATEMENT_LIMIT}, and was undone ({cause})"),
        _ => format!("the database failed: {cause}"),
    }
}

/// Runs a command.
///
/// # Errors
/// [`CommandError`]. Nothing was changed unless it says so.
pub async fn run(command: Command) -> Result<(), CommandError> {
    let ended = match command {
        Command::Status(arguments) => show_status(arguments).await,
        Command::Doctor(arguments) => examine(arguments).await,
        Command::Journey(arguments) => show_journey(arguments, Receivers::Asked).await,
        Command::Why(arguments) => show_journey(arguments, Receivers::NotAsked).await,
        Command::Subscribe(arguments) => subscribe_name(arguments).await,
        Command::Unsubscribe(arguments) => unsubscribe_name(arguments).await,
        Command::Subscriptions(arguments) => list_subscriptions(arguments).await,
        Command::Dead(DeadCommand::List(arguments)) => list(arguments).await,
        Command::Dead(DeadCommand::Show(arguments)) => show(arguments).await,
        Command::Dead(DeadCommand::Requeue(arguments)) => requeue_dead(arguments).await,
        Command::Dead(DeadCommand::Discard(arguments)) => discard_dead(arguments).await,
        Command::Dead(DeadCommand::Restore(arguments)) => restore_discarded(arguments).await,
        Command::Pause(arguments) => pause_outbox(arguments).await,
        Command::Resume(arguments) => resume_outbox(arguments).await,
    };
    match ended {
        // The reader closed the pipe, as `| head` does.
        Err(CommandError::Terminal(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        ended => ended,
    }
}

impl Outbox {
    /// Runs `work` on a new connection.
    async fn ask<T, E>(&self, work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>) -> Result<T, CommandError>
    where
        CommandError: From<E>,
    {
        let mut connection = self.connect().await?;
        let answer = in_time(work(&mut connection)).await;
        // Not needed, but it avoids a warning in the server's log.
        drop(timeout(CONNECT_LIMIT, connection.close()).await);
        answer
    }

    async fn connect(&self) -> Result<PgConnection, CommandError> {
        let failed = |why: String| CommandError::Connect { database: self.database_url.to_string(), why };
        let url = self.database_url.clone().with_application_name("outbox-relay operator");
        let url = url.with_setting("statement_timeout", STATEMENT_LIMIT).with_setting("synchronous_commit", "off");
        match timeout(CONNECT_LIMIT, url.connect()).await {
            Ok(connected) => connected.map_err(|cause| failed(cause.to_string())),
            Err(_) => Err(failed(format!("no answer within {CONNECT_LIMIT:?}"))),
        }
    }
}

/// Does one piece of work on a connection.
async fn in_time<T, E>(work: impl Future<Output = Result<T, E>>) -> Result<T, CommandError>
where
    CommandError: From<E>,
{
    Ok(timeout(ANSWER_LIMIT, work).await.map_err(|_| CommandError::NoAnswer)??)
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
        // One may be watching for an outage: print the error, and try again after a second.
        match outbox.ask(async |connection| read_status(connection, &readings[0]).await).await {
            Err(error) => eprintln!("error: {error}"),
            Ok((status, totals)) => {
                readings.push_back(totals);
                if readings.len() > WATCH_READINGS {
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
    // Moves the cursor to the upper left corner, and clears the screen.
    let redraw = if io::stdout().is_terminal() { "\x1b[H\x1b[J" } else { "\n" };
    let time = status.time.unwrap_or_default();
    say(&format!("{redraw}{time}\n\n{}", print::status(status)))
}

async fn examine(arguments: DoctorArguments) -> Result<(), CommandError> {
    let DoctorArguments { outbox, json } = arguments;
    let diagnosis = diagnose(outbox.ask(read_all).await?).await;
    if json {
        say_json(&answer(&diagnosis)?)?;
    } else {
        say(&print::diagnosis(&diagnosis))?;
    }
    let faults = diagnosis.findings.iter().filter(|finding| finding.severity() == Severity::Fault).count();
    match faults {
        0 => Ok(()),
        1 => Err(CommandError::Refused("there is 1 fault".into())),
        faults => Err(CommandError::Refused(format!("there are {faults} faults"))),
    }
}

/// Whether a command asks receivers what they have applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Receivers {
    Asked,
    NotAsked,
}

async fn show_journey(arguments: JourneyArguments, receivers: Receivers) -> Result<(), CommandError> {
    let JourneyArguments { outbox, id, json } = arguments;
    let id = parse_id(&id)?.uuid();
    let facts = outbox.ask(async |connection| read_facts(connection, id).await).await?;
    let journey = match receivers {
        Receivers::Asked => ask_receivers(facts).await?,
        Receivers::NotAsked => facts.journey(),
    };
    if json { say_json(&answer(&journey)?) } else { say(&print::journey(&journey, receivers == Receivers::NotAsked)) }
}

async fn subscribe_name(arguments: SubscribeArguments) -> Result<(), CommandError> {
    let SubscribeArguments { outbox, name, pattern, by } = arguments;
    let mut connection = outbox.connect().await?;
    let done = in_time(subscribe(&mut connection, &name, &pattern, &by)).await?;
    // In pieces, each of which is committed. If one fails, relays do the rest, and so does the same command again.
    let adopted = in_pieces(&mut connection, async |connection| adopt_piece(connection, Unrouted::All).await).await?;
    wake_relays(&mut connection).await;
    let how = if done.existed { "is subscribed already" } else { "is subscribed from now on" };
    let adopted = match adopted {
        0 => String::new(),
        adopted => format!(", and {} that waited go to the subscriptions made for them", events(adopted)),
    };
    let Subscription { name, pattern, .. } = done.subscription;
    say(&format!("{name} {how} to {pattern}{adopted}\n"))
}

async fn unsubscribe_name(arguments: UnsubscribeArguments) -> Result<(), CommandError> {
    let UnsubscribeArguments { outbox, name, reason, by } = arguments;
    let mut connection = outbox.connect().await?;
    in_time(unsubscribe(&mut connection, &name, &by, &reason)).await?;
    let discarded = in_pieces(&mut connection, discard_piece).await?;
    say(&format!("{name} is subscribed no more; {} discarded as {by}\n", were(discarded)))
}

/// Repeats a piece of work until it finds nothing to do. Returns the number of rows.
async fn in_pieces(
    connection: &mut PgConnection,
    piece: impl AsyncFn(&mut PgConnection) -> Result<u64, sqlx::Error>,
) -> Result<i64, CommandError> {
    let mut done = 0;
    loop {
        match in_time(piece(connection)).await? {
            0 => return Ok(done),
            rows => done += count(rows),
        }
    }
}

async fn list_subscriptions(arguments: SubscriptionsArguments) -> Result<(), CommandError> {
    let SubscriptionsArguments { outbox, json } = arguments;
    let status = outbox.ask(read_backlogs).await?;
    if !json {
        return say(&print::subscriptions(&status));
    }
    let mut shown = answer(&status)?;
    say_json(&shown["subscriptions"].take())
}

async fn list(arguments: ListArguments) -> Result<(), CommandError> {
    let ListArguments { outbox, limit, event_type, subscription, failing, json } = arguments;
    let filter = Filter { event_type, subscription };
    let page = Page { size: limit, before: Page::first(), filter, failing };
    let list = outbox.ask(async |connection| list_dead(connection, &page).await).await?;
    if !json {
        return say(&print::events(&list, failing));
    }
    let mut shown = answer(&list)?;
    if let Some(fields) = shown.as_object_mut() {
        // For callers of RelayAdmin. The command line has --limit instead.
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
    let RequeueArguments { outbox, event_ids, all, event_type, subscription, yes } = arguments;
    let (done, too_old) = if all {
        let filter = Filter { event_type, subscription };
        let dead = confirm(&outbox, &filter, yes).await?;
        requeue_all(&outbox, filter, dead).await?
    } else {
        let (event_ids, only) = (parse_ids(&event_ids)?, subscription.as_deref());
        let done = outbox.ask(async |connection| requeue(connection, &event_ids, only).await).await?;
        (Requeued { events: done.requeued, freed: done.freed }, 0)
    };
    say(&format!("requeued {}, and freed {} that waited for them\n", events(done.events), done.freed))?;
    if too_old > 0 {
        say(&format!(
            "too old, and still dead: {}; receivers may not remember whether they applied them\n",
            events(too_old)
        ))?;
    }
    Ok(())
}

/// Walks over the dead events, of which there were `dead` when it was asked for. Returns what it has requeued, and how
/// many events stay dead because they are too old.
async fn requeue_all(outbox: &Outbox, filter: Filter, dead: i64) -> Result<(Requeued, i64), CommandError> {
    let shutdown = chassis::shutdown_signal()?;
    let mut connection = outbox.connect().await?;
    let mut progress = Progress::of(dead);
    let (mut done, mut too_old) = (Requeued::default(), 0);
    let mut rest = in_time(Walk::begin(&mut connection, filter)).await?;
    while let Some(walk) = rest {
        if shutdown.is_cancelled() {
            return Err(CommandError::Interrupted { requeued: done.events });
        }
        let piece = in_time(requeue_piece(&mut connection, walk, PIECE)).await;
        let piece = piece.map_err(|cause| unfinished(cause, done.events))?;
        done.events += piece.requeued.events;
        done.freed += piece.requeued.freed;
        too_old += piece.too_old;
        rest = piece.rest;
        progress.show(done.events);
    }
    drop(timeout(CONNECT_LIMIT, connection.close()).await);
    Ok((done, too_old))
}

fn unfinished(cause: CommandError, requeued: i64) -> CommandError {
    if requeued == 0 { cause } else { CommandError::Unfinished { requeued, cause: Box::new(cause) } }
}

/// Asks the operator to confirm the number of events, unless `yes` is set. Returns the number.
async fn confirm(outbox: &Outbox, filter: &Filter, yes: bool) -> Result<i64, CommandError> {
    let only = filter.subscription.as_deref();
    let event_type = filter.event_type.as_deref();
    let subscription_id = outbox.ask(async |connection| find_subscription(connection, only).await).await?;
    let dead = outbox.ask(async |connection| count_dead(connection, event_type, subscription_id).await).await?;
    let of_type = filter.event_type.as_deref().map(|event_type| format!(" of type {event_type}"));
    let of_type = of_type.unwrap_or_default() + &only.map(|name| format!(" for {name}")).unwrap_or_default();
    if dead == 0 {
        return Err(CommandError::Refused(format!("there are no dead events{of_type}")));
    }
    if yes {
        return Ok(dead);
    }
    let what = format!("requeue {}{of_type}", events(dead));
    if !io::stdin().is_terminal() {
        return Err(CommandError::Refused(format!("this would {what}: confirm it with --yes")));
    }
    eprint!("{what}? [y/N] ");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    match line.trim() {
        "y" | "Y" | "yes" => Ok(dead),
        _ => Err(CommandError::Refused("nothing was requeued".into())),
    }
}

async fn discard_dead(arguments: DiscardArguments) -> Result<(), CommandError> {
    let DiscardArguments { outbox, event_id, subscription, reason, refuse, by } = arguments;
    let event_id = parse_id(&event_id)?;
    let asked = Discard { event_id, subscription, by, reason, refuse };
    let done = outbox.ask(async |connection| discard(connection, &asked).await).await?;
    let (by, refused) = (asked.by, if refuse { ", refused what it tells of" } else { "" });
    say(&format!("discarded event {event_id} as {by}{refused}, and freed {} that waited for it\n", done.freed))
}

async fn restore_discarded(arguments: RestoreArguments) -> Result<(), CommandError> {
    let RestoreArguments { outbox, event_id, subscription, by } = arguments;
    let (event_id, only) = (parse_id(&event_id)?, subscription.as_deref());
    let done = outbox.ask(async |connection| restore(connection, event_id, only, &by).await).await?;
    let dead = if done.restored == 1 { String::new() } else { format!(" for {} subscriptions", done.restored) };
    say(&format!("event {event_id} is dead again{dead}; requeue it, so that it is delivered\n"))
}

async fn pause_outbox(arguments: PauseArguments) -> Result<(), CommandError> {
    let PauseArguments { outbox, subscription, reason, by } = arguments;
    let only = subscription.as_deref();
    let paused = outbox.ask(async |connection| pause(connection, only, &by, &reason).await).await?;
    say(&format!("paused {}{}\n", named(&paused, " "), describe(&paused)))
}

async fn resume_outbox(arguments: ResumeArguments) -> Result<(), CommandError> {
    let ResumeArguments { outbox, subscription } = arguments;
    let ended = outbox.ask(async |connection| resume(connection, subscription.as_deref()).await).await?;
    let what = if ended.subscription.is_empty() { String::new() } else { format!(" {}", ended.subscription) };
    say(&format!("resumed{what}; it was paused {}\n", describe(&ended)))
}

fn were(number: i64) -> String {
    format!("{} {}", events(number), if number == 1 { "was" } else { "were" })
}

fn events(number: i64) -> String {
    if number == 1 { "1 event".into() } else { format!("{number} events") }
}

const ID_EXAMPLE: &str = "an id looks like 0192f0c1-2345-7abc-8def-0123456789ab";

fn parse_id(text: &str) -> Result<EventId, CommandError> {
    let id = Uuid::try_parse(text);
    id.map(EventId::from).map_err(|_| CommandError::Arguments(format!("not an id: {text:?}; {ID_EXAMPLE}")))
}

/// Each id once, even if it is given several times.
fn parse_ids(texts: &[String]) -> Result<Vec<EventId>, CommandError> {
    let bad: Vec<_> =
        texts.iter().filter(|text| Uuid::try_parse(text).is_err()).map(|text| format!("{text:?}")).collect();
    if !bad.is_empty() {
        return Err(CommandError::Arguments(format!("not ids: {}; {ID_EXAMPLE}", bad.join(", "))));
    }
    let ids: BTreeSet<_> = texts.iter().filter_map(|text| Uuid::try_parse(text).ok()).collect();
    Ok(ids.into_iter().map(EventId::from).collect())
}

fn say(text: &str) -> Result<(), CommandError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

fn say_json(answer: &Value) -> Result<(), CommandError> {
    say(&format!("{}\n", serde_json::to_string_pretty(answer)?))
}
