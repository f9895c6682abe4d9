//! The gRPC service: reads requests, writes answers, and makes every `Status`.

use chassis::{Database, Fields, Refuse};
use proto::loyalty::v1::{Balance, GetBalanceRequest, loyalty_service_server::LoyaltyService};
use tonic::{Request, Response, Status};

use crate::get_balance::get_balance;

pub(crate) const REFUSE: Refuse = Refuse { domain: "loyalty-service" };

/// `loyalty.v1.LoyaltyService`.
pub(crate) struct Loyalty {
    pub(crate) database: Database,
}

#[tonic::async_trait]
impl LoyaltyService for Loyalty {
    async fn get_balance(&self, request: Request<GetBalanceRequest>) -> Result<Response<Balance>, Status> {
        let GetBalanceRequest { customer_id } = request.into_inner();
        let mut fields = Fields::default();
        fields.name("customer_id", &customer_id);
        let customer_id = fields.finish(customer_id).map_err(|bad| REFUSE.invalid("INVALID_CUSTOMER", bad))?;
        self.database
            .run(|connection| Box::pin(async move { get_balance(connection, &customer_id).await }))
            .await
            .map(Response::new)
            .map_err(|error| REFUSE.database(&error))
    }
}
