//! Routes: which receiver an event goes to, and whether that receiver takes deliveries.

use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use chassis::LogLimit;
use outbox::EventId;
use tokio::{
    sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, watch},
    time::{Instant, sleep_until},
};
use tonic::transport::Uri;
use tracing::{debug, error, info, warn};

use crate::{fate::RETRY_AFTER_MAX, measure, pace::Pace};

/// By default gRPC servers accept messages of up to 4 MiB. They refuse a larger one whole, and its events would then be
/// delivered one by one.
const MESSAGE_BYTES_MAX: usize = 3 * 1024 * 1024;
/// Longest first back-off before a probe. It doubles with each further failure, up to the cap.
const BACK_OFF: Duration = Duration::from_millis(50);
/// Cap of that back-off, and so the longest that a backlog waits once the receiver is back.
const BACK_OFF_MAX: Duration = Duration::from_secs(1);
/// Only people can repair a barred route. It is probed rarely, so that its errors do not flood the log.
const BARRED_BACK_OFF: Duration = Duration::from_secs(5);
/// How long the largest message that a receiver accepted bounds further ones. Then a larger one is tried, since the
/// receiver may accept it by now.
const MESSAGE_BYTES_KEPT: Duration = Duration::from_secs(600);
/// Time between two lines of the log about events that are set aside.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// A receiver may say that it never forgets. The database's times do not reach that far.
const MAX_AGE_MAX: Duration = Duration::from_hours(100 * 365 * 24);

/// A route: a subscription, and its receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSettings {
    /// Name of the subscription.
    pub subscription: String,
    /// The service that receives its events.
    pub receiver: Uri,
}

/// Whether it is the name of a subscription: short, and without characters that mean something elsewhere.
pub(crate) fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('-')
}

impl FromStr for RouteSettings {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (subscription, receiver) =
            text.split_once('=').ok_or("not a route; it looks like NAME=URL, such as inventory=https://host:52052")?;
        let subscription = subscription.trim();
        if !is_name(subscription) {
            return Err("not the name of a subscription, which has only a-z, 0-9 and -; a route looks like \
                        inventory=https://host:52052, after `outbox-relay subscribe inventory 'orders.v1.*'`");
        }
        let uri = receiver.trim().parse::<Uri>().ok().filter(|uri| {
            // The URL appears in logs and in the status. A password in it would leak there, and have no effect.
            let credentials = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
            // gRPC has the path for its own use.
            let path = uri.path() != "/" || uri.query().is_some();
            matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() && !credentials && !path
        });
        let receiver = uri.ok_or(
            "not the URL of a receiver; it looks like https://host:52052 or http://localhost:52052, without a path",
        )?;
        Ok(Self { subscription: subscription.to_owned(), receiver })
    }
}

/// The condition of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Its receiver has not answered Describe yet.
    Starting,
    /// All workers deliver.
    Open,
    /// The receiver is unavailable, or just coming back: one worker probes it, the others wait.
    Down,
    /// The receiver does not allow this relay to deliver.
    Barred,
}

impl Condition {
    /// The name that operators see.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "STARTING",
            Self::Open => "OPEN",
            Self::Down => "DOWN",
            Self::Barred => "BARRED",
        }
    }
}

/// A route with its condition, shared by its workers in a process.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    settings: RouteSettings,
    health: watch::Sender<Health>,
    /// Whether its subscription has ended.
    ended: AtomicBool,
    /// Why it is not open; empty if it is.
    reason: watch::Sender<String>,
    /// Workers that deliver while the route is open hold a read lock.
    deliveries: RwLock<()>,
    /// The one worker that probes while the route is not open holds this.
    probing: Mutex<()>,
    /// The largest message that the receiver has accepted, after it refused a larger one; and until when that counts.
    message_bytes_max: watch::Sender<Option<(usize, Instant)>>,
    /// The types of events that the receiver knows, and when it said so.
    types: watch::Sender<(Vec<String>, Instant)>,
    /// Whether the receiver applies the events of an aggregate in a batch in order.
    ordered: AtomicBool,
    /// Events that were delivered on it.
    delivered: AtomicU64,
    pace: Pace,
    /// How old an event may be, by how long the receiver remembers those that it applied.
    max_age: watch::Sender<Option<Duration>>,
    /// Of the lines about events whose type the receiver does not know.
    warned_of_types: LogLimit,
    /// Of the lines about events whose age is in doubt.
    warned_of_clocks: LogLimit,
}

#[derive(Clone, Copy, Debug)]
struct Health {
    condition: Condition,
    /// Failures in a row since the receiver last took an event.
    failures: u32,
    /// The event that failed last without a witness, if the receiver took none since.
    unwitnessed: Option<EventId>,
    /// Whether the route has ever been open.
    opened: bool,
    /// The receiver has asked for no call before this time.
    not_before: Instant,
}

