//! Wakes workers when there may be something to deliver: by notification, or at the latest by the clock.

use std::{sync::Arc, time::Duration};

use sqlx::postgres::PgConnectOptions;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

/// What the idle workers of a route wait on. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Wake {
    notified: Arc<Notify>,
    called: Arc<Notify>,
    shutdown: CancellationToken,
}

impl Wake {
    /// Starts listening until `shutdown`, on one connection for all of the `routes`: a notification does not tell which
    /// way the events go that it is about, so it wakes one worker of each.
    pub(crate) fn listen(database: PgConnectOptions, shutdown: &CancellationToken, routes: usize) -> Vec<Self> {
        let wake = || Self { notified: Arc::default(), called: Arc::default(), shutdown: shutdown.clone() };
        let wakes: Vec<_> = (0..routes).map(|_| wake()).collect();
        let (to_wake, cancelled) = (wakes.clone(), shutdown.clone());
        let listening = outbox::listen(database, outbox::CHANNEL, move || to_wake.iter().for_each(Self::look_again));
        tokio::spawn(async move { cancelled.run_until_cancelled(listening).await });
        wakes
    }

    /// Waits for a notification, for a call, for `poll` at most, or for shutdown. A notification or a call that came since
    /// the last wait, while every worker that would have heard it was busy, counts.
    pub(crate) async fn wait(&self, poll: Duration) {
        tokio::select! {
            () = self.notified.notified() => {}
            () = self.wait_for_call(poll) => {}
        }
    }

    /// The same, without notifications.
    pub(crate) async fn wait_for_call(&self, poll: Duration) {
        tokio::select! {
            () = self.called.notified() => {}
            () = sleep(poll) => {}
            () = self.shutdown.cancelled() => {}
        }
    }

    /// Wakes a worker that waits for notifications.
    pub(crate) fn look_again(&self) {
        self.notified.notify_one();
    }

    /// Calls one more worker, whichever. Where that finds more than it can carry, it calls the next, and so on, instead of
    /// all running for every single event.
    pub(crate) fn call_another(&self) {
        self.called.notify_one();
    }
}
