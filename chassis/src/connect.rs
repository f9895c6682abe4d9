//! Connects to other processes, with TLS if their URL says so.

use std::{
    error::Error,
    io,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Status,
    transport::{Channel, Endpoint, Uri},
};
use tower::Service;

use crate::Tls;

/// If the endpoint has no limit of its own.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Connects at the first call, and again after a break.
///
/// Each connection is made with the newest certificates. Without CAs to trust, one with TLS fails.
pub fn connect_lazily(endpoint: &Endpoint, tls: &Tls) -> Channel {
    if endpoint.uri().scheme_str() != Some("https") {
        return endpoint.connect_lazy();
    }
    let connector = Connector::of(tls.clone(), endpoint, None);
    endpoint.connect_with_connector_lazy(connector)
}

/// Connects to a process that has the same certificate as this one, whatever address it is asked at.
pub(crate) async fn connect_to_own(endpoint: Endpoint, tls: &Tls) -> Result<Channel, tonic::transport::Error> {
    if endpoint.uri().scheme_str() != Some("https") {
        return endpoint.connect().await;
    }
    let connector = Connector::of(tls.clone(), &endpoint, tls.own_name());
    endpoint.connect_with_connector(connector).await
}

/// What a failed call says. If no answer came, only the last cause may tell what to do: those before it are no more than
/// "transport error".
pub fn explain(status: &Status) -> String {
    let said = format!("{:?}: {}", status.code(), status.message());
    let cause = last_cause(status);
    if status.source().is_none() || said.contains(&cause) { said } else { format!("{said}: {cause}") }
}

/// The system's, or that of TLS.
pub(crate) fn last_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[derive(Clone, Debug)]
struct Connector {
    tcp: HttpConnector,
    tls: Tls,
    limit: Duration,
    /// The name that the other end must have, if it is not that of the URL.
    name: Option<ServerName<'static>>,
}

impl Connector {
    fn of(tls: Tls, endpoint: &Endpoint, name: Option<ServerName<'static>>) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // It is divided among the addresses of a name, so that one that swallows packets does not take all of it.
        tcp.set_connect_timeout(endpoint.get_connect_timeout());
        let limit = endpoint.get_connect_timeout().unwrap_or(CONNECT_LIMIT).mul_f64(0.9);
        Self { tcp, tls, limit, name }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = self.name.clone().map_or_else(|| ServerName::try_from(host), Ok);
        let (connecting, config) = (self.tcp.call(uri), self.tls.client());
        let limit = self.limit;
        let connecting = async move {
            let config = config.ok_or_else(|| io::Error::other("there is no --tls-ca-file, so nobody is trusted"))?;
            let stream = connecting.await?.into_inner();
            Ok(TokioIo::new(TlsConnector::from(config).connect(name?, stream).await?))
        };
        // Shorter than tonic's own limit, which does not say that there was no connection.
        Box::pin(async move { timeout(limit, connecting).await? })
    }
}
