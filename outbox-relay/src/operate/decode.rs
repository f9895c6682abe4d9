//! Converts messages to JSON by their descriptors: payloads, whose types this crate does not know, and its own answers.

use std::{fmt, fs, io, str::FromStr, sync::LazyLock};

use prost::{DecodeError, Message, Name};
use prost_reflect::{DescriptorError, DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;

static CONTRACT: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(proto::DESCRIPTORS).expect("the contract's code was generated from these descriptors")
});

/// Answers in JSON have every field, also empty ones, so that programs can rely on it. Names are the contract's, and
/// 64-bit integers are numbers.
const ANSWER: SerializeOptions =
    SerializeOptions::new().skip_default_fields(false).use_proto_field_name(true).stringify_64_bit_integers(false);

/// Descriptors of events that the contract does not have, read from a file: an encoded `FileDescriptorSet`.
#[derive(Clone)]
pub struct Descriptors(DescriptorPool);

/// Why a file of descriptors cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorsError {
    /// The file cannot be read.
    #[error("cannot read {file}: {cause}")]
    Read {
        /// The file's name.
        file: String,
        /// The system's error.
        cause: io::Error,
    },
    /// The file holds no complete descriptors.
    #[error(
        "{file} is not a complete FileDescriptorSet: write it with `buf build -o` or `protoc --include_imports -o` ({cause})"
    )]
    Decode {
        /// The file's name.
        file: String,
        /// The decoder's error.
        cause: DescriptorError,
    },
}

impl FromStr for Descriptors {
    type Err = DescriptorsError;

    /// Reads the file with this name.
    fn from_str(file: &str) -> Result<Self, DescriptorsError> {
        let read = |cause| DescriptorsError::Read { file: file.to_owned(), cause };
        let decode = |cause| DescriptorsError::Decode { file: file.to_owned(), cause };
        let bytes = fs::read(file).map_err(read)?;
        DescriptorPool::decode(bytes.as_slice()).map(Self).map_err(decode)
    }
}

impl fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} files", self.0.files().len())
    }
}

/// Why a payload cannot be shown as JSON.
#[derive(Debug, thiserror::Error)]
pub(super) enum Undecodable {
    #[error("no descriptor of {0} is known: pass a file that has it with --descriptors")]
    UnknownType(String),
    #[error("not a {event_type}: {cause}")]
    Malformed { event_type: String, cause: DecodeError },
    #[error("this {event_type} has no JSON form: {cause}")]
    NoJson { event_type: String, cause: serde_json::Error },
}

/// The payload in the JSON mapping of protobuf. Its type is looked up in the given descriptors, then in this project's
/// contract. They stay apart, because one pool cannot hold two versions of a file, such as one of Google's.
pub(super) fn decode(
    event_type: &str,
    payload: &[u8],
    descriptors: Option<&Descriptors>,
) -> Result<String, Undecodable> {
    let given = descriptors.and_then(|Descriptors(pool)| pool.get_message_by_name(event_type));
    let Some(descriptor) = given.or_else(|| CONTRACT.get_message_by_name(event_type)) else {
        return Err(Undecodable::UnknownType(event_type.to_owned()));
    };
    let message = DynamicMessage::decode(descriptor, payload)
        .map_err(|cause| Undecodable::Malformed { event_type: event_type.to_owned(), cause })?;
    serde_json::to_string(&message).map_err(|cause| Undecodable::NoJson { event_type: event_type.to_owned(), cause })
}

/// A message of the contract from JSON. Nothing at all is an empty message.
///
/// # Errors
/// If it is no JSON of this message. An unknown field is an error, too.
pub(crate) fn question<M: Message + Name + Default>(json: &[u8]) -> serde_json::Result<M> {
    if json.is_empty() {
        return Ok(M::default());
    }
    let descriptor = CONTRACT.get_message_by_name(&M::full_name()).expect("M was generated from the contract");
    let mut reading = serde_json::Deserializer::from_slice(json);
    let dynamic = DynamicMessage::deserialize(descriptor, &mut reading)?;
    reading.end()?;
    Ok(dynamic.transcode_to().expect("M is encoded as the contract says"))
}

/// A message of the contract as JSON.
///
/// # Errors
/// If the message has no JSON form: a time outside the years 1 to 9999 has none.
pub(crate) fn answer<M: Message + Name>(message: &M) -> serde_json::Result<Value> {
    let descriptor = CONTRACT.get_message_by_name(&M::full_name()).expect("M was generated from the contract");
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message).expect("M is encoded as the contract says");
    dynamic.serialize_with_options(serde_json::value::Serializer, &ANSWER)
}