/// Permission to deliver.
pub(crate) enum Admission<'a> {
    /// The route is open: other workers deliver as well.
    Open { _delivering: RwLockReadGuard<'a, ()> },
    /// The route is not open: this worker alone may probe it.
    Probe(Probe<'a>),
}

/// Exclusive use of a route that is not open. No other worker of the process begins a delivery before the probe ends.
pub(crate) struct Probe<'a> {
    route: &'a Route,
    /// Whether the receiver has answered Describe since the last delivery.
    pub(crate) described: bool,
    /// Whether the last Describe of this probe was answered. Then the next need not wait.
    pub(crate) is_up: bool,
    _probing: MutexGuard<'a, ()>,
}

impl Route {
    pub(crate) fn new(settings: RouteSettings) -> Self {
        let health = Health {
            condition: Condition::Starting,
            failures: 0,
            unwitnessed: None,
            opened: false,
            not_before: Instant::now(),
        };
        measure::register(&settings.subscription);
        let state = State {
            settings,
            health: watch::Sender::new(health),
            ended: AtomicBool::new(false),
            reason: watch::Sender::new(String::new()),
            deliveries: RwLock::default(),
            probing: Mutex::default(),
            message_bytes_max: watch::Sender::new(None),
            types: watch::Sender::new((Vec::new(), Instant::now())),
            ordered: AtomicBool::new(false),
            delivered: AtomicU64::new(0),
            pace: Pace::default(),
            max_age: watch::Sender::new(None),
            warned_of_types: LogLimit::default(),
            warned_of_clocks: LogLimit::default(),
        };
        Self { state: Arc::new(state) }
    }

    pub(crate) fn settings(&self) -> &RouteSettings {
        &self.state.settings
    }

    /// The name of its subscription.
    pub(crate) fn name(&self) -> &str {
        &self.state.settings.subscription
    }

    pub(crate) fn condition(&self) -> Condition {
        self.state.health.borrow().condition
    }

    /// How fast it may deliver.
    pub(crate) fn pace(&self) -> &Pace {
        &self.state.pace
    }

    /// Counts events that were delivered.
    pub(crate) fn count_delivered(&self, events: usize) {
        self.state.delivered.fetch_add(events as u64, Ordering::Relaxed);
    }

    /// Events that were delivered on it since the relay started.
    pub(crate) fn delivered(&self) -> u64 {
        self.state.delivered.load(Ordering::Relaxed)
    }

    /// Why it is not open; empty if it is, or has never been tried.
    pub(crate) fn reason(&self) -> String {
        self.state.reason.borrow().clone()
    }

    /// Its subscription has ended. A worker may still be in the middle of a delivery, whose outcome tells no more.
    pub(crate) fn end(&self) {
        self.state.ended.store(true, Ordering::Relaxed);
        measure::route_state(self.name(), None);
    }

    fn tell(&self, condition: Condition) {
        if !self.state.ended.load(Ordering::Relaxed) {
            measure::route_state(self.name(), Some(condition));
        }
    }

    /// Whether the route has ever been open.
    pub(crate) fn was_open(&self) -> bool {
        self.state.health.borrow().opened
    }

