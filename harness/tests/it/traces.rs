//! Traces of the whole system, as a collector gets them.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use harness::system::Service;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use proto::orders::v1::{CreateOrderRequest, OrderItem, WatchOrderRequest, order_service_client::OrderServiceClient};
use rustix::process::Signal;
use testkit::processes::{Process, free_port};
use tokio::time::sleep;
use tonic::{Request, Response, Status, async_trait, transport::Server};
use uuid::Uuid;

use crate::site::Site;

const LIMIT: Duration = Duration::from_secs(30);

/// A span, and the service that has sent it.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    service: String,
    pub(crate) span: Span,
    /// The caller's header `x-key`.
    pub(crate) key: Option<String>,
}

impl Sent {
    fn attribute(&self, key: &str) -> Option<Value> {
        self.span.attributes.iter().find(|of| of.key == key)?.value.clone()?.value
    }

    fn links_to(&self, other: &Self) -> bool {
        let is_it =
            |(trace_id, span_id): (&[u8], &[u8])| trace_id == other.span.trace_id && span_id == other.span.span_id;
        self.span.links.iter().any(|link| is_it((&link.trace_id, &link.span_id)))
    }
}

/// A collector that keeps what it gets.
#[derive(Clone, Default)]
pub(crate) struct Collector(Arc<Mutex<Vec<Sent>>>);

