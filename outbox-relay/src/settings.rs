//! The settings of the relay.

use std::net::SocketAddr;

use chassis::{DatabaseSettings, DatabaseUrl, ServeSettings, TlsSettings};
use clap::Args;

use crate::{access::TokenFile, operate::Descriptors, route::RouteSettings};

/// Settings of the relay.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Address for operators and their tools: gRPC (RelayAdmin, health), and HTTP (/console/, /livez, /readyz and
    /// /metrics). Without --token-file anybody who reaches it may do deeds by RelayAdmin, so bind it to loopback or to a
    /// network of your own.
    #[arg(long, env = "RELAY_OPS_LISTEN", default_value = "127.0.0.1:50053")]
    pub ops_listen: SocketAddr,
    /// Database with the outbox, as the role outbox_relay: postgres://user:password@host:5432/database.
    #[arg(long, env = "RELAY_DATABASE_URL", hide_env_values = true)]
    pub database_url: DatabaseUrl,
    /// The database itself, if a pooler that shares sessions stands before it: for the two sessions that have to be this
    /// relay's own. One listens to notifications, one shows that the relay lives. Without it, new events are polled for
    /// ten times a second, and what a dead relay had leased waits until its leases expire.
    #[arg(long, env = "RELAY_LISTEN_DATABASE_URL", hide_env_values = true)]
    pub listen_database_url: Option<DatabaseUrl>,
    /// Receiver of a subscription, as NAME=URL, such as inventory=https://host:52052. Repeat the flag for more
    /// subscriptions: each has its own queue. `outbox-relay subscribe` makes a subscription.
    #[arg(long = "route", env = "RELAY_ROUTES", value_name = "NAME=URL", value_delimiter = ',', required = true)]
    pub routes: Vec<RouteSettings>,
    /// Name of the service that owns the outbox. Its events carry this name as `source`.
    #[arg(long, env = "RELAY_SOURCE")]
    pub source: String,
    /// Workers on each route. A worker has one batch in flight at a time. Two workers wake on notifications, the others
    /// when a batch was full. All of them poll.
    #[arg(long, env = "RELAY_WORKERS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub workers: u32,
    /// Deliver at most this many events at once, or as many as fit into 3 MiB. A lease holds as many. With a backlog it
    /// holds up to 64, for several small deliveries one after the other.
    #[arg(long, env = "RELAY_BATCH", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub batch: u32,
    /// Lease events with at most this many MiB at once, and at most one event more. A relay holds that much for each
    /// worker.
    #[arg(long, env = "RELAY_LEASE_MIB", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub lease_mib: u32,
    /// Seconds that a lease lasts. A delivery may use three quarters of it.
    #[arg(long, env = "RELAY_LEASE_SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub lease_seconds: u32,
    /// Milliseconds between two polls of the outbox while no notification comes.
    #[arg(long, env = "RELAY_POLL_MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=600_000))]
    pub poll_ms: u64,
    /// Failures after which an event is dead. One counts only if the receiver took another event since the last.
    #[arg(long, env = "RELAY_ATTEMPTS", default_value_t = 10, value_parser = clap::value_parser!(i32).range(1..=1000))]
    pub attempts: i32,
    /// Back off for at most this many milliseconds after an event's first failure. The limit doubles with each further
    /// failure. The time within the limit is random.
    #[arg(long, env = "RELAY_BACK_OFF_MS", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=600_000))]
    pub back_off_ms: u32,
    /// Back off for at most this many milliseconds, however often an event has failed.
    #[arg(long, env = "RELAY_BACK_OFF_MAX_MS", default_value_t = 60_000, value_parser = clap::value_parser!(u32).range(1..=86_400_000))]
    pub back_off_max_ms: u32,
    /// File with the descriptors of your own events: an encoded FileDescriptorSet with all imports. RelayAdmin shows
    /// their payloads as JSON. Without it RelayAdmin decodes only the events of orders and inventory.
    #[arg(long, env = "RELAY_DESCRIPTORS", value_name = "FILE")]
    pub descriptors: Option<Descriptors>,
    /// File with a line `ROLE SHA256 NAME` for each token, as `outbox-relay token` prints it. RelayAdmin and the console
    /// then answer only those who send a token. It is read again for each call. Without it, the console answers programs on
    /// this machine, which may look and not act.
    #[arg(long, env = "RELAY_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<TokenFile>,
    /// Name by which browsers may ask for the console, beside localhost and addresses. Repeat the flag for more names.
    #[arg(long = "console-host", env = "RELAY_CONSOLE_HOSTS", value_name = "NAME", value_delimiter = ',')]
    pub console_hosts: Vec<String>,
    /// Limits on the use of the database.
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Limits of the server.
    #[command(flatten)]
    pub serve: ServeSettings,
    /// The certificates.
    #[command(flatten)]
    pub tls: TlsSettings,
}