    /// Admits the worker at once if the route is open. Otherwise it waits until another worker has opened the route, or
    /// until it is the one that may probe. Dropping the future gives up its place.
    pub(crate) async fn admit(&self) -> Admission<'_> {
        if let Some(open) = self.enter() {
            return open;
        }
        let probing = self.state.probing.lock().await;
        self.enter().unwrap_or(Admission::Probe(Probe {
            route: self,
            described: false,
            is_up: false,
            _probing: probing,
        }))
    }

    /// Takes the read lock before it checks the condition. The other way round, `is_alone` could miss a delivery that
    /// is just starting.
    fn enter(&self) -> Option<Admission<'_>> {
        // The lock is taken only while a probe checks whether it is alone, and then the route is not open.
        let delivering = self.state.deliveries.try_read().ok()?;
        (self.condition() == Condition::Open).then_some(Admission::Open { _delivering: delivering })
    }

    /// The receiver took an event, so it works.
    pub(crate) fn took(&self) {
        self.state.health.send_if_modified(|health| {
            health.unwitnessed = None;
            std::mem::take(&mut health.failures) > 0
        });
    }

    /// The event failed alone, and nothing shows that the receiver works.
    pub(crate) fn failed_without_witness(&self, event_id: EventId) {
        self.state.health.send_modify(|health| health.unwitnessed = Some(event_id));
    }

    /// The event that failed last without a witness, if the receiver took none since.
    pub(crate) fn unwitnessed(&self) -> Option<EventId> {
        self.state.health.borrow().unwitnessed
    }

    /// The receiver knows these types of events; all, if there are none.
    pub(crate) fn set_types(&self, types: Vec<String>) {
        self.state.types.send_replace((types, Instant::now()));
    }

    /// Whether a batch may have several events of an aggregate.
    pub(crate) fn set_ordered(&self, ordered: bool) {
        self.state.ordered.store(ordered, Ordering::Relaxed);
    }

    /// The receiver applies the events of an aggregate in a batch in order, and none behind one that it refuses.
    pub(crate) fn is_ordered(&self) -> bool {
        self.state.ordered.load(Ordering::Relaxed)
    }

    /// The receiver remembers applied events for this time. They are delivered while they are younger than six sevenths of
    /// it: the rest is for clocks that differ, and for a delivery that takes long.
    pub(crate) fn set_retention(&self, retention: Duration) {
        self.state.max_age.send_replace(Some((retention / 7 * 6).min(MAX_AGE_MAX)));
    }

    /// How old an event may be when it is delivered; `None` before the receiver has said how long it remembers.
    pub(crate) fn max_age(&self) -> Option<Duration> {
        *self.state.max_age.borrow()
    }

    /// Whether the receiver knows the type, as far as it has said.
    pub(crate) fn knows(&self, event_type: &str) -> bool {
        let (types, _) = &*self.state.types.borrow();
        types.is_empty() || types.iter().any(|known| known == event_type)
    }

    /// How long ago the receiver said which types it knows.
    pub(crate) fn types_age(&self) -> Duration {
        self.state.types.borrow().1.elapsed()
    }

    /// Whether the log may say again that events wait since the receiver does not know their type.
    pub(crate) fn may_warn_of_types(&self) -> bool {
        self.state.warned_of_types.allows(Instant::now(), WARNING_INTERVAL)
    }

    /// Whether the log may say again that events wait since two clocks disagree about their age.
    pub(crate) fn may_warn_of_clocks(&self) -> bool {
        self.state.warned_of_clocks.allows(Instant::now(), WARNING_INTERVAL)
    }

    /// The receiver refuses messages larger than this.
    pub(crate) fn limit_messages(&self, bytes: usize) {
        info!(route = self.name(), bytes, "smaller batches: the receiver refuses larger messages");
        self.state.message_bytes_max.send_replace(Some((bytes, Instant::now() + MESSAGE_BYTES_KEPT)));
    }

    /// The largest message to send.
    pub(crate) fn message_bytes_max(&self) -> usize {
        let limit = self.state.message_bytes_max.borrow().filter(|(_, until)| *until > Instant::now());
        limit.map_or(MESSAGE_BYTES_MAX, |(bytes, _)| bytes)
    }

    /// The receiver is unavailable: only a probe calls it, and not before `retry_after`.
    pub(crate) fn mark_down(&self, reason: &str, retry_after: Duration) {
        let before = self.close(Condition::Down, reason, retry_after);
        let (route, receiver) = (self.name(), &self.state.settings.receiver);
        if before == Condition::Down {
            debug!(route, %receiver, reason, "receiver still unavailable");
        } else {
            warn!(route, %receiver, reason, "route down: receiver unavailable");
        }
    }

    /// The receiver does not allow this relay to deliver. No event is at fault, and no retry helps: an operator must
    /// act.
    pub(crate) fn bar(&self, reason: &str) {
        self.close(Condition::Barred, reason, Duration::ZERO);
        let (route, receiver) = (self.name(), &self.state.settings.receiver);
        error!(
            route,
            %receiver,
            reason,
            "route barred: check its URL, whether this relay may deliver to it, and whether it answers each event by its id"
        );
    }

    fn close(&self, condition: Condition, reason: &str, retry_after: Duration) -> Condition {
        self.state.reason.send_replace(reason.to_owned());
        let mut before = condition;
        self.state.health.send_modify(|health| {
            before = std::mem::replace(&mut health.condition, condition);
            health.failures = health.failures.saturating_add(1);
            health.not_before = health.not_before.max(Instant::now() + retry_after.min(RETRY_AFTER_MAX));
        });
        self.tell(condition);
        before
    }
}

