//! Which connections a listener keeps.
//!
//! What is held for a connection costs memory, and a caller decides how long. So each listener has a number of connections,
//! and a number of bytes that wait for callers to read them. Whoever uses least makes room: a flood of connections that do
//! nothing keeps out no caller that does something.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::Context,
    time::Duration,
};

use clap::Args;
use futures_util::{Stream, StreamExt as _, task::AtomicWaker};
use metrics::{counter, describe_counter};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tracing::warn;

use crate::{LogLimit, guard::Guarded};

const CONNECTIONS: u32 = 1000;
const HELLO_SECONDS: u64 = 5;
const PING_SECONDS: u64 = 20;
const PING_TIMEOUT_SECONDS: u64 = 10;
const UNREAD_MIB: u32 = 64;
const UNREAD_SECONDS: u64 = 60;

/// After a connection that cannot be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// ENFILE and EMFILE: the machine or this process has no descriptor left.
const NO_DESCRIPTOR: [i32; 2] = [23, 24];
/// Between two lines of the log about connections that are closed.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
const CLOSED: &str = "connections_closed_total";

/// Which connections a listener keeps.
#[derive(Args, Clone, Debug)]
pub struct ConnectionSettings {
    /// Maximum number of connections of one listener. If there is another, the one that has had no call for longest is
    /// closed. If each has a call, the new one is.
    #[arg(long, env = "CONNECTIONS", default_value_t = CONNECTIONS, value_parser = clap::value_parser!(u32).range(10..=20_000))]
    pub connections: u32,
    /// Seconds within which a new connection has to begin to speak HTTP.
    #[arg(long, env = "HELLO_SECONDS", default_value_t = HELLO_SECONDS, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub hello_seconds: u64,
    /// Seconds after which a connection that says nothing is asked whether it is still there.
    #[arg(long, env = "PING_SECONDS", default_value_t = PING_SECONDS, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub ping_seconds: u64,
    /// Seconds within which it has to answer that.
    #[arg(long, env = "PING_TIMEOUT_SECONDS", default_value_t = PING_TIMEOUT_SECONDS, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub ping_timeout_seconds: u64,
    /// Maximum number of MiB of answers that wait for callers to read them, at one listener. Beyond that, the connection
    /// that has most of them is closed.
    #[arg(long, env = "UNREAD_MIB", default_value_t = UNREAD_MIB, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub unread_mib: u32,
    /// Seconds after which a connection is closed whose caller takes nothing of an answer. It may take twice as long.
    #[arg(long, env = "UNREAD_SECONDS", default_value_t = UNREAD_SECONDS, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub unread_seconds: u64,
}

impl Default for ConnectionSettings {
    fn default() -> Self {
        Self {
            connections: CONNECTIONS,
            hello_seconds: HELLO_SECONDS,
            ping_seconds: PING_SECONDS,
            ping_timeout_seconds: PING_TIMEOUT_SECONDS,
            unread_mib: UNREAD_MIB,
            unread_seconds: UNREAD_SECONDS,
        }
    }
}

pub(crate) fn describe() {
    describe_counter!(
        CLOSED,
        "Connections that were closed for their behaviour: idle (had no call, and made room), full (each other had a call), \
         silent (did not begin to speak), unread (answers were not read)"
    );
    for reason in ["idle", "full", "silent", "unread"] {
        counter!(CLOSED, "reason" => reason).increment(0);
    }
}

pub(crate) fn count_closed(reason: &'static str) {
    static SAID: LogLimit = LogLimit::new();
    counter!(CLOSED, "reason" => reason).increment(1);
    if SAID.allows(Instant::now(), LOG_INTERVAL) {
        warn!(reason, "a connection was closed for its behaviour (said once a minute at most)");
    }
}

/// The connections of a listener. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Connections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    connections_max: usize,
    unread_max: usize,
    unread_limit: Duration,
    hello_limit: Duration,
    open: Mutex<Open>,
    /// Bytes of answers that wait for callers to read them, those of connections included that are cut and not gone yet.
    unread: AtomicUsize,
    /// Counts intervals of the limit for reading.
    interval: AtomicUsize,
    /// Counts connections that have begun and calls that have ended.
    clock: AtomicU64,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    by_number: HashMap<u64, Arc<Connection>>,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    number: u64,
    calls: AtomicUsize,
    /// When its last call ended, or it began, by the listener's clock.
    idle_since: AtomicU64,
    unread: AtomicUsize,
    /// Answers that have waited for the caller since this interval, by whether its number is odd.
    stalled: [AtomicUsize; 2],
    is_cut: AtomicBool,
    /// Its task, which has to learn that it is cut.
    task: AtomicWaker,
    listener: Connections,
}

