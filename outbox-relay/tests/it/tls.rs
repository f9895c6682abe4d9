//! The listener for operations with certificates.

use chassis::{Tls, TlsFiles, connect_lazily};
use proto::relay::v1::{GetStatusRequest, relay_admin_client::RelayAdminClient};
use testkit::{
    Scratch,
    certificates::{Authority, replace},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{
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
