//! Strategies for the input of a stranger: mostly nearly right, rarely very large.

use std::fmt::{self, Debug, Formatter};

use proptest::{char, collection::vec, prelude::*};
use prost::{Message, bytes::Bytes};
use prost_types::Timestamp;
use proto::events::v1::Event;
use uuid::Uuid;

/// Doubled this often, one byte is about as large as the largest message that a server accepts by default.
const DOUBLINGS_MAX: u32 = 22;
/// Likewise for messages in a list: many times more of them than any limit allows.
const MESSAGE_DOUBLINGS_MAX: u32 = 16;
/// Limit of the bytes that [`repeat`] returns.
const REPEATED_MAX: usize = 6 * 1024 * 1024;
/// Longer texts are abbreviated in a report.
const SHOWN_MAX: usize = 300;

/// How often to double something. The more often, the rarer: the smallest of several numbers decides.
pub fn doublings() -> impl Strategy<Value = u32> {
    any::<[u8; 4]>().prop_map(|bytes| {
        let least = bytes.into_iter().min().map_or(0, u32::from);
        least * DOUBLINGS_MAX / u32::from(u8::MAX)
    })
}

/// The text of a field.
#[derive(Clone)]
pub struct Text(String);

impl Debug for Text {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self(text) = self;
        if text.len() <= SHOWN_MAX {
            return text.fmt(formatter);
        }
        let beginning: String = text.chars().take(20).collect();
        write!(formatter, "{beginning:?}… ({} bytes)", text.len())
    }
}

impl From<&Text> for String {
    fn from(Text(text): &Text) -> Self {
        text.clone()
    }
}

/// Text for any field: a sound name, anything printable, control characters, a NUL (which PostgreSQL refuses), or too much.
pub fn text() -> impl Strategy<Value = Text> {
    let character = prop_oneof![any::<char>(), char::range('\0', '\u{1f}')];
    prop_oneof![
        2 => any::<u8>().prop_map(|number| format!("NAME-{number}")),
        1 => r"\PC{0,64}",
        1 => vec(character, 0..=64).prop_map(String::from_iter),
        2 => any::<u8>().prop_map(|number| format!("NAME\0{number}")),
        2 => doublings().prop_map(|doublings| "x".repeat(1 << doublings)),
    ]
    .prop_map(Text)
}

/// Text for a field that holds a UUID: one of few, so that some repeat; any UUID; or any text.
pub fn id() -> impl Strategy<Value = Text> {
    prop_oneof![
        any::<u8>().prop_map(|number| Text(Uuid::from_u128(number.into()).to_string())),
        any::<u128>().prop_map(|number| Text(Uuid::from_u128(number).to_string())),
        text(),
    ]
}

/// A number for any field: near the low limits, near the high ones, anything, nearly too large to add to, or the one
/// number that cannot be negated.
pub fn number() -> impl Strategy<Value = i64> {
    prop_oneof![
        any::<i8>().prop_map(i64::from),
        any::<i16>().prop_map(|number| i64::from(number) * 100_000),
        any::<i64>(),
        any::<u8>().prop_map(|number| i64::MAX - i64::from(number)),
        Just(i64::MIN),
    ]
}

/// A [`number`], or the nearest one that fits.
pub fn number_i32() -> impl Strategy<Value = i32> {
    number().prop_map(|number| number.try_into().unwrap_or(if number < 0 { i32::MIN } else { i32::MAX }))
}

/// All of the messages, doubled this often, but no more than are worth sending.
pub fn repeat<M: Message + Clone>(messages: &[M], doublings: u32) -> Vec<M> {
    let mut bytes = 0;
    let fits = |message: &&M| {
        bytes += message.encoded_len();
        bytes <= REPEATED_MAX
    };
    let count = messages.len() << doublings.min(MESSAGE_DOUBLINGS_MAX);
    messages.iter().cycle().take(count).take_while(fits).cloned().collect()
}

/// Damage to an encoded message.
#[derive(Clone, Debug)]
pub enum Damage {
    /// Other bytes arrive instead.
    Replaced(Vec<u8>),
    /// Some bytes are changed.
    Overwritten(Vec<(u16, u8)>),
    /// The end is missing.
    Cut(u16),
    /// Bytes follow: garbage, or fields once more.
    Extended(Vec<u8>),
}

/// Any damage, or none.
pub fn damage() -> impl Strategy<Value = Option<Damage>> {
    proptest::option::of(some_damage())
}

fn some_damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        vec(any::<u8>(), 0..=64).prop_map(Damage::Replaced),
        vec(any::<(u16, u8)>(), 0..=64).prop_map(Damage::Overwritten),
        any::<u16>().prop_map(Damage::Cut),
        vec(any::<u8>(), 0..=64).prop_map(Damage::Extended),
    ]
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

/// How an event differs from a sound one.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "each is the field of the envelope that changes")]
pub enum EventChange {
    Id(Text),
    Source(Text),
    Type(Text),
    Subject(Text),
    Sequence(i64),
    Time(i64, i32),
    NoTime,
    Data(Damage),
    Traceparent(Text),
    Tracestate(Text),
}

/// At most two changes.
pub fn event_changes() -> impl Strategy<Value = Vec<EventChange>> {
    let change = prop_oneof![
        id().prop_map(EventChange::Id),
        text().prop_map(EventChange::Source),
        text().prop_map(EventChange::Type),
        id().prop_map(EventChange::Subject),
        number().prop_map(EventChange::Sequence),
        (number(), number_i32()).prop_map(|(seconds, nanos)| EventChange::Time(seconds, nanos)),
        Just(EventChange::NoTime),
        some_damage().prop_map(EventChange::Data),
        text().prop_map(EventChange::Traceparent),
        text().prop_map(EventChange::Tracestate),
    ];
    vec(change, 0..=2)
}

/// The event with these changes.
pub fn change_event(mut event: Event, changes: &[EventChange]) -> Event {
    for change in changes {
        match change {
            EventChange::Id(id) => event.id = id.into(),
            EventChange::Source(text) => event.source = text.into(),
            EventChange::Type(text) => event.r#type = text.into(),
            EventChange::Subject(id) => event.subject = id.into(),
            EventChange::Sequence(number) => event.sequence = *number,
            EventChange::Time(seconds, nanos) => event.time = Some(Timestamp { seconds: *seconds, nanos: *nanos }),
            EventChange::NoTime => event.time = None,
            EventChange::Data(damage) => event.data = Damage::of(Some(damage), event.data.to_vec()),
            EventChange::Traceparent(text) => event.traceparent = text.into(),
            EventChange::Tracestate(text) => event.tracestate = text.into(),
        }
    }
    event
}
