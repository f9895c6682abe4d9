//! The sessions of a process: a limited number, used again and again, and closed when they may be unsound.
//!
//! sqlx's pool lost. It pings each connection that comes back, one more round trip for each unit of work; it knows one
//! host; and it keeps a connection whose server can only read, or whose plans no longer fit the tables.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use metrics::{Gauge, describe_gauge, gauge};
use sqlx::{Connection, PgConnection};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use crate::{DatabaseUrl, session::is_refused};

/// A session that was idle for longer is pinged before it is used.
const PING_AFTER: Duration = Duration::from_millis(500);
/// A session that was not needed for this long is closed.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// A session is closed at this age, since a server's process only grows.
const AGE_MAX: Duration = Duration::from_secs(1800);
/// Timeout of a ping, and of a goodbye.
const PING_LIMIT: Duration = Duration::from_secs(2);
/// By OpenTelemetry's conventions.
const CONNECTIONS: &str = "db_client_connection_count";
const PENDING: &str = "db_client_connection_pending_requests";
/// The first pause after a failed attempt to connect, while its caller still waits. It doubles, up to the longest.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
const CONNECT_PAUSE_MAX: Duration = Duration::from_millis(400);

/// Clones share the sessions.
#[derive(Clone, Debug)]
pub(crate) struct Sessions {
    pub(crate) url: DatabaseUrl,
    slots: Arc<Semaphore>,
    idle: Arc<Mutex<Idle>>,
    /// Whether the last attempt to connect failed.
    is_unreachable: Arc<AtomicBool>,
    measured: Measured,
}

/// How many sessions are in use and idle, and how many callers wait for one.
#[derive(Clone, Debug)]
struct Measured {
    used: Gauge,
    idle: Gauge,
    pending: Gauge,
}

#[derive(Debug)]
struct Idle {
    /// The one used last is at the end.
    sessions: Vec<Taken>,
    /// Sessions that were opened before are not used again.
    sound_since: Instant,
}

/// A session in use. Dropping it closes it, and frees its slot.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) connection: PgConnection,
    opened_at: Instant,
    used_at: Instant,
    /// Of a session in use only: an idle one may be used by anybody.
    slot: Option<Slot>,
}

/// The permission to have a session in use, which is counted.
#[derive(Debug)]
struct Slot {
    _permit: OwnedSemaphorePermit,
    _used: OneMore,
}

/// Counts one more as long as it is there.
#[derive(Debug)]
struct OneMore(Gauge);

impl OneMore {
    fn of(gauge: &Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge.clone())
    }
}

impl Drop for OneMore {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// What an error says of the session, and of those that are open beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Soundness {
    Sound,
    Unsound,
    /// The server is not what it was, so all open sessions are unsound.
    AllUnsound,
}

impl Soundness {
    pub(crate) fn of(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::RowNotFound => Self::Sound,
            sqlx::Error::Io(_) => Self::AllUnsound,
            sqlx::Error::Database(error) => error.code().map_or(Self::Unsound, |code| Self::of_code(&code)),
            _ => Self::Unsound,
        }
    }

    /// Bad data (class 22), a violated constraint (23), a conflict (40) and an exception of a function (P0) say nothing
    /// of the session. Everything else may come again with the next statement: for example a plan that no longer fits
    /// its table (0A000), or a server that can only read (25006), shuts down (57) or is out of reach (08).
    fn of_code(code: &str) -> Self {
        match code.get(..2) {
            Some("22" | "23" | "40" | "P0") => Self::Sound,
            // A statement that its time limit ended. A new session would first plan the next one, within the same limit.
            _ if code == "57014" => Self::Sound,
            Some("08" | "57") => Self::AllUnsound,
            _ if code == "25006" => Self::AllUnsound,
            _ => Self::Unsound,
        }
    }
}

impl Sessions {
    /// `name` tells these sessions from others of the process.
    pub(crate) fn new(url: DatabaseUrl, connections: u32, name: &'static str) -> Self {
        let idle = Idle { sessions: Vec::new(), sound_since: Instant::now() };
        let (slots, idle) = (Arc::new(Semaphore::new(connections as usize)), Arc::new(Mutex::new(idle)));
        Self { url, slots, idle, is_unreachable: Arc::default(), measured: Measured::of(name) }
    }

    /// Takes an idle session, or opens one. While the server cannot be reached, it tries again as long as the caller
    /// waits.
    ///
    /// # Errors
    /// Those of the server.
    pub(crate) async fn take(&self, caller: &mut oneshot::Sender<()>) -> Result<Taken, sqlx::Error> {
        let slot = self.acquire(caller).await?;
        while let Some(mut idle) = self.pop() {
            let is_fresh = idle.used_at.elapsed() <= PING_AFTER;
            if is_fresh || ping(&mut idle.connection).await {
                return Ok(Taken { slot: Some(slot), ..idle });
            }
            // If it was the network, to ping all the others would take as long for each.
            self.renew();
        }
        let mut pause = CONNECT_PAUSE;
        loop {
            let opened_at = Instant::now();
            match self.open().await {
                Ok(connection) => return Ok(Taken { connection, opened_at, used_at: opened_at, slot: Some(slot) }),
                Err(cause) if is_refused(&cause) || caller.is_closed() => return Err(cause),
                Err(_) => sleep(pause).await,
            }
            pause = CONNECT_PAUSE_MAX.min(pause * 2);
        }
    }

