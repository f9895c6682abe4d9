//! Watches orders until they are settled, which means no longer PENDING.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chassis::{Database, DatabaseUrl};
use clap::Args;
use proto::orders::v1::{Order, OrderStatus};
use sqlx::PgConnection;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use crate::{
    get_order::get_orders,
    ids::OrderId,
    share::{Share, Shares},
};

/// Every process notifies this channel after a commit that settles or cancels orders.
pub(crate) const CHANNEL: &str = "order_status";

/// The poll interval, for notifications that are lost.
const POLL: Duration = Duration::from_secs(1);
/// The poll interval without notifications.
const POLL_ONLY: Duration = Duration::from_millis(100);
/// One query returns at most this many settled orders. A backlog after a long outage is read in pieces, each of which
/// fits into a unit of work.
const FOUND_MAX: u16 = 500;
/// The shortest pause between two queries. Under load, one query finds all changes since the last one.
const PAUSE: Duration = Duration::from_millis(10);

/// How many may watch orders.
#[derive(Args, Clone, Debug)]
pub struct WatchSettings {
    /// Maximum number of watchers, since each query asks for the orders of all of them. Further ones are refused with a
    /// hint to retry.
    #[arg(long, env = "ORDER_SERVICE_WATCHERS", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub watchers: u32,
    /// Maximum number of watchers of the orders of one customer.
    #[arg(long, env = "ORDER_SERVICE_WATCHERS_PER_CUSTOMER", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub watchers_per_customer: u32,
}

/// The orders that are watched through this process, with the watchers of each. Clones share them.
///
/// One task queries all of them at once, after a notification. So the number of queries depends neither on the number
/// of watchers nor on the number of changes.
#[derive(Clone, Debug)]
pub(crate) struct Watchers {
    watched: Arc<Mutex<Watched>>,
    places: Arc<Semaphore>,
    shares: Shares,
    shutdown: CancellationToken,
}

/// A registered watcher. Its place is free again once this is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    settled: oneshot::Receiver<Order>,
    _place: OwnedSemaphorePermit,
    shares: Shares,
    share: Option<Share>,
}

impl Watch {
    /// False if others watch as many orders of the customer as may be watched. Whose order it is, is not known before it
    /// is read.
    pub(crate) fn take_share_of(&mut self, customer_id: &str) -> bool {
        self.share = self.shares.take(customer_id);
        self.share.is_some()
    }

    /// The order, once it is settled; `None` if the process shuts down before.
    pub(crate) async fn settled(self) -> Option<Order> {
        self.settled.await.ok()
    }
}

type Watched = HashMap<OrderId, Vec<oneshot::Sender<Order>>>;

impl Watchers {
    /// Starts the task. At `shutdown` it ends and closes the channels of all watchers.
    ///
    /// It listens at `own_session`. Without one it only polls, more often.
    pub(crate) fn start(
        database: Database,
        settings: &WatchSettings,
        own_session: Option<DatabaseUrl>,
        shutdown: CancellationToken,
    ) -> Self {
        let places = Arc::new(Semaphore::new(settings.watchers as usize));
        let shares = Shares::of(settings.watchers_per_customer);
        let watchers = Self { watched: Arc::default(), places, shares, shutdown: shutdown.clone() };
        let woken = Arc::new(Notify::new());
        let wake = woken.clone();
        let poll = if own_session.is_some() { POLL } else { POLL_ONLY };
        let listening = Box::pin(async move {
            if let Some(url) = own_session {
                outbox::listen(url, CHANNEL, move || wake.notify_one()).await;
            }
        });
        let telling = watchers.clone().tell_when_settled(database, woken, poll);
        let ended = watchers.clone();
        tokio::spawn(async move {
            shutdown.run_until_cancelled(async { tokio::join!(listening, telling) }).await;
            ended.lock().clear();
        });
        watchers
    }

    /// Call this before reading the order: a change after that read then reaches the watcher. `None` if there are
    /// already too many watchers.
    pub(crate) fn register(&self, order_id: OrderId) -> Option<Watch> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let (sender, settled) = oneshot::channel();
        let mut watched = self.lock();
        // Checked under the lock. The task takes it once more at the end, to close all channels that exist by then.
        if !self.shutdown.is_cancelled() {
            watched.entry(order_id).or_default().push(sender);
        }
        Some(Watch { settled, _place: place, shares: self.shares.clone(), share: None })
    }

    async fn tell_when_settled(self, database: Database, woken: Arc<Notify>, poll: Duration) {
        loop {
            // A timeout is the poll.
            drop(timeout(poll, woken.notified()).await);
            let order_ids = self.watched();
            if order_ids.is_empty() {
                continue;
            }
            match database.run(|connection| Box::pin(find_settled(connection, order_ids))).await {
                Ok(orders) => {
                    if orders.len() == usize::from(FOUND_MAX) {
                        woken.notify_one();
                    }
                    self.tell(orders);
                }
                Err(cause) => warn!(%cause, "cannot read watched orders; retrying"),
            }
            sleep(PAUSE).await;
        }
    }

    /// The orders that still have watchers.
    fn watched(&self) -> Vec<OrderId> {
        let mut watched = self.lock();
        watched.retain(|_, waiting| {
            waiting.retain(|sender| !sender.is_closed());
            !waiting.is_empty()
        });
        watched.keys().copied().collect()
    }

    fn tell(&self, orders: Vec<Order>) {
        let mut watched = self.lock();
        for order in orders {
            let order_id = Uuid::try_parse(&order.order_id).ok().map(OrderId::from);
            let waiting = order_id.and_then(|order_id| watched.remove(&order_id));
            for sender in waiting.unwrap_or_default() {
                // A watcher that has hung up needs no answer.
                drop(sender.send(order.clone()));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        // No code panics while it holds the lock.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a watcher of this order is done.
pub(crate) fn is_settled(order: &Order) -> bool {
    order.status() != OrderStatus::Pending
}

async fn find_settled(connection: &mut PgConnection, order_ids: Vec<OrderId>) -> Result<Vec<Order>, sqlx::Error> {
    let settled = sqlx::query_scalar!(
        r#"-- orders: find settled
        SELECT order_id AS "order_id: OrderId" FROM orders
        WHERE order_id = ANY ($1) AND status <> 'PENDING' LIMIT $2"#,
        &order_ids as &[OrderId],
        i64::from(FOUND_MAX),
    )
    .fetch_all(&mut *connection)
    .await?;
    if settled.is_empty() {
        return Ok(Vec::new());
    }
    get_orders(connection, &settled).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::Watchers;
    use crate::{ids::OrderId, share::Shares};
    use tokio::sync::Semaphore;
    use tokio_util::sync::CancellationToken;

    #[test]
    fn each_watcher_takes_a_place_and_frees_it_when_it_is_dropped() {
        let places = Arc::new(Semaphore::new(2));
        let watchers =
            Watchers { watched: Arc::default(), places, shares: Shares::of(1), shutdown: CancellationToken::new() };
        let order_id = OrderId::new();
        let (first, _second) = (watchers.register(order_id).unwrap(), watchers.register(order_id).unwrap());
        assert!(watchers.register(OrderId::new()).is_none());
        drop(first);
        assert!(watchers.register(OrderId::new()).is_some());
    }
}
