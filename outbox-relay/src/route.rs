//! Says which way an event goes, and whether that way is open.

use std::{str::FromStr, sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, watch},
    time::{Instant, sleep_until},
};
use tonic::transport::Uri;
use tracing::{debug, error, info, warn};

use crate::measure;

/// The first pause before a probe lasts at most this long, each further one twice as long, up to the cap. The cap is
/// also the longest a backlog waits after the receiver has returned.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// What bars a route is mended by people: probed rarely, so that its errors in the log are read and not drowned in.
const BARRED_PAUSE: Duration = Duration::from_secs(5);
/// A receiver that asks for more time than this is probed earlier: it may have been replaced meanwhile.
pub(crate) const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// A way for events: which of them go it, and to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSettings {
    /// A full event type (`orders.v1.OrderCreated`), or the beginning of some, ending in `*` (`orders.v1.*`, `*`).
    pub pattern: String,
    /// The service that receives the events.
    pub receiver: Uri,
}

impl RouteSettings {
    /// The pattern, as SQL's LIKE reads it.
    pub(crate) fn like(&self) -> String {
        let (prefix, any) = self.pattern.strip_suffix('*').map_or((&*self.pattern, ""), |prefix| (prefix, "%"));
        prefix.replace('_', "\\_") + any
    }
}

impl FromStr for RouteSettings {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (pattern, receiver) = text
            .split_once('=')
            .ok_or("not a route; it looks like PATTERN=URL, such as orders.v1.*=http://host:50052")?;
        // No other characters are in a type's name; so `_` is the only one that LIKE reads differently.
        let named = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._".contains(&byte));
        let pattern = pattern.trim();
        if pattern.is_empty() || !named(pattern.strip_suffix('*').unwrap_or(pattern)) {
            return Err("not a pattern of event types; it looks like orders.v1.OrderCreated, orders.v1.* or *");
        }
        let uri = receiver.trim().parse::<Uri>().ok().filter(|uri| {
            // The URL is shown in logs and to operators, and nothing would be done with a password in it.
            let credentials = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
            uri.scheme_str() == Some("http") && uri.host().is_some() && !credentials
        });
        let receiver = uri.ok_or("not the URL of a receiver; it looks like http://host:50052")?;
        Ok(Self { pattern: pattern.to_owned(), receiver })
    }
}

/// How a route is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Its receiver has not been asked yet.
    Starting,
    /// All workers deliver.
    Open,
    /// The receiver is away, or comes back: one worker delivers, the others wait.
    Down,
    /// The receiver does not let this relay deliver.
    Barred,
}

impl Condition {
    /// As operators read it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "STARTING",
            Self::Open => "OPEN",
            Self::Down => "DOWN",
            Self::Barred => "BARRED",
        }
    }
}

/// The way to a receiver, shared by its workers in a process.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    settings: RouteSettings,
    health: watch::Sender<Health>,
    /// Held in common by the workers that deliver while the route is open.
    deliveries: RwLock<()>,
    /// Held by the one worker whose turn it is while the route is not.
    probing: Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Health {
    condition: Condition,
    /// In a row, since the receiver last answered a delivery.
    failures: u32,
    /// Whether the route has ever been open.
    opened: bool,
    /// The receiver has asked to be left alone until then.
    not_before: Instant,
}

/// Leave to deliver.
pub(crate) enum Admission<'a> {
    /// To any worker.
    Open { _delivering: RwLockReadGuard<'a, ()> },
    /// To this worker alone.
    Turn(Turn<'a>),
}

/// The turn of one worker at a route that is not open. No other worker of the process begins a delivery before it ends.
pub(crate) struct Turn<'a> {
    route: &'a Route,
    /// Whether the receiver has said that it is up, and nothing has been delivered since.
    pub(crate) described: bool,
    _probing: MutexGuard<'a, ()>,
}

