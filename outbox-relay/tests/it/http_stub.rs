//! A receiver, or a proxy before it, that answers with any HTTP response, also with what no gRPC server would send.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderName, Request, Response};
use prost::bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

/// An HTTP response.
#[derive(Clone, Debug, Default)]
pub(crate) struct HttpReply {
    head: Response<()>,
    body: Vec<u8>,
    /// Without trailers the body is the end.
    trailers: Option<HeaderMap>,
}

impl HttpReply {
    /// The page of a proxy.
    pub(crate) fn page(status: u16, headers: &[(&'static str, &str)], body: &str) -> Self {
        let mut reply = Self { body: body.as_bytes().to_vec(), ..Self::default() };
        *reply.head.status_mut() = status.try_into().unwrap();
        *reply.head.headers_mut() = map(headers);
        reply
    }

    /// The head of a gRPC answer, with these headers too.
    pub(crate) fn grpc(headers: &[(&'static str, &str)]) -> Self {
        let mut reply = Self::page(200, &[("content-type", "application/grpc")], "");
        reply.head.headers_mut().extend(map(headers));
        reply
    }

    /// With a message in the body.
    pub(crate) fn message(mut self, is_compressed: bool, message: &[u8]) -> Self {
        self.body.push(is_compressed.into());
        self.body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        self.body.extend(message);
        self
    }

    pub(crate) fn trailers(self, trailers: &[(&'static str, &str)]) -> Self {
        Self { trailers: Some(map(trailers)), ..self }
    }
}

fn map(headers: &[(&'static str, &str)]) -> HeaderMap {
    headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
}

/// Replies to a call of this path with this message.
type Script = Arc<Mutex<dyn FnMut(&str, &[u8]) -> HttpReply + Send>>;

/// Serves until it is dropped.
pub(crate) struct HttpStub {
    pub(crate) address: SocketAddr,
    _stop: DropGuard,
}

impl HttpStub {
    /// Without `reads`, it replies before it has read the message.
    pub(crate) async fn start(reads: bool, script: impl FnMut(&str, &[u8]) -> HttpReply + Send + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let (serving, stopped) = (listen(listener, reads, Arc::new(Mutex::new(script))), stop.clone());
        tokio::spawn(async move { stopped.run_until_cancelled(serving).await });
        Self { address, _stop: stop.drop_guard() }
    }
}

async fn listen(listener: TcpListener, reads: bool, script: Script) {
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        tokio::spawn(serve(socket, reads, script.clone()));
    }
}

async fn serve(socket: TcpStream, reads: bool, script: Script) {
    // The relay may hang up at any time.
    let Ok(mut connection) = h2::server::handshake(socket).await else { return };
    while let Some(Ok((request, respond))) = connection.accept().await {
        tokio::spawn(answer(request, respond, reads, script.clone()));
    }
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, reads: bool, script: Script) {
    let (head, body) = request.into_parts();
    let message = if reads { read(body).await } else { Vec::new() };
    let HttpReply { head, body, trailers } = (script.lock().unwrap())(head.uri.path(), &message);
    let ends = body.is_empty() && trailers.is_none();
    let Ok(mut stream) = respond.send_response(head, ends) else { return };
    if !body.is_empty() {
        let _ = stream.send_data(body.into(), trailers.is_none());
    }
    if let Some(trailers) = trailers {
        let _ = stream.send_trailers(trailers);
    }
}

async fn read(mut body: RecvStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        bytes.extend(chunk);
    }
    // The message is after one byte for its compression, and four for its length.
    bytes.split_off(5)
}