    async fn acquire(&self, caller: &mut oneshot::Sender<()>) -> Result<Slot, sqlx::Error> {
        let permit = if let Ok(permit) = self.slots.clone().try_acquire_owned() {
            permit
        } else {
            let _pending = OneMore::of(&self.measured.pending);
            tokio::select! {
                acquired = self.slots.clone().acquire_owned() => acquired.map_err(|_| sqlx::Error::PoolClosed)?,
                () = caller.closed() => return Err(sqlx::Error::PoolTimedOut),
            }
        };
        Ok(Slot { _permit: permit, _used: OneMore::of(&self.measured.used) })
    }

    /// It ends by itself and not with its caller: after an outage every connection is made anew, which on a busy machine
    /// may take longer than a call may wait. If each attempt ended with its caller, none would succeed.
    async fn open(&self) -> Result<PgConnection, sqlx::Error> {
        let opened = self.url.connect_in_time().await;
        // Callers are told that it timed out. The log says why, once.
        match &opened {
            Err(cause) if !self.is_unreachable.swap(true, Ordering::Relaxed) => {
                warn!(%cause, database = %self.url, "cannot connect; trying again while a call waits");
            }
            Ok(_) if self.is_unreachable.swap(false, Ordering::Relaxed) => {
                info!(database = %self.url, "connected again");
            }
            _ => {}
        }
        opened
    }

    /// Closes all idle sessions, and those in use when they are given back.
    pub(crate) fn renew(&self) {
        let mut idle = self.lock();
        idle.sound_since = Instant::now();
        idle.sessions.clear();
        self.measured.idle.set(0.0);
    }

    /// Gives a session back after work, or closes it.
    pub(crate) fn give_back(&self, mut taken: Taken, soundness: Soundness) {
        if soundness == Soundness::AllUnsound {
            self.renew();
        }
        if soundness != Soundness::Sound || taken.opened_at.elapsed() >= AGE_MAX {
            close(taken);
        } else if taken.connection.should_flush() {
            // The rollback of a transaction that the work left open is not sent yet. An idle session would hold its
            // locks until its next use.
            let sessions = self.clone();
            tokio::spawn(async move {
                if ping(&mut taken.connection).await {
                    sessions.keep(taken);
                }
            });
        } else {
            self.keep(taken);
        }
    }

    fn keep(&self, mut taken: Taken) {
        let slot = taken.slot.take();
        taken.used_at = Instant::now();
        let mut idle = self.lock();
        if taken.opened_at >= idle.sound_since {
            idle.sessions.push(taken);
        }
        if idle.sessions.first().is_some_and(|oldest| oldest.used_at.elapsed() >= IDLE_MAX) {
            close(idle.sessions.remove(0));
        }
        self.measured.idle.set(idle.sessions.len() as f64);
        // Whoever waits for the slot finds the session.
        drop(idle);
        drop(slot);
    }

    fn pop(&self) -> Option<Taken> {
        let mut idle = self.lock();
        let popped = idle.sessions.pop();
        self.measured.idle.set(idle.sessions.len() as f64);
        popped
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        // No code panics while it holds the lock.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Measured {
    fn of(name: &'static str) -> Self {
        describe_gauge!(CONNECTIONS, "Sessions of the database by pool and state: used, idle");
        describe_gauge!(PENDING, "Units of work that wait for a session");
        let connections = |state: &'static str| gauge!(CONNECTIONS, "db_client_connection_pool_name" => name, "db_client_connection_state" => state);
        let pending = gauge!(PENDING, "db_client_connection_pool_name" => name);
        Self { used: connections("used"), idle: connections("idle"), pending }
    }
}

async fn ping(connection: &mut PgConnection) -> bool {
    matches!(timeout(PING_LIMIT, connection.ping()).await, Ok(Ok(())))
}

/// Says goodbye, which the server would otherwise note as a lost client. The slot is free at once only if that is sent.
fn close(taken: Taken) {
    tokio::spawn(timeout(PING_LIMIT, async move {
        let Taken { connection, slot, .. } = taken;
        drop(connection.close().await);
        drop(slot);
    }));
}

#[cfg(test)]
mod tests {
    use super::Soundness;

    #[test]
    fn a_session_is_sound_after_errors_of_its_input_only() {
        for (code, soundness) in [
            ("22001", Soundness::Sound),
            ("23505", Soundness::Sound),
            ("40P01", Soundness::Sound),
            ("P0001", Soundness::Sound),
            ("0A000", Soundness::Unsound),
            ("26000", Soundness::Unsound),
            ("42501", Soundness::Unsound),
            ("57014", Soundness::Sound),
            ("55P03", Soundness::Unsound),
            ("", Soundness::Unsound),
            ("25006", Soundness::AllUnsound),
            ("57P01", Soundness::AllUnsound),
            ("57P03", Soundness::AllUnsound),
            ("08006", Soundness::AllUnsound),
        ] {
            assert_eq!(Soundness::of_code(code), soundness, "{code}");
        }
        assert_eq!(Soundness::of(&sqlx::Error::RowNotFound), Soundness::Sound);
        assert_eq!(Soundness::of(&sqlx::Error::Io(std::io::ErrorKind::BrokenPipe.into())), Soundness::AllUnsound);
        assert_eq!(Soundness::of(&sqlx::Error::PoolTimedOut), Soundness::Unsound);
    }
}
