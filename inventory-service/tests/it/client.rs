//! Calls the service as relays and clients do.

use std::net::SocketAddr;

use proto::{
    events::v1::{DeliverRequest, Event, event_receiver_client::EventReceiverClient, event_receiver_server},
    inventory::v1::{
        AdjustStockRequest, GetStockRequest, ListStockRequest, ListStockResponse,
        inventory_service_client::InventoryServiceClient,
    },
};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

/// One connection to each listener of the service. Clones share them.
#[derive(Clone)]
pub(crate) struct Client {
    /// To what callers use.
    pub(crate) channel: Channel,
    /// To what relays use.
    pub(crate) events: Channel,
}

impl Client {
    pub(crate) async fn connect([api, events]: [SocketAddr; 2]) -> Self {
        let connect =
            async |address| Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        Self { channel: connect(api).await, events: connect(events).await }
    }

    /// The connection to the listener that has this service.
    pub(crate) fn to(&self, service: &str) -> Channel {
        let channel = if service == event_receiver_server::SERVICE_NAME { &self.events } else { &self.channel };
        channel.clone()
    }

    /// Returns the outcome of each event: `APPLIED`, `DUPLICATE`, or `REJECTED` with the reason.
    pub(crate) async fn deliver(&self, events: impl IntoIterator<Item = &Event>) -> Result<Vec<String>, Status> {
        let events = events.into_iter().cloned().collect();
        self.deliver_request(Request::new(DeliverRequest { events })).await
    }

    pub(crate) async fn deliver_request(&self, request: Request<DeliverRequest>) -> Result<Vec<String>, Status> {
        let sent: Vec<String> = request.get_ref().events.iter().map(|event| event.id.clone()).collect();
        let response = EventReceiverClient::new(self.events.clone()).deliver(request).await?;
        let results = response.into_inner().results;
        let answered: Vec<&String> = results.iter().map(|result| &result.event_id).collect();
        assert_eq!(answered, sent.iter().collect::<Vec<_>>(), "one result per event, in the order of the request");
        let outcomes = results.iter().map(|result| {
            assert_eq!(result.reason.is_empty(), result.detail.is_empty(), "{result:?}");
            let outcome = result.outcome().as_str_name().trim_start_matches("OUTCOME_");
            format!("{outcome} {}", result.reason).trim_end().to_owned()
        });
        Ok(outcomes.collect())
    }

    pub(crate) async fn get_stock(&self, sku: &str) -> Result<i64, Status> {
        let request = GetStockRequest { sku: sku.into() };
        let level = InventoryServiceClient::new(self.channel.clone()).get_stock(request).await?.into_inner();
        assert_eq!(level.sku, sku);
        Ok(level.available)
    }

    pub(crate) async fn adjust_stock(&self, request_id: &str, sku: &str, delta: i64) -> Result<i64, Status> {
        let request = AdjustStockRequest { request_id: request_id.into(), sku: sku.into(), delta };
        let level = InventoryServiceClient::new(self.channel.clone()).adjust_stock(request).await?.into_inner();
        assert_eq!(level.sku, sku);
        Ok(level.available)
    }

    pub(crate) async fn list_stock(&self, page_size: i32, page_token: &str) -> Result<ListStockResponse, Status> {
        let request = ListStockRequest { page_size, page_token: page_token.into() };
        Ok(InventoryServiceClient::new(self.channel.clone()).list_stock(request).await?.into_inner())
    }
}

/// A refusal as one line: its code, its reason, and the fields it names.
pub(crate) fn refusal(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(info.domain, "inventory-service");
    assert_eq!(details.retry_info().is_some(), status.code() == Code::Unavailable, "RetryInfo: {status:?}");
    let fields = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    let fields: Vec<&str> = fields.iter().map(|violation| violation.field.as_str()).collect();
    format!("{:?} {} {}", status.code(), info.reason, fields.join(",")).trim_end().to_owned()
}
