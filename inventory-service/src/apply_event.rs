//! Applies events of orders: stock, reservations and answers change in the transaction that records the events.

use outbox::{ApplyError, Envelope, Handler, Notifier, Refusal};
use prost::Name;
use proto::orders::v1::{OrderCancelled, OrderCreated};
use sqlx::{Postgres, Transaction};

use crate::{decide::decide, lock_batch::lock_batch, order_event::OrderEvent, write_batch::write_batch};

/// Applies events in batches. A batch is read under locks, decided in memory, and written with one statement: a SKU
/// that every order wants is updated once.
#[derive(Debug)]
pub(crate) struct ApplyOrderEvents {
    /// Tells the relay about new answers.
    pub(crate) relay: Notifier,
}

impl Handler for ApplyOrderEvents {
    type Event = OrderEvent;

    fn read(&self, envelope: &Envelope<'_>) -> Result<OrderEvent, Refusal> {
        OrderEvent::read(envelope)
    }

    async fn apply(&self, tx: &mut Transaction<'_, Postgres>, events: &[&OrderEvent]) -> Result<(), ApplyError> {
        let (mut reservations, mut stock) = lock_batch(tx, events).await?;
        let answers = decide(events, &mut reservations, &mut stock).map_err(ApplyError::Refused)?;
        write_batch(tx, &reservations, &stock, &answers).await
    }

    fn types(&self) -> Vec<String> {
        vec![OrderCreated::full_name(), OrderCancelled::full_name()]
    }

    fn committed(&self) {
        self.relay.notify();
    }
}
