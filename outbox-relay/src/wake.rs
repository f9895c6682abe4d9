//! Wakes workers when there may be something to deliver: by notification, or at the latest by the clock.

use std::{sync::Arc, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// A listening connection is made anew after this much silence. A connection can die without a word, and sqlx sends no
/// keepalives: this bounds for how long deliveries fall back to the poll.
const SILENCE_MAX: Duration = Duration::from_secs(30);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// What the idle workers of a route wait on. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Wake {
    woken: Arc<Notify>,
    poll: Duration,
    shutdown: CancellationToken,
}

impl Wake {
    /// Starts listening until `shutdown`, on one connection for all of the `routes`: a notification does not tell which
    /// way the events go that it is about, so it wakes one worker of each.
    pub(crate) fn listen(
        database: PgConnectOptions,
        poll: Duration,
        shutdown: &CancellationToken,
        routes: usize,
    ) -> Vec<Self> {
        let woken: Vec<_> = (0..routes).map(|_| Arc::new(Notify::new())).collect();
        let listening = listen_until_shutdown(database, woken.clone());
        let cancelled = shutdown.clone();
        tokio::spawn(async move { cancelled.run_until_cancelled(listening).await });
        woken.into_iter().map(|woken| Self { woken, poll, shutdown: shutdown.clone() }).collect()
    }

    /// Waits for a notification, for the poll interval at most, or for shutdown. A notification that came since the last
    /// wait, while every worker was busy, counts.
    pub(crate) async fn wait(&self) {
        tokio::select! {
            () = self.woken.notified() => {}
            () = sleep(self.poll) => {}
            () = self.shutdown.cancelled() => {}
        }
    }

    /// Wakes one more worker. A notification wakes one; where that finds more than it can carry, the next is called, and
    /// so on, instead of all running for every single event.
    pub(crate) fn wake_another(&self) {
        self.woken.notify_one();
    }
}

async fn listen_until_shutdown(database: PgConnectOptions, woken: Vec<Arc<Notify>>) {
    loop {
        if let Err(error) = listen_until_silence(&database, &woken).await {
            warn!(%error, "not listening for notifications; polling meanwhile");
            sleep(RECONNECT_PAUSE).await;
        }
    }
}

async fn listen_until_silence(database: &PgConnectOptions, woken: &[Arc<Notify>]) -> Result<(), sqlx::Error> {
    let wake_all = || woken.iter().for_each(|woken| woken.notify_one());
    let pool =
        PgPoolOptions::new().max_connections(1).acquire_timeout(CONNECT_LIMIT).connect_lazy_with(database.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    timeout(CONNECT_LIMIT, listener.listen(outbox::CHANNEL))
        .await
        .map_err(|_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))??;
    // Armed first, then looked: what was committed before is found by this look, what comes later is notified.
    wake_all();
    while let Ok(notification) = timeout(SILENCE_MAX, listener.try_recv()).await {
        // None: the connection broke and was made again; something may have been missed.
        if notification?.is_none() {
            debug!("listening again");
        }
        wake_all();
    }
    Ok(())
}