impl Connections {
    pub(crate) fn new(settings: &ConnectionSettings) -> Self {
        Self(Arc::new(Shared {
            connections_max: settings.connections as usize,
            unread_max: settings.unread_mib as usize * 1024 * 1024,
            unread_limit: Duration::from_secs(settings.unread_seconds),
            hello_limit: Duration::from_secs(settings.hello_seconds),
            open: Mutex::default(),
            unread: AtomicUsize::new(0),
            interval: AtomicUsize::new(0),
            clock: AtomicU64::new(0),
        }))
    }

    /// These connections, as far as there is room for them.
    pub(crate) fn keep<S>(
        &self,
        incoming: impl Stream<Item = io::Result<S>>,
    ) -> impl Stream<Item = io::Result<Guarded<S>>> {
        let connections = self.clone();
        incoming.filter_map(move |accepted| {
            let connections = connections.clone();
            async move {
                match accepted {
                    Ok(stream) => Some(Ok(Guarded::new(stream, connections.admit()?, connections.0.hello_limit))),
                    Err(cause) => {
                        if cause.raw_os_error().is_some_and(|number| NO_DESCRIPTOR.contains(&number)) {
                            connections.lock().make_room();
                        }
                        // There is no sense in asking again at once.
                        sleep(ACCEPT_PAUSE).await;
                        Some(Err(cause))
                    }
                }
            }
        })
    }

    fn admit(&self) -> Option<Arc<Connection>> {
        let mut open = self.lock();
        if open.by_number.len() >= self.0.connections_max && !open.make_room() {
            drop(open);
            count_closed("full");
            return None;
        }
        let number = open.next;
        open.next += 1;
        let connection = Arc::new(Connection {
            number,
            calls: AtomicUsize::new(0),
            idle_since: AtomicU64::new(self.tick()),
            unread: AtomicUsize::new(0),
            stalled: Default::default(),
            is_cut: AtomicBool::new(false),
            task: AtomicWaker::new(),
            listener: self.clone(),
        });
        open.by_number.insert(number, connection.clone());
        Some(connection)
    }

