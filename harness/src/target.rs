//! Where a running system is: for the subcommands that work on one they did not start.

use anyhow::{Context, Result};
use chassis::DatabaseUrl;
use clap::Args;
use proto::{
    events::v1::event_receiver_client::EventReceiverClient,
    inventory::v1::inventory_service_client::InventoryServiceClient,
    orders::v1::order_service_client::OrderServiceClient,
};
use sqlx::{Connection, PgConnection};
use tonic::transport::{Channel, Endpoint, Uri};

/// The databases, as roles that may read everything in them.
#[derive(Args, Clone, Debug)]
pub struct Databases {
    /// The orders database, as its owner
    #[arg(
        long,
        env = "ORDERS_DATABASE_URL",
        hide_env_values = true,
        default_value = "postgres://orders_owner:orders_owner@127.0.0.1:5433/orders"
    )]
    pub orders_database_url: DatabaseUrl,
    /// The inventory database, as its owner
    #[arg(
        long,
        env = "INVENTORY_DATABASE_URL",
        hide_env_values = true,
        default_value = "postgres://inventory_owner:inventory_owner@127.0.0.1:5433/inventory"
    )]
    pub inventory_database_url: DatabaseUrl,
}

/// The services and their databases; the defaults are those of `harness up` and of docker-compose.
#[derive(Args, Clone, Debug)]
pub struct Target {
    /// order-service
    #[arg(long, env = "ORDER_SERVICE_URL", default_value = "http://127.0.0.1:50051")]
    pub order_service: Uri,
    /// inventory-service
    #[arg(long, env = "INVENTORY_SERVICE_URL", default_value = "http://127.0.0.1:50052")]
    pub inventory_service: Uri,
    /// The databases.
    #[command(flatten)]
    pub databases: Databases,
}

impl Databases {
    /// A connection to the orders database.
    pub async fn orders(&self) -> Result<PgConnection> {
        connect(&self.orders_database_url).await
    }

    /// A connection to the inventory database.
    pub async fn inventory(&self) -> Result<PgConnection> {
        connect(&self.inventory_database_url).await
    }
}

impl Target {
    /// A client of order-service, connected when first used.
    pub fn orders(&self) -> OrderServiceClient<Channel> {
        OrderServiceClient::new(Endpoint::from(self.order_service.clone()).connect_lazy())
    }

    /// A client of inventory-service, connected when first used.
    pub fn inventory(&self) -> InventoryServiceClient<Channel> {
        InventoryServiceClient::new(Endpoint::from(self.inventory_service.clone()).connect_lazy())
    }

    /// A client of order-service as the receiver of inventory's answers, connected when first used.
    pub fn reply_receiver(&self) -> EventReceiverClient<Channel> {
        EventReceiverClient::new(Endpoint::from(self.order_service.clone()).connect_lazy())
    }

    /// A client of inventory-service as the receiver of events, connected when first used.
    pub fn receiver(&self) -> EventReceiverClient<Channel> {
        EventReceiverClient::new(Endpoint::from(self.inventory_service.clone()).connect_lazy())
    }
}

async fn connect(url: &DatabaseUrl) -> Result<PgConnection> {
    PgConnection::connect_with(&url.options()).await.with_context(|| {
        format!("cannot connect to {url}; is the system up (`make up`, `docker-compose up`), or elsewhere (--help)?")
    })
}
