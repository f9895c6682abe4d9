//! Reads messages by their descriptors: payloads, whose types this crate has no word of, and its own answers.

use std::{fmt, fs, io, str::FromStr, sync::LazyLock};

use prost::{DecodeError, Message, Name};
use prost_reflect::{DescriptorError, DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;

static CONTRACT: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(proto::DESCRIPTORS).expect("the code of the contract was generated from these descriptors")
});

/// Answers in JSON have every field, so that programs find each, with the contract's names and numbers as numbers.
const ANSWER: SerializeOptions =
    SerializeOptions::new().skip_default_fields(false).use_proto_field_name(true).stringify_64_bit_integers(false);

/// The descriptors of a team's own events, read from a file: an encoded `FileDescriptorSet`.
#[derive(Clone)]
pub struct Descriptors(DescriptorPool);

/// A file that no descriptors could be read from.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorsError {
    /// The file.
    #[error("cannot read {file}: {cause}")]
    Read {
        /// Its name.
        file: String,
        /// Why not.
        cause: io::Error,
    },
    /// What is in it.
    #[error(
        "{file} is not a complete FileDescriptorSet, as `protoc --include_imports -o` or `buf build -o` write it: {cause}"
    )]
    Decode {
        /// Its name.
        file: String,
        /// Why not.
        cause: DescriptorError,
    },
}

impl FromStr for Descriptors {
    type Err = DescriptorsError;

    /// Reads the file of this name.
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

/// Why a payload cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Undecodable {
    #[error("no descriptor of {0} is known: give the file that has it with --descriptors")]
    UnknownType(String),
    #[error("not a {event_type}: {cause}")]
    Malformed { event_type: String, cause: DecodeError },
    #[error("a {event_type} that has no JSON: {cause}")]
    NoJson { event_type: String, cause: serde_json::Error },
}

/// The payload in the JSON mapping of protobuf. A type is looked up in the descriptors given, then in this project's
/// contract. They are not put together: two versions of one file, be it one of google's, cannot be.
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

/// A message of the contract as JSON.
///
/// # Errors
/// A message that has no JSON: with a time outside the years 1 to 9999.
pub(super) fn answer<M: Message + Name>(message: &M) -> serde_json::Result<Value> {
    let descriptor = CONTRACT.get_message_by_name(&M::full_name()).expect("M was generated from the contract");
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message).expect("M is encoded as the contract says");
    dynamic.serialize_with_options(serde_json::value::Serializer, &ANSWER)
}
