//! The operator's command line, directly on the database.

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use chassis::{Tls, TlsError};
use outbox::EventId;
use proto::relay::v1::{BlastRadius, OutboxStatus, dead_event_content::Payload, finding::Severity};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::{
    Author, Change, Changed, Command, DeedPage, Discard, Filter, OperateError, Outbox, PIECE, Page, RELAYS_KNOW_POLL,
    SAMPLE, SetPace, SlowDown, Undo, Walk, answer,
    arguments::{
        AskingArguments, DeadCommand, DeedsArguments, DiscardArguments, DoctorArguments, GroupsArguments,
        JourneyArguments, ListArguments, PauseArguments, RequeueArguments, RestoreArguments, ResumeArguments,
        ShowArguments, StatusArguments, SubscribeArguments, SubscriptionsArguments, TokenArguments, UndoArguments,
        UnsubscribeArguments,
    },
    ask_receivers,
    bundle::gather,
    count, diagnose, discard, discard_piece, find_subscription, group_dead, list_dead,
    list_dead::count_dead,
    list_deeds, measure_blast, pause, print,
    progress::Progress,
    read_all, read_backlogs, read_facts, read_status, read_totals,
    refuse::{describe, named},
    relays_know, requeue, restore, resume, resume_slowly, set_pace, show_dead, subscribe, undo_piece, unsubscribe,
    wake_relays, walk_piece,
};
use crate::{
    access::make_token,
    subscription::{Subscription, Unrouted, adopt_piece},
};

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long the server may work on one statement. Longer than for a relay, since counting many rows takes a while on a
/// busy server.
const STATEMENT_LIMIT: &str = "30s";
/// How long to wait for an answer if the server or the network does not keep that limit.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Relays read the paces once a second. One that has died is taken for gone after ten.
const RELAYS_KNOW_LIMIT: Duration = Duration::from_secs(15);
/// Readings, one per second, that the rates of `--watch` span.
const WATCH_READINGS: usize = 10;

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
    /// The certificates cannot be used. Nothing was changed.
    #[error(transparent)]
    Tls(#[from] TlsError),
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
    /// A signal came between two pieces of a long command.
    #[error("interrupted: {} {what}{}; repeat the command for the rest", were(*.events), deed(*.deed_id))]
    Interrupted {
        /// What was done to them, such as `requeued`.
        what: &'static str,
        /// Events that were changed.
        events: i64,
        /// The deed that they are recorded with; 0 if there is none yet.
        deed_id: i64,
    },
    /// A long command failed after some of its pieces.
    #[error("{} {what}, then: {cause}; repeat the command for the rest", were(*.events))]
    Unfinished {
        /// What was done to them, such as `requeued`.
        what: &'static str,
        /// Events that were changed.
        events: i64,
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
            | OperateError::NoDeed(_)
            | OperateError::PaceLost
            | OperateError::CannotUndo { .. }
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
        Command::Journey(AskingArguments { journey, tls }) => {
            show_journey(journey, Receivers::Asked(Tls::read(&tls)?)).await
        }
        Command::Why(arguments) => show_journey(arguments, Receivers::NotAsked).await,
        Command::Subscribe(arguments) => subscribe_name(arguments).await,
        Command::Unsubscribe(arguments) => unsubscribe_name(arguments).await,
        Command::Subscriptions(arguments) => list_subscriptions(arguments).await,
        Command::Dead(DeadCommand::List(arguments)) => list(arguments).await,
        Command::Dead(DeadCommand::Groups(arguments)) => list_groups(arguments).await,
        Command::Dead(DeadCommand::Show(arguments)) => show(arguments).await,
        Command::Dead(DeadCommand::Requeue(arguments)) => requeue_dead(arguments).await,
        Command::Dead(DeadCommand::Discard(arguments)) => discard_dead(arguments).await,
        Command::Dead(DeadCommand::Restore(arguments)) => restore_discarded(arguments).await,
        Command::Pause(arguments) => pause_outbox(arguments).await,
        Command::Resume(arguments) => resume_outbox(arguments).await,
        Command::Deeds(arguments) => show_deeds(arguments).await,
        Command::Undo(arguments) => undo_deed(arguments).await,
        Command::Token(arguments) => tell_token(&arguments),
    };
    match ended {
        // The reader closed the pipe, as `| head` does.
        Err(CommandError::Terminal(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        ended => ended,
    }
}

impl Outbox {
    /// Runs `work` on a new connection.
    pub(super) async fn ask<T, E>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
    ) -> Result<T, CommandError>
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
        let url = self.database_url.clone().with_password_file(&self.password_file);
        let url = url.with_application_name("outbox-relay operator");
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
    let DoctorArguments { outbox, json, bundle, tls } = arguments;
    let diagnosis = diagnose(outbox.ask(read_all).await?, &Tls::read(&tls)?).await;
    if json {
        say_json(&answer(&diagnosis)?)?;
    } else {
        say(&print::diagnosis(&diagnosis))?;
    }
    if let Some(file) = bundle {
        let text = serde_json::to_string_pretty(&gather(&outbox, &diagnosis).await)? + "\n";
        let name = file.display().to_string();
        fs::write(&file, text).map_err(|cause| CommandError::Refused(format!("cannot write {name}: {cause}")))?;
        say(&format!(
            "\nwrote {name}: read it before you pass it on: it has names, and reasons in the words of operators and receivers\n"
        ))?;
    }
    let faults = diagnosis.findings.iter().filter(|finding| finding.severity() == Severity::Fault).count();
    match faults {
        0 => Ok(()),
        1 => Err(CommandError::Refused("there is 1 fault".into())),
        faults => Err(CommandError::Refused(format!("there are {faults} faults"))),
    }
}

/// Whether a command asks receivers what they have applied.
enum Receivers {
    Asked(Tls),
    NotAsked,
}

async fn show_journey(arguments: JourneyArguments, receivers: Receivers) -> Result<(), CommandError> {
    let JourneyArguments { outbox, id, json } = arguments;
    let id = parse_id(&id)?.uuid();
    let facts = outbox.ask(async |connection| read_facts(connection, id).await).await?;
    let (journey, why) = match &receivers {
        Receivers::Asked(tls) => (ask_receivers(facts, tls).await?, false),
        Receivers::NotAsked => (facts.journey(), true),
    };
    if json { say_json(&answer(&journey)?) } else { say(&print::journey(&journey, why)) }
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
    let author = Author { name: by, reason };
    in_time(unsubscribe(&mut connection, &name, &author)).await?;
    let discarded = in_pieces(&mut connection, discard_piece).await?;
    say(&format!("{name} is subscribed no more; {} discarded as {}\n", were(discarded), author.name))
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
    let ListArguments { outbox, limit, event_type, subscription, code, failing, json } = arguments;
    let filter = Filter { event_type, subscription, code };
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

async fn list_groups(arguments: GroupsArguments) -> Result<(), CommandError> {
    let GroupsArguments { outbox, event_type, subscription, json } = arguments;
    let filter = Filter { event_type, subscription, code: None };
    let groups = outbox.ask(async |connection| group_dead(connection, &filter).await).await?;
    if json { say_json(&answer(&groups)?) } else { say(&print::groups(&groups)) }
}

async fn show_deeds(arguments: DeedsArguments) -> Result<(), CommandError> {
    let DeedsArguments { outbox, limit, event, json } = arguments;
    let event_id = event.as_deref().map(parse_id).transpose()?;
    let page = DeedPage { size: limit, before: i64::MAX, event_id };
    let list = outbox.ask(async |connection| list_deeds(connection, &page).await).await?;
    if !json {
        return say(&print::deeds(&list));
    }
    let mut shown = answer(&list)?;
    if let Some(fields) = shown.as_object_mut() {
        // As for `dead list`.
        fields.remove("next_page_token");
    }
    say_json(&shown)
}

fn tell_token(arguments: &TokenArguments) -> Result<(), CommandError> {
    let (token, line) = make_token(arguments.role, &arguments.name);
    say(&format!("the token:                   {token}\nits line in the token file:  {line}\n"))
}

async fn undo_deed(arguments: UndoArguments) -> Result<(), CommandError> {
    const WHAT: &str = "changed back";
    let UndoArguments { outbox, deed_id, reason, by } = arguments;
    let author = Author { name: by, reason };
    let shutdown = chassis::shutdown_signal()?;
    let mut connection = outbox.connect().await?;
    let (mut undone, mut left, mut undo_id) = (0, 0, 0);
    let mut rest = Some(Undo::begin(deed_id));
    while let Some(undo) = rest {
        if shutdown.is_cancelled() {
            return Err(CommandError::Interrupted { what: WHAT, events: undone, deed_id: undo_id });
        }
        let piece = in_time(undo_piece(&mut connection, undo, &author, PIECE)).await;
        let piece = piece.map_err(|cause| unfinished(cause, WHAT, undone))?;
        undone += piece.undone;
        left += piece.left;
        undo_id = piece.undo_id.unwrap_or_default();
        rest = piece.rest;
    }
    drop(timeout(CONNECT_LIMIT, connection.close()).await);
    let left = match left {
        0 => String::new(),
        1 => "; 1 event stays as it is".to_owned(),
        left => format!("; {left} events stay as they are"),
    };
    let what = if undone == 0 { String::new() } else { format!(": {} changed back", were(undone)) };
    say(&format!("undid deed {deed_id} as {}{}{what}{left}\n", author.name, deed(undo_id)))
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
    let RequeueArguments { outbox, event_ids, all, event_type, code, subscription, yes, reason, by } = arguments;
    let author = Author { name: by, reason };
    let (done, too_old, deed_id) = if all {
        let all = ChangeOfAll { change: Change::Requeue, filter: Filter { event_type, subscription, code }, author };
        let dead = all.confirm(&outbox, yes).await?;
        all.walk(&outbox, dead).await?
    } else {
        let (event_ids, only) = (parse_ids(&event_ids)?, subscription.as_deref());
        let done = outbox.ask(async |connection| requeue(connection, &event_ids, only, &author).await).await?;
        (Changed { events: done.requeued, freed: done.freed }, 0, done.deed_id)
    };
    let (requeued, freed) = (events(done.events), done.freed);
    say(&format!("requeued {requeued}, and freed {freed} that waited for them{}\n", deed(deed_id)))?;
    if too_old > 0 {
        say(&format!(
            "too old, and still dead: {}; receivers may not remember whether they applied them\n",
            events(too_old)
        ))?;
    }
    Ok(())
}

async fn discard_dead(arguments: DiscardArguments) -> Result<(), CommandError> {
    let DiscardArguments { outbox, event_ids, all, event_type, code, subscription, yes, reason, refuse, by } =
        arguments;
    let author = Author { name: by, reason };
    if all {
        let all = ChangeOfAll { change: Change::Discard, filter: Filter { event_type, subscription, code }, author };
        let dead = all.confirm(&outbox, yes).await?;
        let (done, _, deed_id) = all.walk(&outbox, dead).await?;
        let (discarded, by, freed) = (events(done.events), &all.author.name, done.freed);
        return say(&format!(
            "discarded {discarded} as {by}, and freed {freed} that waited for them{}\n",
            deed(deed_id)
        ));
    }
    let event_ids = parse_ids(&event_ids)?;
    if refuse && event_ids.len() > 1 {
        return Err(CommandError::Arguments("--refuse goes with one event: its reason is for one customer".into()));
    }
    let what = match event_ids[..] {
        [event_id] => format!("event {event_id}"),
        _ => events(count(event_ids.len() as u64)),
    };
    let asked = Discard { event_ids, subscription, author, refuse };
    let done = outbox.ask(async |connection| discard(connection, &asked).await).await?;
    let (by, refused) = (asked.author.name, if refuse { ", refused what it tells of" } else { "" });
    let (freed, deed) = (done.changed.freed, deed(done.deed_id));
    let them = if asked.event_ids.len() == 1 { "it" } else { "them" };
    say(&format!("discarded {what} as {by}{refused}, and freed {freed} that waited for {them}{deed}\n"))
}

/// The deed, as the end of a sentence; nothing if there is none.
fn deed(deed_id: i64) -> String {
    if deed_id == 0 { String::new() } else { format!(" (deed {deed_id})") }
}

/// A change of all dead events that match.
struct ChangeOfAll {
    change: Change,
    filter: Filter,
    author: Author,
}

impl ChangeOfAll {
    fn verb(&self) -> &'static str {
        match self.change {
            Change::Requeue => "requeue",
            Change::Discard => "discard",
        }
    }

    fn done(&self) -> &'static str {
        match self.change {
            Change::Requeue => "requeued",
            Change::Discard => "discarded",
        }
    }

    /// Asks the operator to confirm what would change, unless `yes` is set. Returns the number of dead events.
    async fn confirm(&self, outbox: &Outbox, yes: bool) -> Result<i64, CommandError> {
        let only = self.filter.subscription.as_deref();
        let only = outbox.ask(async |connection| find_subscription(connection, only).await).await?;
        let dead = outbox.ask(async |connection| count_dead(connection, &self.filter, only).await).await?;
        let for_name = self.filter.subscription.as_deref().map(|name| format!(" for {name}"));
        let matching = self.filter.describe() + &for_name.unwrap_or_default();
        if dead == 0 {
            return Err(CommandError::Refused(format!("there are no dead events{matching}")));
        }
        if yes {
            return Ok(dead);
        }
        let blast = outbox.ask(async |connection| measure_blast(connection, None, &self.filter).await).await?;
        let what = format!("{} {}{matching}{}", self.verb(), events(dead), self.describe(&blast));
        if !io::stdin().is_terminal() {
            return Err(CommandError::Refused(format!("this would {what}: confirm it with --yes")));
        }
        eprint!("{what}? [y/N] ");
        let mut line = String::new();
        io::stdin().read_line(&mut line)?;
        match line.trim() {
            "y" | "Y" | "yes" => Ok(dead),
            _ => Err(CommandError::Refused(format!("nothing was {}", self.done()))),
        }
    }

    /// What else the deed would change, as the end of a sentence.
    fn describe(&self, blast: &BlastRadius) -> String {
        let at_least = if blast.more { "at least " } else { "" };
        let of = match blast.subjects {
            1 => " of 1 subject".to_owned(),
            subjects => format!(" of {at_least}{subjects} subjects"),
        };
        let freeing = match blast.held_back {
            0 => String::new(),
            held_back => format!(", and free {at_least}{held_back} that wait for them"),
        };
        let too_old = match blast.too_old {
            too_old if too_old > 0 && self.change == Change::Requeue => {
                format!("; {at_least}{too_old} of them are too old, and would stay dead")
            }
            _ => String::new(),
        };
        of + &freeing + &too_old
    }

    /// Walks over the dead events, of which there were `dead` when it was asked for. Returns what it has changed, how many
    /// events stay dead because they are too old, and the deed.
    async fn walk(&self, outbox: &Outbox, dead: i64) -> Result<(Changed, i64, i64), CommandError> {
        let shutdown = chassis::shutdown_signal()?;
        let mut connection = outbox.connect().await?;
        let mut progress = Progress::of(self.done(), dead);
        let (mut done, mut too_old, mut deed_id) = (Changed::default(), 0, 0);
        let mut rest = in_time(Walk::begin(&mut connection, self.change, self.filter.clone())).await?;
        while let Some(walk) = rest {
            if shutdown.is_cancelled() {
                return Err(CommandError::Interrupted { what: self.done(), events: done.events, deed_id });
            }
            let piece = in_time(walk_piece(&mut connection, walk, &self.author, PIECE)).await;
            let piece = piece.map_err(|cause| unfinished(cause, self.done(), done.events))?;
            done.events += piece.changed.events;
            done.freed += piece.changed.freed;
            too_old += piece.too_old;
            deed_id = piece.deed_id.unwrap_or_default();
            rest = piece.rest;
            progress.show(done.events);
        }
        drop(timeout(CONNECT_LIMIT, connection.close()).await);
        Ok((done, too_old, deed_id))
    }
}

