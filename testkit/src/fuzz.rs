//! Sends a service what a fuzzer thinks of, and watches what that does to it.

use std::{
    cell::RefCell,
    future::Future,
    mem,
    panic::{self, AssertUnwindSafe, RefUnwindSafe},
    process,
    sync::{Arc, Mutex, Once},
    time::Duration,
};

use bolero::TypeGenerator;
use prost::{
    Message,
    bytes::{Buf, BufMut, Bytes},
};
use proto::events::v1::{DeliverResponse, Event, EventResult, Outcome};
use tokio::runtime::{Builder, Runtime};
use tonic::{
    Code, Request, Response, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};
use uuid::Uuid;

use crate::processes::resident_bytes;

/// For how long a target is fed by `cargo test`.
pub const TEST_TIME: Duration = Duration::from_millis(1500);
/// What a server takes unless it is told otherwise.
pub const MESSAGE_MAX: usize = 4 * 1024 * 1024;
/// What a receiver of events takes.
pub const BATCH_MAX: usize = 16 * 1024 * 1024;

/// What a process that keeps nothing may grow by: its pools, its caches, and other tests that run beside it.
const GROWTH_MAX: u64 = 256 * 1024 * 1024;

/// A power of two that makes a message too large for a server which was not told otherwise, or nearly.
const LARGEST: u32 = 22;
/// Where it is messages that are as many: hundreds of times more than are allowed anywhere.
const MOST: u32 = 16;
/// Bytes of what is repeated.
const REPEATED_MAX: usize = 6 * 1024 * 1024;

thread_local! {
    static PANICS: RefCell<Option<Arc<Mutex<Vec<String>>>>> = const { RefCell::new(None) };
}

/// Runs a service on threads of its own, so that its panics are told from those of the test, which may run beside others.
#[derive(Debug)]
pub struct Host {
    runtime: Runtime,
    panics: Arc<Mutex<Vec<String>>>,
    resident: Option<u64>,
}

impl Host {
    /// A host that serves nothing yet.
    ///
    /// # Panics
    /// When there are no threads to be had.
    pub fn start() -> Self {
        record_panics();
        let panics: Arc<Mutex<Vec<String>>> = Arc::default();
        let of_threads = Arc::clone(&panics);
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(2).enable_all();
        builder.on_thread_start(move || PANICS.set(Some(of_threads.clone())));
        Self { runtime: builder.build().expect("threads"), panics, resident: resident_bytes(process::id()) }
    }

    /// What the service spawns meanwhile is watched; `future` itself may panic, as a test does.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// A fuzz target's test: what `test` asserts of each input, and that the service neither panicked nor keeps what it is
    /// sent.
    pub fn test_each<T>(&self, test: impl AsyncFn(&T)) -> impl Fn(&T) + RefUnwindSafe {
        // What an input that fails may leave behind is the service's, which any input must find fit for work.
        let tested = AssertUnwindSafe((self, test));
        move |input| {
            let (host, test) = &*tested;
            host.block_on(test(input));
            host.assert_unharmed();
        }
    }

    fn assert_unharmed(&self) {
        // Taken, so that of the smaller inputs that are tried next only those fail that panic as well.
        let panics = mem::take(&mut *self.panics.lock().expect("nobody panics with it"));
        assert!(panics.is_empty(), "the service panicked: {panics:?}");
        if let (Some(before), Some(now)) = (self.resident, resident_bytes(process::id())) {
            assert!(now.saturating_sub(before) < GROWTH_MAX, "memory has grown from {before} to {now} bytes");
        }
    }
}

/// tokio and hyper catch what a task panics with, and nobody looks at most of these tasks.
fn record_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panicked| {
            PANICS.with_borrow(|panics| {
                if let Some(panics) = panics {
                    panics.lock().expect("nobody panics with it").push(panicked.to_string());
                }
            });
            report(panicked);
        }));
    });
}

/// How many times: a power of two, the larger the rarer.
#[derive(Clone, Debug, TypeGenerator)]
pub struct Times([u8; 4]);

impl Times {
    fn power(&self) -> u32 {
        let least = self.0.iter().min().copied().map_or(0, u32::from);
        least * LARGEST / u32::from(u8::MAX)
    }
}

/// What may stand in a field of text.
#[derive(Clone, Debug, TypeGenerator)]
pub enum Text {
    /// A sound name, of few.
    Name(u8),
    /// Anything.
    Any(String),
    /// Sound, but for a NUL in it, which PostgreSQL has not in its text.
    Nul(u8),
    /// A letter, so many times.
    Long(Times),
}

impl From<&Text> for String {
    fn from(text: &Text) -> Self {
        match text {
            Text::Name(number) => format!("NAME-{number}"),
            Text::Any(text) => text.clone(),
            Text::Nul(number) => format!("NAME\0{number}"),
            Text::Long(times) => "x".repeat(1 << times.power()),
        }
    }
}

