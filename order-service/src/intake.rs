//! Group commit: calls that arrive at the same time place their orders in one transaction, each as if it were alone.

use std::{
    future::pending,
    mem, slice,
    sync::{Arc, Weak},
    time::Duration,
};

use chassis::{
    Database, may_pass,
    trace::{self, KeyValue, NewSpan, Span, SpanKind, Trace},
};
use clap::Args;
use futures_util::{
    future::{FutureExt, OptionFuture},
    stream::{FuturesUnordered, StreamExt},
};
use outbox::Notifier;
use proto::orders::v1::Order;
use sqlx::PgConnection;
use tokio::{
    select,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::yield_now,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    create_order::{CreateOrderError, Draft, Outcome, create_orders},
    group_calls::{Decision, GROUP_MAX, Situation, decide, patience},
    measure,
    share::{Share, Shares},
};

/// Between two readings of how many orders wait.
const QUEUE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a group may gather. On a busy processor calls keep arriving, and the first must not wait until the group is
/// full.
const GATHER_MAX: Duration = Duration::from_millis(1);

/// How calls share transactions, and how many may wait.
#[derive(Args, Clone, Debug)]
pub struct IntakeSettings {
    /// Maximum number of order transactions at once. Waiting calls share one; a second starts only if the first is
    /// slow.
    #[arg(long, env = "ORDER_SERVICE_WRITERS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub writers: u32,
    /// Maximum number of orders that wait for a transaction or are in it, those included whose callers are gone. Further calls
    /// are refused with a hint to retry.
    #[arg(long, env = "ORDER_SERVICE_QUEUE", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub queue: u32,
    /// The same of one customer's orders, but no more than half of --calls: so one customer's flood leaves places for others.
    #[arg(long, env = "ORDER_SERVICE_QUEUE_PER_CUSTOMER", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub queue_per_customer: u32,
}

impl IntakeSettings {
    /// How many orders of one customer there may be among so many calls.
    pub(crate) fn share_among(&self, calls: u32) -> u32 {
        self.queue_per_customer.min(calls / 2)
    }
}

/// Hands orders to the task that places them. The task ends with the last clone.
///
/// Which calls share a transaction is decided in [`group_calls`](crate::group_calls).
#[derive(Clone, Debug)]
pub(crate) struct Intake {
    queue: mpsc::UnboundedSender<Call>,
    /// How many more orders there may be. A bounded channel would not count those that the task has received.
    room: Arc<Semaphore>,
    shares: Shares,
}

#[derive(Debug)]
struct Call {
    draft: Draft,
    arrived: Instant,
    caller: Caller,
}

/// Who waits for the answer.
#[derive(Debug)]
struct Caller {
    /// Closed once the caller is gone.
    answer: oneshot::Sender<Result<Order, CreateOrderError>>,
    // Held until the answer, as the call's place among `--calls` is, which others want too.
    _room: OwnedSemaphorePermit,
    _share: Share,
}

impl Caller {
    fn is_gone(&self) -> bool {
        self.answer.is_closed()
    }

    /// A caller that hangs up now learns the answer by repeating its call.
    fn answer(self, answer: Result<Order, CreateOrderError>) {
        drop(self.answer.send(answer));
    }
}

impl Intake {
    /// Starts the task, which notifies `relay` of new events. One customer has at most `share` orders in it. A call that gets no transaction within `begin_limit` is
    /// refused.
    pub(crate) fn start(
        database: &Database,
        settings: &IntakeSettings,
        share: u32,
        relay: &Notifier,
        begin_limit: Duration,
    ) -> Self {
        let (queue, calls) = mpsc::unbounded_channel();
        let waiting = Waiting::new(calls, begin_limit);
        tokio::spawn(place_groups(waiting, settings.writers as usize, database.clone(), relay.clone()));
        let size = settings.queue as usize;
        let room = Arc::new(Semaphore::new(size));
        tokio::spawn(measure_queue(Arc::downgrade(&room), size));
        Self { queue, room, shares: Shares::of(share) }
    }

