//! What operators and load balancers see of the process.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use order_service::MIGRATORS;
use proto::orders::v1::{CreateOrderRequest, WatchOrderRequest, order_service_client::OrderServiceClient};
use testkit::{
    TestDatabase,
    http::{get, sum_metric},
    processes::free_port,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, client::Grpc, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_prost::ProstCodec;

use crate::service::{LIMIT, Service, eventually, order, rejected, reserved, settings, sockets};

const PAUSE: Duration = Duration::from_millis(10);

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], free_port().unwrap()).into()
}

/// Until the page has this status. Returns its text.
async fn becomes(address: SocketAddr, path: &str, expected: u16) -> String {
    let asking = async {
        loop {
            let (status, text) = get(address, path).await.unwrap();
            if status == expected {
                return text;
            }
            sleep(PAUSE).await;
        }
    };
    timeout(LIMIT, asking).await.unwrap_or_else(|_| panic!("{path} is not {expected}"))
}

#[tokio::test]
async fn a_process_whose_database_is_away_is_alive_and_not_ready() {
    let (database, ops) = (TestDatabase::create("orders_owner", &MIGRATORS).await, loopback());
    let mut settings = settings(&database, &["--ops-listen", &ops.to_string()]);
    settings.database_url = format!("postgres://order_service:x@{}/none", loopback()).parse().unwrap();
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(order_service::run(sockets().await, settings, shutdown.clone()));
    while TcpStream::connect(ops).await.is_err() {
        sleep(PAUSE).await;
    }
    assert_eq!(get(ops, "/livez").await.unwrap(), (200, "alive\n".into()));
    assert_eq!(get(ops, "/readyz").await.unwrap(), (503, "not ready: it starts\n".into()));
    shutdown.cancel();
    timeout(LIMIT, running).await.expect("it ends").unwrap().unwrap();
}

#[tokio::test]
async fn calls_are_accepted_for_a_while_after_health_has_announced_the_end() {
    let ops = loopback();
    let service = Service::start_with(&["--lame-duck-seconds", "5", "--ops-listen", &ops.to_string()]).await;
    assert_eq!(becomes(ops, "/readyz", 200).await, "ready\n");
    assert_eq!(get(ops, "/elsewhere").await.unwrap().0, 404);
    let announced = Instant::now();
    service.shut_down();
    assert_eq!(becomes(ops, "/readyz", 503).await, "not ready: it ends\n");
    assert_eq!(get(ops, "/livez").await.unwrap().0, 200);
    // A caller that the load balancer has not told yet.
    let late = OrderServiceClient::connect(format!("http://{}", service.address)).await;
    late.unwrap().create_order(order()).await.unwrap();
    let address = service.address;
    service.end().await;
    assert!(announced.elapsed() >= Duration::from_secs(5), "{:?}", announced.elapsed());
    assert!(TcpStream::connect(address).await.is_err());
}

