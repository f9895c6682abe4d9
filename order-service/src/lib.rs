//! order-service: takes orders. An order and the event that announces it are committed together or not at all.
//! Inventory's reply settles the order.

mod apply_reply;
mod cancel_order;
mod create_order;
mod erase_customer;
mod get_order;
mod group_calls;
mod grpc;
mod ids;
mod intake;
mod list_orders;
mod measure;
mod resend;
mod share;
mod validate_order;
mod watch_order;

use std::{net::SocketAddr, time::Duration};

use chassis::{
    CallSettings, Database, DatabaseSettings, DatabaseUrl, EndSettings, Ending, EraseArguments, EraseError, Listener,
    Ops, RunError, ServeSettings, Tls, TlsSettings,
};
use clap::Args;
use outbox::{InboxSettings, Notifier, Receiver, ResendArguments, ResendError};
use proto::{
    events::v1::event_receiver_server,
    orders::v1::order_service_server::{self, OrderServiceServer},
};
use sqlx::migrate::Migrator;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::Routes};
use tracing::info;

use crate::{apply_reply::ApplyReplies, erase_customer::EraseFromOrders, intake::Intake, watch_order::Watchers};
pub use crate::{intake::IntakeSettings, watch_order::WatchSettings};

/// Creates the tables of orders. Runs after [`outbox::MIGRATOR`].
static MIGRATOR: Migrator = sqlx::migrate!();

/// All migrations of this service's database, in order.
pub static MIGRATORS: [&Migrator; 2] = [&outbox::MIGRATOR, &MIGRATOR];

/// Settings of the serving process.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Address for callers: its API over gRPC.
    #[arg(long, env = "ORDER_SERVICE_LISTEN", default_value = "127.0.0.1:50051")]
    pub listen: SocketAddr,
    /// Address for relays: EventReceiver over gRPC. Whoever reaches it can pretend to be the source of events, so it is
    /// never that of callers. Let relays alone reach it.
    #[arg(long, env = "ORDER_SERVICE_EVENTS_LISTEN", default_value = "127.0.0.1:52051")]
    pub events_listen: SocketAddr,
    /// Address for operators and their tools, over HTTP: /livez, /readyz and /metrics. Off by default. There is no
    /// authentication, so bind it to loopback or to a network of your own.
    #[arg(long, env = "ORDER_SERVICE_OPS_LISTEN")]
    pub ops_listen: Option<SocketAddr>,
    /// The orders database, as the role order_service: postgres://user:password@host:5432/database.
    #[arg(long, env = "ORDERS_DATABASE_URL", hide_env_values = true)]
    pub database_url: DatabaseUrl,
    /// The database itself, if a pooler that shares sessions stands before it: for the one session that listens to
    /// changes of orders that are watched. Without it they are polled for.
    #[arg(long, env = "ORDERS_LISTEN_DATABASE_URL", hide_env_values = true)]
    pub listen_database_url: Option<DatabaseUrl>,
    /// How calls share transactions, and how many may wait.
    #[command(flatten)]
    pub intake: IntakeSettings,
    /// How many may watch orders.
    #[command(flatten)]
    pub watch: WatchSettings,
    /// The inbox.
    #[command(flatten)]
    pub inbox: InboxSettings,
    /// How the database is used.
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
    info!(?settings, "order-service starts");
    let ending = Ending::after(shutdown, &settings.end);
    let listeners = [Some(api.local_addr()?), Some(events.local_addr()?), settings.ops_listen];
    let tls = Tls::start(&settings.tls, &listeners.into_iter().flatten().collect::<Vec<_>>())?;
    let ops = Ops::start(settings.ops_listen, &settings.serve, &tls).await?;
    measure::describe();
    let url = settings.database_url.clone().with_generic_plans();
    let connecting = Database::connect(&url, &settings.database, &MIGRATORS, &ending.announced);
    let Some(database) = connecting.await? else { return Ok(()) };
    let notifier = |channel| Notifier::start(database.url().clone(), channel);
    let status = notifier(watch_order::CHANNEL);
    let replies = ApplyReplies { watchers: status.clone() };
    let receiver = Receiver::start(&database, replies, grpc::REFUSE, &settings.inbox, ending.begun.clone());
    let own_session = database.url_of_own_session(settings.listen_database_url.as_ref()).await?;
    let watchers = Watchers::start(database.clone(), &settings.watch, own_session, ending.begun.clone());
    let relay = notifier(outbox::CHANNEL);
    let begin_limit = Duration::from_millis(settings.database.database_acquire_ms);
    let share = settings.intake.share_among(settings.calls.calls);
    let intake = Intake::start(&database, &settings.intake, share, &relay, begin_limit);
    let orders = OrderServiceServer::new(grpc::Orders { database: database.clone(), intake, relay, status, watchers })
        .max_decoding_message_size(settings.serve.message_max())
        .accept_compressed(CompressionEncoding::Gzip);
    let listeners = [
        Listener::of(api, Routes::new(orders), &[order_service_server::SERVICE_NAME], proto::DESCRIPTORS)
            .shedding(settings.calls),
        Listener::of(events, Routes::new(receiver), &[event_receiver_server::SERVICE_NAME], proto::DESCRIPTORS),
    ];
    chassis::serve(listeners, &settings.serve, &tls, &database, &ops, ending).await?;
    info!("order-service ended");
    Ok(())
}

/// Sends orders' events again that a receiver has lost.
///
/// # Errors
/// [`ResendError`].
pub async fn resend(url: &DatabaseUrl, arguments: ResendArguments) -> Result<(), ResendError> {
    outbox::resend(url, arguments, &resend::SentByOrders).await
}

/// Erases a customer from the orders and from events that were discarded.
///
/// # Errors
/// [`EraseError`].
pub async fn erase_customer(url: &DatabaseUrl, arguments: &EraseArguments) -> Result<(), EraseError> {
    chassis::erase(url, &MIGRATORS, arguments, &EraseFromOrders).await
}
