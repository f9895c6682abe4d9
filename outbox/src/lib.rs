//! The transactional outbox and inbox: the two parts of the pattern that run in a service's own transactions.
//!
//! A service that changes its database **and** tells other services commits both with [`enqueue`]. A relay then
//! delivers the committed events. A service that receives events implements [`Handler`] and serves a [`Receiver`],
//! which applies each event once, however often it is delivered.
//!
//! ```no_run
//! # use outbox::{ApplyError, Envelope, Handler, NewEvent, Refusal, TraceContext};
//! # use proto::orders::v1::OrderCreated;
//! # use sqlx::{Postgres, Transaction, types::Uuid};
//! # struct Loyalty;
//! // Your commit makes both durable, or neither. This is event 1 of the order.
//! async fn place(tx: &mut Transaction<'_, Postgres>, id: Uuid, order: &OrderCreated) -> sqlx::Result<()> {
//!     sqlx::query("INSERT INTO orders (order_id) VALUES ($1)").bind(id).execute(&mut **tx).await?;
//!     outbox::enqueue(tx, &[NewEvent::of(id, 1, order, &TraceContext::default())]).await
//! }
//! // The receiver commits each event's effect once.
//! impl Handler for Loyalty {
//!     type Event = OrderCreated;
//!     fn read(&self, envelope: &Envelope<'_>) -> Result<OrderCreated, Refusal> { envelope.decode() }
//!     async fn apply(&self, tx: &mut Transaction<'_, Postgres>, orders: &[&OrderCreated]) -> Result<(), ApplyError> {
//!         for order in orders {
//!             let sql = "INSERT INTO points (customer, points) VALUES ($1, $2)";
//!             sqlx::query(sql).bind(&order.customer_id).bind(order.total_minor).execute(&mut **tx).await?;
//!         }
//!         Ok(())
//!     }
//! }
//! ```
//!
//! The crate `loyalty-service` is such a receiving service, and does nothing else.
//!
//! [`MIGRATOR`] creates the tables, the same in every database. Run it before the service's own migrations. It grants
//! privileges to the relay's role `outbox_relay`, so that role must exist.

mod accept;
mod apply_batch;
mod enqueue;
mod envelope;
mod gather;
mod handler;
mod id;
mod inbox_clock;
mod measure;
mod prune;
mod recall;
mod receive;
mod resend;
mod trace_events;
mod wake;

pub use enqueue::{NewEvent, Rows, TraceContext, enqueue};
pub use envelope::{Envelope, timestamp};
pub use handler::{ApplyError, Handler, Refusal};
pub use id::{AggregateId, EventId};
pub use receive::{InboxSettings, Receiver};
pub use resend::{Found, ResendArguments, ResendError, Sent, SentEvent, resend};
pub use wake::{CHANNEL, Notifier, listen, notify};

/// Creates the tables of the outbox and the inbox. Its history is separate from the service's own migrations.
pub static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!();