impl Route {
    pub(crate) fn new(settings: RouteSettings) -> Self {
        let health = Health { condition: Condition::Starting, failures: 0, opened: false, not_before: Instant::now() };
        measure::register(&settings.pattern);
        let state = State {
            settings,
            health: watch::Sender::new(health),
            deliveries: RwLock::default(),
            probing: Mutex::default(),
        };
        Self { state: Arc::new(state) }
    }

    pub(crate) fn settings(&self) -> &RouteSettings {
        &self.state.settings
    }

    pub(crate) fn pattern(&self) -> &str {
        &self.state.settings.pattern
    }

    pub(crate) fn condition(&self) -> Condition {
        self.state.health.borrow().condition
    }

    /// Whether the receiver was fit to be delivered to, at some time.
    pub(crate) fn was_open(&self) -> bool {
        self.state.health.borrow().opened
    }

    /// Waits while the route is not open: until another worker has opened it, or for this worker's turn to. Dropping the
    /// future gives the turn up.
    pub(crate) async fn admit(&self) -> Admission<'_> {
        if let Some(open) = self.enter() {
            return open;
        }
        let probing = self.state.probing.lock().await;
        self.enter().unwrap_or(Admission::Turn(Turn { route: self, described: false, _probing: probing }))
    }

    /// First in, then looked: whoever finds the route open is seen by the one that is going to find it down and asks
    /// whether it is alone.
    fn enter(&self) -> Option<Admission<'_>> {
        // Fails only while a worker asks whether it is alone, and then the route is not open.
        let delivering = self.state.deliveries.try_read().ok()?;
        (self.condition() == Condition::Open).then_some(Admission::Open { _delivering: delivering })
    }

    /// The receiver answered a delivery, whatever it said.
    pub(crate) fn answered(&self) {
        self.state.health.send_if_modified(|health| std::mem::take(&mut health.failures) > 0);
    }

    /// The receiver is away: nobody but the worker whose turn it is comes near it, and not before it has asked to be.
    pub(crate) fn fail(&self, reason: &str, retry_after: Duration) {
        let before = self.close(Condition::Down, retry_after);
        if before == Condition::Down {
            debug!(route = self.pattern(), reason, "receiver still away");
        } else {
            warn!(route = self.pattern(), reason, "route down: receiver does not answer");
        }
    }

    /// The receiver does not let this relay deliver: no event is at fault, no repetition helps, somebody has to act.
    pub(crate) fn bar(&self, reason: &str) {
        self.close(Condition::Barred, Duration::ZERO);
        let (route, receiver) = (self.pattern(), &self.state.settings.receiver);
        error!(route, %receiver, reason, "route barred: check where it leads, and whether this relay may deliver there");
    }

    fn close(&self, condition: Condition, retry_after: Duration) -> Condition {
        let mut before = condition;
        self.state.health.send_modify(|health| {
            before = std::mem::replace(&mut health.condition, condition);
            health.failures = health.failures.saturating_add(1);
            health.not_before = health.not_before.max(Instant::now() + retry_after.min(RETRY_AFTER_MAX));
        });
        measure::route_open(self.pattern(), false);
        before
    }
}

impl Turn<'_> {
    /// Waits for as long as the receiver is to be left alone: nothing after an answer, otherwise with full jitter, so that
    /// relays which lost it together do not come back together.
    pub(crate) async fn pause(&self) {
        let Health { condition, failures, not_before, .. } = *self.route.state.health.borrow();
        if failures == 0 && not_before <= Instant::now() {
            return;
        }
        let pause = match condition {
            Condition::Barred => BARRED_PAUSE + PAUSE_MAX.mul_f64(fastrand::f64()),
            Condition::Starting | Condition::Open | Condition::Down => pause_max(failures).mul_f64(fastrand::f64()),
        };
        sleep_until(not_before.max(Instant::now()) + pause).await;
    }

    /// Whether no delivery is under way that was begun while the route was open. A receiver that crashes takes them all
    /// with it: only of one that was alone can it be said that it was the cause.
    pub(crate) fn is_alone(&self) -> bool {
        self.route.state.deliveries.try_write().is_ok()
    }

    /// Whether the receiver has never been away.
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
        measure::route_open(self.route.pattern(), true);
        info!(route = self.route.pattern(), "route open");
    }
}

