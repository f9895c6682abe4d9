//! Sends events again that a receiver has lost, because its database was restored to an earlier state: the command
//! `resend` of a service.
//!
//! The events are made again from the service's own tables, under the ids that they had. The receiver is asked which of
//! them it has applied (`Recall`), and the others are enqueued again, for its subscription alone. They keep the time at
//! which they were first enqueued. So the receiver's own rules hold: an event that it has is a DUPLICATE, and one that it
//! may have forgotten is STALE. Whatever this command gets wrong, nothing is applied twice.
//!
//! It works in pieces, each of which is committed. Whatever stops it, the same command again goes on with the rest: what
//! was enqueued waits in the outbox, or the receiver has it.

mod judge;
mod outbox;
mod receiver;

use std::{future::Future, io::Write, time::Duration};

use chassis::{DatabaseUrl, PasswordFile, Tls, TlsError, TlsFiles, keep_erasures_out, parse_text, require_own_session};
use clap::Args;
use prost_types::Timestamp;
use sqlx::{Connection, PgConnection, types::time::OffsetDateTime};
use tokio::time::timeout;
use tonic::transport::Uri;
use uuid::Uuid;

use self::{
    judge::{Evidence, Verdict, judge},
    outbox::{Subscription, enqueue_again, find_subscription, read_kept, wake_relays},
    receiver::Receiver,
};
use crate::{AggregateId, EventId, NewEvent, timestamp};

/// Aggregates whose events are made, recalled and enqueued at once.
const PIECE: usize = 500;

/// Arguments of a service's command `resend`.
#[derive(Args, Clone, Debug)]
pub struct ResendArguments {
    /// Name of the subscription whose receiver has lost events.
    #[arg(long, value_name = "NAME")]
    subscription: String,
    /// URL of that receiver, such as https://host:52052. It is asked what it remembers.
    #[arg(long, value_name = "URL", value_parser = parse_receiver)]
    receiver: Uri,
    /// Look at the events that were enqueued since this time, such as 2026-11-30T08:00:00Z. Take a time before that of the
    /// state to which the receiver was restored.
    #[arg(long, value_name = "TIME", value_parser = parse_time, required_unless_present = "orders", conflicts_with = "orders")]
    since: Option<OffsetDateTime>,
    /// Look at all events of these orders.
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    orders: Vec<Uuid>,
    /// Show what is lost, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask the receiver which of the events it has applied, for one that cannot say. All events of the orders are
    /// sent, and the receiver drops those that it has.
    #[arg(long, requires = "orders")]
    without_recall: bool,
    /// Reason, kept with each event that is enqueued.
    #[arg(long, value_parser = parse_text, required_unless_present = "dry_run")]
    reason: Option<String>,
    /// Your name, kept with each event that is enqueued.
    #[arg(long, env = "USER", value_parser = parse_text, required_unless_present = "dry_run")]
    by: Option<String>,
    /// Where the database's password is.
    #[command(flatten)]
    password_file: PasswordFile,
    /// The certificates, for a receiver with TLS.
    #[command(flatten)]
    tls: TlsFiles,
}

fn parse_receiver(text: &str) -> Result<Uri, &'static str> {
    let uri = text
        .parse::<Uri>()
        .ok()
        .filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some());
    uri.ok_or("must look like https://host:52052 or http://localhost:52052")
}

fn parse_time(text: &str) -> Result<OffsetDateTime, &'static str> {
    let time = text.parse::<Timestamp>().ok().and_then(|time| OffsetDateTime::from_unix_timestamp(time.seconds).ok());
    time.ok_or("must look like 2026-11-30T08:00:00Z")
}

/// An event that a service has enqueued once, made again from its tables.
#[derive(Clone, Debug)]
pub struct SentEvent {
    /// The event, without the trace of the call that caused it.
    pub event: NewEvent,
    /// When it was enqueued: the start of that transaction.
    pub at: OffsetDateTime,
    /// Whether it had the id that is derived. Events of earlier versions had others, and nobody knows them.
    pub has_derived_id: bool,
}

/// The aggregates that one query has found.
#[derive(Debug)]
pub struct Found {
    /// Those that have enqueued something since the time that was asked for.
    pub ids: Vec<Uuid>,
    /// The last one that was looked at; `None` if there is no further one.
    pub last: Option<Uuid>,
}

/// What a service has sent, as its own tables tell.
pub trait Sent {
    /// Looks at some thousand aggregates after this id, in the order of their ids.
    ///
    /// # Errors
    /// Those of the database.
    fn find(
        &self,
        connection: &mut PgConnection,
        since: OffsetDateTime,
        after: Uuid,
    ) -> impl Future<Output = Result<Found, sqlx::Error>>;

