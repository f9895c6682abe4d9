//! A third service: it gives customers points for their orders, and counts each order once, however often its event is
//! delivered. It needs no other code, on a server with the roles of migrations/bootstrap.
//!
//! Route events to it with `outbox-relay serve --route …`, or try it alone:
//!
//! ```text
//! cargo run -p outbox --example loyalty_service -- --database-url postgres://owner:password@127.0.0.1/loyalty
//! grpcurl -plaintext localhost:50055 events.v1.EventReceiver/Describe
//! ```

use std::{net::SocketAddr, process::ExitCode};

use chassis::{Database, DatabaseSettings, DatabaseUrl, Refuse, ServeSettings, Services, serve_until_signal};
use outbox::{ApplyError, Envelope, Handler, InboxSettings, Receiver, Refusal};
use proto::{events::v1::event_receiver_server::SERVICE_NAME, orders::v1::OrderCreated};
use sqlx::{Postgres, Transaction, migrate::Migrator};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

static MIGRATORS: [&Migrator; 1] = [&outbox::MIGRATOR];

struct Loyalty;

impl Handler for Loyalty {
    type Event = OrderCreated;

    fn read(&self, envelope: &Envelope<'_>) -> Result<OrderCreated, Refusal> {
        let order: OrderCreated = envelope.decode()?;
        // PostgreSQL allows no NUL in text; one such order would fail its whole batch.
        let valid = !order.customer_id.contains('\0');
        valid.then_some(order).ok_or_else(|| Refusal::reject("INVALID_ORDER", "customer_id contains NUL"))
    }

    async fn apply(&self, tx: &mut Transaction<'_, Postgres>, orders: &[&OrderCreated]) -> Result<(), ApplyError> {
        // In the order of the customers, so that two batches cannot deadlock over their rows.
        let statement = "-- loyalty: add points
            INSERT INTO points SELECT customer, sum(total) FROM unnest($1::text[], $2::bigint[]) AS o (customer, total)
            GROUP BY customer ORDER BY customer
            ON CONFLICT (customer) DO UPDATE SET points = points.points + excluded.points";
        let (customers, totals): (Vec<&str>, Vec<i64>) =
            orders.iter().map(|order| (order.customer_id.as_str(), order.total_minor)).unzip();
        sqlx::query(statement).bind(customers).bind(totals).execute(&mut **tx).await?;
        Ok(())
    }
}

#[derive(clap::Parser)]
struct Settings {
    #[arg(long, default_value = "127.0.0.1:50055")]
    listen: SocketAddr,
    #[arg(long)]
    database_url: DatabaseUrl,
    #[command(flatten)]
    inbox: InboxSettings,
    #[command(flatten)]
    database: DatabaseSettings,
    #[command(flatten)]
    serve: ServeSettings,
}

fn main() -> ExitCode {
    chassis::main(async |settings: Settings| {
        chassis::log_to_stdout();
        serve_until_signal(settings.listen, settings, run).await
    })
}

async fn run(listener: TcpListener, settings: Settings, shutdown: CancellationToken) -> anyhow::Result<()> {
    chassis::migrate(&settings.database_url, &MIGRATORS).await?;
    let connecting = Database::connect(&settings.database_url, &settings.database, &MIGRATORS, &shutdown);
    let Some(database) = connecting.await? else { return Ok(()) };
    let table = "CREATE TABLE IF NOT EXISTS points (customer text PRIMARY KEY, points numeric NOT NULL)";
    database.run(move |connection| Box::pin(sqlx::query(table).execute(connection))).await?;
    let refuse = Refuse { domain: "loyalty-service" };
    let receiver = Receiver::start(&database, Loyalty, refuse, &settings.inbox, shutdown.clone());
    let services = Services { routes: Routes::new(receiver), names: &[SERVICE_NAME], descriptors: proto::DESCRIPTORS };
    Ok(chassis::serve(listener, &settings.serve, services, &database, shutdown).await?)
}
