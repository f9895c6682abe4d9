//! The whole system with a policy: each caller may do what it says, and nothing else.

use std::{fs, time::Duration};

use chassis::{Tls, TlsFiles, connect_lazily};
use harness::{
    demo::forge_reservation,
    identities::{CUSTOMERS, Identities, OPERATORS},
    stress::{Load, place_orders, wait_until_delivered},
    system::{Service, stop},
    target::Target,
};
use proto::{
    events::v1::{Outcome, event_receiver_client::EventReceiverClient},
    orders::v1::{
        CreateOrderRequest, GetOrderRequest, OrderItem, OrderStatus, order_service_client::OrderServiceClient,
    },
    relay::v1::{GetStatusRequest, ListDeedsRequest, PauseRequest, relay_admin_client::RelayAdminClient},
};
use testkit::{
    Scratch,
    certificates::{Authority, replace},
    http,
    processes::Process,
};
use tokio::time::timeout;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};
use uuid::Uuid;

use crate::{
    site::Site,
    tls::{LIMIT, eventually, start},
};

/// A system with a policy.
struct Secured {
    site: Site,
    target: Target,
    identities: Identities,
    processes: Vec<Process>,
    _directory: Scratch,
}

impl Secured {
    async fn start() -> Self {
        let (authority, directory) = (Authority::new().unwrap(), Scratch::new());
        let identities = Identities::make(&directory.join("certificates"), &authority).unwrap();
        let mut site = Site::prepare(&[]).await;
        site.layout.identities = Some(identities.clone());
        site.layout.serves_ops = true;
        let target = site.layout.target().unwrap();
        let processes = start(&site.layout).await;
        Self { site, target, identities, processes, _directory: directory }
    }

    fn connect(&self, url: &Uri, name: &str) -> Channel {
        connect_with(url, &self.identities.files(name))
    }

    fn relay(&self, files: &TlsFiles) -> RelayAdminClient<Channel> {
        let url = format!("https://{}", self.site.layout.orders_relay).parse().unwrap();
        RelayAdminClient::new(connect_with(&url, files))
    }

    /// As Prometheus reads them, which has no certificate.
    async fn metrics_of(&self, service: Service) -> String {
        let address = self.site.layout.ops_address(service).unwrap().unwrap();
        let files = TlsFiles { tls_cert_file: None, ..self.identities.files(OPERATORS) };
        http::get_by(&files, address, "/metrics").await.unwrap()
    }

    fn log_of(&self, service: Service) -> String {
        fs::read_to_string(self.site.layout.log(service)).unwrap()
    }
}

fn connect_with(url: &Uri, files: &TlsFiles) -> Channel {
    connect_lazily(&Endpoint::from(url.clone()), &Tls::read(files).unwrap())
}

fn order() -> CreateOrderRequest {
    CreateOrderRequest {
        request_id: Uuid::new_v4().into(),
        customer_id: "ann".into(),
        currency_code: "EUR".into(),
        items: vec![OrderItem { sku: "MUG".into(), quantity: 1, unit_price_minor: 100 }],
    }
}

fn assert_says(refused: &Status, code: Code, text: &str) {
    assert_eq!(refused.code(), code, "{refused:?}");
    assert!(refused.message().contains(text), "{refused:?}");
}

