//! Parses the bytes that pass between two processes, so that a fault can strike at a point: for example when the insert
//! of an order was executed and its service does not know yet. The processes under test have no hooks for this: those
//! would make them other programs than the released ones. Statements are recognized by the comment that each begins
//! with.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use prost::bytes::{Buf, Bytes, BytesMut};

/// The protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// A service or a relay, and its database.
    Postgres,
    /// A caller and a service, or a relay and a receiver.
    Grpc,
}

/// A complete message at the proxy, before it is passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// A statement on its way to the server, by its name.
    Statement(Arc<str>),
    /// The answer that a statement was executed.
    Executed(Arc<str>),
    /// The answer that an UPDATE or DELETE was executed, and found no row.
    WithoutEffect(Arc<str>),
    /// A message of a call, on its way to the service.
    Request(Bytes),
    /// A message of an answer, on its way to the caller.
    Reply(Bytes),
}

/// Follows one connection, in both directions.
#[derive(Debug)]
pub(super) enum Reader {
    Postgres(Box<Postgres>),
    Grpc(Grpc),
}

impl Reader {
    pub(super) fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Postgres => Self::Postgres(Box::default()),
            Protocol::Grpc => {
                Self::Grpc(Grpc { up: Frames { preface: PREFACE, ..Frames::default() }, down: Frames::default() })
            }
        }
    }

    /// Parses bytes of the client.
    pub(super) fn up(&mut self, bytes: &[u8]) -> Vec<Mark> {
        match self {
            Self::Postgres(postgres) => postgres.up(bytes),
            Self::Grpc(grpc) => grpc.up.messages(bytes).into_iter().map(Mark::Request).collect(),
        }
    }

    /// Parses bytes of the server.
    pub(super) fn down(&mut self, bytes: &[u8]) -> Vec<Mark> {
        match self {
            Self::Postgres(postgres) => postgres.down(bytes),
            Self::Grpc(grpc) => grpc.down.messages(bytes).into_iter().map(Mark::Reply).collect(),
        }
    }
}

/// A connection to PostgreSQL (<https://www.postgresql.org/docs/current/protocol-message-formats.html>).
#[derive(Debug, Default)]
pub(super) struct Postgres {
    from_client: BytesMut,
    from_server: BytesMut,
    started: bool,
    /// Bytes that the server will send without a frame: one in answer to each request for encryption.
    unframed: usize,
    /// The names of the queries, by prepared statement.
    prepared: HashMap<Bytes, Arc<str>>,
    /// Queries without an answer so far.
    sent: VecDeque<Arc<str>>,
}

const SSL_REQUEST: u32 = 80_877_103;

impl Postgres {
    fn up(&mut self, bytes: &[u8]) -> Vec<Mark> {
        self.from_client.extend_from_slice(bytes);
        let mut marks = Vec::new();
        while !self.started {
            let Some(mut body) = take_frame(&mut self.from_client, 0) else { return marks };
            self.started = body.len() != 4 || body.get_u32() != SSL_REQUEST;
            self.unframed += usize::from(!self.started);
        }
        while let Some(mut message) = take_frame(&mut self.from_client, 1) {
            let kind = message.get_u8();
            message.advance(4);
            match kind {
                b'P' => {
                    let name = take_text(&mut message);
                    self.prepared.insert(name, query_name(&take_text(&mut message)));
                }
                b'B' => {
                    take_text(&mut message);
                    let name = self.prepared.get(&take_text(&mut message)).cloned().unwrap_or_else(|| "unknown".into());
                    self.sent.push_back(name.clone());
                    marks.push(Mark::Statement(name));
                }
                b'Q' => {
                    let name = query_name(&take_text(&mut message));
                    self.sent.push_back(name.clone());
                    marks.push(Mark::Statement(name));
                }
                _ => {}
            }
        }
        marks
    }

    fn down(&mut self, bytes: &[u8]) -> Vec<Mark> {
        self.from_server.extend_from_slice(bytes);
        let mut marks = Vec::new();
        let unframed = self.unframed.min(self.from_server.len());
        self.from_server.advance(unframed);
        self.unframed -= unframed;
        while let Some(message) = take_frame(&mut self.from_server, 1) {
            match message[0] {
                b'C' if matches!(&message[5..], b"UPDATE 0\0" | b"DELETE 0\0") => {
                    marks.extend(self.sent.pop_front().map(Mark::WithoutEffect));
                }
                // Complete, empty, or suspended at the limit of rows.
                b'C' | b'I' | b's' => marks.extend(self.sent.pop_front().map(Mark::Executed)),
                // The server is ready for the next query: after an error, it has skipped the others.
                b'Z' => self.sent.clear(),
                _ => {}
            }
        }
        marks
    }
}

/// Takes a complete message. Its length counts itself, but not the `kind` bytes before it.
fn take_frame(buffer: &mut BytesMut, kind: usize) -> Option<BytesMut> {
    let length = buffer.get(kind..kind + 4)?.try_into().ok().map(u32::from_be_bytes)?;
    let end = kind + length as usize;
    if buffer.len() < end {
        return None;
    }
    let mut frame = buffer.split_to(end);
    if kind == 0 {
        frame.advance(4);
    }
    Some(frame)
}

