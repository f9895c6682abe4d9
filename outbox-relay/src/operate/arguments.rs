//! The arguments of the operator's command line.

use std::path::PathBuf;

use chassis::{DatabaseUrl, PasswordFile, TlsFiles};
use clap::{Args, Subcommand};

use super::{Descriptors, NAME_CHARS, OPTIONAL_REASON_CHARS, REASON_CHARS, check_text};
use crate::{access::Role, route::is_name};

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
    Journey(AskingArguments),
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
  outbox-relay doctor --bundle report.json
  outbox-relay doctor --json | jq '.findings[] | select(.severity == \"SEVERITY_FAULT\")'")]
    Doctor(DoctorArguments),
    /// List, show, requeue or discard dead events
    #[command(subcommand)]
    Dead(DeadCommand),
    /// List what operators have done: who, when and why
    ///
    /// Each deed is in the database, written in the transaction of its effect. Nobody but the owner can change one. Commands
    /// and relays of earlier versions have left none. What `… resend` has done is in the table outbox_resent.
    #[command(after_long_help = "Examples:
  outbox-relay deeds
  outbox-relay deeds --event 0192f0c1-2345-7abc-8def-0123456789ab
  outbox-relay deeds --json | jq '.deeds[] | select(.done_by == \"ann\")'")]
    Deeds(DeedsArguments),
    /// Make a token for the console and RelayAdmin
    ///
    /// Prints the token, which is nowhere else, and the line for it in the file of `serve --token-file`.
    #[command(after_long_help = "Example:
  outbox-relay token operator 'Ann B.'")]
    Token(TokenArguments),
    /// Undo a deed, as far as that is still possible
    ///
    /// Requeued events are dead again, unless a relay holds them or they have failed since. Discarded events are restored,
    /// and restored ones that are still dead are discarded. A pause ends, and a pause that has ended begins again. All other
    /// events stay as they are, and are counted. The undo is a deed itself.
    #[command(after_long_help = "Example:
  outbox-relay undo 17 --reason 'the wrong type'")]
    Undo(UndoArguments),
    /// Pause the outbox, or one subscription: its relays lease nothing until `resume`
    ///
    /// Events that are already leased are still delivered. The pause is a row in the database. It outlives every
    /// process, and applies to relays that start later. Services can still enqueue events.
    #[command(after_long_help = "Examples:
  outbox-relay pause --reason 'the database is being moved'
  outbox-relay pause --subscription inventory --reason 'inventory is being moved'")]
    Pause(PauseArguments),
    /// Resume the outbox, or one subscription, after a pause
    ///
    /// With --per-second, relays deliver no more than so many events in a second, so that a backlog does not run a receiver
    /// over. A `resume` without it ends that. A new pause ends it, too.
    #[command(after_long_help = "Examples:
  outbox-relay resume
  outbox-relay resume --subscription inventory --per-second 200")]
    Resume(ResumeArguments),
}

/// The outbox to operate on.
#[derive(Args, Debug)]
pub struct Outbox {
    /// Database with the outbox, as the role outbox_relay: postgres://user:password@host:5432/database.
    #[arg(long, env = "RELAY_DATABASE_URL", hide_env_values = true)]
    pub(super) database_url: DatabaseUrl,
    #[command(flatten)]
    pub(super) password_file: PasswordFile,
}

/// Arguments of `status`.
#[derive(Args, Debug)]
pub struct StatusArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Print JSON: the fields of relay.v1.OutboxStatus.
    #[arg(long)]
    pub(super) json: bool,
    /// Repeat every second until Ctrl-C. With --json, print one line each time.
    #[arg(long)]
    pub(super) watch: bool,
}

/// Arguments of `doctor`.
#[derive(Args, Debug)]
pub struct DoctorArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Print JSON: the fields of relay.v1.Diagnosis.
    #[arg(long)]
    pub(super) json: bool,
    /// Also write a file for a report: findings, status, deeds, dead events by reason, and the server's settings. It has no
    /// password, token or payload. Reasons come from receivers, so read it before you pass it on.
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(super) bundle: Option<PathBuf>,
    #[command(flatten)]
    pub(super) tls: TlsFiles,
}

/// Arguments of `journey` and `why`.
#[derive(Args, Debug)]
pub struct JourneyArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Id of a subject, such as an order, or of an event.
    pub(super) id: String,
    /// Print JSON: the fields of relay.v1.Journey.
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `journey`.
#[derive(Args, Debug)]
pub struct AskingArguments {
    #[command(flatten)]
    pub(super) journey: JourneyArguments,
    #[command(flatten)]
    pub(super) tls: TlsFiles,
}

/// Arguments of `subscribe`.
#[derive(Args, Debug)]
pub struct SubscribeArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Name of the subscription: up to 63 of a-z, 0-9 and -.
    #[arg(value_parser = parse_subscription)]
    pub(super) name: String,
    /// Types of events: a full protobuf name, or a prefix that ends in *, such as orders.v1.* or *.
    #[arg(value_parser = parse_pattern)]
    pub(super) pattern: String,
    /// Your name, kept with the subscription.
    #[arg(long, env = "USER", value_parser = parse_name)]
    pub(super) by: String,
}