/// Other tests of this process count too, so these numbers are least ones.
#[tokio::test]
async fn calls_orders_and_events_are_measured_by_method_and_outcome() {
    let ops = loopback();
    let service = Service::start_with(&["--ops-listen", &ops.to_string()]).await;
    let [one, other] = [service.place(order()).await, service.place(order()).await];
    service.orders().create_order(CreateOrderRequest::default()).await.unwrap_err();
    let request = WatchOrderRequest { order_id: one.order_id.clone() };
    let mut watching = service.orders().watch_order(request).await.unwrap().into_inner();
    watching.message().await.unwrap();
    drop(watching);
    let reserved = reserved(&one.order_id);
    let answers = [reserved.clone(), rejected(&other.order_id), reserved];
    assert_eq!(service.deliver(&answers).await, ["APPLIED", "APPLIED", "DUPLICATE"]);
    for unknown in ["/orders.v1.OrderService/None", "/any/Path"] {
        let mut client = Grpc::new(service.channel.clone());
        client.ready().await.unwrap();
        let codec = ProstCodec::<WatchOrderRequest, WatchOrderRequest>::default();
        let path = PathAndQuery::from_static(unknown);
        client.unary(tonic::Request::new(WatchOrderRequest::default()), path, codec).await.unwrap_err();
    }

    let calls = async |method: &str, code: &str, error: &str| {
        let (_, page) = get(ops, "/metrics").await.unwrap();
        let mut labels = vec![("rpc_system_name", "grpc"), ("rpc_method", method), ("rpc_status_code", code)];
        labels.extend((!error.is_empty()).then_some(("error_type", error)));
        sum_metric::<u64>(&page, "rpc_server_call_duration_seconds_count", &labels).unwrap_or_default()
    };
    let create = "orders.v1.OrderService/CreateOrder";
    // A call is counted when its last frame is sent, which is after its caller has the answer.
    eventually("two orders are counted", async || calls(create, "OK", "").await >= 2).await;
    eventually("a refusal", async || calls(create, "INVALID_ARGUMENT", "").await >= 1).await;
    eventually("a watcher that left", async || calls("orders.v1.OrderService/WatchOrder", "CANCELLED", "").await >= 1)
        .await;
    eventually("unknown methods", async || calls("_OTHER", "UNIMPLEMENTED", "UNIMPLEMENTED").await >= 2).await;
    assert!(calls(create, "INVALID_ARGUMENT", "INVALID_ARGUMENT").await == 0, "the caller's fault is no error");
    let (_, page) = get(ops, "/metrics").await.unwrap();
    assert!(!page.contains("OrderService/None") && !page.contains("any/Path"), "{page}");
    let least = |name: &str, labels: &[(&str, &str)], number: f64| {
        let counted: Option<f64> = sum_metric(&page, name, labels);
        assert!(counted.is_some_and(|counted| counted >= number), "{name} {labels:?} is {counted:?}: {page}");
    };
    least("orders_total", &[("outcome", "placed")], 2.0);
    least("orders_total", &[("outcome", "confirmed")], 1.0);
    least("order_settled_seconds_count", &[("outcome", "rejected")], 1.0);
    least("intake_group_orders_sum", &[], 2.0);
    least("intake_wait_seconds_count", &[], 2.0);
    least("inbox_events_total", &[("outcome", "applied")], 2.0);
    least("inbox_events_total", &[("outcome", "duplicate")], 1.0);
    // Pools of other tests have the same name.
    eventually("a session is idle", async || {
        let (_, page) = get(ops, "/metrics").await.unwrap();
        let idle = [("db_client_connection_state", "idle")];
        sum_metric::<f64>(&page, "db_client_connection_count", &idle).is_some_and(|idle| idle >= 1.0)
    })
    .await;
    service.end().await;
}

/// Passes connections on, and counts them.
async fn count_connections(to: SocketAddr) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, counted) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let count = counted.clone();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut to = TcpStream::connect(to).await.unwrap();
                copy_bidirectional(&mut from, &mut to).await
            });
        }
    });
    (address, counted)
}

/// A call that meets the end of a connection may not be sent. tonic says CANCELLED then, and callers repeat it.
#[tokio::test]
async fn clients_leave_a_connection_at_its_age_and_their_calls_go_on() {
    let service = Service::start_with(&["--connection-age-seconds", "1"]).await;
    let (address, connections) = count_connections(service.address).await;
    let orders = OrderServiceClient::connect(format!("http://{address}")).await.unwrap();
    let place = async |mut orders: OrderServiceClient<Channel>| {
        while connections.load(Ordering::Relaxed) < 4 {
            let request = order();
            match orders.create_order(request.clone()).await {
                Err(cancelled) if cancelled.code() == Code::Cancelled => orders.create_order(request).await.unwrap(),
                placed => placed.unwrap(),
            };
        }
    };
    let placing = futures_util::future::join_all((0..8).map(|_| place(orders.clone())));
    timeout(LIMIT, placing).await.expect("further connections");
    service.end().await;
}
