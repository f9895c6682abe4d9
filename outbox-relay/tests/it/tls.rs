//! The listener for operations with certificates.

use std::{fs, time::Duration};

use chassis::{Tls, TlsFiles, connect_lazily};
use proto::relay::v1::{GetStatusRequest, relay_admin_client::RelayAdminClient};
use sqlx::types::time::OffsetDateTime;
use testkit::{
    Scratch,
    certificates::{Authority, replace},
    http::{get_by, sum_metric},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{
    binary::Binary,
    outbox::Outbox,
    receiver::{Receiver, Reply},
    relay::Relay,
    wait::until,
};

/// Probes and Prometheus have no certificate, and operators have one.
#[tokio::test]
async fn with_mutual_tls_only_those_with_a_certificate_operate() {
    let (scratch, authority) = (Scratch::new(), Authority::new().unwrap());
    let file = |name: &str, text: &str| {
        replace(&scratch.join(name), text).unwrap();
        scratch.join(name)
    };
    let own = file("own.pem", &authority.sign(&["localhost", "127.0.0.1"]).unwrap());
    let stranger = file("stranger.pem", &Authority::new().unwrap().sign(&["localhost"]).unwrap());
    let ca = file("ca.pem", authority.pem());
    let (outbox, receiver) = (Outbox::create().await, Receiver::start(Reply::apply).await);
    let flags = ["--tls-cert-file", own.to_str().unwrap(), "--tls-ca-file", ca.to_str().unwrap()];
    let relay = Relay::start(&outbox, receiver.address, &flags).await;
    let files = |cert| TlsFiles { tls_cert_file: cert, tls_key_file: None, tls_ca_file: Some(ca.clone()) };
    until("it serves", async || chassis::healthcheck(relay.address, &files(Some(own.clone()))).await.is_ok()).await;

    let channel = |scheme: &str, cert| {
        let endpoint = Endpoint::from_shared(format!("{scheme}://localhost:{}", relay.address.port())).unwrap();
        connect_lazily(&endpoint, &Tls::read(&files(cert)).unwrap())
    };
    get_status(channel("https", Some(own.clone()))).await.unwrap();
    assert_eq!(get_status(channel("https", None)).await.unwrap_err().code(), Code::Unauthenticated);
    for refused in [channel("https", Some(stranger)), channel("http", Some(own))] {
        let status = get_status(refused).await.unwrap_err();
        assert!(std::error::Error::source(&status).is_some(), "it was answered: {status:?}");
    }
    relay.stop().await;
}

async fn get_status(channel: Channel) -> Result<(), Status> {
    RelayAdminClient::new(channel).get_status(GetStatusRequest {}).await.map(drop)
}

/// A certificate that nobody has renewed is what ends a system that has run for a year.
#[tokio::test]
async fn the_end_of_a_certificate_is_measured_and_reported_once_it_is_over() {
    const HOUR: Duration = Duration::from_secs(3600);
    let (scratch, authority) = (Scratch::new(), Authority::new().unwrap());
    let (own, ca) = (scratch.join("own.pem"), scratch.join("ca.pem"));
    let sign = |end| replace(&own, &authority.sign_until(&["127.0.0.1"], end).unwrap()).unwrap();
    let first_end = OffsetDateTime::now_utc() + HOUR;
    sign(first_end);
    replace(&ca, authority.pem()).unwrap();
    let files = TlsFiles { tls_ca_file: Some(ca), ..TlsFiles::default() };
    let (outbox, receiver) = (Outbox::create().await, Receiver::start(Reply::apply).await);
    let mut relay = Binary::start(&outbox, &receiver, &["--tls-cert-file", own.to_str().unwrap()]);
    let ends_at = async |end: OffsetDateTime| {
        until("the end is measured", async || {
            let page = get_by(&files, relay.ops, "/metrics").await.unwrap_or_default();
            sum_metric::<f64>(&page, "tls_certificate_not_after_seconds", &[]) == Some(end.unix_timestamp() as f64)
        })
        .await;
    };
    ends_at(first_end).await;
    sign(first_end + HOUR);
    ends_at(first_end + HOUR).await;
    let reported = || fs::read_to_string(relay.log_file()).unwrap().contains("the certificate has expired");
    assert!(!reported());
    sign(OffsetDateTime::now_utc() - HOUR);
    until("it is reported", async || reported()).await;
    relay.process.terminate(Duration::from_secs(10)).await.unwrap();
}