    /// Places the order together with those of other calls, and answers once it is committed.
    ///
    /// Once its transaction has begun, the order is placed even if the caller hangs up.
    pub(crate) async fn place(&self, draft: Draft) -> Result<Order, CreateOrderError> {
        // First, so that the flood is told of itself.
        let Some(share) = self.shares.take(draft.customer_id()) else {
            measure::refused("share", 1);
            return Err(CreateOrderError::OverShare(draft.customer_id().to_owned()));
        };
        let Ok(room) = self.room.clone().try_acquire_owned() else {
            measure::refused("full", 1);
            return Err(CreateOrderError::Overloaded);
        };
        let (answer, answered) = oneshot::channel();
        // If the task is gone, `answered` returns an error.
        let caller = Caller { answer, _room: room, _share: share };
        drop(self.queue.send(Call { draft, arrived: Instant::now(), caller }));
        answered.await.unwrap_or_else(|_| Err(CreateOrderError::of_database(sqlx::Error::WorkerCrashed)))
    }
}

/// Tells how many orders are not answered, until none can arrive any more. Calls do not tell it themselves: that would slow each one.
async fn measure_queue(room: Weak<Semaphore>, size: usize) {
    while let Some(room) = room.upgrade() {
        measure::queued(size - room.available_permits());
        drop(room);
        sleep(QUEUE_INTERVAL).await;
    }
}

/// Places group after group until no order can arrive any more.
async fn place_groups(mut waiting: Waiting, writers: usize, database: Database, relay: Notifier) {
    let mut in_flight = InFlight::none();
    loop {
        // Before the check: if this finds the channel closed, the wait below may have nothing left to wait for.
        waiting.receive().now_or_never();
        // They would wait too, each group in one more session.
        if database.waits_for_standby() {
            waiting.refuse_all();
        }
        if waiting.is_over() {
            break;
        }
        let now = Instant::now();
        match decide(&take_situation(&mut waiting, &mut in_flight, writers, now)) {
            Decision::Gather => waiting.gather().await,
            Decision::Begin(calls) => {
                let begun = in_flight.begin(calls, now);
                let group = waiting.take_oldest(calls);
                in_flight.transactions.push(place_wanted(group, &database, &relay).map(move |()| begun));
            }
            Decision::RefuseLate => waiting.refuse_late(now),
            Decision::Wait(limit) => select! {
                () = waiting.receive() => {}
                Some(()) = in_flight.end_one() => {}
                Some(()) = OptionFuture::from(limit.map(|limit| sleep_until(now + limit))) => {}
            },
        }
    }
    while in_flight.end_one().await.is_some() {}
}

/// Resets the state that tells of the time since the last decision.
fn take_situation<T>(waiting: &mut Waiting, in_flight: &mut InFlight<T>, writers: usize, now: Instant) -> Situation {
    Situation {
        waiting: waiting.received.len(),
        expires_in: waiting.expires_in(now),
        transactions: in_flight.transactions.len(),
        writers,
        in_flight: in_flight.calls,
        just_answered: mem::take(&mut in_flight.just_answered),
        patience_left: in_flight.patience_ends.saturating_duration_since(now),
        has_gathered: mem::take(&mut waiting.has_gathered),
    }
}

/// The transactions in flight, and the state that a decision needs.
struct InFlight<T> {
    transactions: FuturesUnordered<T>,
    calls: usize,
    /// Calls of the transaction that has ended since the last decision.
    just_answered: usize,
    /// When the patience with the last transaction that began is over.
    patience_ends: Instant,
}

/// A transaction that has begun; its future returns this.
struct Begun {
    calls: usize,
    patience_ends: Instant,
}

impl<T> InFlight<T> {
    fn none() -> Self {
        Self { transactions: FuturesUnordered::new(), calls: 0, just_answered: 0, patience_ends: Instant::now() }
    }

    fn begin(&mut self, calls: usize, now: Instant) -> Begun {
        self.calls += calls;
        self.patience_ends = now + patience(calls);
        Begun { calls, patience_ends: self.patience_ends }
    }
}

