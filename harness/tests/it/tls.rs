//! The whole system with mutual TLS, by certificates that are made here.

use std::time::Duration;

use chassis::{Tls, TlsFiles, connect_lazily};
use harness::{
    audit::audit,
    identities::{CUSTOMERS, Identities},
    stress::{Load, place_orders, wait_until_delivered},
    system::{Layout, Service, stop},
    target::Target,
};
use proto::{
    events::v1::{DescribeRequest, event_receiver_client::EventReceiverClient},
    orders::v1::{GetOrderRequest, order_service_client::OrderServiceClient},
};
use testkit::{
    Scratch,
    certificates::{Authority, replace},
    processes::Process,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::site::Site;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// An authority, and all that it has signed for one system.
struct Certificates {
    authority: Authority,
    identities: Identities,
    _directory: Scratch,
}

impl Certificates {
    fn new() -> Self {
        let (authority, directory) = (Authority::new().unwrap(), Scratch::new());
        let identities = Identities::make(&directory.join("certificates"), &authority).unwrap();
        Self { authority, identities, _directory: directory }
    }

    fn files(&self) -> TlsFiles {
        self.identities.files(CUSTOMERS)
    }
}

pub(crate) async fn start(layout: &Layout) -> Vec<Process> {
    let mut processes = Vec::new();
    for service in layout.services() {
        processes.push(layout.start(service).await.unwrap());
    }
    processes
}

/// What a call of order-service with these certificates fails with. No order has this id.
async fn fails(url: &Uri, files: &TlsFiles) -> Status {
    let channel = connect(url, files);
    let request = GetOrderRequest { order_id: "01a20b21-00d5-752f-907c-c77357a0e2da".into() };
    let called = timeout(LIMIT, OrderServiceClient::new(channel).get_order(request)).await;
    called.expect("an answer").unwrap_err()
}

fn connect(url: &Uri, files: &TlsFiles) -> Channel {
    connect_lazily(&Endpoint::from(url.clone()), &Tls::read(files).unwrap())
}

async fn assert_refused(target: &Target, own: &TlsFiles) {
    let stranger = Certificates::new();
    let nobody = TlsFiles { tls_cert_file: None, ..own.clone() };
    let of_another = TlsFiles { tls_cert_file: stranger.files().tls_cert_file, ..own.clone() };
    let trusts_another = TlsFiles { tls_ca_file: stranger.files().tls_ca_file, ..own.clone() };
    assert_eq!(fails(&target.order_service, own).await.code(), Code::NotFound);
    let plain: Uri = target.order_service.to_string().replace("https", "http").parse().unwrap();
    for (what, url, files) in [
        ("no TLS", &plain, own),
        ("no certificate", &target.order_service, &nobody),
        ("that of another authority", &target.order_service, &of_another),
        ("trust in another authority", &target.order_service, &trusts_another),
    ] {
        let refused = fails(url, files).await;
        assert!(std::error::Error::source(&refused).is_some(), "{what} was answered: {refused:?}");
        let events = url.to_string().replace(
            &target.order_service.authority().unwrap().to_string(),
            target.order_events.authority().unwrap().as_str(),
        );
        let mut receiver = EventReceiverClient::new(connect(&events.parse().unwrap(), files));
        let refused = timeout(LIMIT, receiver.describe(DescribeRequest {})).await.expect("an answer").unwrap_err();
        assert!(std::error::Error::source(&refused).is_some(), "{what} was answered: {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_mutual_tls_orders_are_confirmed_and_strangers_are_refused() {
    let certificates = Certificates::new();
    let mut site = Site::prepare_with_loyalty(&[]).await;
    site.layout.identities = Some(certificates.identities.clone());
    let processes = start(&site.layout).await;
    let target = site.layout.target().unwrap();
    let load = Load { orders: 200, concurrency: 8, retry_for: Duration::ZERO };
    place_orders(&target, load).await.unwrap();
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();
    assert_eq!(audit(&target.databases).await.unwrap().findings, [""; 0]);
    assert_refused(&target, &certificates.files()).await;
    stop(processes).await.unwrap();
}

/// From one authority to another, as security.md says. No call fails meanwhile, and a broken file changes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_under_load_and_broken_ones_are_not_used() {
    let certificates = Certificates::new();
    let (ca_file, next) = (certificates.identities.ca_file(), Certificates::new());
    let mut site = Site::prepare(&[]).await;
    site.layout.identities = Some(certificates.identities.clone());
    let mut processes = start(&site.layout).await;
    let target = site.layout.target().unwrap();
    let both = format!("{}{}", certificates.authority.pem(), next.authority.pem());
    // First others trust the next one, then it signs, then nobody trusts the last one.
    let steps = [Some(both.as_str()), None, Some(next.authority.pem())];
    for (changes, step) in (1..).zip(steps) {
        match step {
            Some(authorities) => replace(&ca_file, authorities).unwrap(),
            None => certificates.identities.renew(&next.authority).unwrap(),
        }
        let began = Instant::now();
        // Each load has connections of its own.
        while said(&processes, "the files of the certificates have changed, and count") < changes {
            assert!(began.elapsed() < LIMIT, "the certificates are not used");
            place(&target).await;
        }
        place(&target).await;
    }
    let before = Certificates::new();
    before.identities.renew(&certificates.authority).unwrap();
    replace(&before.identities.ca_file(), &both).unwrap();
    let refused = fails(&target.order_service, &before.files()).await;
    assert!(std::error::Error::source(&refused).is_some(), "it was answered: {refused:?}");
    // Its relay connects again, by the newest certificates.
    let inventory = site.layout.services().into_iter().position(|service| service == Service::Inventory).unwrap();
    stop([processes.remove(inventory)]).await.unwrap();
    processes.insert(inventory, site.layout.start(Service::Inventory).await.unwrap());
    place(&target).await;
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();

    for service in site.layout.services() {
        replace(&certificates.identities.own_file(service.name()), "no certificate").unwrap();
    }
    eventually("it is said", async || said(&processes, "what they held before is kept") == 1).await;
    assert_eq!(fails(&target.order_service, &next.files()).await.code(), Code::NotFound);
    assert_eq!(audit(&target.databases).await.unwrap().findings, [""; 0]);
    stop(processes).await.unwrap();
}

/// Renews every certificate again and again while orders are placed. No call may fail.
async fn renew_under_load(times: usize, at_least: Duration) {
    let certificates = Certificates::new();
    let mut site = Site::prepare(&[]).await;
    site.layout.identities = Some(certificates.identities.clone());
    let processes = start(&site.layout).await;
    let target = site.layout.target().unwrap();
    for changes in 1..=times {
        certificates.identities.renew(&certificates.authority).unwrap();
        let began = Instant::now();
        while said(&processes, "the files of the certificates have changed, and count") < changes
            || began.elapsed() < at_least
        {
            assert!(began.elapsed() < LIMIT, "the certificates are not used");
            place(&target).await;
        }
    }
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();
    assert_eq!(audit(&target.databases).await.unwrap().findings, [""; 0]);
    stop(processes).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_all_certificates_are_renewed() {
    renew_under_load(3, Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it takes a minute"]
async fn no_call_fails_while_all_certificates_are_renewed_every_ten_seconds() {
    renew_under_load(6, Duration::from_secs(10)).await;
}

/// How often each process has said it, at least.
fn said(processes: &[Process], text: &str) -> usize {
    processes.iter().map(|process| process.log().unwrap().matches(text).count()).min().unwrap()
}

async fn place(target: &Target) {
    place_orders(target, Load { orders: 40, concurrency: 4, retry_for: Duration::ZERO }).await.unwrap();
}

pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}