fn pause_max(failures: u32) -> Duration {
    PAUSE.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::{Admission, Condition, Route, RouteSettings, pause_max};
    use std::time::Duration;
    use tokio::time::Instant;

    fn route() -> Route {
        Route::new("*=http://localhost:1".parse().unwrap())
    }

    async fn turn(route: &Route) -> super::Turn<'_> {
        match route.admit().await {
            Admission::Turn(turn) => turn,
            Admission::Open { .. } => panic!("the route is open"),
        }
    }

    #[test]
    fn pauses_double_up_to_their_cap() {
        assert_eq!(pause_max(1), Duration::from_millis(50));
        assert_eq!(pause_max(3), Duration::from_millis(200));
        assert_eq!(pause_max(u32::MAX), Duration::from_secs(1));
    }

    proptest::proptest! {
        #[test]
        fn no_pause_is_longer_than_the_cap_nor_shorter_than_the_one_before(
            failures in proptest::prop_oneof![0..10_u32, proptest::prelude::any::<u32>()]
        ) {
            let (pause, next) = (pause_max(failures), pause_max(failures.saturating_add(1)));
            proptest::prop_assert!(super::PAUSE <= pause && pause <= next && next <= super::PAUSE_MAX);
        }
    }

    #[test]
    fn a_pattern_is_a_type_or_the_beginning_of_some() {
        let like = |text: &str| text.parse::<RouteSettings>().map(|route| route.like());
        assert_eq!(like("orders.v1.OrderCreated=http://a:1").unwrap(), "orders.v1.OrderCreated");
        assert_eq!(like(" my_orders.v1.* = http://a:1").unwrap(), "my\\_orders.v1.%");
        assert_eq!(like("*=http://a:1").unwrap(), "%");
        for bad in
            ["", "http://a:1", "=http://a:1", "a*b=http://a:1", "a%=http://a:1", "**=http://a:1", "a\\=http://a:1"]
        {
            assert!(like(bad).is_err(), "{bad}");
        }
        for bad in ["*=", "*=a:1", "*=https://a:1", "*=http://me:secret@a:1"] {
            assert!(like(bad).unwrap_err().contains("http://host"), "{bad}");
        }
    }

    #[tokio::test]
    async fn one_worker_has_its_turn_at_a_route_that_is_not_open_and_the_others_wait_for_it() {
        let route = route();
        let turn = turn(&route).await;
        let waiting = tokio::spawn({
            let route = route.clone();
            async move { matches!(route.admit().await, Admission::Open { .. }) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        turn.open();
        drop(turn);
        assert!(waiting.await.unwrap());
        assert_eq!(route.condition(), Condition::Open);
    }

    #[tokio::test]
    async fn a_turn_knows_of_deliveries_that_were_begun_before_it() {
        let route = route();
        turn(&route).await.open();
        let delivering = route.admit().await;
        route.fail("gone", Duration::ZERO);
        let turn = turn(&route).await;
        assert!(!turn.is_alone() && !turn.is_first());
        drop(delivering);
        assert!(turn.is_alone());
    }

    #[test]
    fn a_receiver_that_asks_for_time_gets_a_minute_at_most() {
        for (asked, given) in [(5, 5), (3600, 60)] {
            let (route, before) = (route(), Instant::now());
            route.fail("overloaded", Duration::from_secs(asked));
            let left = route.state.health.borrow().not_before - before;
            assert!(left >= Duration::from_secs(given) && left < Duration::from_secs(given + 1), "{left:?}");
        }
    }
}
