//! inventory-service: applies each event of an order once. The transaction that records the event moves stock and
//! enqueues the answer.

mod adjust_stock;
mod apply_event;
mod decide;
mod get_stock;
mod grpc;
mod lock_batch;
mod order_event;
mod release_stock;
mod resend;
mod reservations;
mod reserve_stock;
mod seed;
mod stock;
mod write_batch;

use std::net::SocketAddr;

use chassis::{
    CallSettings, Database, DatabaseSettings, DatabaseUrl, EndSettings, Ending, Listener, Ops, RunError, ServeSettings,
    Tls, TlsSettings,
};
use clap::Args;
use outbox::{InboxSettings, Notifier, Receiver, ResendArguments, ResendError};
use proto::{
    events::v1::event_receiver_server,
    inventory::v1::inventory_service_server::{self, InventoryServiceServer},
};
pub use seed::seed;
use sqlx::migrate::Migrator;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::Routes};
use tracing::info;

use crate::apply_event::ApplyOrderEvents;

/// Creates the tables of stock. Runs after [`outbox::MIGRATOR`].
static MIGRATOR: Migrator = sqlx::migrate!();

/// All migrations of this service's database, in the order they run.
pub static MIGRATORS: [&Migrator; 2] = [&outbox::MIGRATOR, &MIGRATOR];

/// Settings of the serving process.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Address for callers: its API over gRPC.
    #[arg(long, env = "INVENTORY_SERVICE_LISTEN", default_value = "127.0.0.1:50052")]
    pub listen: SocketAddr,
    /// Address for relays: EventReceiver over gRPC. Whoever reaches it can pretend to be the source of events, so it is
    /// never that of callers. Let relays alone reach it.
    #[arg(long, env = "INVENTORY_SERVICE_EVENTS_LISTEN", default_value = "127.0.0.1:52052")]
    pub events_listen: SocketAddr,
    /// Address for operators and their tools, over HTTP: /livez, /readyz and /metrics. Off by default. There is no
    /// authentication, so bind it to loopback or to a network of your own.
    #[arg(long, env = "INVENTORY_SERVICE_OPS_LISTEN")]
    pub ops_listen: Option<SocketAddr>,
    /// The inventory database, as the role inventory_service: postgres://user:password@host:5432/database.
    #[arg(long, env = "INVENTORY_DATABASE_URL", hide_env_values = true)]
    pub database_url: DatabaseUrl,
    /// The inbox.
    #[command(flatten)]
    pub inbox: InboxSettings,
    /// Use of the database.
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Limits of the server.
    #[command(flatten)]
    pub serve: ServeSettings,
    /// How many calls may wait.
    #[command(flatten)]
    pub calls: CallSettings,
    /// The certificates.
    #[command(flatten)]
    pub tls: TlsSettings,
    /// How the server and its connections end.
    #[command(flatten)]
    pub end: EndSettings,
}

/// Serves callers on the first socket and relays on the second, until the end that `shutdown` announces.
///
/// # Errors
/// [`RunError`].
pub async fn run(
    [api, events]: [TcpListener; 2],
    settings: Settings,
    shutdown: CancellationToken,
) -> Result<(), RunError> {
    info!(?settings, "inventory-service starts");
    let ending = Ending::after(shutdown, &settings.end);
    let listeners = [Some(api.local_addr()?), Some(events.local_addr()?), settings.ops_listen];
    let tls = Tls::start(&settings.tls, &listeners.into_iter().flatten().collect::<Vec<_>>())?;
    let ops = Ops::start(settings.ops_listen, &settings.serve, &tls).await?;
    let url = settings.database_url.clone().with_generic_plans();
    let connecting = Database::connect(&url, &settings.database, &MIGRATORS, &ending.announced);
    let Some(database) = connecting.await? else { return Ok(()) };
    let relay = Notifier::start(database.url().clone(), outbox::CHANNEL);
    let receiver =
        Receiver::start(&database, ApplyOrderEvents { relay }, grpc::REFUSE, &settings.inbox, ending.begun.clone());
    let inventory = InventoryServiceServer::new(grpc::Inventory { database: database.clone() })
        .max_decoding_message_size(settings.serve.message_max())
        .accept_compressed(CompressionEncoding::Gzip);
    let listeners = [
        Listener::of(api, Routes::new(inventory), &[inventory_service_server::SERVICE_NAME], proto::DESCRIPTORS)
            .shedding(settings.calls),
        Listener::of(events, Routes::new(receiver), &[event_receiver_server::SERVICE_NAME], proto::DESCRIPTORS),
    ];
    chassis::serve(listeners, &settings.serve, &tls, &database, &ops, ending).await?;
    info!("inventory-service ended");
    Ok(())
}

/// Sends answers again that a receiver has lost.
///
/// # Errors
/// [`ResendError`].
pub async fn resend(url: &DatabaseUrl, arguments: ResendArguments) -> Result<(), ResendError> {
    outbox::resend(url, arguments, &resend::SentByInventory).await
}
