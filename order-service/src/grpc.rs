//! The service as gRPC: requests in, answers out, and the only place that makes a `Status`.

use chassis::{Database, Fields, Refuse};
use outbox::{RelayWaker, TraceContext};
use proto::orders::v1::{
    CreateOrderRequest, GetOrderRequest, ListOrdersRequest, ListOrdersResponse, Order,
    order_service_server::OrderService,
};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

use crate::{
    create_order::{CreateOrderError, create_order},
    get_order::get_orders,
    list_orders::{list_orders, validate_page},
    validate_order::validate_order,
};

const REFUSE: Refuse = Refuse { domain: "order-service" };

/// `orders.v1.OrderService`.
pub(crate) struct Orders {
    pub(crate) database: Database,
    pub(crate) waker: RelayWaker,
}

#[tonic::async_trait]
impl OrderService for Orders {
    async fn create_order(&self, request: Request<CreateOrderRequest>) -> Result<Response<Order>, Status> {
        let trace = trace_context(request.metadata());
        let new = validate_order(request.into_inner()).map_err(|bad| REFUSE.invalid("INVALID_ORDER", bad))?;
        let waker = self.waker.clone();
        let placed = self
            .database
            .run(|connection| {
                Box::pin(async move {
                    let placed = create_order(connection, new, trace).await?;
                    // Inside the unit of work, so that a caller who hung up after the commit does not leave its event to
                    // the next poll.
                    if placed.by_this_call {
                        waker.wake();
                    }
                    Ok(placed)
                })
            })
            .await
            .map_err(refuse_create)?;
        Ok(Response::new(placed.order))
    }

    async fn get_order(&self, request: Request<GetOrderRequest>) -> Result<Response<Order>, Status> {
        let mut fields = Fields::default();
        let order_id = fields.uuid("order_id", &request.into_inner().order_id);
        let order_id = fields.finish(order_id).map_err(|bad| REFUSE.invalid("INVALID_ORDER_ID", bad))?;
        self.database
            .run(move |connection| Box::pin(async move { get_orders(connection, &[order_id]).await }))
            .await
            .map_err(|error| REFUSE.database(&error))?
            .pop()
            .map(Response::new)
            .ok_or_else(|| REFUSE.with(Code::NotFound, "ORDER_NOT_FOUND", format!("there is no order {order_id}")))
    }

    async fn list_orders(&self, request: Request<ListOrdersRequest>) -> Result<Response<ListOrdersResponse>, Status> {
        let page = validate_page(request.into_inner()).map_err(|bad| REFUSE.invalid("INVALID_PAGE", bad))?;
        self.database
            .run(|connection| Box::pin(list_orders(connection, page)))
            .await
            .map(Response::new)
            .map_err(|error| REFUSE.database(&error))
    }
}

fn refuse_create(error: CreateOrderError) -> Status {
    match error {
        CreateOrderError::RequestIdReused => REFUSE.with(Code::InvalidArgument, "REQUEST_ID_REUSED", error.to_string()),
        CreateOrderError::Database(cause) => REFUSE.database(&cause),
    }
}

fn trace_context(metadata: &MetadataMap) -> TraceContext {
    let header = |name| metadata.get(name).and_then(|value| value.to_str().ok());
    TraceContext::from_headers(header("traceparent"), header("tracestate"))
}
