//! Counts the calls of a connection, and what of their answers is not read yet.
//!
//! HTTP/2 lets a caller take an answer as slowly as it likes. A server that is asked for the next part of an answer has
//! sent the part before it; until then that part waits for the caller.

use std::{
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use axum::{
    body::Bytes,
    http::{Request, Response},
};
use futures_util::future::{BoxFuture, FutureExt as _};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::{connections::Connection, guard::End};

/// A larger part of an answer is handed over in pieces. The server keeps one piece of each answer, however little of it the
/// caller takes, and the rest is counted here.
const PIECE_MAX: usize = 16 * 1024;

/// Counts the calls that come by connections whose other ends are known as `I`.
#[derive(Debug)]
pub(crate) struct CountCalls<I>(PhantomData<fn() -> I>);

impl<I> CountCalls<I> {
    pub(crate) fn new() -> Self {
        Self(PhantomData)
    }
}

// Derived, these would ask for more of `I`.
impl<I> Clone for CountCalls<I> {
    fn clone(&self) -> Self {
        Self(PhantomData)
    }
}

impl<S, I> Layer<S> for CountCalls<I> {
    type Service = Counted<S, I>;

    fn layer(&self, service: S) -> Counted<S, I> {
        Counted { service, ends: PhantomData }
    }
}

#[derive(Debug)]
pub(crate) struct Counted<S, I> {
    service: S,
    ends: PhantomData<fn() -> I>,
}

impl<S: Clone, I> Clone for Counted<S, I> {
    fn clone(&self) -> Self {
        Self { service: self.service.clone(), ends: PhantomData }
    }
}

impl<S, I> Service<Request<Body>> for Counted<S, I>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    I: Clone + Send + Sync + 'static,
{
    type Response = Response<Answer>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Answer>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let call = request.extensions_mut().remove::<End<I>>().map(|end| {
            request.extensions_mut().insert(end.info);
            Call::begin(end.connection)
        });
        let answered = self.service.call(request);
        async move { Ok(answered.await?.map(|body| Answer { body, rest: Bytes::new(), call })) }.boxed()
    }
}

/// A call that has not ended.
#[derive(Debug)]
struct Call {
    connection: Arc<Connection>,
    /// The bytes that wait for the caller, and since which interval.
    waiting: Option<(usize, usize)>,
}

impl Call {
    fn begin(connection: Arc<Connection>) -> Self {
        connection.call_begins();
        Self { connection, waiting: None }
    }

    fn waits(&mut self, bytes: usize) {
        self.waiting = Some((bytes, self.connection.waits(bytes)));
    }

    fn waits_no_longer(&mut self) {
        if let Some((bytes, interval)) = self.waiting.take() {
            self.connection.waits_no_longer(bytes, interval);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.waits_no_longer();
        self.connection.call_ends();
    }
}

/// The body of an answer.
#[derive(Debug)]
pub(crate) struct Answer {
    body: Body,
    /// Of a part that is handed over in pieces.
    rest: Bytes,
    call: Option<Call>,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(call) = &mut self.call {
            call.waits_no_longer();
        }
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(part) => self.rest = part,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                ended => return Poll::Ready(ended),
            }
        }
        let waiting = self.rest.len();
        if let Some(call) = &mut self.call {
            call.waits(waiting);
        }
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(waiting.min(PIECE_MAX))))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // It is asked for before the first part.
        if self.rest.is_empty() { self.body.size_hint() } else { SizeHint::default() }
    }
}