    /// Closes connections whose callers take nothing, for ever.
    pub(crate) async fn cut_stalled(&self) {
        let mut intervals = interval(self.0.unread_limit);
        // After a stop of the process, what has only begun to wait is not stalled.
        intervals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            intervals.tick().await;
            self.begin_interval();
        }
    }

    /// What has waited since the interval before the last one, or longer, has waited for a whole interval at least.
    fn begin_interval(&self) {
        let next = self.0.interval.load(Relaxed).wrapping_add(1);
        let has_stalled = |connection: &Connection| connection.stalled[next % 2].load(Relaxed) > 0;
        self.lock().cut_each("unread", has_stalled);
        self.0.interval.store(next, Relaxed);
    }

    /// What a connection held that was just cut does not count: it must not cost another its own.
    fn cut_greediest_if_too_much_waits(&self) {
        let mut open = self.lock();
        let unread: usize = open.by_number.values().map(|connection| connection.unread.load(Relaxed)).sum();
        if unread <= self.0.unread_max {
            return;
        }
        let greediest = open.by_number.values().max_by_key(|connection| connection.unread.load(Relaxed));
        if let Some(number) = greediest.map(|connection| connection.number) {
            open.cut("unread", number);
        }
    }

    fn tick(&self) -> u64 {
        self.0.clock.fetch_add(1, Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // No code panics while it holds the lock.
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Closes the connection that has had no call for longest; false if each has one.
    fn make_room(&mut self) -> bool {
        let idle = self.by_number.values().filter(|connection| connection.calls.load(Relaxed) == 0);
        let idlest = idle.min_by_key(|connection| connection.idle_since.load(Relaxed));
        let Some(number) = idlest.map(|connection| connection.number) else { return false };
        self.cut("idle", number);
        true
    }

    fn cut_each(&mut self, reason: &'static str, is_one: impl Fn(&Connection) -> bool) {
        let numbers: Vec<_> = self
            .by_number
            .values()
            .filter(|connection| is_one(connection))
            .map(|connection| connection.number)
            .collect();
        numbers.into_iter().for_each(|number| self.cut(reason, number));
    }

    /// From now on it does not count any more, though its task may need a moment.
    fn cut(&mut self, reason: &'static str, number: u64) {
        if let Some(connection) = self.by_number.remove(&number) {
            connection.is_cut.store(true, Relaxed);
            connection.task.wake();
            count_closed(reason);
        }
    }
}

impl Connection {
    /// An error once it is cut. Its task is woken then.
    pub(crate) fn check(&self, cx: &Context<'_>) -> io::Result<()> {
        self.task.register(cx.waker());
        if self.is_cut.load(Relaxed) { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    pub(crate) fn closed(&self) {
        self.listener.lock().by_number.remove(&self.number);
    }

    pub(crate) fn call_begins(&self) {
        self.calls.fetch_add(1, Relaxed);
    }

    pub(crate) fn call_ends(&self) {
        self.idle_since.store(self.listener.tick(), Relaxed);
        self.calls.fetch_sub(1, Relaxed);
    }

    /// So many bytes of an answer wait for the caller. Returns the interval in which that began.
    pub(crate) fn waits(&self, bytes: usize) -> usize {
        let listener = &self.listener.0;
        self.unread.fetch_add(bytes, Relaxed);
        let interval = listener.interval.load(Relaxed);
        self.stalled[interval % 2].fetch_add(1, Relaxed);
        if listener.unread.fetch_add(bytes, Relaxed) + bytes > listener.unread_max {
            self.listener.cut_greediest_if_too_much_waits();
        }
        interval
    }

    /// They wait no longer.
    pub(crate) fn waits_no_longer(&self, bytes: usize, interval: usize) {
        self.unread.fetch_sub(bytes, Relaxed);
        self.stalled[interval % 2].fetch_sub(1, Relaxed);
        self.listener.0.unread.fetch_sub(bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections(connections: u32) -> Connections {
        Connections::new(&ConnectionSettings { connections, unread_mib: 1, ..ConnectionSettings::default() })
    }

    fn is_cut(connection: &Connection) -> bool {
        connection.is_cut.load(Relaxed)
    }

    #[test]
    fn the_one_that_has_had_no_call_for_longest_makes_room() {
        let connections = connections(3);
        let [busy, called, idle] = [(); 3].map(|()| connections.admit().unwrap());
        busy.call_begins();
        called.call_begins();
        called.call_ends();
        let new = connections.admit().unwrap();
        assert_eq!([&busy, &called, &idle, &new].map(|connection| is_cut(connection)), [false, false, true, false]);
        connections.admit().unwrap();
        // The new one came after that.
        assert_eq!([&busy, &called, &new].map(|connection| is_cut(connection)), [false, true, false]);
    }

    #[test]
    fn nobody_is_admitted_while_each_has_a_call() {
        let connections = connections(2);
        let [one, other] = [(); 2].map(|()| connections.admit().unwrap());
        one.call_begins();
        other.call_begins();
        assert!(connections.admit().is_none());
        other.closed();
        assert!(connections.admit().is_some());
        assert!(!is_cut(&one));
    }

    #[test]
    fn the_one_that_reads_least_is_closed_once_too_much_waits() {
        let connections = connections(10);
        let [greedy, modest] = [(); 2].map(|()| connections.admit().unwrap());
        greedy.waits(700 * 1024);
        modest.waits(200 * 1024);
        assert!(!is_cut(&greedy) && !is_cut(&modest));
        modest.waits(200 * 1024);
        assert!(is_cut(&greedy) && !is_cut(&modest));
        // The greedy one is not gone yet.
        modest.waits(200 * 1024);
        assert!(!is_cut(&modest));
    }

    #[test]
    fn an_answer_that_waits_for_a_whole_interval_closes_its_connection() {
        let connections = connections(10);
        let [slow, late, quick] = [(); 3].map(|()| connections.admit().unwrap());
        slow.waits(1);
        let interval = quick.waits(1);
        connections.begin_interval();
        late.waits(1);
        quick.waits_no_longer(1, interval);
        assert!(!is_cut(&slow));
        connections.begin_interval();
        assert_eq!([&slow, &late, &quick].map(|connection| is_cut(connection)), [true, false, false]);
    }
}
