//! Wakes workers when there may be something to deliver: by notification, or at the latest by the clock.

use std::{sync::Arc, time::Duration};

use sqlx::postgres::PgConnectOptions;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

/// What the idle workers of a route wait on. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Wake {
    woken: Arc<Notify>,
    shutdown: CancellationToken,
}

impl Wake {
    /// Starts listening until `shutdown`, on one connection for all of the `routes`: a notification does not tell which
    /// way the events go that it is about, so it wakes one worker of each.
    pub(crate) fn listen(database: PgConnectOptions, shutdown: &CancellationToken, routes: usize) -> Vec<Self> {
        let woken: Vec<_> = (0..routes).map(|_| Arc::new(Notify::new())).collect();
        let (to_wake, cancelled) = (woken.clone(), shutdown.clone());
        let listening = outbox::listen(database, outbox::CHANNEL, move || {
            to_wake.iter().for_each(|woken| woken.notify_one());
        });
        tokio::spawn(async move { cancelled.run_until_cancelled(listening).await });
        woken.into_iter().map(|woken| Self { woken, shutdown: shutdown.clone() }).collect()
    }

    /// Waits for a notification, for `poll` at most, or for shutdown. A notification that came since the last
    /// wait, while every worker was busy, counts.
    pub(crate) async fn wait(&self, poll: Duration) {
        tokio::select! {
            () = self.woken.notified() => {}
            () = sleep(poll) => {}
            () = self.shutdown.cancelled() => {}
        }
    }

    /// Wakes one more worker. A notification wakes one; where that finds more than it can carry, the next is called, and
    /// so on, instead of all running for every single event.
    pub(crate) fn wake_another(&self) {
        self.woken.notify_one();
    }
}
