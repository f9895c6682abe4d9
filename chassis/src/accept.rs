//! Accepts connections, and knows who is at the other end of each.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::http::Extensions;
use futures_util::{Stream, StreamExt as _, stream::unfold};
use metrics::{counter, describe_counter};
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{Instant, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};
use tracing::{debug, warn};
use webpki::EndEntityCert;

use crate::LogLimit;

/// How long a handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// So many may be under way. The oldest makes room for a new one: whoever opens connections and says nothing keeps no
/// caller out.
const HANDSHAKES_MAX: usize = 256;
/// Between two lines of the log about failed handshakes.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
const HANDSHAKES: &str = "tls_handshakes_total";

/// Who is at the other end of a connection with TLS.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    address: Option<SocketAddr>,
    /// The URIs and DNS names of its certificate, in that order; `None` if it has shown none.
    names: Option<Arc<[String]>>,
}

impl Peer {
    pub(crate) fn names(&self) -> Option<&[String]> {
        self.names.as_deref()
    }
}

/// Where the other end of the connection is that a request came by.
pub fn address_of_peer(extensions: &Extensions) -> Option<SocketAddr> {
    let plain = || extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
    extensions.get::<Peer>().map_or_else(plain, |peer| peer.address)
}

/// Whether the other end of the connection has shown a certificate of one of the CAs.
pub fn peer_has_certificate(extensions: &Extensions) -> bool {
    extensions.get::<Peer>().is_some_and(|peer| peer.names.is_some())
}

pub(crate) fn describe() {
    describe_counter!(HANDSHAKES, "Handshakes of connections that were accepted, by outcome: done, failed");
    // Prometheus can take no rate of a metric that does not exist yet.
    for outcome in ["done", "failed"] {
        counter!(HANDSHAKES, "outcome" => outcome).increment(0);
    }
}

pub(crate) fn accept(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(Duration::from_secs(30)))
}

/// Connections whose handshake has succeeded, by the newest configuration.
pub(crate) fn accept_tls(
    listener: TcpListener,
    config: impl Fn() -> Option<Arc<ServerConfig>> + Send + 'static,
) -> impl Stream<Item = io::Result<Known>> {
    let accepting =
        Accepting { incoming: accept(listener), config, handshakes: JoinSet::new(), running: VecDeque::new() };
    unfold(accepting, |mut accepting| async move { Some((accepting.next().await?, accepting)) })
}

struct Accepting<C> {
    incoming: TcpIncoming,
    config: C,
    handshakes: JoinSet<Option<Known>>,
    running: VecDeque<AbortHandle>,
}

impl<C: Fn() -> Option<Arc<ServerConfig>>> Accepting<C> {
    async fn next(&mut self) -> Option<io::Result<Known>> {
        loop {
            tokio::select! {
                Some(ended) = self.handshakes.join_next() => {
                    if let Ok(Some(known)) = ended {
                        return Some(Ok(known));
                    }
                }
                accepted = self.incoming.next() => match accepted? {
                    Ok(stream) => self.begin(stream),
                    // Whoever keeps the connections makes room, and waits before the next one.
                    Err(cause) => return Some(Err(cause)),
                },
            }
        }
    }

    fn begin(&mut self, stream: TcpStream) {
        let Some(config) = (self.config)() else { return };
        self.running.retain(|handshake| !handshake.is_finished());
        if self.running.len() >= HANDSHAKES_MAX
            && let Some(oldest) = self.running.pop_front()
        {
            oldest.abort();
            fail("others came, and it was the oldest");
        }
        self.running.push_back(self.handshakes.spawn(shake_hands(stream, config)));
    }
}

async fn shake_hands(stream: TcpStream, config: Arc<ServerConfig>) -> Option<Known> {
    match timeout(HANDSHAKE_LIMIT, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(stream)) => {
            counter!(HANDSHAKES, "outcome" => "done").increment(1);
            let (socket, session) = stream.get_ref();
            // The handshake has verified it.
            let names = session.peer_certificates().and_then(|chain| chain.first()).map(names_in);
            let peer = Peer { address: socket.peer_addr().ok(), names };
            Some(Known { stream, peer })
        }
        Ok(Err(cause)) => {
            fail(&cause.to_string());
            None
        }
        Err(_) => {
            fail("it took too long");
            None
        }
    }
}

/// The URIs and DNS names of a certificate, in that order.
pub fn names_in(certificate: &CertificateDer<'_>) -> Arc<[String]> {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Arc::default() };
    // A URI without a scheme would look like the name of a host, which its issuer may not have looked at.
    let uris = certificate.valid_uri_names().filter(|uri| uri.contains(':'));
    let names = uris.chain(certificate.valid_dns_names());
    names.map(str::to_owned).collect()
}

fn fail(why: &str) {
    static SAID: LogLimit = LogLimit::new();
    counter!(HANDSHAKES, "outcome" => "failed").increment(1);
    debug!(why, "a handshake failed");
    if SAID.allows(Instant::now(), LOG_INTERVAL) {
        warn!(why, "a connection was refused: its TLS handshake failed (said once a minute at most)");
    }
}

/// A connection, and who is at its other end.
#[derive(Debug)]
pub(crate) struct Known {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

impl Connected for Known {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Known {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Known {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
