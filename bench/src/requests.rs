//! Creates random orders and places them.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use proto::{
    inventory::v1::AdjustStockRequest,
    orders::v1::{CreateOrderRequest, Order, OrderItem, order_service_client::OrderServiceClient},
};
use tokio::task::JoinSet;
use tonic::{
    Request,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

use harness::{stress::check_reply, target::Target};

/// A call that takes longer counts as failed.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// A connection has a limit of concurrent calls.
const CALLS_PER_CONNECTION: u32 = 64;
/// Stock of each SKU that no run uses up. It is the limit of one adjustment.
const STOCK: i64 = 1_000_000_000;
const STOCK_CALLERS: u32 = 8;

/// What the orders contain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Number of SKUs, each equally likely.
    pub(super) skus: u32,
    /// Number of different SKUs in an order.
    pub(super) items: u32,
}

impl Shape {
    pub(super) const USUAL: Self = Self { skus: 1000, items: 2 };

    /// A random order with a new request id.
    pub(super) fn request(self) -> CreateOrderRequest {
        let first = fastrand::u32(..self.skus);
        let apart = self.skus / self.items;
        let item = |number| OrderItem {
            sku: sku((first + number * apart) % self.skus),
            quantity: 1,
            unit_price_minor: 1250 + 2950 * i64::from(number),
        };
        CreateOrderRequest {
            request_id: Uuid::new_v4().into(),
            customer_id: format!("bench-{}", fastrand::u32(..1000)),
            currency_code: "EUR".into(),
            items: (0..self.items).map(item).collect(),
        }
    }

    /// Adds more stock of every SKU than will be ordered.
    pub(super) async fn add_stock(self, target: &Target) -> Result<()> {
        let inventory = target.inventory()?;
        let mut callers = JoinSet::new();
        for caller in 0..STOCK_CALLERS {
            let (mut inventory, skus) = (inventory.clone(), self.skus);
            callers.spawn(async move {
                for number in (caller..skus).step_by(STOCK_CALLERS as usize) {
                    let request_id = Uuid::new_v4().into();
                    let request = AdjustStockRequest { request_id, sku: sku(number), delta: STOCK };
                    inventory.adjust_stock(request).await.context("cannot add stock")?;
                }
                Ok::<_, anyhow::Error>(())
            });
        }
        callers.join_all().await.into_iter().collect()
    }
}

/// The name of a SKU, as in the scripts for pgbench.
fn sku(number: u32) -> String {
    format!("SKU-{:04}", number + 1)
}

/// Enough connections for that many concurrent calls. Each is opened at its first use.
pub(super) fn connect(address: SocketAddr, at_once: u32) -> Result<Vec<OrderServiceClient<Channel>>> {
    let endpoint = Endpoint::try_from(format!("http://{address}"))?.tcp_nodelay(true);
    Ok((0..connections_for(at_once)).map(|_| OrderServiceClient::new(endpoint.connect_lazy())).collect())
}

/// Enough for that many concurrent calls.
pub(super) fn connections_for(at_once: u32) -> u32 {
    at_once.div_ceil(CALLS_PER_CONNECTION)
}

/// Places one order.
///
/// # Errors
/// If the call fails, or its answer is wrong.
pub(super) async fn place(client: &mut OrderServiceClient<Channel>, shape: Shape) -> Result<Order> {
    let content = shape.request();
    let mut request = Request::new(content.clone());
    request.set_timeout(CALL_LIMIT);
    let answered = client.create_order(request).await;
    let order = answered.context("CreateOrder was refused")?.into_inner();
    check_reply(&content, &order)?;
    Ok(order)
}

/// Failed calls and wrong answers: how many, and the first one.
#[derive(Clone, Debug, Default)]
pub(super) struct Failures {
    pub(super) count: u64,
    pub(super) first: Option<String>,
}

impl Failures {
    pub(super) fn add(&mut self, error: &anyhow::Error) {
        self.merge(Self { count: 1, first: Some(format!("{error:#}")) });
    }

    pub(super) fn merge(&mut self, other: Self) {
        self.count += other.count;
        self.first = self.first.take().or(other.first);
    }
}
