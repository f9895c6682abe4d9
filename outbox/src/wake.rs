//! Tells other processes that there is something to look at, and is told.

use std::{sync::Arc, time::Duration};

use sqlx::{
    ConnectOptions, PgConnection,
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

/// The channel relays listen on, in the database that holds the outbox.
pub const CHANNEL: &str = "outbox";

/// How long a notification may take before its connection is given up.
const NOTIFY_LIMIT: Duration = Duration::from_secs(2);
/// Wishes that come this soon after a notification become one more. Each notification wakes every process that listens, and
/// those who have work do not wait for it: 2,500 a second took a tenth of two cores from the calls that asked for them.
const NOTIFY_PAUSE: Duration = Duration::from_millis(2);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Pause before connecting again, so that a database that is down is not besieged.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);
/// A listening connection is made anew after this much silence. A connection can die without a word, and sqlx sends no
/// keepalives: this bounds for how long listeners fall back to polling.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Notifies a channel after a commit. Clones notify through the same connection.
///
/// NOTIFY inside the writing transaction would take a server-wide lock at commit and serialise all commits (2.8 times
/// slower, measured); after the commit, on a connection of its own, with all wake-ups that come while one is under way or
/// just over made into one, it costs 6 % at most. One that is lost (crash, broken connection) costs one poll interval of
/// whoever listens.
#[derive(Clone, Debug)]
pub struct Notifier {
    wanted: Arc<Notify>,
    _task: Arc<AbortOnDropHandle<()>>,
}

impl Notifier {
    /// Starts the task that notifies; it connects when it is first needed, and ends with the last clone of this value. So
    /// calls that finish while the process drains still notify, unless it ends within a pause.
    pub fn start(database: PgConnectOptions, channel: &'static str) -> Self {
        let wanted = Arc::new(Notify::new());
        let task = tokio::spawn(notify_when_wanted(database, channel, wanted.clone()));
        Self { wanted, _task: Arc::new(AbortOnDropHandle::new(task)) }
    }

    /// Asks for a notification; returns at once. To be called after the commit, since whoever looks earlier sees nothing.
    pub fn notify(&self) {
        self.wanted.notify_one();
    }
}

async fn notify_when_wanted(database: PgConnectOptions, channel: &'static str, wanted: Arc<Notify>) {
    let mut connection = None;
    loop {
        // Notify holds one permit: any number of wishes during a round trip and a pause become one more round trip.
        wanted.notified().await;
        match timeout(NOTIFY_LIMIT, notify_on(connection.take(), &database, channel)).await {
            Ok(Ok(alive)) => {
                connection = Some(alive);
                sleep(NOTIFY_PAUSE).await;
            }
            Ok(Err(error)) => {
                warn!(%error, channel, "not notified; listeners poll meanwhile");
                wanted.notify_one();
                sleep(RECONNECT_PAUSE).await;
            }
            Err(_) => {
                warn!(channel, "notifying took over {NOTIFY_LIMIT:?}; listeners poll meanwhile");
                wanted.notify_one();
            }
        }
    }
}

/// Gives the connection back only if the notification succeeded on it: it may have broken since the one before.
async fn notify_on(
    connection: Option<PgConnection>,
    database: &PgConnectOptions,
    channel: &str,
) -> Result<PgConnection, sqlx::Error> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => database.connect().await?,
    };
    notify(&mut connection, channel).await?;
    Ok(connection)
}

/// Notifies a channel once, for who does so too rarely to keep a [`Notifier`]. Not within a transaction: see there.
///
/// # Errors
/// The database's. Whoever listens then finds out within its poll interval.
pub async fn notify(connection: &mut PgConnection, channel: &str) -> Result<(), sqlx::Error> {
    sqlx::query!("-- outbox: notify\nSELECT pg_notify($1, '')", channel).execute(connection).await?;
    Ok(())
}

/// Calls `wake` for every notification of the channel, and whenever one may have been missed; never returns. Polling
/// remains the floor under it: a notification can be lost.
pub async fn listen(database: PgConnectOptions, channel: &'static str, wake: impl Fn() + Send + Sync) {
    loop {
        if let Err(error) = listen_until_silence(&database, channel, &wake).await {
            warn!(%error, channel, "not listening for notifications; polling meanwhile");
            sleep(RECONNECT_PAUSE).await;
        }
    }
}

async fn listen_until_silence(
    database: &PgConnectOptions,
    channel: &str,
    wake: &(impl Fn() + Send + Sync),
) -> Result<(), sqlx::Error> {
    let pool =
        PgPoolOptions::new().max_connections(1).acquire_timeout(CONNECT_LIMIT).connect_lazy_with(database.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    timeout(CONNECT_LIMIT, listener.listen(channel))
        .await
        .map_err(|_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))??;
    // Armed first, then looked: what was committed before is found by this look, what comes later is notified.
    wake();
    while let Ok(notification) = timeout(SILENCE_MAX, listener.try_recv()).await {
        // None: the connection broke and was made again; something may have been missed.
        if notification?.is_none() {
            debug!(channel, "listening again");
        }
        wake();
    }
    Ok(())
}