    /// All events of these aggregates, those of one in their sequence.
    ///
    /// # Errors
    /// Those of the database.
    fn read(
        &self,
        connection: &mut PgConnection,
        ids: &[Uuid],
    ) -> impl Future<Output = Result<Vec<SentEvent>, sqlx::Error>>;
}

/// Why events were not sent again, on one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ResendError {
    /// The database cannot be reached.
    #[error("cannot connect to {database}: {why}")]
    Connect {
        /// The database, without the password.
        database: String,
        /// The cause.
        why: String,
    },
    /// A customer is erased just now.
    #[error("erase-customer works on this database: repeat the command when it has ended")]
    Erasing,
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Nobody has subscribed this name.
    #[error("{name} is no subscription; there {there}")]
    NoSubscription {
        /// The name.
        name: String,
        /// The names there are.
        there: String,
    },
    /// The receiver does not answer, or does not say what it must.
    #[error("{receiver} {why}")]
    Receiver {
        /// Its URL.
        receiver: Uri,
        /// What it answered, and what to do.
        why: String,
    },
    /// Some events cannot be sent again.
    #[error("{refused} of the events cannot be sent again, as the lines above say: repair their effects by hand")]
    Refused {
        /// Their number.
        refused: u64,
    },
    /// Orders that do not exist were named. Nothing was changed.
    #[error("nothing was ever sent about {0}")]
    Unknown(String),
    /// The output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
    /// The database failed.
    #[error("the database failed: {0}; what was enqueued until then stays: repeat the command to go on")]
    Database(#[from] sqlx::Error),
}

/// How many events have which verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    lost: u64,
    applied: u64,
    waiting: u64,
    discarded: u64,
    earlier: u64,
    refused: u64,
    enqueued: u64,
}

impl Counts {
    fn add(&mut self, verdict: &Verdict) {
        *match verdict {
            Verdict::Lost => &mut self.lost,
            Verdict::Applied => &mut self.applied,
            Verdict::Waiting => &mut self.waiting,
            Verdict::Discarded => &mut self.discarded,
            Verdict::Earlier => &mut self.earlier,
            Verdict::UnknownId | Verdict::TooOld => &mut self.refused,
        } += 1;
    }

    fn line(&self, dry_run: bool) -> String {
        let Self { lost, applied, waiting, discarded, earlier, refused, enqueued } = self;
        let enqueued =
            if dry_run { "none enqueued, since this was a dry run".into() } else { format!("{enqueued} enqueued") };
        format!(
            "{lost} lost, {enqueued}; {applied} applied, {waiting} on their way, {discarded} discarded, {earlier} older \
             than the subscription, {refused} refused\n"
        )
    }
}

/// The command `resend`.
///
/// # Errors
/// [`ResendError`].
pub async fn resend(url: &DatabaseUrl, arguments: ResendArguments, sent: &impl Sent) -> Result<(), ResendError> {
    let mut connection = connect(&url.clone().with_password_file(&arguments.password_file)).await?;
    // Or events could name a customer who was erased after their orders were read.
    if !keep_erasures_out(&mut connection).await? {
        return Err(ResendError::Erasing);
    }
    let subscription = find_subscription(&mut connection, &arguments.subscription).await?;
    let mut receiver = Receiver::connect_lazily(arguments.receiver.clone(), &Tls::read(&arguments.tls)?);
    let max_age = receiver.max_age().await?;
    if !arguments.without_recall {
        // It names no event. So a receiver that cannot recall is found before anything is done.
        receiver.recall(&[]).await?;
    }
    let mut resend = Resend { arguments, subscription, receiver, max_age, counts: Counts::default() };
    resend.walk(&mut connection, sent).await?;
    let Resend { arguments, counts, .. } = resend;
    if counts.enqueued > 0 {
        wake_relays(&mut connection).await;
    }
    say(&counts.line(arguments.dry_run))?;
    connection.close().await?;
    if counts.refused > 0 { Err(ResendError::Refused { refused: counts.refused }) } else { Ok(()) }
}

async fn connect(url: &DatabaseUrl) -> Result<PgConnection, ResendError> {
    let failed = |why: String| ResendError::Connect { database: url.to_string(), why };
    let limit = url.connect_limit();
    let connection = match timeout(limit, url.connect()).await {
        Ok(connected) => connected.map_err(|cause| failed(cause.to_string()))?,
        Err(_) => return Err(failed(format!("no answer within {limit:?}"))),
    };
    require_own_session(url).await.map_err(|cause| failed(cause.to_string()))?;
    Ok(connection)
}

