//! Answers the calls of relays in place of a receiver: as the frameworks of other languages do, or as a proxy does before
//! a receiver that is away.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use h2::{RecvStream, server::SendResponse};
use prost::{Message, bytes::Bytes};
use proto::events::v1::{DescribeRequest, DescribeResponse, event_receiver_client::EventReceiverClient};
use tokio::{select, task::JoinSet};
use tonic::{
    Status,
    codegen::http::{HeaderMap, HeaderName, HeaderValue, Request, Response},
    transport::Endpoint,
};

use super::stream::{Ends, Stream};
use chassis::{Tls, TlsFiles, connect_lazily};

/// What every call is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// As grpcio answers if the service raises an exception.
    Unknown,
    /// As services answer that have waited in vain for another one.
    DeadlineExceeded,
    /// The page of a proxy, with this status.
    Page(u16),
    /// An answer that ends before its gRPC status.
    NoStatus,
}

/// How a receiver is stood in for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StandIn {
    pub(super) answer: Answer,
    /// Whether Describe is passed on to the receiver. Then only deliveries are answered so.
    pub(super) describes: bool,
}

/// The one that is stood in for, as its relay reaches it.
#[derive(Clone, Debug)]
pub(super) struct Receiver {
    url: String,
    tls: Option<Tls>,
}

impl Receiver {
    pub(super) fn at(address: SocketAddr, ends: Option<&Ends>) -> Self {
        let scheme = if ends.is_some() { "https" } else { "http" };
        Self { url: format!("{scheme}://{address}"), tls: ends.map(|ends| ends.client.tls.clone()) }
    }

    async fn describe(self) -> Result<DescribeResponse, Status> {
        let fails = |error: &dyn std::error::Error| Status::unavailable(error.to_string());
        let endpoint = Endpoint::from_shared(self.url).map_err(|error| fails(&error))?;
        let tls = self.tls.map_or_else(|| Tls::read(&TlsFiles::default()), Ok).map_err(|error| fails(&error))?;
        let mut client = EventReceiverClient::new(connect_lazily(&endpoint, &tls));
        Ok(client.describe(DescribeRequest {}).await?.into_inner())
    }
}

struct Reply {
    head: Response<()>,
    body: Bytes,
    /// Without trailers the body is the end.
    trailers: Option<HeaderMap>,
}

impl StandIn {
    /// Serves one connection until the client ends it, and counts the calls that are not passed on.
    pub(super) async fn serve(self, client: Stream, receiver: Receiver, answered: &AtomicU64) {
        let Ok(mut connection) = h2::server::handshake(client).await else { return };
        let mut answering = JoinSet::new();
        loop {
            select! {
                accepted = connection.accept() => {
                    let Some(Ok((request, respond))) = accepted else { return };
                    let passes_on = self.describes && request.uri().path().ends_with("/Describe");
                    answered.fetch_add(u64::from(!passes_on), Ordering::Relaxed);
                    answering.spawn(self.answer_call(request, respond, passes_on.then(|| receiver.clone())));
                }
                Some(_) = answering.join_next() => {}
            }
        }
    }

    async fn answer_call(
        self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        passed_to: Option<Receiver>,
    ) {
        read(request.into_body()).await;
        let Reply { head, body, trailers } = if let Some(receiver) = passed_to {
            receiver
                .describe()
                .await
                .map_or_else(|status| status_only(status.code().into(), "away"), |description| whole(&description))
        } else {
            self.answer.reply()
        };
        // The relay may hang up at any time.
        let Ok(mut stream) = respond.send_response(head, body.is_empty() && trailers.is_none()) else { return };
        if !body.is_empty() {
            let _ = stream.send_data(body, trailers.is_none());
        }
        if let Some(trailers) = trailers {
            let _ = stream.send_trailers(trailers);
        }
    }
}

impl Answer {
    fn reply(self) -> Reply {
        match self {
            Self::Unknown => status_only(2, "Exception calling application: connection already closed"),
            Self::DeadlineExceeded => status_only(4, "Deadline Exceeded"),
            Self::Page(status) => page(status),
            Self::NoStatus => Reply { trailers: None, ..whole(&DescribeResponse::default()) },
        }
    }
}

async fn read(mut body: RecvStream) {
    while let Some(Ok(chunk)) = body.data().await {
        let _ = body.flow_control().release_capacity(chunk.len());
    }
}

/// A status without a message comes in the head alone.
fn status_only(code: i32, text: &'static str) -> Reply {
    let mut head = grpc_head();
    head.headers_mut().insert("grpc-status", code.into());
    head.headers_mut().insert("grpc-message", HeaderValue::from_static(text));
    Reply { head, body: Bytes::new(), trailers: None }
}

