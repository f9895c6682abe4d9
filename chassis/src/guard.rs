//! A connection as its listener guards it: one that says nothing at first, or is cut, ends.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tonic::transport::server::Connected;

use crate::connections::{Connection, count_closed};

/// How HTTP/2 begins. Whatever begins otherwise is HTTP/1, or an error.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection of a listener.
#[derive(Debug)]
pub(crate) struct Guarded<S> {
    stream: S,
    connection: Arc<Connection>,
    /// Until it has begun to speak.
    hello: Option<Hello>,
}

#[derive(Debug)]
struct Hello {
    limit: Pin<Box<Sleep>>,
    heard: usize,
}

impl<S> Guarded<S> {
    pub(crate) fn new(stream: S, connection: Arc<Connection>, hello_limit: Duration) -> Self {
        Self { stream, connection, hello: Some(Hello { limit: Box::pin(sleep(hello_limit)), heard: 0 }) }
    }
}

impl Hello {
    fn is_over(&mut self, bytes: &[u8]) -> bool {
        let expected = &PREFACE[self.heard..];
        self.heard += bytes.len();
        bytes.len() >= expected.len() || !expected.starts_with(bytes)
    }
}

impl<S> Drop for Guarded<S> {
    fn drop(&mut self) {
        self.connection.closed();
    }
}

/// Who is at the other end, and the connection itself.
#[derive(Clone, Debug)]
pub(crate) struct End<I> {
    pub(crate) info: I,
    pub(crate) connection: Arc<Connection>,
}

impl<S: Connected> Connected for Guarded<S> {
    type ConnectInfo = End<S::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        End { info: self.stream.connect_info(), connection: self.connection.clone() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.connection.check(cx)?;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let Some(hello) = &mut self.hello else { return polled };
        if polled.is_ready() {
            if hello.is_over(&buffer.filled()[before..]) {
                self.hello = None;
            }
            return polled;
        }
        ready!(hello.limit.as_mut().poll(cx));
        count_closed("silent");
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.connection.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.connection.check(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.check(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_has_begun_once_it_cannot_become_http_2_or_has() {
        for (parts, is_over) in [
            (&[&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..]][..], true),
            (&[b"PRI * HTTP/2.0\r\n\r\n", b"SM\r\n\r\n and more"], true),
            (&[b"PRI * HTTP/2.0\r\n\r\n", b"SM\r\n\r"], false),
            (&[b"PRI"], false),
            (&[b"GET"], true),
            (&[b"PRI", b"CE / HTTP/1.1"], true),
            (&[b"P", b"UT / HTTP/1.1"], true),
        ] {
            let mut hello = Hello { limit: Box::pin(sleep(Duration::ZERO)), heard: 0 };
            let (last, first) = parts.split_last().unwrap();
            assert!(first.iter().all(|part| !hello.is_over(part)), "{parts:?}");
            assert_eq!(hello.is_over(last), is_over, "{parts:?}");
        }
    }
}