#[async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let key = request.metadata().get("x-key").map(|key| key.to_str().unwrap().to_owned());
        for of in request.into_inner().resource_spans {
            let attributes = of.resource.unwrap_or_default().attributes;
            let name = attributes.into_iter().find(|of| of.key == "service.name").and_then(|of| of.value?.value);
            let Some(Value::StringValue(service)) = name else { panic!("no name: {name:?}") };
            let spans = of.scope_spans.into_iter().flat_map(|of| of.spans);
            self.0.lock().unwrap().extend(spans.map(|span| Sent { service: service.clone(), span, key: key.clone() }));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub(crate) async fn start() -> (Self, String) {
        let (collector, address) = (Self::default(), SocketAddr::from(([127, 0, 0, 1], free_port().unwrap())));
        let service = TraceServiceServer::new(collector.clone());
        tokio::spawn(Server::builder().add_service(service).serve(address));
        (collector, format!("http://{address}"))
    }

    pub(crate) fn all(&self) -> Vec<Sent> {
        self.0.lock().unwrap().clone()
    }

    fn named(&self, name: &str) -> Vec<Sent> {
        self.all().into_iter().filter(|sent| sent.span.name == name).collect()
    }

    async fn wait_for(&self, name: &str, number: usize) -> Vec<Sent> {
        let began = Instant::now();
        loop {
            let found = self.named(name);
            if found.len() >= number {
                return found;
            }
            let names: Vec<_> =
                self.all().into_iter().map(|sent| format!("{} {}", sent.service, sent.span.name)).collect();
            assert!(began.elapsed() < LIMIT, "{} of {number} {name:?} in {names:?}", found.len());
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Places an order as a caller whose span this is, and waits until it is settled.
async fn place(orders: &str, traceparent: &str) {
    let mut client = OrderServiceClient::connect(orders.to_owned()).await.unwrap();
    let items = vec![OrderItem { sku: "MUG".into(), quantity: 1, unit_price_minor: 1250 }];
    let mut request = Request::new(CreateOrderRequest {
        request_id: Uuid::now_v7().to_string(),
        customer_id: "ann".into(),
        currency_code: "EUR".into(),
        items,
    });
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    let order_id = client.create_order(request).await.unwrap().into_inner().order_id;
    let mut watching = client.watch_order(WatchOrderRequest { order_id }).await.unwrap().into_inner();
    while watching.message().await.unwrap().is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn one_order_is_one_trace_from_its_caller_to_its_confirmation_and_each_delivery_links_to_its_events() {
    let (collector, endpoint) = Collector::start().await;
    let site =
        Site::prepare(&[("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "50")]).await;
    let mut processes: Vec<(Service, Process)> = Vec::new();
    for service in site.layout.services() {
        processes.push((service, site.layout.start(service).await.unwrap()));
    }
    let orders = site.layout.target().unwrap().order_service.to_string();
    place(&orders, "00-11111111111111111111111111111111-2222222222222222-00").await;
    place(&orders, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").await;

    let [settled] = &collector.wait_for("create inventory.v1.StockReserved", 1).await[..] else { panic!("one") };
    let [created] = &collector.wait_for("create orders.v1.OrderCreated", 1).await[..] else { panic!("one") };
    let [call] = &collector.wait_for("orders.v1.OrderService/CreateOrder", 1).await[..] else { panic!("one") };
    let [reserve] = &collector.wait_for("process orders.v1.OrderCreated", 1).await[..] else { panic!("one") };
    let [confirm] = &collector.wait_for("process inventory.v1.StockReserved", 1).await[..] else { panic!("one") };
    let expected = [
        (call, "order-service", "b7ad6b7169203331".to_owned(), SpanKind::Server),
        (created, "outbox-relay", hex(&call.span.span_id), SpanKind::Producer),
        (reserve, "inventory-service", hex(&created.span.span_id), SpanKind::Consumer),
        (settled, "outbox-relay", hex(&reserve.span.span_id), SpanKind::Producer),
        (confirm, "order-service", hex(&settled.span.span_id), SpanKind::Consumer),
    ];
    for (sent, service, parent, kind) in expected {
        assert_eq!(hex(&sent.span.trace_id), "0af7651916cd43dd8448eb211c80319c", "{sent:?}");
        assert_eq!((sent.service.as_str(), hex(&sent.span.parent_span_id)), (service, parent), "{sent:?}");
        assert_eq!(sent.span.kind(), kind, "{sent:?}");
        assert!(sent.span.end_time_unix_nano >= sent.span.start_time_unix_nano, "{sent:?}");
    }
    // It begins with its transaction, which is within the call, and ends after its receiver has it.
    let milliseconds = |nanoseconds: u64| nanoseconds / 1_000_000;
    assert!(milliseconds(created.span.end_time_unix_nano) >= milliseconds(reserve.span.start_time_unix_nano));
    let [group] = &collector.wait_for("orders: create orders", 1).await[..] else { panic!("one") };
    assert!(group.links_to(call) && group.attribute("db.system.name").is_some(), "{group:?}");
    let [delivery] = &collector.wait_for("send inventory", 1).await[..] else { panic!("one") };
    assert!(delivery.links_to(created) && reserve.span.links.len() == 1, "{delivery:?} {reserve:?}");
    let delivered = collector.wait_for("events.v1.EventReceiver/Deliver", 2).await;
    assert!(delivered.iter().any(|call| call.span.parent_span_id == delivery.span.span_id), "{delivered:?}");
    assert_eq!(call.attribute("rpc.status_code"), Some(Value::StringValue("OK".into())));

    // A receiver that is away costs a delivery, and the next one links to the same event.
    let (_, inventory) = processes.iter_mut().find(|(service, _)| *service == Service::Inventory).unwrap();
    inventory.kill().await.unwrap();
    let placing = tokio::spawn(async move {
        place(&orders, "00-33333333333333333333333333333333-4444444444444444-01").await;
    });
    let failed = collector.wait_for("send inventory", 2).await.pop().unwrap();
    assert_eq!(
        failed.span.status.as_ref().map(opentelemetry_proto::tonic::trace::v1::Status::code),
        Some(StatusCode::Error),
        "{failed:?}"
    );
    processes.retain(|(service, _)| *service != Service::Inventory);
    processes.push((Service::Inventory, site.layout.start(Service::Inventory).await.unwrap()));
    placing.await.unwrap();
    let created = collector.wait_for("create orders.v1.OrderCreated", 2).await.pop().unwrap();
    let deliveries = collector.named("send inventory");
    let of_it: Vec<_> = deliveries.iter().filter(|delivery| delivery.links_to(&created)).collect();
    assert!(of_it.len() >= 2, "{deliveries:?}");
    // Relays do not begin traces of their own.
    for of_relay in ["events.v1.EventReceiver/Describe", "events.v1.EventReceiver/Recall"] {
        assert_eq!(collector.named(of_relay).len(), 0, "{of_relay}");
    }
    dies(&collector, &site).await;
    for sent in collector.all() {
        assert_eq!((sent.span.dropped_links_count, sent.span.dropped_attributes_count), (0, 0), "{sent:?}");
        assert_ne!(hex(&sent.span.trace_id), "11111111111111111111111111111111", "not sampled: {sent:?}");
    }
    harness::system::stop(processes.into_iter().map(|(_, process)| process)).await.unwrap();
}

/// An event that no receiver can read is dead, and its span says why.
async fn dies(collector: &Collector, site: &Site) {
    sqlx::query(
        "SELECT outbox_enqueue(ARRAY[gen_random_uuid()], ARRAY[1], ARRAY[gen_random_uuid()],
            ARRAY['orders.v1.OrderCreated'], ARRAY['\\xff'::bytea], ARRAY[$1], ARRAY[NULL])",
    )
    .bind("00-55555555555555555555555555555555-6666666666666666-01")
    .execute(&site.orders.pool().await)
    .await
    .unwrap();
    let created = collector.wait_for("create orders.v1.OrderCreated", 3).await;
    let dead = created.iter().find(|sent| hex(&sent.span.parent_span_id) == "6666666666666666").unwrap();
    let status = dead.span.status.clone().unwrap();
    assert_eq!(status.code(), StatusCode::Error, "{dead:?}");
    assert!(status.message.starts_with("UNDECODABLE"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_costs_one_warning_and_delays_no_end() {
    let nobody = format!("http://127.0.0.1:{}", free_port().unwrap());
    let settings = [("OTEL_EXPORTER_OTLP_ENDPOINT", nobody.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "50")];
    let site = Site::prepare(&settings).await;
    let mut processes = Vec::new();
    for service in site.layout.services() {
        processes.push(site.layout.start(service).await.unwrap());
    }
    let orders = site.layout.target().unwrap().order_service.to_string();
    let lost = |process: &Process| process.log().unwrap().matches("spans are lost").count();
    let began = Instant::now();
    while processes.iter().any(|process| lost(process) == 0) {
        place(&orders, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").await;
        assert!(began.elapsed() < LIMIT, "no warning");
        sleep(Duration::from_millis(100)).await;
    }
    for _ in 0..10 {
        place(&orders, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").await;
    }
    assert_eq!(processes.iter().map(lost).collect::<Vec<_>>(), vec![1; processes.len()]);
    let ending = Instant::now();
    for process in processes {
        let mut process = process;
        let exit = process.stop(Signal::TERM, LIMIT).await.unwrap();
        assert!(exit.status.success() && !exit.killed, "{}", process.log().unwrap());
    }
    assert!(ending.elapsed() < Duration::from_secs(10), "{:?}", ending.elapsed());
}
