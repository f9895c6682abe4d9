//! An order-service that stores nothing. It shows how fast gRPC alone is, for the upper bound of `CreateOrder`.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::Result;
use proto::orders::v1::{
    CancelOrderRequest, CreateOrderRequest, GetOrderRequest, ListOrdersRequest, ListOrdersResponse, Order, OrderStatus,
    WatchOrderRequest,
    order_service_server::{OrderService, OrderServiceServer},
};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status, async_trait,
    transport::{Server, server::TcpIncoming},
};
use uuid::Uuid;

/// Answer CreateOrder with the order it would place, and store nothing (the bench itself starts this)
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Arguments {
    /// Address to listen on
    #[arg(long)]
    listen: SocketAddr,
}

/// Runs the subcommand until it is killed.
pub(super) async fn run(arguments: &Arguments) -> Result<ExitCode> {
    let incoming = TcpIncoming::from(TcpListener::bind(arguments.listen).await?).with_nodelay(Some(true));
    Server::builder().add_service(OrderServiceServer::new(Noop)).serve_with_incoming(incoming).await?;
    Ok(ExitCode::SUCCESS)
}

struct Noop;

#[async_trait]
impl OrderService for Noop {
    async fn create_order(&self, request: Request<CreateOrderRequest>) -> Result<Response<Order>, Status> {
        let CreateOrderRequest { customer_id, currency_code, items, .. } = request.into_inner();
        Ok(Response::new(Order {
            order_id: Uuid::now_v7().into(),
            customer_id,
            status: OrderStatus::Pending.into(),
            currency_code,
            total_minor: items.iter().map(|item| item.unit_price_minor * i64::from(item.quantity)).sum(),
            items,
            // Any time of the usual length.
            create_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 123_456_000 }),
            rejection: String::new(),
        }))
    }

    async fn get_order(&self, _: Request<GetOrderRequest>) -> Result<Response<Order>, Status> {
        Err(not_here())
    }

    async fn list_orders(&self, _: Request<ListOrdersRequest>) -> Result<Response<ListOrdersResponse>, Status> {
        Err(not_here())
    }

    async fn cancel_order(&self, _: Request<CancelOrderRequest>) -> Result<Response<Order>, Status> {
        Err(not_here())
    }

    type WatchOrderStream = tokio_stream::Empty<Result<Order, Status>>;

    async fn watch_order(&self, _: Request<WatchOrderRequest>) -> Result<Response<Self::WatchOrderStream>, Status> {
        Err(not_here())
    }
}

fn not_here() -> Status {
    Status::unimplemented("this process answers only CreateOrder")
}
