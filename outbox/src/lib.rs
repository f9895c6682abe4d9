//! The transactional outbox and inbox: the two halves of the pattern that live in a service's own transactions.
//!
//! A service that must change its database **and** tell others commits both with [`enqueue`]; a relay delivers what is
//! committed. A service that receives implements [`Handler`] and serves a [`Receiver`], which has each event applied once,
//! however often it arrives.
//!
//! The tables are defined here, for every database: run [`MIGRATOR`] before the service's own. It gives the relay's role,
//! `outbox_relay`, its rights, so that role must exist.

mod accept;
mod enqueue;
mod envelope;
mod id;
mod prune;
mod receive;
mod wake;

pub use enqueue::{NewEvent, Rows, TraceContext, enqueue};
pub use envelope::{Envelope, Malformed, timestamp};
pub use id::{AggregateId, EventId};
pub use receive::{ApplyError, Handler, InboxSettings, Receiver, Refusal};
pub use wake::{CHANNEL, Notifier, listen, notify};

/// Creates the tables of the outbox and the inbox. Its history is kept apart from the service's own.
pub static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!();