/// One run of the command.
struct Resend {
    arguments: ResendArguments,
    subscription: Subscription,
    receiver: Receiver,
    max_age: Duration,
    counts: Counts,
}

impl Resend {
    /// Visits the orders that were named, or all that have sent something since the time.
    async fn walk(&mut self, connection: &mut PgConnection, sent: &impl Sent) -> Result<(), ResendError> {
        let Some(since) = self.arguments.since else {
            return self.visit_named(connection, sent).await;
        };
        let mut after = Some(Uuid::nil());
        while let Some(from) = after {
            let Found { ids, last } = sent.find(connection, since, from).await?;
            for piece in ids.chunks(PIECE) {
                let events = sent.read(connection, piece).await?;
                let events = events.into_iter().filter(|event| event.at >= since).collect();
                self.visit(connection, events).await?;
            }
            after = last;
        }
        Ok(())
    }

    async fn visit_named(&mut self, connection: &mut PgConnection, sent: &impl Sent) -> Result<(), ResendError> {
        let mut named = self.arguments.orders.clone();
        named.sort_unstable();
        named.dedup();
        let mut pieces = Vec::new();
        for piece in named.chunks(PIECE) {
            pieces.push(sent.read(connection, piece).await?);
        }
        let is_unknown = |id: &&Uuid| !pieces.iter().flatten().any(|sent| sent.event.aggregate_id.uuid() == **id);
        let unknown: Vec<String> = named.iter().filter(is_unknown).map(Uuid::to_string).collect();
        if !unknown.is_empty() {
            return Err(ResendError::Unknown(unknown.join(", ")));
        }
        for events in pieces {
            self.visit(connection, events).await?;
        }
        Ok(())
    }

    /// Judges the events, prints those that are lost or refused, and enqueues the lost ones.
    ///
    /// What waits is read before the receiver is asked. An event that was delivered in between is then left alone, and one
    /// that was gone before and that the receiver does not know is lost.
    async fn visit(&mut self, connection: &mut PgConnection, events: Vec<SentEvent>) -> Result<(), ResendError> {
        if events.is_empty() {
            return Ok(());
        }
        let kept = read_kept(connection, &self.subscription, &events).await?;
        let ids: Vec<EventId> = events.iter().map(|sent| sent.event.id).collect();
        let applied = match self.arguments.without_recall {
            true => Vec::new(),
            false => self.receiver.recall(&ids).await?,
        };
        let evidence = Evidence {
            applied: &applied.into_iter().collect(),
            kept: &kept,
            subscribed_at: self.subscription.created_at,
            oldest: kept.now - self.max_age,
        };
        let mut lost = Vec::new();
        for sent in events.into_iter().filter(|sent| kept.is_for_subscription(sent)) {
            let verdict = judge(&sent, &evidence);
            self.counts.add(&verdict);
            if let Some(line) = describe(&sent, &verdict, self.max_age) {
                say(&line)?;
            }
            if verdict == Verdict::Lost {
                lost.push(sent);
            }
        }
        self.enqueue(connection, &lost).await
    }

    async fn enqueue(&mut self, connection: &mut PgConnection, lost: &[SentEvent]) -> Result<(), ResendError> {
        let ResendArguments { dry_run: false, by: Some(by), reason: Some(reason), .. } = &self.arguments else {
            return Ok(());
        };
        if !lost.is_empty() {
            self.counts.enqueued += enqueue_again(connection, &self.subscription, lost, by, reason).await?;
        }
        Ok(())
    }
}

fn describe(sent: &SentEvent, verdict: &Verdict, max_age: Duration) -> Option<String> {
    let why = match verdict {
        Verdict::Lost => "lost".to_owned(),
        Verdict::UnknownId => "refused: a version without derived ids has sent it, so its id is not known".to_owned(),
        Verdict::TooOld => {
            let hours = max_age.as_secs() / 3600;
            format!("refused: older than {hours} hours, so the receiver may have applied and forgotten it")
        }
        Verdict::Applied | Verdict::Waiting | Verdict::Discarded | Verdict::Earlier => return None,
    };
    let NewEvent { id, aggregate_id, sequence, event_type, .. } = &sent.event;
    let (id, at) =
        (if *verdict == Verdict::UnknownId { "unknown".to_owned() } else { id.to_string() }, timestamp(sent.at));
    Some(format!("event {id}  {event_type}  {aggregate_id}  {sequence}  {at}  {why}\n"))
}

fn say(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// The position of an event in the sequence of its aggregate.
type Position = (AggregateId, i32);