/// What may stand for a UUID.
#[derive(Clone, Debug, TypeGenerator)]
pub enum Id {
    /// One of few, so that some come again.
    Known(u8),
    /// Any UUID.
    Any(u128),
    /// Perhaps none.
    Text(Text),
}

impl From<&Id> for String {
    fn from(id: &Id) -> Self {
        match id {
            Id::Known(number) => Uuid::from_u128((*number).into()).to_string(),
            Id::Any(number) => Uuid::from_u128(*number).to_string(),
            Id::Text(text) => text.into(),
        }
    }
}

/// What may stand in a field of numbers.
#[derive(Clone, Debug, TypeGenerator)]
pub enum Number {
    /// Where most limits are.
    Small(i8),
    /// In hundreds of thousands: where the others are.
    Large(i16),
    /// Anything.
    Any(i64),
    /// What is nearly too large to be added to.
    Most(u8),
    /// What cannot be negated.
    Least,
}

impl From<&Number> for i64 {
    fn from(number: &Number) -> Self {
        match number {
            Number::Small(number) => (*number).into(),
            Number::Large(number) => Self::from(*number) * 100_000,
            Number::Any(number) => *number,
            Number::Most(number) => Self::MAX - Self::from(*number),
            Number::Least => Self::MIN,
        }
    }
}

impl From<&Number> for i32 {
    /// As large or small as it can be, where the number does not fit.
    fn from(number: &Number) -> Self {
        let number = i64::from(number);
        number.try_into().unwrap_or(if number < 0 { Self::MIN } else { Self::MAX })
    }
}

/// What becomes of a message on its way.
#[derive(Clone, Debug, TypeGenerator)]
pub enum Damage {
    /// Other bytes come in its place.
    Replaced(Vec<u8>),
    /// Some bytes are others.
    Overwritten(Vec<(u16, u8)>),
    /// The end is missing.
    Cut(u16),
    /// Bytes follow that are none of its fields, or come after all.
    Extended(Vec<u8>),
}

impl Damage {
    /// The message as it arrives.
    pub fn of(damage: Option<&Self>, mut message: Vec<u8>) -> Bytes {
        let length = message.len().max(1);
        match damage {
            None => {}
            Some(Self::Replaced(others)) => message.clone_from(others),
            Some(Self::Overwritten(others)) => {
                for (place, byte) in others {
                    if let Some(overwritten) = message.get_mut(usize::from(*place) % length) {
                        *overwritten = *byte;
                    }
                }
            }
            Some(Self::Cut(place)) => message.truncate(usize::from(*place) % length),
            Some(Self::Extended(more)) => message.extend(more),
        }
        message.into()
    }
}

/// All of the messages so many times over, or as many as a server that was not told otherwise just does not take.
pub fn repeat<M: Message + Clone>(messages: &[M], times: &Times) -> Vec<M> {
    let mut bytes = 0;
    let bearable = |message: &&M| {
        bytes += message.encoded_len();
        bytes <= REPEATED_MAX
    };
    let count = messages.len() << times.power().min(MOST);
    messages.iter().cycle().take(count).take_while(bearable).cloned().collect()
}

/// Whether the transport refused what was sent by itself, being too large or no message at all; asserts that what it refused
/// was one of these, and refused as the contract says.
pub fn is_refused_by_transport<M: Message + Default>(status: &Status, sent: &Bytes, limit: usize) -> bool {
    if sent.len() > limit {
        assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
        true
    } else if M::decode(sent.clone()).is_err() {
        assert_eq!((status.code(), status.details()), (Code::Internal, &[][..]), "{status:?}");
        true
    } else {
        false
    }
}

/// Asserts that the answer has a result for each event, in their order, and why an event was not applied.
pub fn is_result_of_each(events: &[Event], answer: &DeliverResponse) {
    let ids = |result: &EventResult| result.event_id.clone();
    assert!(answer.results.iter().map(ids).eq(events.iter().map(|event| event.id.clone())));
    for result in &answer.results {
        let applied = match result.outcome() {
            Outcome::Applied | Outcome::Duplicate => true,
            Outcome::Rejected => false,
            Outcome::Retry | Outcome::Unspecified => panic!("no reason to come again: {result:?}"),
        };
        assert_eq!((result.reason.is_empty(), result.detail.is_empty()), (applied, applied), "{result:?}");
    }
}

/// Makes the unary call at `path` with these bytes in the place of its message, and answers those that come back.
///
/// # Errors
/// The call's status.
pub async fn call(
    channel: &Channel,
    path: &'static str,
    message: impl Into<Request<Bytes>>,
) -> Result<Response<Bytes>, Status> {
    // An answer repeats what it answers, and a server may be ready to take more than a client is.
    let mut client = Grpc::new(channel.clone()).max_decoding_message_size(usize::MAX);
    client.ready().await.map_err(|error| Status::unavailable(format!("not connected: {error}")))?;
    client.unary(message.into(), PathAndQuery::from_static(path), Verbatim).await
}

/// A message is its bytes.
#[derive(Clone, Copy, Debug)]
struct Verbatim;

impl Codec for Verbatim {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Verbatim {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Verbatim {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
