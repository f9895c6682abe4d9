//! Watches orders until they are settled.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chassis::Database;
use proto::orders::v1::{Order, OrderStatus};
use sqlx::{PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use crate::get_order::get_orders;

/// Notified after every commit that settles or cancels orders, by whichever process.
pub(crate) const CHANNEL: &str = "order_status";

/// How often is looked when no notification comes.
const POLL: Duration = Duration::from_secs(1);
/// Orders found settled by one look at most: what a long outage has left is worked off in pieces that fit into a unit of work.
const FOUND_MAX: u16 = 500;
/// Watchers of one process at most: a look asks for the orders of all of them.
const WATCHERS_MAX: usize = 10_000;
/// Between two looks at least: under load, what changed meanwhile is found by one.
const PAUSE: Duration = Duration::from_millis(10);

/// The orders that are watched through this process, with who waits for each. Clones share them.
///
/// One task looks for all of them at once, after a notification: neither the number of watchers nor that of changes
/// decides how often the database is asked.
#[derive(Clone, Debug)]
pub(crate) struct Watchers {
    watched: Arc<Mutex<Watched>>,
    places: Arc<Semaphore>,
    shutdown: CancellationToken,
}

/// A watcher's place, given up with it.
#[derive(Debug)]
pub(crate) struct Watch {
    settled: oneshot::Receiver<Order>,
    _place: OwnedSemaphorePermit,
}

impl Watch {
    /// The order, once it is settled; `None` when the process shuts down before.
    pub(crate) async fn settled(self) -> Option<Order> {
        self.settled.await.ok()
    }
}

type Watched = HashMap<Uuid, Vec<oneshot::Sender<Order>>>;

impl Watchers {
    /// Starts the task, until `shutdown`; then whoever waits still is told so by the end of the channel.
    pub(crate) fn start(database: Database, url: PgConnectOptions, shutdown: CancellationToken) -> Self {
        let places = Arc::new(Semaphore::new(WATCHERS_MAX));
        let watchers = Self { watched: Arc::default(), places, shutdown: shutdown.clone() };
        let woken = Arc::new(Notify::new());
        let wake = woken.clone();
        let listening = Box::pin(outbox::listen(url, CHANNEL, move || wake.notify_one()));
        let telling = watchers.clone().tell_when_settled(database, woken);
        let ended = watchers.clone();
        tokio::spawn(async move {
            shutdown.run_until_cancelled(async { tokio::join!(listening, telling) }).await;
            ended.lock().clear();
        });
        watchers
    }

    /// To be called before the order is read: whatever settles it after that read is then told of. `None` when there are
    /// too many watchers already.
    pub(crate) fn register(&self, order_id: Uuid) -> Option<Watch> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let (sender, settled) = oneshot::channel();
        let mut watched = self.lock();
        // Looked at under the lock, which the task takes once more to end all channels there are then.
        if !self.shutdown.is_cancelled() {
            watched.entry(order_id).or_default().push(sender);
        }
        Some(Watch { settled, _place: place })
    }

    async fn tell_when_settled(self, database: Database, woken: Arc<Notify>) {
        loop {
            // Elapsed: the poll.
            drop(timeout(POLL, woken.notified()).await);
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
                Err(cause) => warn!(%cause, "cannot look after watched orders"),
            }
            sleep(PAUSE).await;
        }
    }

    /// The orders somebody still waits for.
    fn watched(&self) -> Vec<Uuid> {
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
            let waiting = Uuid::try_parse(&order.order_id).ok().and_then(|order_id| watched.remove(&order_id));
            for sender in waiting.unwrap_or_default() {
                // Who has hung up wants no answer.
                drop(sender.send(order.clone()));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        // No code that holds it panics half-way.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a watcher has seen all there is to see.
pub(crate) fn is_settled(order: &Order) -> bool {
    order.status() != OrderStatus::Pending
}

async fn find_settled(connection: &mut PgConnection, order_ids: Vec<Uuid>) -> Result<Vec<Order>, sqlx::Error> {
    let settled = sqlx::query_scalar!(
        "-- orders: find settled
        SELECT order_id FROM orders WHERE order_id = ANY ($1) AND status <> 'PENDING' LIMIT $2",
        &order_ids,
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

    use tokio::sync::Semaphore;
    use tokio_util::sync::CancellationToken;
    use uuid::Uuid;

    use super::Watchers;

    #[test]
    fn a_place_is_free_as_soon_as_its_watcher_is_gone_and_each_watcher_takes_one() {
        let places = Arc::new(Semaphore::new(2));
        let watchers = Watchers { watched: Arc::default(), places, shutdown: CancellationToken::new() };
        let order_id = Uuid::now_v7();
        let (first, _second) = (watchers.register(order_id).unwrap(), watchers.register(order_id).unwrap());
        assert!(watchers.register(Uuid::now_v7()).is_none());
        drop(first);
        assert!(watchers.register(Uuid::now_v7()).is_some());
    }
}