impl Probe<'_> {
    /// Waits until the receiver may be called again: not at all after an answer, otherwise for a back-off with full
    /// jitter. Without jitter, relays that lost the receiver together would return together.
    pub(crate) async fn back_off(&self) {
        let Health { condition, failures, not_before, .. } = *self.route.state.health.borrow();
        if (failures == 0 || self.is_up) && not_before <= Instant::now() {
            return;
        }
        let back_off = match condition {
            Condition::Barred => BARRED_BACK_OFF + BACK_OFF_MAX.mul_f64(fastrand::f64()),
            Condition::Starting | Condition::Open | Condition::Down => {
                longest_back_off(failures).mul_f64(fastrand::f64())
            }
        };
        sleep_until(not_before.max(Instant::now()) + back_off).await;
    }

    /// Whether no delivery is in flight that began while the route was open. A receiver that crashes fails all
    /// deliveries in flight, so only a delivery that was alone is known to be the cause.
    pub(crate) fn is_alone(&self) -> bool {
        self.route.state.deliveries.try_write().is_ok()
    }

    /// Whether the receiver has never been unavailable.
    pub(crate) fn is_first(&self) -> bool {
        let health = self.route.state.health.borrow();
        health.condition == Condition::Starting && health.failures == 0
    }

    /// Lets all workers deliver.
    pub(crate) fn open(&self) {
        self.route.state.health.send_modify(|health| {
            health.condition = Condition::Open;
            health.failures = 0;
            health.opened = true;
        });
        self.route.state.reason.send_replace(String::new());
        self.route.tell(Condition::Open);
        info!(route = self.route.name(), "route open");
    }
}

fn longest_back_off(failures: u32) -> Duration {
    BACK_OFF.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(BACK_OFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::{Admission, Condition, Probe, Route, RouteSettings, longest_back_off};
    use std::time::Duration;
    use tokio::time::Instant;

    fn route() -> Route {
        Route::new("all=http://localhost:1".parse().unwrap())
    }

    async fn probe(route: &Route) -> Probe<'_> {
        match route.admit().await {
            Admission::Probe(probe) => probe,
            Admission::Open { .. } => panic!("the route is open"),
        }
    }

    #[test]
    fn the_back_off_of_a_route_doubles_up_to_its_cap() {
        assert_eq!(longest_back_off(1), Duration::from_millis(50));
        assert_eq!(longest_back_off(3), Duration::from_millis(200));
        assert_eq!(longest_back_off(u32::MAX), Duration::from_secs(1));
    }

    proptest::proptest! {
        #[test]
        fn no_back_off_exceeds_the_cap_or_is_shorter_than_the_one_before(
            failures in proptest::prop_oneof![0..10_u32, proptest::prelude::any::<u32>()]
        ) {
            let (back_off, next) = (longest_back_off(failures), longest_back_off(failures.saturating_add(1)));
            proptest::prop_assert!(super::BACK_OFF <= back_off && back_off <= next && next <= super::BACK_OFF_MAX);
        }
    }

    #[test]
    fn a_route_is_the_name_of_a_subscription_and_a_url() {
        let name = |text: &str| text.parse::<RouteSettings>().map(|route| route.subscription);
        assert_eq!(name("inventory=http://a:1").unwrap(), "inventory");
        assert_eq!(name(" loyalty-2 = https://a:1").unwrap(), "loyalty-2");
        for bad in
            ["", "http://a:1", "=http://a:1", "orders.v1.*=http://a:1", "*=http://a:1", "-a=http://a:1", "A=http://a:1"]
        {
            assert!(name(bad).is_err(), "{bad}");
        }
        assert!(name("orders.v1.*=http://a:1").unwrap_err().contains("subscribe inventory"));
        for bad in
            ["all=", "all=a:1", "all=ftp://a:1", "all=http://me:secret@a:1", "all=http://a:1/x", "all=http://a:1?x"]
        {
            assert!(name(bad).unwrap_err().contains("https://host"), "{bad}");
        }
    }

    #[tokio::test]
    async fn one_worker_probes_a_route_that_is_not_open_and_the_others_wait() {
        let route = route();
        let probe = probe(&route).await;
        let waiting = tokio::spawn({
            let route = route.clone();
            async move { matches!(route.admit().await, Admission::Open { .. }) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        probe.open();
        drop(probe);
        assert!(waiting.await.unwrap());
        assert_eq!(route.condition(), Condition::Open);
    }

    #[tokio::test]
    async fn a_probe_is_not_alone_while_an_earlier_delivery_is_in_flight() {
        let route = route();
        probe(&route).await.open();
        let delivering = route.admit().await;
        route.mark_down("gone", Duration::ZERO);
        let probe = probe(&route).await;
        assert!(!probe.is_alone() && !probe.is_first());
        drop(delivering);
        assert!(probe.is_alone());
    }

    #[test]
    fn a_receiver_that_asks_for_time_gets_at_most_a_minute() {
        for (asked, given) in [(5, 5), (3600, 60)] {
            let (route, before) = (route(), Instant::now());
            route.mark_down("overloaded", Duration::from_secs(asked));
            let left = route.state.health.borrow().not_before - before;
            assert!(left >= Duration::from_secs(given) && left < Duration::from_secs(given + 1), "{left:?}");
        }
    }
}