fn unfinished(cause: CommandError, what: &'static str, events: i64) -> CommandError {
    if events == 0 { cause } else { CommandError::Unfinished { what, events, cause: Box::new(cause) } }
}

async fn restore_discarded(arguments: RestoreArguments) -> Result<(), CommandError> {
    let RestoreArguments { outbox, event_id, subscription, reason, by } = arguments;
    let (event_id, only) = (parse_id(&event_id)?, subscription.as_deref());
    let author = Author { name: by, reason };
    let done = outbox.ask(async |connection| restore(connection, event_id, only, &author).await).await?;
    let dead = if done.restored == 1 { String::new() } else { format!(" for {} subscriptions", done.restored) };
    let deed = deed(done.deed_id);
    say(&format!("event {event_id} is dead again{dead}; requeue it, so that it is delivered{deed}\n"))
}

async fn pause_outbox(arguments: PauseArguments) -> Result<(), CommandError> {
    let PauseArguments { outbox, subscription, reason, by } = arguments;
    let only = subscription.as_deref();
    let author = Author { name: by, reason };
    let paused = outbox.ask(async |connection| pause(connection, only, &author).await).await?;
    say(&format!("paused {}{}{}\n", named(&paused, " "), describe(&paused), deed(paused.deed_id)))
}

async fn resume_outbox(arguments: ResumeArguments) -> Result<(), CommandError> {
    let ResumeArguments { outbox, subscription, per_second, reason, by } = arguments;
    let author = Author { name: by, reason };
    if let Some(events_per_second) = per_second {
        return resume_at(&outbox, &SlowDown { subscription, events_per_second, author }).await;
    }
    let ended = outbox.ask(async |connection| resume(connection, subscription.as_deref(), &author).await).await?;
    if ended.pause_time.is_none() {
        let name = named(&ended, " ");
        return say(&format!("{name}delivers as fast as its relays can again{}\n", deed(ended.deed_id)));
    }
    let what = if ended.subscription.is_empty() { String::new() } else { format!(" {}", ended.subscription) };
    say(&format!("resumed{what}; it was paused {}{}\n", describe(&ended), deed(ended.deed_id)))
}

