//! Notifies other processes after a commit, and listens for their notifications.

use std::{sync::Arc, time::Duration};

use chassis::DatabaseUrl;
use sqlx::{
    PgConnection,
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

/// Timeout of a notification. After it the connection is closed.
const NOTIFY_LIMIT: Duration = Duration::from_secs(2);
/// Pause after a notification; all requests during the pause become one more. Each notification wakes every process
/// that listens, which takes processor time from the calls, and processes that have work do not wait for it.
const NOTIFY_PAUSE: Duration = Duration::from_millis(2);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Pause before a new connection, so that a database that is down is not flooded with attempts.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);
/// A listening connection is replaced after this long without a notification. A connection can break unnoticed, since
/// sqlx sends no keepalives. This limits how long listeners then depend on polling.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Notifies a channel after a commit. Clones share one connection.
///
/// NOTIFY inside the writing transaction was slower: at commit it takes a lock of the whole server, which serialises
/// all commits. Here it runs after the commit, on a connection of its own. Requests that come while a notification is
/// in flight become one more.
///
/// A notification can be lost, with a crash or a broken connection. Listeners then find the change at their next poll.
#[derive(Clone, Debug)]
pub struct Notifier {
    wanted: Arc<Notify>,
    _task: Arc<AbortOnDropHandle<()>>,
}

impl Notifier {
    /// Starts the task that notifies. It connects when it is first needed, and ends with the last clone of this value.
    /// So calls that finish during a shutdown still notify, unless the process ends within a pause.
    pub fn start(database: DatabaseUrl, channel: &'static str) -> Self {
        let wanted = Arc::new(Notify::new());
        let task = tokio::spawn(notify_when_wanted(database, channel, wanted.clone()));
        Self { wanted, _task: Arc::new(AbortOnDropHandle::new(task)) }
    }

    /// Requests a notification, and returns at once. Call it after the commit: listeners that look earlier find
    /// nothing.
    pub fn notify(&self) {
        self.wanted.notify_one();
    }
}

async fn notify_when_wanted(database: DatabaseUrl, channel: &'static str, wanted: Arc<Notify>) {
    let mut connection = None;
    loop {
        // `Notify` stores one permit, so any number of requests during a round trip and a pause become one more.
        wanted.notified().await;
        // If there is no connection yet, it also connects.
        let limit = if connection.is_some() { NOTIFY_LIMIT } else { NOTIFY_LIMIT + database.connect_limit() };
        match timeout(limit, notify_on(connection.take(), &database, channel)).await {
            Ok(Ok(alive)) => {
                connection = Some(alive);
                sleep(NOTIFY_PAUSE).await;
            }
            Ok(Err(error)) => {
                warn!(%error, channel, "notification failed; listeners depend on polling until one succeeds");
                wanted.notify_one();
                sleep(RECONNECT_PAUSE).await;
            }
            Err(_) => {
                warn!(channel, "notification took over {limit:?}; listeners depend on polling until one succeeds");
                wanted.notify_one();
            }
        }
    }
}

/// Returns the connection only if the notification succeeded: it may have broken since the last one.
async fn notify_on(
    connection: Option<PgConnection>,
    database: &DatabaseUrl,
    channel: &str,
) -> Result<PgConnection, sqlx::Error> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => database.connect().await?,
    };
    notify(&mut connection, channel).await?;
    Ok(connection)
}

/// Notifies a channel once, for callers that do so too rarely for a [`Notifier`]. Do not call it in a transaction (see
/// there).
///
/// # Errors
/// Those of the database. Listeners then find the change at their next poll.
pub async fn notify(connection: &mut PgConnection, channel: &str) -> Result<(), sqlx::Error> {
    sqlx::query!("-- outbox: notify\nSELECT pg_notify($1, '')", channel).execute(connection).await?;
    Ok(())
}

/// Calls `wake` for every notification of the channel, and whenever one may have been missed. It never returns.
///
/// Callers poll as well, since a notification can be lost. The session has to be this process's own: through a pooler
/// that shares sessions, LISTEN succeeds, hears nothing, and makes the server send notifications to others.
pub async fn listen(database: DatabaseUrl, channel: &'static str, wake: impl Fn() + Send + Sync) {
    loop {
        if let Err(error) = listen_until_silence(&database, channel, &wake).await {
            warn!(%error, channel, "cannot listen for notifications; polling until it succeeds");
            sleep(RECONNECT_PAUSE).await;
        }
    }
}

async fn listen_until_silence(
    database: &DatabaseUrl,
    channel: &str,
    wake: &(impl Fn() + Send + Sync),
) -> Result<(), sqlx::Error> {
    let mut listener = database.first_host(|host| listen_at(host, channel)).await?;
    // Listen first, then wake once: the caller finds earlier commits now, and later ones are notified.
    wake();
    while let Ok(notification) = timeout(SILENCE_MAX, listener.try_recv()).await {
        // None: the connection broke and was replaced, so notifications may have been missed.
        if notification?.is_none() {
            debug!(channel, "listening again");
        }
        wake();
    }
    Ok(())
}

/// Fails at a standby, where nobody can listen.
async fn listen_at(host: PgConnectOptions, channel: &str) -> Result<PgListener, sqlx::Error> {
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(CONNECT_LIMIT).connect_lazy_with(host);
    let mut listener = PgListener::connect_with(&pool).await?;
    timeout(CONNECT_LIMIT, listener.listen(channel)).await.unwrap_or_else(|_| Err(chassis::timed_out()))?;
    Ok(listener)
}
