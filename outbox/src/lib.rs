//! The transactional outbox and inbox: the two halves of the pattern that live in a service's own transactions.
//!
//! A service that must change its database **and** tell others commits both with [`enqueue`]; a relay delivers what is
//! committed. A service that receives calls [`accept`] first in the transaction of the event's effect, so that an event
//! has that effect once, however often it arrives.
//!
//! The tables are defined here, for every database: run [`MIGRATOR`] before the service's own.

mod accept;
mod enqueue;
mod envelope;
mod wake;

pub use accept::accept;
pub use enqueue::{TraceContext, enqueue};
pub use envelope::{Envelope, Malformed, timestamp};
pub use wake::{CHANNEL, RelayWaker};

/// Creates the tables `outbox` and `processed_messages`. Its history is kept apart from the service's own.
pub static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!();
