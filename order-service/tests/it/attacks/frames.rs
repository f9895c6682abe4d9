//! Writes frames of HTTP/2 that no client library would send, and reads what comes back.

use std::{future::pending, io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::LIMIT;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;

pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

const INITIAL_WINDOW_SIZE: u16 = 4;

pub(super) const REFUSED_STREAM: u32 = 7;
pub(super) const ENHANCE_YOUR_CALM: u32 = 11;

/// A frame as bytes.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// One header, spelt out: it is not kept in any table.
pub(super) fn header(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    for text in [name, value] {
        push_length(&mut bytes, text.len());
        bytes.extend(text.as_bytes());
    }
    bytes
}

fn push_length(bytes: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(0x7f) else { return bytes.push(length.try_into().unwrap()) };
    bytes.push(0x7f);
    while rest >= 0x80 {
        bytes.push(u8::try_from(rest % 0x80).unwrap() | 0x80);
        rest /= 0x80;
    }
    bytes.push(rest.try_into().unwrap());
}

/// The headers of a call of gRPC.
pub(super) fn call_of(path: &str) -> Vec<u8> {
    let headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "order-service"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    headers.iter().flat_map(|(name, value)| header(name, value)).collect()
}

/// A message as it is sent: it says its length before.
pub(super) fn message(bytes: &[u8]) -> Vec<u8> {
    let mut sent = vec![0];
    sent.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    sent.extend(bytes);
    sent
}

#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    /// The error code of a frame that resets a stream, or of one that ends the connection.
    pub(super) fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    /// Whether it ends a call, by an answer or without one.
    pub(super) fn ends_call(&self) -> bool {
        self.kind == RST_STREAM || (self.kind == HEADERS && self.flags & END_STREAM != 0)
    }
}

/// A connection that an attacker has opened.
pub(super) struct Connection {
    pub(super) reader: OwnedReadHalf,
    pub(super) writer: OwnedWriteHalf,
}

impl Connection {
    /// One that has said nothing.
    pub(super) async fn silent(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (reader, writer) = stream.into_split();
        Self { reader, writer }
    }

    /// One that speaks HTTP/2.
    pub(super) async fn open(address: SocketAddr) -> Self {
        Self::open_with(address, &[]).await
    }

    /// One that takes nothing of any answer but its headers.
    pub(super) async fn open_without_window(address: SocketAddr) -> Self {
        let mut setting = INITIAL_WINDOW_SIZE.to_be_bytes().to_vec();
        setting.extend(0_u32.to_be_bytes());
        Self::open_with(address, &setting).await
    }

    async fn open_with(address: SocketAddr, settings: &[u8]) -> Self {
        let mut connection = Self::silent(address).await;
        let begin = [PREFACE, &frame(SETTINGS, 0, 0, settings)].concat();
        // A server that is full may have closed it.
        drop(connection.writer.write_all(&begin).await);
        connection
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes).await
    }

    /// The next frame, after each that belongs to the protocol alone, which is answered. `None` once it is closed.
    pub(super) async fn next(&mut self) -> Option<Frame> {
        loop {
            let frame = read_frame(&mut self.reader).await?;
            if frame.flags & ACK == 0 && [SETTINGS, PING].contains(&frame.kind) {
                let payload = if frame.kind == PING { &frame.payload[..] } else { &[] };
                drop(self.writer.write_all(&self::frame(frame.kind, ACK, 0, payload)).await);
            }
            if ![SETTINGS, PING].contains(&frame.kind) {
                return Some(frame);
            }
        }
    }

    /// The first frame like this; `None` if the connection is closed before.
    pub(super) async fn find(&mut self, what: &str, is_it: impl Fn(&Frame) -> bool) -> Option<Frame> {
        let finding = async {
            loop {
                match self.next().await {
                    Some(frame) if !is_it(&frame) => {}
                    found => return found,
                }
            }
        };
        timeout(LIMIT, finding).await.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"))
    }

    /// Sends these bytes, each time for another stream, until the server has ended the connection. Tells its reason.
    pub(super) async fn flood(self, bytes: impl Fn(u32) -> Vec<u8> + Send + 'static) -> Option<u32> {
        let Self { mut reader, mut writer } = self;
        let flooding = AbortOnDropHandle::new(tokio::spawn(async move {
            for stream in (1..).step_by(2) {
                if writer.write_all(&bytes(stream)).await.is_err() {
                    break;
                }
            }
            // Open until the reason is read.
            pending::<()>().await;
        }));
        let ended = async {
            loop {
                match read_frame(&mut reader).await {
                    Some(frame) if frame.kind == GOAWAY && frame.code() != 0 => return Some(frame.code()),
                    Some(_) => {}
                    None => return None,
                }
            }
        };
        let ended = timeout(LIMIT, ended).await;
        drop(flooding);
        ended.unwrap_or_else(|_| panic!("not within {LIMIT:?}: the flood is ended"))
    }
}

/// `None` once it is closed.
pub(super) async fn read_frame(reader: &mut OwnedReadHalf) -> Option<Frame> {
    let mut head = [0; 9];
    reader.read_exact(&mut head).await.ok()?;
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number: u32, byte| number << 8 | u32::from(*byte));
    let mut payload = vec![0; number(&head[..3]).try_into().unwrap()];
    reader.read_exact(&mut payload).await.ok()?;
    Some(Frame { kind: head[3], flags: head[4], stream: number(&head[5..]), payload })
}