/// Arguments of `unsubscribe`.
#[derive(Args, Debug)]
pub struct UnsubscribeArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Name of the subscription.
    #[arg(value_parser = parse_subscription)]
    pub(super) name: String,
    /// Reason, kept with the subscription and its events.
    #[arg(long, value_parser = parse_reason)]
    pub(super) reason: String,
    /// Your name, kept with the subscription and its events.
    #[arg(long, env = "USER", value_parser = parse_name)]
    pub(super) by: String,
}

/// Arguments of `subscriptions`.
#[derive(Args, Debug)]
pub struct SubscriptionsArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Print JSON: a list of relay.v1.Subscription.
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `deeds`.
#[derive(Args, Debug)]
pub struct DeedsArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Show at most this many deeds.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub(super) limit: u16,
    /// Show only the deeds that have changed this event.
    #[arg(long, value_name = "EVENT_ID")]
    pub(super) event: Option<String>,
    /// Print JSON: the deeds, as in relay.v1.ListDeedsResponse.
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `token`.
#[derive(Args, Debug)]
pub struct TokenArguments {
    /// What its owner may do: look (viewer), or do deeds, too (operator).
    #[arg(value_name = "viewer|operator")]
    pub(super) role: Role,
    /// Name of its owner, under which deeds are kept.
    #[arg(value_parser = parse_name)]
    pub(super) name: String,
}

/// Arguments of `undo`.
#[derive(Args, Debug)]
pub struct UndoArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Id of the deed, as `deeds` shows it.
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    pub(super) deed_id: i64,
    /// Reason, kept with the deed.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = parse_optional_reason)]
    pub(super) reason: String,
    /// Your name, kept with the deed.
    #[arg(long, env = "USER", value_parser = parse_name)]
    pub(super) by: String,
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
    /// Count dead events by subscription, type and code of their last failure
    #[command(after_long_help = "A group can be requeued or discarded as one, by its type and its CODE:
  outbox-relay dead groups
  outbox-relay dead requeue --all --type orders.v1.OrderCreated --code UNKNOWN_SKU")]
    Groups(GroupsArguments),
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
  outbox-relay dead requeue --all --type orders.v1.OrderCreated --reason 'inventory is mended'
  outbox-relay dead requeue --all --yes")]
    Requeue(RequeueArguments),
    /// Discard dead events, and free the later events that they held back
    ///
    /// The whole events move to the table outbox_discarded, with your name, the time and the reason. `dead restore` brings
    /// one back, and `undo` all of them. If one of the named events cannot be discarded, none is. --all discards the oldest
    /// first, in pieces, as `dead requeue` does.
    ///
    /// --refuse also ends what the event tells of, in the same transaction: an order that waits is REJECTED with your reason.
    #[command(after_long_help = "Examples:
  outbox-relay dead discard 0192f0c1-2345-7abc-8def-0123456789ab --reason 'test order of the pilot'
  outbox-relay dead discard --all --type test.v1.Ping --reason 'the test has ended'
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
    pub(super) outbox: Outbox,
    /// Show at most this many events.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub(super) limit: u16,
    /// Show only events of this type: a full protobuf name, such as orders.v1.OrderCreated.
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_name)]
    pub(super) event_type: Option<String>,
    /// Show only events of this subscription.
    #[arg(long, value_parser = parse_subscription)]
    pub(super) subscription: Option<String>,
    /// Show only events whose last reason has this code: what precedes its first colon.
    #[arg(long, value_name = "CODE", value_parser = parse_reason)]
    pub(super) code: Option<String>,
    /// Show the events that have failed and are not dead, instead of those that are.
    #[arg(long)]
    pub(super) failing: bool,
    /// Print JSON: the events and their total number, as in relay.v1.ListDeadEventsResponse.
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `dead groups`.
#[derive(Args, Debug)]
pub struct GroupsArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Count only events of this type: a full protobuf name, such as orders.v1.OrderCreated.
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_name)]
    pub(super) event_type: Option<String>,
    /// Count only events of this subscription.
    #[arg(long, value_parser = parse_subscription)]
    pub(super) subscription: Option<String>,
    /// Print JSON: the fields of relay.v1.GroupDeadEventsResponse.
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `dead show`.
#[derive(Args, Debug)]
pub struct ShowArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Id of the event.
    pub(super) event_id: String,
    /// File with the descriptors of your own events: an encoded FileDescriptorSet with all imports. Without it only the
    /// events of orders and inventory are decoded.
    #[arg(long, env = "RELAY_DESCRIPTORS", value_name = "FILE")]
    pub(super) descriptors: Option<Descriptors>,
    /// Print JSON: the fields of relay.v1.DeadEventContent, with the payload as `payload`.
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `dead requeue`.
#[derive(Args, Debug)]
pub struct RequeueArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Ids of the events.
    #[arg(value_name = "EVENT_ID", required_unless_present = "all", conflicts_with = "all")]
    pub(super) event_ids: Vec<String>,
    /// Requeue all dead events that are not too old. Asks for confirmation.
    #[arg(long)]
    pub(super) all: bool,
    /// With --all, requeue only events of this type.
    #[arg(long = "type", value_name = "TYPE", conflicts_with = "event_ids", value_parser = parse_name)]
    pub(super) event_type: Option<String>,
    /// With --all, requeue only events whose last reason has this code: what precedes its first colon.
    #[arg(long, value_name = "CODE", conflicts_with = "event_ids", value_parser = parse_reason)]
    pub(super) code: Option<String>,
    /// Requeue only for this subscription. Otherwise for each in which the events are dead.
    #[arg(long, value_parser = parse_subscription)]
    pub(super) subscription: Option<String>,
    /// With --all, do not ask. Required if stdin is not a terminal.
    #[arg(long, conflicts_with = "event_ids")]
    pub(super) yes: bool,
    /// Reason, kept with the deed.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = parse_optional_reason)]
    pub(super) reason: String,
    /// Your name, kept with the deed.
    #[arg(long, env = "USER", value_parser = parse_name)]
    pub(super) by: String,
}