async fn resume_at(outbox: &Outbox, slow_down: &SlowDown) -> Result<(), CommandError> {
    let (whole, each) = (slow_down.events_per_second, slow_down.subscription.is_none());
    let pace = format!("{whole} events per second at most{}", if each { " for each subscription" } else { "" });
    let prepared = match outbox.ask(async |connection| set_pace(connection, slow_down).await).await? {
        SetPace::Prepared(prepared) => prepared,
        SetPace::Changed(changed) => {
            let (name, deed) = (named(&changed, " "), deed(changed.deed_id));
            return say(&format!("{name}delivers {pace} from now on{deed}\n"));
        }
    };
    let deadline = Instant::now() + RELAYS_KNOW_LIMIT;
    while !outbox.ask(async |connection| relays_know(connection, prepared).await).await? {
        if Instant::now() > deadline {
            return Err(CommandError::Refused(
                "a relay has not read the pace, so the pause goes on: repeat the command once it has ended, or was replaced \
                 by one of this version"
                    .into(),
            ));
        }
        sleep(RELAYS_KNOW_POLL).await;
    }
    let ended = outbox.ask(async |connection| resume_slowly(connection, slow_down, prepared).await).await?;
    let name = named(&ended, " ");
    say(&format!("resumed {name}slowly: {pace}{}\n", deed(ended.deed_id)))
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
