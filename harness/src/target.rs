//! Where a running system is, for the subcommands that did not start it themselves.

use anyhow::{Context, Result};
use chassis::{DatabaseUrl, Tls, TlsFiles};
use clap::Args;
use proto::{
    events::v1::event_receiver_client::EventReceiverClient,
    inventory::v1::inventory_service_client::InventoryServiceClient,
    orders::v1::order_service_client::OrderServiceClient,
};
use sqlx::PgConnection;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{identities::Identities, system::Service};

const ORDER_SERVICE: &str = "http://127.0.0.1:50051";
const INVENTORY_SERVICE: &str = "http://127.0.0.1:50052";
const ORDER_EVENTS: &str = "http://127.0.0.1:52051";
const INVENTORY_EVENTS: &str = "http://127.0.0.1:52052";
const ORDERS_DATABASE: &str = "postgres://orders_owner:orders_owner@127.0.0.1:5433/orders";
const INVENTORY_DATABASE: &str = "postgres://inventory_owner:inventory_owner@127.0.0.1:5433/inventory";
const LOYALTY_DATABASE: &str = "postgres://loyalty_owner:loyalty_owner@127.0.0.1:5433/loyalty";

/// The environment variables of a [`Target`] with their defaults: the addresses of `harness up` and docker-compose.
pub(crate) const DEFAULTS: [(&str, &str); 7] = [
    ("ORDER_SERVICE_URL", ORDER_SERVICE),
    ("INVENTORY_SERVICE_URL", INVENTORY_SERVICE),
    ("ORDER_EVENTS_URL", ORDER_EVENTS),
    ("INVENTORY_EVENTS_URL", INVENTORY_EVENTS),
    ("ORDERS_DATABASE_URL", ORDERS_DATABASE),
    ("INVENTORY_DATABASE_URL", INVENTORY_DATABASE),
    ("LOYALTY_DATABASE_URL", LOYALTY_DATABASE),
];

/// The databases, as roles that may read everything in them.
#[derive(Args, Clone, Debug)]
pub struct Databases {
    /// URL of the orders database, as its owner
    #[arg(long, env = "ORDERS_DATABASE_URL", hide_env_values = true, value_name = "URL", default_value = ORDERS_DATABASE)]
    pub orders_database_url: DatabaseUrl,
    /// URL of the inventory database, as its owner
    #[arg(long, env = "INVENTORY_DATABASE_URL", hide_env_values = true, value_name = "URL", default_value = INVENTORY_DATABASE)]
    pub inventory_database_url: DatabaseUrl,
    /// URL of the loyalty database, as its owner; it is read only if loyalty has a subscription
    #[arg(long, env = "LOYALTY_DATABASE_URL", hide_env_values = true, value_name = "URL", default_value = LOYALTY_DATABASE)]
    pub loyalty_database_url: DatabaseUrl,
}

/// The services and their databases.
#[derive(Args, Clone, Debug)]
pub struct Target {
    /// URL of order-service
    #[arg(long, env = "ORDER_SERVICE_URL", value_name = "URL", default_value = ORDER_SERVICE)]
    pub order_service: Uri,
    /// URL of inventory-service
    #[arg(long, env = "INVENTORY_SERVICE_URL", value_name = "URL", default_value = INVENTORY_SERVICE)]
    pub inventory_service: Uri,
    /// URL at which order-service takes events
    #[arg(long, env = "ORDER_EVENTS_URL", value_name = "URL", default_value = ORDER_EVENTS)]
    pub order_events: Uri,
    /// URL at which inventory-service takes events
    #[arg(long, env = "INVENTORY_EVENTS_URL", value_name = "URL", default_value = INVENTORY_EVENTS)]
    pub inventory_events: Uri,
    /// The certificates, if the URLs begin with https
    #[command(flatten)]
    pub tls: TlsFiles,
    /// Those of each caller of the system that this process has started. Relays may call where others may not.
    #[arg(skip)]
    pub identities: Option<Identities>,
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

    /// A connection to the loyalty database.
    pub async fn loyalty(&self) -> Result<PgConnection> {
        connect(&self.loyalty_database_url).await
    }
}

impl Target {
    fn connect(&self, url: &Uri) -> Result<Channel> {
        Ok(chassis::connect_lazily(&Endpoint::from(url.clone()), &Tls::read(&self.tls)?))
    }

    fn connect_as(&self, relay: Service, url: &Uri) -> Result<Channel> {
        let own = self.identities.as_ref().map(|identities| identities.files(relay.name()));
        Ok(chassis::connect_lazily(&Endpoint::from(url.clone()), &Tls::read(own.as_ref().unwrap_or(&self.tls))?))
    }

    /// A client of order-service, connected when first used.
    ///
    /// # Errors
    /// If the certificates cannot be used.
    pub fn orders(&self) -> Result<OrderServiceClient<Channel>> {
        Ok(OrderServiceClient::new(self.connect(&self.order_service)?))
    }

    /// A client of inventory-service, connected when first used.
    ///
    /// # Errors
    /// If the certificates cannot be used.
    pub fn inventory(&self) -> Result<InventoryServiceClient<Channel>> {
        Ok(InventoryServiceClient::new(self.connect(&self.inventory_service)?))
    }

    /// A client of order-service as the receiver of inventory's replies, connected when first used.
    ///
    /// # Errors
    /// If the certificates cannot be used.
    pub fn reply_receiver(&self) -> Result<EventReceiverClient<Channel>> {
        Ok(EventReceiverClient::new(self.connect_as(Service::InventoryRelay, &self.order_events)?))
    }

    /// A client of inventory-service as the receiver of events, connected when first used.
    ///
    /// # Errors
    /// If the certificates cannot be used.
    pub fn receiver(&self) -> Result<EventReceiverClient<Channel>> {
        Ok(EventReceiverClient::new(self.connect_as(Service::OrdersRelay, &self.inventory_events)?))
    }
}

async fn connect(url: &DatabaseUrl) -> Result<PgConnection> {
    url.connect().await.with_context(|| {
        format!(
            "cannot connect to {url}: start the system (`make up`, `docker-compose up`), \
             or say where it is (--help lists the flags and variables)"
        )
    })
}
