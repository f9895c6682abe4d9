//! Wakes workers when there may be events to deliver: on a notification, or at the latest by the clock.

use std::{sync::Arc, time::Duration};

use chassis::DatabaseUrl;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

/// The poll interval without notifications.
const POLL_ONLY: Duration = Duration::from_millis(100);

/// The idle workers of a route wait on this. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Wake {
    /// Only workers that wait for notifications wait on this.
    notified: Arc<Notify>,
    /// Every idle worker waits on this.
    any: Arc<Notify>,
    /// Whether notifications are heard.
    hears: bool,
    shutdown: CancellationToken,
}

impl Wake {
    /// Listens until `shutdown`, in one session for all of the `routes`. A notification does not name a route, so it
    /// wakes one worker of each. Without a session nothing is heard.
    pub(crate) fn listen(own_session: Option<DatabaseUrl>, shutdown: &CancellationToken, routes: usize) -> Vec<Self> {
        let hears = own_session.is_some();
        let wake = || Self { notified: Arc::default(), any: Arc::default(), hears, shutdown: shutdown.clone() };
        let wakes: Vec<_> = (0..routes).map(|_| wake()).collect();
        let (to_wake, cancelled) = (wakes.clone(), shutdown.clone());
        if let Some(url) = own_session {
            let wake_all = move || to_wake.iter().for_each(Self::wake_notified);
            let listening = outbox::listen(url, outbox::CHANNEL, wake_all);
            tokio::spawn(async move { cancelled.run_until_cancelled(listening).await });
        }
        wakes
    }

    /// Waits for a notification, for [`Self::wake_any`], for at most `poll`, or for shutdown. A wake-up that came while
    /// all workers were busy is not lost: the next wait returns at once. Where no notification is heard, it waits less.
    pub(crate) async fn wait(&self, poll: Duration) {
        let poll = if self.hears { poll } else { poll.min(POLL_ONLY) };
        tokio::select! {
            () = self.notified.notified() => {}
            () = self.wait_without_notifications(poll) => {}
        }
    }

    /// The same, without notifications.
    pub(crate) async fn wait_without_notifications(&self, poll: Duration) {
        tokio::select! {
            () = self.any.notified() => {}
            () = sleep(poll) => {}
            () = self.shutdown.cancelled() => {}
        }
    }

    /// Wakes one of the workers that wait for notifications.
    pub(crate) fn wake_notified(&self) {
        self.notified.notify_one();
    }

    /// Wakes one idle worker. If that worker leases a full batch, it wakes the next one, and so on. So a single event
    /// never wakes all of them.
    pub(crate) fn wake_any(&self) {
        self.any.notify_one();
    }
}