/// Takes a text up to its terminating zero.
fn take_text(message: &mut BytesMut) -> Bytes {
    let end = message.iter().position(|byte| *byte == 0).unwrap_or(message.len());
    let text = message.split_to(end).freeze();
    message.advance(1.min(message.len()));
    text
}

/// The name in the comment that a query begins with. Without a comment its first word, as for BEGIN and COMMIT.
fn query_name(query: &[u8]) -> Arc<str> {
    let query = String::from_utf8_lossy(query);
    match query.strip_prefix("-- ") {
        Some(named) => named.lines().next().unwrap_or_default().into(),
        None => query.split_whitespace().next().unwrap_or_default().into(),
    }
}

/// A connection of HTTP/2 (RFC 9113) with messages of gRPC.
#[derive(Debug)]
pub(super) struct Grpc {
    up: Frames,
    down: Frames,
}

const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
const DATA: u8 = 0;
const RESET: u8 = 3;
const PADDED: u8 = 8;

/// One direction of a connection.
#[derive(Debug, Default)]
struct Frames {
    /// Bytes of the client's preface that have not arrived yet.
    preface: usize,
    buffer: BytesMut,
    /// The incomplete message of each stream.
    streams: HashMap<u32, BytesMut>,
}

impl Frames {
    fn messages(&mut self, bytes: &[u8]) -> Vec<Bytes> {
        self.buffer.extend_from_slice(bytes);
        let preface = self.preface.min(self.buffer.len());
        self.buffer.advance(preface);
        self.preface -= preface;
        let mut messages = Vec::new();
        while let Some(header) = self.buffer.get(..9) {
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
            let (kind, flags) = (header[3], header[4]);
            let stream = u32::from_be_bytes([header[5], header[6], header[7], header[8]]);
            if self.buffer.len() < 9 + length {
                break;
            }
            let mut frame = self.buffer.split_to(9 + length);
            frame.advance(9);
            match kind {
                // No process here pads its frames.
                DATA if flags & PADDED == 0 => {
                    let body = self.streams.entry(stream).or_default();
                    body.extend_from_slice(&frame);
                    messages.extend(std::iter::from_fn(|| take_message(body)));
                    if body.is_empty() {
                        self.streams.remove(&stream);
                    }
                }
                RESET => drop(self.streams.remove(&stream)),
                _ => {}
            }
        }
        messages
    }
}

/// Takes a complete message of gRPC. A byte that says whether it is compressed comes first (none is here), then its
/// length.
fn take_message(body: &mut BytesMut) -> Option<Bytes> {
    let length = body.get(1..5)?.try_into().ok().map(u32::from_be_bytes)? as usize;
    if body.len() < 5 + length {
        return None;
    }
    let mut message = body.split_to(5 + length);
    message.advance(5);
    Some(message.freeze())
}

#[cfg(test)]
mod tests {
    use super::{Mark, Protocol, Reader};

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).expect("a short message").to_be_bytes();
        [&[kind], &length[..], body].concat()
    }

    /// As a driver does: a request for encryption that is declined, a query, a prepared statement.
    #[test]
    fn statements_are_recognized_by_name_however_the_bytes_are_split() {
        let ssl = [0, 0, 0, 8, 4, 210, 22, 47].to_vec();
        let startup = [&11_u32.to_be_bytes()[..], &[0, 3, 0, 0, b'u', 0, 0]].concat();
        let begin = message(b'Q', b"BEGIN\0");
        let parse = message(b'P', b"s1\0-- orders: cancel\nUPDATE orders\0\0\0");
        let bind = message(b'B', b"\0s1\0\0\0\0\0\0\0");
        let up = [ssl, startup, begin, parse, bind].concat();
        let done = [message(b'C', b"BEGIN\0"), message(b'Z', b"T"), message(b'C', b"UPDATE 1\0")].concat();
        for cut in 1..up.len() {
            let mut reader = Reader::of(Protocol::Postgres);
            let sent: Vec<Mark> = up.chunks(cut).flat_map(|chunk| reader.up(chunk)).collect();
            assert_eq!(sent, [Mark::Statement("BEGIN".into()), Mark::Statement("orders: cancel".into())]);
        }
        let mut reader = Reader::of(Protocol::Postgres);
        reader.up(&up[..up.len() - 1]);
        assert_eq!(reader.down(&[&b"N"[..], &done[..18]].concat()), [Mark::Executed("BEGIN".into())]);
        reader.up(&up[up.len() - 1..]);
        assert_eq!(reader.down(&done[18..]), [Mark::Executed("orders: cancel".into())]);
    }

    #[test]
    fn messages_of_interleaved_streams_are_separated() {
        let frame = |stream: u8, flags: u8, body: &[u8]| {
            [&[0, 0, u8::try_from(body.len()).expect("a short frame"), 0, flags, 0, 0, 0, stream], body].concat()
        };
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        let settings = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
        let parts = [frame(1, 0, &[0, 0, 0, 0, 3, b'a']), frame(3, 1, &[0, 0, 0, 0, 1, b'x']), frame(1, 1, b"bc")];
        let up = [preface, settings, parts.concat()].concat();
        for cut in 1..up.len() {
            let mut reader = Reader::of(Protocol::Grpc);
            let messages: Vec<Mark> = up.chunks(cut).flat_map(|chunk| reader.up(chunk)).collect();
            assert_eq!(messages, [Mark::Request("x".into()), Mark::Request("abc".into())]);
        }
    }
}