/// Nobody but inventory's relay may say that stock is reserved, wherever he says it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_event_is_refused_on_every_path() {
    let mut secured = Secured::start().await;
    let inventory = secured.site.layout.services().iter().position(|service| *service == Service::Inventory).unwrap();
    // So that the order stays as it is, unless somebody lies.
    stop([secured.processes.remove(inventory)]).await.unwrap();
    let order_id = secured.target.orders().unwrap().create_order(order()).await.unwrap().into_inner().order_id;

    let denied = (Code::PermissionDenied, "the policy of this process does not allow this to");
    let (callers, relays) = (&secured.target.order_service, &secured.target.order_events);
    let no_service = (Code::Unimplemented, "");
    for (url, name, (code, says)) in [
        (callers, CUSTOMERS, denied),
        (relays, CUSTOMERS, denied),
        (relays, OPERATORS, denied),
        (relays, "order-service", denied),
        (
            relays,
            "orders-relay",
            (Code::PermissionDenied, "orders-relay may not deliver events of \"inventory-service\""),
        ),
        (callers, "inventory-relay", no_service),
    ] {
        let mut receiver = EventReceiverClient::new(secured.connect(url, name));
        let refused = timeout(LIMIT, receiver.deliver(forge_reservation(&secured.target, &order_id).await.unwrap()))
            .await
            .unwrap()
            .unwrap_err();
        assert_says(&refused, code, says);
    }
    let asked = GetOrderRequest { order_id: order_id.clone() };
    let found = secured.target.orders().unwrap().get_order(asked).await.unwrap().into_inner();
    assert_eq!(found.status(), OrderStatus::Pending);

    // What was refused would have been applied if inventory's relay had said it.
    let mut receiver = EventReceiverClient::new(secured.connect(relays, "inventory-relay"));
    let results = receiver
        .deliver(forge_reservation(&secured.target, &order_id).await.unwrap())
        .await
        .unwrap()
        .into_inner()
        .results;
    assert_eq!(results[0].outcome(), Outcome::Applied);
    stop(secured.processes).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn denials_are_logged_and_counted_and_the_newest_policy_counts() {
    let secured = Secured::start().await;
    place_orders(&secured.target, Load { orders: 20, concurrency: 4, retry_for: Duration::ZERO }).await.unwrap();
    wait_until_delivered(&secured.target.databases, LIMIT).await.unwrap();

    let mut orders = OrderServiceClient::new(secured.connect(&secured.target.order_service, "orders-relay"));
    let refused = orders.create_order(order()).await.unwrap_err();
    assert_says(&refused, Code::PermissionDenied, "does not allow this to localhost, orders-relay");
    let log = secured.log_of(Service::Orders);
    let line = log.lines().find(|line| line.contains("a call is denied")).unwrap();
    assert!(line.contains("orders.v1.OrderService/CreateOrder") && line.contains("orders-relay"), "{line}");
    let page = secured.metrics_of(Service::Orders).await;
    let counted =
        http::sum_metric::<u64>(&page, "calls_denied_total", &[("rpc_method", "orders.v1.OrderService/CreateOrder")]);
    assert_eq!(counted, Some(1), "{page}");

    let text = fs::read_to_string(secured.identities.policy_file()).unwrap();
    replace(&secured.identities.policy_file(), &format!("{text}orders-relay orders.v1.OrderService/CreateOrder\n"))
        .unwrap();
    eventually("the new policy counts", async || orders.create_order(order()).await.is_ok()).await;
    replace(&secured.identities.policy_file(), "orders-relay\n").unwrap();
    eventually("the broken policy is said", async || {
        secured.log_of(Service::Orders).contains("the files of the policy have changed, and cannot be read or used")
    })
    .await;
    orders.create_order(order()).await.unwrap();
    replace(&secured.identities.policy_file(), &text).unwrap();
    eventually("the old policy counts again", async || orders.create_order(order()).await.is_err()).await;
    stop(secured.processes).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_are_known_by_their_certificates() {
    let secured = Secured::start().await;
    let nobody = TlsFiles { tls_cert_file: None, ..secured.identities.files(OPERATORS) };
    let refused = secured.relay(&nobody).get_status(GetStatusRequest::default()).await.unwrap_err();
    assert_says(&refused, Code::Unauthenticated, "certificate");
    let refused =
        secured.relay(&secured.identities.files(CUSTOMERS)).get_status(GetStatusRequest::default()).await.unwrap_err();
    assert_says(&refused, Code::PermissionDenied, "does not allow this to localhost, customers");

    // The console, too, though the caller is on the relay's machine.
    for (files, says) in [
        (nobody, r#""reason":"CERTIFICATE_REQUIRED""#),
        (secured.identities.files(CUSTOMERS), r#""reason":"NOT_ALLOWED""#),
        (secured.identities.files(OPERATORS), r#"{"name":"operators","role":"operator"}"#),
    ] {
        let page = http::get_by(&files, secured.site.layout.orders_relay, "/api/me").await.unwrap();
        assert!(page.contains(says), "{page}");
    }

    let mut relay = secured.relay(&secured.identities.files(OPERATORS));
    let pause = PauseRequest { paused_by: "mallory".into(), reason: "a test".into(), subscription: String::new() };
    relay.pause(pause).await.unwrap();
    let deeds = relay.list_deeds(ListDeedsRequest::default()).await.unwrap().into_inner().deeds;
    assert_eq!(deeds[0].done_by, OPERATORS, "{deeds:?}");
    stop(secured.processes).await.unwrap();
}
