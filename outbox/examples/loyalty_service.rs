//! A third service: it gives its customers points for what they order, each order counted once, however often its event
//! arrives. This is all it takes, on a server with the roles of migrations/bootstrap; route events to it with `outbox-relay serve --route …`, or try it alone:
//!
//! ```text
//! cargo run -p outbox --example loyalty_service -- --database-url postgres://owner:password@127.0.0.1/loyalty
//! grpcurl -plaintext localhost:50055 events.v1.EventReceiver/Describe
//! ```

use std::net::SocketAddr;

use chassis::{Database, DatabaseSettings, DatabaseUrl, Refuse, ServeSettings, Services};
use outbox::{ApplyError, Envelope, Handler, InboxSettings, Receiver, Refusal};
use proto::{events::v1::event_receiver_server::SERVICE_NAME, orders::v1::OrderCreated};
use sqlx::{Postgres, Transaction, migrate::Migrator};
use tonic::service::Routes;

static MIGRATORS: [&Migrator; 1] = [&outbox::MIGRATOR];

struct Loyalty;

impl Handler for Loyalty {
    type Event = OrderCreated;

    fn read(&self, envelope: &Envelope<'_>) -> Result<OrderCreated, Refusal> {
        if !envelope.carries::<OrderCreated>() {
            return Err(Refusal::unknown_type(envelope));
        }
        let order: OrderCreated = envelope.decode()?;
        // Postgres has no NUL in text; it would fail the whole batch.
        let sound = !order.customer_id.contains('\0');
        sound.then_some(order).ok_or_else(|| Refusal::reject("INVALID_ORDER", "no sound customer_id"))
    }

    async fn apply(&self, tx: &mut Transaction<'_, Postgres>, orders: &[&OrderCreated]) -> Result<(), ApplyError> {
        // In the order of the customers, as every service does that may wait for another transaction's locks.
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

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let settings = chassis::parse::<Settings>();
    chassis::log_to_stdout();
    let (shutdown, listener) = (chassis::shutdown_signal()?, chassis::bind(settings.listen).await?);
    chassis::migrate(&settings.database_url, &MIGRATORS).await?;
    let connecting = Database::connect(&settings.database_url, &settings.database, &MIGRATORS, &shutdown);
    let Some(database) = connecting.await? else { return Ok(()) };
    let table = "CREATE TABLE IF NOT EXISTS points (customer text PRIMARY KEY, points numeric NOT NULL)";
    database.run(move |connection| Box::pin(async move { sqlx::query(table).execute(connection).await })).await?;
    let refuse = Refuse { domain: "loyalty-service" };
    let receiver = Receiver::start(&database, Loyalty, refuse, &settings.inbox, shutdown.clone());
    let services = Services { routes: Routes::new(receiver), names: &[SERVICE_NAME], descriptors: proto::DESCRIPTORS };
    Ok(chassis::serve(listener, &settings.serve, services, &database, shutdown).await?)
}