/// Arguments of `dead discard`.
#[derive(Args, Debug)]
pub struct DiscardArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Ids of the events.
    #[arg(value_name = "EVENT_ID", required_unless_present = "all", conflicts_with = "all")]
    pub(super) event_ids: Vec<String>,
    /// Discard all dead events that match. Asks for confirmation.
    #[arg(long)]
    pub(super) all: bool,
    /// With --all, discard only events of this type.
    #[arg(long = "type", value_name = "TYPE", conflicts_with = "event_ids", value_parser = parse_name)]
    pub(super) event_type: Option<String>,
    /// With --all, discard only events whose last reason has this code: what precedes its first colon.
    #[arg(long, value_name = "CODE", conflicts_with = "event_ids", value_parser = parse_reason)]
    pub(super) code: Option<String>,
    /// Discard only for this subscription. Otherwise for each in which the events are dead.
    #[arg(long, value_parser = parse_subscription)]
    pub(super) subscription: Option<String>,
    /// With --all, do not ask. Required if stdin is not a terminal.
    #[arg(long, conflicts_with = "event_ids")]
    pub(super) yes: bool,
    /// Reason, kept with the events.
    #[arg(long, value_parser = parse_reason)]
    pub(super) reason: String,
    /// Also refuse what the event tells of, for this reason. Customers read it. It cannot be undone. Only for one event.
    #[arg(long, conflicts_with = "all")]
    pub(super) refuse: bool,
    /// Your name, kept with the events.
    #[arg(long, env = "USER", value_parser = parse_name)]
    pub(super) by: String,
}

/// Arguments of `dead restore`.
#[derive(Args, Debug)]
pub struct RestoreArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Id of the event.
    pub(super) event_id: String,
    /// Restore it only for this subscription. Otherwise for each in which it was discarded.
    #[arg(long, value_parser = parse_subscription)]
    pub(super) subscription: Option<String>,
    /// Reason, kept with the deed.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = parse_optional_reason)]
    pub(super) reason: String,
    /// Your name, kept with the event.
    #[arg(long, env = "USER", value_parser = parse_name)]
    pub(super) by: String,
}

/// Arguments of `pause`.
#[derive(Args, Debug)]
pub struct PauseArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Pause only this subscription.
    #[arg(long, value_parser = parse_subscription)]
    pub(super) subscription: Option<String>,
    /// Reason, shown in the status.
    #[arg(long, value_parser = parse_reason)]
    pub(super) reason: String,
    /// Your name, shown in the status.
    #[arg(long, env = "USER", value_parser = parse_name)]
    pub(super) by: String,
}

/// Arguments of `resume`.
#[derive(Args, Debug)]
pub struct ResumeArguments {
    #[command(flatten)]
    pub(super) outbox: Outbox,
    /// Resume only this subscription.
    #[arg(long, value_parser = parse_subscription)]
    pub(super) subscription: Option<String>,
    /// Deliver at most this many events in a second, until the next `resume`. Waits until every relay knows.
    #[arg(long, value_name = "EVENTS", value_parser = clap::value_parser!(i32).range(1..=1_000_000))]
    pub(super) per_second: Option<i32>,
    /// Reason, kept with the deed.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = parse_optional_reason)]
    pub(super) reason: String,
    /// Your name, kept with the deed.
    #[arg(long, env = "USER", value_parser = parse_name)]
    pub(super) by: String,
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

fn parse_optional_reason(text: &str) -> Result<String, String> {
    check_text(text, OPTIONAL_REASON_CHARS)
}

fn parse_reason(text: &str) -> Result<String, String> {
    check_text(text, REASON_CHARS)
}
