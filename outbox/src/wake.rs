//! Tells relays that there is something to deliver.

use std::{sync::Arc, time::Duration};

use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::{sync::Notify, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

/// The channel relays LISTEN on, in the database that holds the outbox.
pub const CHANNEL: &str = "outbox";

/// How long a notification may take before its connection is given up.
const NOTIFY_LIMIT: Duration = Duration::from_secs(2);
/// Pause before connecting again, so that a database that is down is not besieged.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// Wakes relays after a commit. Clones wake through the same connection.
///
/// NOTIFY inside the writing transaction would take a server-wide lock at commit and serialise all commits (2.8 times
/// slower, measured); after the commit, on a connection of its own, with all wake-ups that come while one is under way
/// made into one, it costs 6 %. A wake-up that is lost (crash, broken connection) costs one poll interval of the relay.
#[derive(Clone, Debug)]
pub struct RelayWaker {
    wanted: Arc<Notify>,
    _task: Arc<AbortOnDropHandle<()>>,
}

impl RelayWaker {
    /// Starts the task that notifies; it connects when it is first needed, and ends with the last clone of this value. So
    /// calls that finish while the process drains still wake the relay.
    pub fn start(database: PgConnectOptions) -> Self {
        let wanted = Arc::new(Notify::new());
        let task = tokio::spawn(notify_when_wanted(database, wanted.clone()));
        Self { wanted, _task: Arc::new(AbortOnDropHandle::new(task)) }
    }

    /// Asks for a notification; returns at once. To be called after the commit, since a relay that looks earlier sees
    /// nothing.
    pub fn wake(&self) {
        self.wanted.notify_one();
    }
}

async fn notify_when_wanted(database: PgConnectOptions, wanted: Arc<Notify>) {
    let mut connection = None;
    loop {
        // Notify holds one permit: any number of wakes during a round trip become one more round trip.
        wanted.notified().await;
        match timeout(NOTIFY_LIMIT, notify(&database, connection.take())).await {
            Ok(Ok(alive)) => connection = Some(alive),
            Ok(Err(error)) => {
                warn!(%error, "relays not notified; they poll meanwhile");
                wanted.notify_one();
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
            Err(_) => {
                warn!("notifying relays took over {NOTIFY_LIMIT:?}; they poll meanwhile");
                wanted.notify_one();
            }
        }
    }
}

async fn notify(database: &PgConnectOptions, connection: Option<PgConnection>) -> Result<PgConnection, sqlx::Error> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => database.connect().await?,
    };
    // An earlier notification on this connection may have left it broken: execute reports that and the caller drops it.
    sqlx::query!("-- outbox: wake relays\nSELECT pg_notify($1, '')", CHANNEL).execute(&mut connection).await?;
    Ok(connection)
}
