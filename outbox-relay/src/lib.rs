//! outbox-relay: leases outbox rows, delivers them over gRPC, and deletes what was handled. It knows no business: it runs
//! beside any database with the outbox table, towards any service that implements `events.v1.EventReceiver`.

mod deliver;
mod lease;
mod relay;
mod route;
mod settle;
mod wake;

use std::{net::SocketAddr, time::Duration};

use chassis::{Database, DatabaseSettings, DatabaseUrl, RunError, ServeSettings, Services};
use clap::Args;
use sqlx::migrate::Migrator;
use tokio::{net::TcpListener, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Uri};
use tracing::{info, warn};

use crate::{deliver::Receiver, relay::Worker, route::Route, wake::Wake};

static MIGRATORS: [&Migrator; 1] = [&outbox::MIGRATOR];

/// Settings of the relay.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Address to serve gRPC on.
    #[arg(long, env = "RELAY_LISTEN", default_value = "127.0.0.1:50053")]
    pub listen: SocketAddr,
    /// The database with the outbox, as the role outbox_relay: postgres://user:password@host:5432/database.
    #[arg(long, env = "RELAY_DATABASE_URL", hide_env_values = true)]
    pub database_url: DatabaseUrl,
    /// The service that receives the events: http://host:port.
    #[arg(long, env = "RELAY_RECEIVER", value_parser = parse_receiver)]
    pub receiver: Uri,
    /// Name of the service whose outbox this is: the `source` of its events.
    #[arg(long, env = "RELAY_SOURCE")]
    pub source: String,
    /// Leases and deliveries under way at once.
    #[arg(long, env = "RELAY_WORKERS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub workers: u32,
    /// Events in one lease, and so in one delivery, at most.
    #[arg(long, env = "RELAY_BATCH", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub batch: u32,
    /// Seconds a lease holds its events; a delivery ends within three quarters of it.
    #[arg(long, env = "RELAY_LEASE_SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub lease_seconds: u32,
    /// Milliseconds between looks into the outbox when no notification comes.
    #[arg(long, env = "RELAY_POLL_MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub poll_ms: u64,
    /// Deliveries of an event that may fail for the event's own reasons before it is dead.
    #[arg(long, env = "RELAY_ATTEMPTS", default_value_t = 10, value_parser = clap::value_parser!(i32).range(1..=1000))]
    pub attempts: i32,
    /// Milliseconds the first back-off of an event lasts at most; each further one may last twice as long.
    #[arg(long, env = "RELAY_BACK_OFF_MS", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=600_000))]
    pub back_off_ms: u32,
    /// Milliseconds any back-off of an event lasts at most.
    #[arg(long, env = "RELAY_BACK_OFF_MAX_MS", default_value_t = 60_000, value_parser = clap::value_parser!(u32).range(1..=86_400_000))]
    pub back_off_max_ms: u32,
    /// Use of the database.
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Limits of the server.
    #[command(flatten)]
    pub serve: ServeSettings,
}

fn parse_receiver(text: &str) -> Result<Uri, &'static str> {
    let uri = text.parse::<Uri>().ok().filter(|uri| uri.scheme_str() == Some("http") && uri.host().is_some());
    uri.ok_or("not the URL of a receiver; it looks like http://host:50052")
}

/// Relays until `shutdown`; then leases nothing more, and settles or releases what is in flight within the drain time.
///
/// # Errors
/// [`RunError`].
pub async fn run(listener: TcpListener, settings: Settings, shutdown: CancellationToken) -> Result<(), RunError> {
    info!(?settings, "outbox-relay starts");
    let Some(database) = Database::connect(&settings.database_url, &settings.database, &shutdown).await? else {
        return Ok(());
    };
    chassis::check_schema(&database, &MIGRATORS).await?;
    let workers = tokio::spawn(run_workers(database.clone(), settings.clone(), shutdown.clone()));
    let services = Services { routes: Routes::default(), names: &[], descriptors: proto::DESCRIPTORS };
    chassis::serve(listener, &settings.serve, services, &database, shutdown).await?;
    let ended = workers.await.unwrap_or(Err(RunError::Panicked("a worker")));
    info!("outbox-relay ended");
    ended
}

/// Runs the workers until `shutdown`, then gives them most of the drain time to settle, and the rest to release. A worker
/// that ends before shuts the process down.
async fn run_workers(database: Database, settings: Settings, shutdown: CancellationToken) -> Result<(), RunError> {
    let hurry = CancellationToken::new();
    let wake = Wake::listen(settings.database_url.options(), Duration::from_millis(settings.poll_ms), shutdown.clone());
    let route = Route::default();
    let mut workers = JoinSet::new();
    for number in 1..=settings.workers {
        // A channel is one HTTP/2 connection: with one a worker, a receiver's replicas share the load.
        let worker = Worker {
            number,
            database: database.clone(),
            receiver: Receiver::connect_lazily(&settings),
            settings: settings.clone(),
            route: route.clone(),
            wake: wake.clone(),
            shutdown: shutdown.clone(),
            hurry: hurry.clone(),
        };
        workers.spawn(worker.run());
    }
    let panicked = tokio::select! {
        () = shutdown.cancelled() => false,
        ended = workers.join_next() => matches!(ended, Some(Err(_))),
    };
    shutdown.cancel();
    let drain = Duration::from_secs(settings.serve.drain_seconds);
    if timeout(drain.mul_f32(0.6), join_all(&mut workers)).await.is_err() {
        hurry.cancel();
        if timeout(drain.mul_f32(0.3), join_all(&mut workers)).await.is_err() {
            warn!("drain time is over: what is still leased is delivered again when its lease expires");
        }
    }
    if panicked { Err(RunError::Panicked("a worker")) } else { Ok(()) }
}

async fn join_all(workers: &mut JoinSet<()>) {
    while let Some(ended) = workers.join_next().await {
        if let Err(error) = ended {
            warn!(%error, "a worker ended early; its lease will expire");
        }
    }
}
