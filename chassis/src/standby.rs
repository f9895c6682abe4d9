//! Notices that commits wait for a synchronous standby that is away.
//!
//! No time limit of the server ends such a wait, and to cut the connection does not either: the server's process waits
//! on. Each new attempt would add a process, up to the server's limit. To cancel the statement would be wrong: the
//! server then says that the commit is done, though no standby has it. So a session whose work took too long is kept,
//! with its slot, until no session of this role waits any more. Meanwhile writing is refused at once.

use std::{
    error::Error,
    fmt, io, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sqlx::{PgConnection, Row};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::DatabaseUrl;

/// Timeout of the question, once there is a connection.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// Time between two questions.
const INTERVAL: Duration = Duration::from_millis(250);

/// Whether commits wait for a standby. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Standby {
    url: DatabaseUrl,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// What is kept until no commit waits.
    kept: Vec<Box<dyn Send>>,
    /// Whether a task asks the server. It then also drops what is kept.
    is_asking: bool,
    /// Whether the server has said that commits wait.
    is_known: bool,
}

impl Standby {
    pub(crate) fn of(url: DatabaseUrl) -> Self {
        Self { url, state: Arc::default() }
    }

    /// Whether commits wait, or may.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.lock().is_asking
    }

    /// Why work is not begun now, if it is not.
    pub(crate) fn why_not(&self) -> Option<&'static str> {
        let state = self.lock();
        let known = if state.is_known {
            "commits wait for a synchronous standby"
        } else {
            "work took too long; perhaps commits wait for a synchronous standby"
        };
        state.is_asking.then_some(known)
    }

    /// Keeps a session whose work took too long until it is known not to wait for a standby. Work is not begun from now
    /// until then: the next transaction would perhaps wait too.
    ///
    /// A session that does not commit durably waits for nobody, and ends at once. Kept, it would hold the locks of its
    /// transaction, and its slot.
    pub(crate) fn keep(&self, session: impl Send + 'static) {
        if !self.url.is_durable() {
            return;
        }
        let mut state = self.lock();
        state.kept.push(Box::new(session));
        if !state.is_asking {
            state.is_asking = true;
            tokio::spawn(self.clone().ask_until_none_waits());
        }
    }

    async fn ask_until_none_waits(self) {
        let (mut connection, mut waited) = (None, false);
        loop {
            match self.ask(&mut connection).await {
                Some(true) => {
                    if !mem::replace(&mut waited, true) {
                        self.lock().is_known = true;
                        warn!("commits wait for a synchronous standby: nothing is written until they are done");
                    }
                }
                // Once commits are known to wait, a server that does not answer says nothing of them.
                None if waited => {}
                Some(false) | None => break,
            }
            sleep(INTERVAL).await;
        }
        if waited {
            info!("commits no longer wait for a synchronous standby");
        }
        *self.lock() = State::default();
    }

    /// Whether a session of this role waits. A wait that is part of every commit lasts for milliseconds.
    async fn ask(&self, connection: &mut Option<PgConnection>) -> Option<bool> {
        let mut asking = match connection.take() {
            Some(asking) => asking,
            None => self.url.connect_in_time().await.ok()?,
        };
        let ask = "-- chassis: ask whether commits wait for a standby
            SELECT EXISTS (
                SELECT FROM pg_stat_activity
                WHERE usename = current_user AND datname = current_database()
                  AND wait_event_type = 'IPC' AND wait_event = 'SyncRep'
                  AND query_start < clock_timestamp() - interval '0.5 s')";
        let row = timeout(ASK_LIMIT, sqlx::raw_sql(ask).fetch_one(&mut asking)).await.ok()?.ok()?;
        *connection = Some(asking);
        row.try_get(0).ok()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} kept", self.kept.len())
    }
}

/// Why work is not begun.
#[derive(Debug)]
struct Away;

impl fmt::Display for Away {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("commits wait for a synchronous standby")
    }
}

impl Error for Away {}

/// The error of work that is not begun because commits wait.
pub(crate) fn away() -> sqlx::Error {
    sqlx::Error::Io(io::Error::other(Away))
}

/// Whether it is that error. It is logged once when it begins, and not for each call.
pub(crate) fn is_away(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.get_ref().is_some_and(<dyn Error + Send + Sync>::is::<Away>))
}