impl<T: Future<Output = Begun>> InFlight<T> {
    /// Waits until a transaction ends; `None` if there is none.
    async fn end_one(&mut self) -> Option<()> {
        let Begun { calls, patience_ends } = self.transactions.next().await?;
        self.calls -= calls;
        self.just_answered = calls;
        // The last transaction that began has ended. Patience with the others was over before it began.
        if patience_ends == self.patience_ends {
            self.patience_ends = Instant::now();
        }
        Some(())
    }
}

/// Calls that are in no transaction yet.
struct Waiting {
    calls: mpsc::UnboundedReceiver<Call>,
    /// Whether orders can still arrive.
    open: bool,
    /// Received calls, the oldest first.
    received: Vec<Call>,
    /// How long a call may wait for its transaction.
    begin_limit: Duration,
    /// Whether they have gathered since the last decision.
    has_gathered: bool,
}

impl Waiting {
    fn new(calls: mpsc::UnboundedReceiver<Call>, begin_limit: Duration) -> Self {
        Self { calls, open: true, received: Vec::new(), begin_limit, has_gathered: false }
    }

    fn is_over(&self) -> bool {
        !self.open && self.received.is_empty()
    }

    /// Receives calls once some arrive. Never ready while a group is full, or once no order can arrive any more.
    async fn receive(&mut self) {
        let room = GROUP_MAX - self.received.len();
        if room == 0 || !self.open {
            return pending().await;
        }
        self.open = self.calls.recv_many(&mut self.received, room).await > 0;
    }

    /// Yields so that connections with pending calls run first, then receives those calls.
    async fn gather(&mut self) {
        let until = Instant::now() + GATHER_MAX;
        while self.received.len() < GROUP_MAX && Instant::now() < until {
            yield_now().await;
            if self.calls.is_empty() {
                break;
            }
            self.receive().await;
        }
        self.has_gathered = true;
    }

    /// Time until the oldest call is late.
    fn expires_in(&self, now: Instant) -> Option<Duration> {
        self.received.first().map(|oldest| (oldest.arrived + self.begin_limit).saturating_duration_since(now))
    }

    fn refuse_late(&mut self, now: Instant) {
        let is_late = |call: &&Call| now.duration_since(call.arrived) >= self.begin_limit;
        let late = self.received.iter().take_while(is_late).count();
        let late = self.received.drain(..late).map(|call| call.caller);
        let refused: Vec<_> = late.filter(|caller| !caller.is_gone()).collect();
        if !refused.is_empty() {
            measure::refused("late", refused.len());
            fail(refused, sqlx::Error::PoolTimedOut);
        }
    }

    fn refuse_all(&mut self) {
        if !self.received.is_empty() {
            measure::refused("standby", self.received.len());
        }
        for call in self.received.drain(..) {
            call.caller.answer(Err(CreateOrderError::StandbyAway));
        }
    }

    fn take_oldest(&mut self, calls: usize) -> Vec<Call> {
        let later = self.received.split_off(calls);
        mem::replace(&mut self.received, later)
    }
}

/// Places the orders of the callers that still wait, and answers them.
async fn place_wanted(group: Vec<Call>, database: &Database, relay: &Notifier) {
    let wanted: Vec<_> = group.into_iter().filter(|call| !call.caller.is_gone()).collect();
    if wanted.is_empty() {
        return;
    }
    let began = Instant::now();
    measure::begun(wanted.iter().map(|call| began.duration_since(call.arrived)));
    let (drafts, callers): (Vec<_>, Vec<_>) = wanted.into_iter().map(|call| (call.draft, call.caller)).unzip();
    let mut span = begin_commit(&drafts);
    let relay = relay.clone();
    let placed = database.run(|connection| Box::pin(place_group(connection, drafts, relay))).await;
    measure::ended(began.elapsed());
    if let (Some(span), Err(cause)) = (&mut span, &placed) {
        span.fail(cause.to_string());
    }
    drop(span);
    match placed {
        Ok(orders) => callers.into_iter().zip(orders).for_each(|(caller, order)| caller.answer(order)),
        Err(cause) => fail(callers, cause),
    }
}