/// A message, and the status OK.
fn whole(message: &impl Message) -> Reply {
    let mut body = vec![0];
    body.extend(u32::try_from(message.encoded_len()).unwrap_or_default().to_be_bytes());
    body.extend(message.encode_to_vec());
    let ok = (HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
    Reply { head: grpc_head(), body: body.into(), trailers: Some(HeaderMap::from_iter([ok])) }
}

fn grpc_head() -> Response<()> {
    let mut head = Response::new(());
    head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    head
}

/// The page of HAProxy for 503, and that of nginx for the others.
fn page(status: u16) -> Reply {
    const HAPROXY: &str = "<html><body><h1>503 Service Unavailable</h1>\nNo server is available to handle this request.\n</body></html>\n";
    let title = if status == 502 { "502 Bad Gateway" } else { "504 Gateway Time-out" };
    let nginx = format!(
        "<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n\
         <hr><center>nginx/1.24.0</center>\r\n</body>\r\n</html>\r\n"
    );
    let mut head = Response::new(());
    *head.status_mut() = status.try_into().unwrap_or_default();
    head.headers_mut().insert("content-type", HeaderValue::from_static("text/html"));
    Reply { head, body: if status == 503 { HAPROXY.into() } else { nginx.into() }, trailers: None }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, SocketAddr},
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
    };

    use proto::events::v1::{DeliverRequest, DescribeRequest, event_receiver_client::EventReceiverClient};
    use tokio::net::{TcpListener, TcpStream};
    use tonic::{
        Code,
        codegen::http::{HeaderMap, Request},
    };

    use super::{Answer, Receiver, StandIn};
    use crate::stream::Stream;

    /// Where a stand-in serves one connection, and the count of its answers.
    async fn serve(stand_in: StandIn, receiver: SocketAddr) -> (SocketAddr, Arc<AtomicU64>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let (address, answered) = (listener.local_addr().expect("its address"), Arc::new(AtomicU64::new(0)));
        let counted = answered.clone();
        tokio::spawn(async move {
            let (client, _) = listener.accept().await.expect("a connection");
            stand_in.serve(Stream::Plain(client), Receiver::at(receiver, None), &counted).await;
        });
        (address, answered)
    }

    fn nowhere() -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 1))
    }

    /// The HTTP status, the content type, the gRPC status, and the body.
    async fn call(answer: Answer) -> (u16, String, Option<String>, String) {
        let (address, _) = serve(StandIn { answer, describes: false }, nowhere()).await;
        let stream = TcpStream::connect(address).await.expect("it listens");
        let (mut client, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
        tokio::spawn(connection);
        let request = Request::post("http://localhost/events.v1.EventReceiver/Deliver").body(()).expect("a request");
        let (response, _) = client.send_request(request, true).expect("an open connection");
        let response = response.await.expect("a response");
        let header = |map: &HeaderMap, name| map.get(name).map(|value| value.to_str().expect("text").to_owned());
        let (status, content_type) = (response.status().as_u16(), header(response.headers(), "content-type"));
        let in_head = header(response.headers(), "grpc-status");
        let (mut body, mut text) = (response.into_body(), Vec::new());
        while let Some(chunk) = body.data().await {
            text.extend(chunk.expect("a whole body"));
        }
        let trailers = body.trailers().await.expect("an end").unwrap_or_default();
        let grpc_status = in_head.or_else(|| header(&trailers, "grpc-status"));
        (status, content_type.expect("a type"), grpc_status, String::from_utf8(text).expect("text"))
    }

    #[tokio::test]
    async fn calls_are_answered_with_a_code_with_a_page_or_without_a_status() {
        let coded = |code: &str| (200, "application/grpc".to_owned(), Some(code.to_owned()), String::new());
        assert_eq!(call(Answer::Unknown).await, coded("2"));
        assert_eq!(call(Answer::DeadlineExceeded).await, coded("4"));
        let (status, content_type, grpc_status, body) = call(Answer::NoStatus).await;
        assert_eq!((status, &*content_type, grpc_status, &*body), (200, "application/grpc", None, "\0\0\0\0\0"));
        for (status, title) in
            [(502, "502 Bad Gateway"), (503, "503 Service Unavailable"), (504, "504 Gateway Time-out")]
        {
            let (answered, content_type, grpc_status, body) = call(Answer::Page(status)).await;
            assert_eq!((answered, &*content_type, grpc_status), (status, "text/html", None));
            assert!(body.contains(title), "{body}");
        }
    }

    #[tokio::test]
    async fn describe_is_passed_on_and_does_not_count() {
        let (receiver, _) = serve(StandIn { answer: Answer::DeadlineExceeded, describes: false }, nowhere()).await;
        let (address, answered) = serve(StandIn { answer: Answer::Unknown, describes: true }, receiver).await;
        let mut client = EventReceiverClient::connect(format!("http://{address}")).await.expect("it listens");
        let described = client.describe(DescribeRequest {}).await.expect_err("the receiver answers so");
        assert_eq!((described.code(), answered.load(Ordering::Relaxed)), (Code::DeadlineExceeded, 0));
        let delivered = client.deliver(DeliverRequest::default()).await.expect_err("the stand-in answers so");
        assert_eq!((delivered.code(), answered.load(Ordering::Relaxed)), (Code::Unknown, 1));
    }
}
