//! The gRPC service: reads requests, writes answers, and makes every `Status`.

use chassis::{Database, Fields, Refuse};
use proto::inventory::v1::{
    AdjustStockRequest, GetStockRequest, ListStockRequest, ListStockResponse, StockLevel,
    inventory_service_server::InventoryService,
};
use tonic::{Code, Request, Response, Status};

use crate::{
    adjust_stock::{AdjustStockError, adjust_stock, validate_adjustment},
    get_stock::{get_stock, list_stock, validate_page},
};

pub(crate) const REFUSE: Refuse = Refuse { domain: "inventory-service" };

/// `inventory.v1.InventoryService`.
pub(crate) struct Inventory {
    pub(crate) database: Database,
}

#[tonic::async_trait]
impl InventoryService for Inventory {
    async fn get_stock(&self, request: Request<GetStockRequest>) -> Result<Response<StockLevel>, Status> {
        let mut fields = Fields::default();
        let GetStockRequest { sku } = request.into_inner();
        fields.name("sku", &sku);
        let sku = fields.finish(sku).map_err(|bad| REFUSE.invalid("INVALID_SKU", bad))?;
        let unknown = REFUSE.with(Code::NotFound, "SKU_NOT_FOUND", format!("there is no SKU {sku}"));
        self.database
            .run(|connection| Box::pin(async move { get_stock(connection, &sku).await }))
            .await
            .map_err(|error| REFUSE.database(&error))?
            .map(Response::new)
            .ok_or(unknown)
    }

    async fn list_stock(&self, request: Request<ListStockRequest>) -> Result<Response<ListStockResponse>, Status> {
        let page = validate_page(request.get_ref()).map_err(|bad| REFUSE.invalid("INVALID_PAGE", bad))?;
        self.database
            .run(|connection| Box::pin(list_stock(connection, page)))
            .await
            .map(Response::new)
            .map_err(|error| REFUSE.database(&error))
    }

    async fn adjust_stock(&self, request: Request<AdjustStockRequest>) -> Result<Response<StockLevel>, Status> {
        let adjustment =
            validate_adjustment(request.into_inner()).map_err(|bad| REFUSE.invalid("INVALID_ADJUSTMENT", bad))?;
        self.database
            .write(|connection| Box::pin(adjust_stock(connection, adjustment)))
            .await
            .map(Response::new)
            .map_err(refuse_adjust)
    }
}

fn refuse_adjust(error: AdjustStockError) -> Status {
    let message = error.to_string();
    match error {
        AdjustStockError::RequestIdReused => REFUSE.with(Code::InvalidArgument, "REQUEST_ID_REUSED", message),
        AdjustStockError::InsufficientStock { .. } => {
            REFUSE.with(Code::FailedPrecondition, "INSUFFICIENT_STOCK", message)
        }
        AdjustStockError::Database(cause) => REFUSE.database(&cause),
    }
}