/// The span of a transaction, which belongs to all of its calls; `None` if the trace of none is sampled.
fn begin_commit(drafts: &[Draft]) -> Option<Span> {
    if !trace::is_on() {
        return None;
    }
    let links: Vec<_> = drafts.iter().filter_map(Draft::trace).filter(Trace::is_sampled).collect();
    if links.is_empty() {
        return None;
    }
    let attributes = vec![
        KeyValue::new("db.system.name", "postgresql"),
        KeyValue::new("db.query.summary", "orders: create orders"),
        KeyValue::new("db.operation.batch.size", i64::try_from(drafts.len()).unwrap_or(i64::MAX)),
    ];
    NewSpan { name: "orders: create orders".into(), kind: SpanKind::Client, parent: None, links, attributes }.begin()
}

fn fail(callers: Vec<Caller>, cause: sqlx::Error) {
    let failed = CreateOrderError::of_database(cause);
    callers.into_iter().for_each(|caller| caller.answer(Err(failed.clone())));
}

async fn place_group(
    connection: &mut PgConnection,
    drafts: Vec<Draft>,
    relay: Notifier,
) -> Result<Vec<Result<Order, CreateOrderError>>, sqlx::Error> {
    let outcomes: Vec<_> = match create_orders(connection, &drafts).await {
        // One of the orders is at fault, and nothing was written: the others are placed without it.
        Err(cause @ sqlx::Error::Database(_)) if drafts.len() > 1 && !may_pass(&cause) => {
            place_each_alone(connection, &drafts).await
        }
        outcomes => outcomes?,
    };
    let number = |is: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| is(outcome)).count();
    let placed = number(|outcome| matches!(outcome, Outcome::Placed(_)));
    if placed > 0 {
        relay.notify();
    }
    measure::orders("placed", placed);
    measure::orders("repeated", number(|outcome| matches!(outcome, Outcome::Found(_))));
    let order = |(draft, outcome): (Draft, _)| match outcome {
        Outcome::Placed(created_at) => Ok(draft.placed_at(created_at)),
        Outcome::Found(order) => Ok(order),
        Outcome::RequestIdReused => Err(CreateOrderError::RequestIdReused),
        Outcome::Failed(cause) => Err(CreateOrderError::of_database(cause)),
    };
    Ok(drafts.into_iter().zip(outcomes).map(order).collect())
}

async fn place_each_alone(connection: &mut PgConnection, drafts: &[Draft]) -> Vec<Outcome> {
    let mut outcomes = Vec::with_capacity(drafts.len());
    for draft in drafts {
        match create_orders(connection, slice::from_ref(draft)).await {
            Ok(outcome) => outcomes.extend(outcome),
            Err(cause) => outcomes.push(Outcome::Failed(Arc::new(cause))),
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use chassis::{Database, DatabaseSettings, DatabaseUrl, PasswordFile};
    use outbox::Notifier;
    use testkit::TestDatabase;
    use tokio::{sync::mpsc, time::timeout};
    use tokio_util::sync::CancellationToken;

    use super::{Waiting, place_groups};
    use crate::MIGRATORS;

    /// The last sender may be dropped while the last order is answered.
    #[tokio::test]
    async fn the_task_ends_if_all_senders_are_gone_before_it_first_receives() {
        let server = TestDatabase::create("orders_owner", &MIGRATORS).await;
        let url: DatabaseUrl = server.url_as("order_service").parse().unwrap();
        let settings = DatabaseSettings {
            database_connections: 1,
            database_acquire_ms: 1000,
            database_work_ms: 5000,
            password_file: PasswordFile::default(),
        };
        let shutdown = CancellationToken::new();
        let connected = Database::connect(&url, &settings, &MIGRATORS, &shutdown).await;
        let database = connected.unwrap().unwrap();
        let relay = Notifier::start(url, outbox::CHANNEL);
        let (_, calls) = mpsc::unbounded_channel();
        let waiting = Waiting::new(calls, Duration::from_secs(1));
        timeout(Duration::from_secs(10), place_groups(waiting, 1, database, relay)).await.unwrap();
    }
}
