//! The gRPC service: reads requests, calls the functions behind them, and is the only place that makes a `Status`.

use std::pin::Pin;

use chassis::{Database, Fields, Refuse};
use outbox::{Notifier, TraceContext};
use proto::orders::v1::{
    CancelOrderRequest, CreateOrderRequest, GetOrderRequest, ListOrdersRequest, ListOrdersResponse, Order,
    WatchOrderRequest, order_service_server::OrderService,
};
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};
use tonic_types::FieldViolation;

use crate::{
    cancel_order::{CancelOrderError, cancel_order, validate_cancellation},
    create_order::{CreateOrderError, Draft},
    get_order::get_orders,
    ids::OrderId,
    intake::Intake,
    list_orders::{list_orders, validate_page},
    measure,
    validate_order::validate_order,
    watch_order::{Watchers, is_settled},
};

pub(crate) const REFUSE: Refuse = Refuse { domain: "order-service" };

/// `orders.v1.OrderService`.
pub(crate) struct Orders {
    pub(crate) database: Database,
    pub(crate) intake: Intake,
    /// Notified of new events.
    pub(crate) relay: Notifier,
    /// Notified of new statuses.
    pub(crate) status: Notifier,
    pub(crate) watchers: Watchers,
}

#[tonic::async_trait]
impl OrderService for Orders {
    async fn create_order(&self, request: Request<CreateOrderRequest>) -> Result<Response<Order>, Status> {
        let trace = trace_context(request.metadata());
        let new = validate_order(request.into_inner()).map_err(|bad| REFUSE.invalid("INVALID_ORDER", bad))?;
        self.intake.place(Draft::of(new, &trace)).await.map(Response::new).map_err(refuse_create)
    }

    async fn get_order(&self, request: Request<GetOrderRequest>) -> Result<Response<Order>, Status> {
        let order_id = read_order_id(&request.get_ref().order_id)?;
        self.get(order_id).await.map(Response::new)
    }

    async fn list_orders(&self, request: Request<ListOrdersRequest>) -> Result<Response<ListOrdersResponse>, Status> {
        let page = validate_page(request.into_inner()).map_err(|bad| REFUSE.invalid("INVALID_PAGE", bad))?;
        self.database
            .run(|connection| Box::pin(list_orders(connection, page)))
            .await
            .map(Response::new)
            .map_err(|error| REFUSE.database(&error))
    }

    async fn cancel_order(&self, request: Request<CancelOrderRequest>) -> Result<Response<Order>, Status> {
        let trace = trace_context(request.metadata());
        let invalid = |bad: Vec<FieldViolation>| REFUSE.invalid("INVALID_CANCELLATION", bad);
        let cancellation = validate_cancellation(request.get_ref()).map_err(invalid)?;
        let (relay, status) = (self.relay.clone(), self.status.clone());
        let cancelled = self
            .database
            .write(move |connection| {
                Box::pin(async move {
                    let cancelled = cancel_order(connection, cancellation, trace).await?;
                    if cancelled.by_this_call {
                        relay.notify();
                        status.notify();
                        measure::orders("cancelled", 1);
                    }
                    Ok(cancelled)
                })
            })
            .await
            .map_err(refuse_cancel)?;
        Ok(Response::new(cancelled.order))
    }

    type WatchOrderStream = Pin<Box<dyn Stream<Item = Result<Order, Status>> + Send>>;

    async fn watch_order(
        &self,
        request: Request<WatchOrderRequest>,
    ) -> Result<Response<Self::WatchOrderStream>, Status> {
        let order_id = read_order_id(&request.get_ref().order_id)?;
        let too_many = || {
            REFUSE.later(Code::ResourceExhausted, "TOO_MANY_WATCHERS", "too many orders are being watched; try again")
        };
        let mut watch = self.watchers.register(order_id).ok_or_else(too_many)?;
        let order = self.get(order_id).await?;
        let is_final = is_settled(&order);
        if !is_final && !watch.take_share_of(&order.customer_id) {
            let message = format!("customer {} has too many watchers; try again", order.customer_id);
            return Err(REFUSE.over_share("TOO_MANY_WATCHERS", message, order.customer_id));
        }
        let current = tokio_stream::once(Ok(order));
        if is_final {
            return Ok(Response::new(Box::pin(current)));
        }
        let shuts_down =
            || REFUSE.later(Code::Unavailable, "SHUTTING_DOWN", "the server is shutting down; watch again");
        let later =
            tokio_stream::once(watch).then(move |watch| async move { watch.settled().await.ok_or_else(shuts_down) });
        Ok(Response::new(Box::pin(current.chain(later))))
    }
}

impl Orders {
    async fn get(&self, order_id: OrderId) -> Result<Order, Status> {
        self.database
            .run(move |connection| Box::pin(async move { get_orders(connection, &[order_id]).await }))
            .await
            .map_err(|error| REFUSE.database(&error))?
            .pop()
            .ok_or_else(|| not_found(order_id))
    }
}

fn read_order_id(text: &str) -> Result<OrderId, Status> {
    let mut fields = Fields::default();
    let order_id = fields.uuid("order_id", text).into();
    fields.finish(order_id).map_err(|bad| REFUSE.invalid("INVALID_ORDER_ID", bad))
}

fn not_found(order_id: OrderId) -> Status {
    REFUSE.with(Code::NotFound, "ORDER_NOT_FOUND", format!("there is no order {order_id}"))
}

fn refuse_cancel(error: CancelOrderError) -> Status {
    let message = error.to_string();
    match error {
        CancelOrderError::NotFound(order_id) => not_found(order_id),
        CancelOrderError::Rejected(_) => REFUSE.with(Code::FailedPrecondition, "ORDER_REJECTED", message),
        CancelOrderError::Cancelled(_) => REFUSE.with(Code::FailedPrecondition, "ORDER_CANCELLED", message),
        CancelOrderError::RequestIdReused => REFUSE.with(Code::InvalidArgument, "REQUEST_ID_REUSED", message),
        CancelOrderError::Database(cause) => REFUSE.database(&cause),
    }
}

fn refuse_create(error: CreateOrderError) -> Status {
    let message = error.to_string();
    match error {
        CreateOrderError::RequestIdReused => REFUSE.with(Code::InvalidArgument, "REQUEST_ID_REUSED", message),
        CreateOrderError::StandbyAway => REFUSE.later(Code::Unavailable, "DATABASE_UNAVAILABLE", message),
        CreateOrderError::OverShare(customer_id) => REFUSE.over_share("OVERLOADED", message, customer_id),
        CreateOrderError::Overloaded => REFUSE.later(Code::ResourceExhausted, "OVERLOADED", message),
        CreateOrderError::Database(cause) => REFUSE.database_logged(&cause),
    }
}

fn trace_context(metadata: &MetadataMap) -> TraceContext {
    let header = |name| metadata.get(name).and_then(|value| value.to_str().ok());
    TraceContext::from_headers(header("traceparent"), header("tracestate"))
}
