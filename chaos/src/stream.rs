//! One side of a connection that passes a proxy: without TLS, or with TLS that ends here.
//!
//! A proxy looks for the messages that pass, so with TLS it has to read what only the two ends should. It is therefore the
//! server to the client, and the client to the server, each by the certificate of the one that it stands for.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use chassis::{Tls, names_in};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{Accept, Connect, TlsAcceptor, TlsConnector, TlsStream, rustls::pki_types::ServerName};

/// One that has a certificate.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) name: &'static str,
    pub(super) tls: Tls,
}

/// The two that a proxy stands between, and stands for.
#[derive(Clone, Debug)]
pub(super) struct Ends {
    pub(super) client: Identity,
    pub(super) server: Identity,
}

/// A handshake keeps its state here. So one that a fault strikes can be left hanging, or reset.
pub(super) enum Stream {
    Plain(TcpStream),
    /// With the name that the client must have: the proxy lends its client's certificate to nobody else.
    Accepting(Box<Accept<TcpStream>>, &'static str),
    Connecting(Box<Connect<TcpStream>>),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// The side of the client.
    pub(super) fn of_client(tcp: TcpStream, ends: Option<&Ends>) -> io::Result<Self> {
        let Some(Ends { client, server }) = ends else { return Ok(Self::Plain(tcp)) };
        let config = server.tls.server().ok_or_else(|| io::Error::other("the server has no certificate"))?;
        Ok(Self::Accepting(Box::new(TlsAcceptor::from(config).accept(tcp)), client.name))
    }

    /// The side of the server.
    pub(super) fn of_server(tcp: TcpStream, ends: Option<&Ends>) -> io::Result<Self> {
        let Some(Ends { client, server }) = ends else { return Ok(Self::Plain(tcp)) };
        let config = client.tls.client().ok_or_else(|| io::Error::other("the client trusts nobody"))?;
        let name = ServerName::try_from(server.name).map_err(io::Error::other)?;
        Ok(Self::Connecting(Box::new(TlsConnector::from(config).connect(name, tcp))))
    }

    /// Ends the handshake, if there is one. May be called again if it was dropped.
    pub(super) async fn shake_hands(&mut self) -> io::Result<()> {
        let (stream, expected) = match self {
            Self::Plain(_) | Self::Tls(_) => return Ok(()),
            Self::Accepting(shaking, client) => (TlsStream::from(shaking.await?), Some(*client)),
            Self::Connecting(shaking) => (TlsStream::from(shaking.await?), None),
        };
        if let Some(client) = expected
            && !names_of_peer(&stream).iter().any(|name| name == client)
        {
            return Err(io::Error::other(format!("it is not {client}")));
        }
        *self = Self::Tls(Box::new(stream));
        Ok(())
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(self, Self::Plain(_) | Self::Tls(_))
    }

    /// The connection is reset once this is dropped.
    pub(super) fn will_reset(&mut self) {
        if let Some(tcp) = self.tcp() {
            let _ = tcp.set_zero_linger();
        }
    }

    /// Closes the connection in order. Nothing is said by TLS: a network that breaks has no key, either.
    pub(super) async fn close(&mut self) {
        if let Some(tcp) = self.tcp() {
            let _ = tcp.shutdown().await;
        }
    }

    /// There is none any more if its handshake has failed.
    fn tcp(&mut self) -> Option<&mut TcpStream> {
        match self {
            Self::Plain(tcp) => Some(tcp),
            Self::Accepting(shaking, _) => shaking.get_mut(),
            Self::Connecting(shaking) => shaking.get_mut(),
            Self::Tls(stream) => Some(stream.get_mut().0),
        }
    }

    fn ready(self: Pin<&mut Self>) -> io::Result<Pin<&mut dyn ReadWrite>> {
        match self.get_mut() {
            Self::Plain(stream) => Ok(Pin::new(stream)),
            Self::Tls(stream) => Ok(Pin::new(&mut **stream)),
            Self::Accepting(..) | Self::Connecting(_) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// What the certificate at the other end says.
pub(super) fn names_of_peer(stream: &TlsStream<TcpStream>) -> Vec<String> {
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    shown.map(|certificate| names_in(certificate).to_vec()).unwrap_or_default()
}

trait ReadWrite: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> ReadWrite for T {}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.ready()?.poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.ready()?.poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ready()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ready()?.poll_shutdown(cx)
    }
}
