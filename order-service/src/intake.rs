//! Group commit: calls that come at the same time place their orders in one transaction, each as if it were alone.

use std::{future::pending, mem, slice, sync::Arc, time::Duration};

use chassis::{Database, may_pass};
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
    time::{Instant, sleep_until},
};
use tracing::error;

use crate::create_order::{Draft, Outcome, create_orders};

/// Orders in one transaction at most: it bounds how long the first of them waits for the last, and 512 of the smallest
/// are past the size at which a larger group is any faster.
const GROUP_MAX: usize = 512;

/// Orders that are worth a transaction of their own while there are more. It costs as much as 5 to 8 of them.
const WORTH_A_GROUP: usize = 16;
/// How long a transaction may take, and for each of its orders, until another begins beside it. One that does not wait takes
/// half of it. So the disk is waited for by several, where it is slow, and nobody else waits for a connection that is gone
/// without a word. (As many as there are writers keep all waiting, until the database's work is given up.)
const PATIENCE: Duration = Duration::from_millis(1);
const PATIENCE_PER_ORDER: Duration = Duration::from_micros(16);
/// How long a group waits for what is on its way: where the processor is so busy that each look finds somebody, the first
/// of them is not to wait until the group is full.
const GATHER_MAX: Duration = Duration::from_millis(1);

/// How orders are taken in.
#[derive(Args, Clone, Debug)]
pub struct IntakeSettings {
    /// Transactions at most that place orders at once. Calls share one as far as they wait; another begins beside it only when it
    /// takes longer than its orders should.
    #[arg(long, env = "ORDER_SERVICE_WRITERS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub writers: u32,
    /// Orders that wait to be placed at most, those of the next transaction among them; what comes then is refused with a hint
    /// to retry.
    #[arg(long, env = "ORDER_SERVICE_QUEUE", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub queue: u32,
}

#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum CreateOrderError {
    #[error("the request_id was used for an order with other content")]
    RequestIdReused,
    #[error("too many orders are waiting to be placed; try again")]
    Overloaded,
    /// Shared by all calls of the transaction that failed, and logged.
    #[error(transparent)]
    Database(Arc<sqlx::Error>),
}

impl CreateOrderError {
    /// Logs the cause, once for all the orders it has kept from being placed.
    fn of_database(cause: impl Into<Arc<sqlx::Error>>, orders: usize) -> Self {
        let cause = cause.into();
        error!(%cause, orders, "not placed");
        Self::Database(cause)
    }
}

/// Where calls bring their orders, to be placed by the task behind it, which ends with the last clone.
///
/// Groups grow by themselves as far as the load asks for it: a transaction begins when none is under way, with what waits,
/// so an order that is alone waits for nobody. A few first let arrive what is ready to, or the first call after a commit
/// would be a group by itself, with the others, who were answered at the same moment, a little behind it. Of many, half are a
/// group: while it is in the database the other half are answered and call again, and neither waits for the other. (See the
/// tables in ARCHITECTURE.md.)
#[derive(Clone, Debug)]
pub(crate) struct Intake {
    queue: mpsc::UnboundedSender<Call>,
    /// How many more may wait. (Were it the channel that is bounded, those that are received would come on top.)
    room: Arc<Semaphore>,
}

#[derive(Debug)]
struct Call {
    draft: Draft,
    came: Instant,
    _room: OwnedSemaphorePermit,
    /// Closed once the caller is gone.
    answer: Answer,
}

type Answer = oneshot::Sender<Result<Order, CreateOrderError>>;

impl Intake {
    /// Starts the task; `relay` is told of new events. An order whose turn has not come within `begin_limit` is refused.
    pub(crate) fn start(
        database: &Database,
        settings: &IntakeSettings,
        relay: &Notifier,
        begin_limit: Duration,
    ) -> Self {
        let (queue, calls) = mpsc::unbounded_channel();
        let waiting = Waiting { calls, open: true, group: Vec::new(), begin_limit };
        tokio::spawn(write(waiting, settings.writers as usize, database.clone(), relay.clone()));
        Self { queue, room: Arc::new(Semaphore::new(settings.queue as usize)) }
    }

    /// Places the order together with those of other calls, and answers once it is committed.
    ///
    /// From the moment its transaction has begun the order is placed whether or not the caller still waits.
    pub(crate) async fn place(&self, draft: Draft) -> Result<Order, CreateOrderError> {
        let room = self.room.clone().try_acquire_owned().map_err(|_| CreateOrderError::Overloaded)?;
        let (answer, answered) = oneshot::channel();
        // Did the task not live any more, the answer would say so.
        drop(self.queue.send(Call { draft, came: Instant::now(), _room: room, answer }));
        answered.await.unwrap_or_else(|_| Err(CreateOrderError::of_database(sqlx::Error::WorkerCrashed, 1)))
    }
}

/// Places group after group until nobody can bring an order any more.
async fn write(mut waiting: Waiting, writers: usize, database: Database, relay: Notifier) {
    let mut placing = FuturesUnordered::new();
    // Calls that are in the groups under way, and that are answered at this moment.
    let (mut under_way, mut answered) = (0, 0);
    let mut until = Instant::now();
    loop {
        // Before it is asked whether to go on: that the last who could bring orders is gone is heard only once.
        waiting.receive().now_or_never();
        if !waiting.can_go_on() {
            break;
        }
        let is_one_free = placing.len() < writers;
        if is_one_free && waiting.may_begin(placing.is_empty(), until) {
            if placing.is_empty() && waiting.group.len() < WORTH_A_GROUP {
                waiting.let_arrive().await;
                // Whoever of these calls again has arrived.
                answered = 0;
            }
            let group = waiting.take_half(under_way + answered);
            let calls = group.len();
            until = Instant::now() + patience(calls);
            placing.push(place_wanted(group, &database, &relay).map(move |()| (calls, until)));
            (under_way, answered) = (under_way + calls, 0);
            continue;
        }
        // Only now: what may begin begins, late or not, as after the process has stood still.
        waiting.refuse_late();
        let look_again = waiting.look_again(is_one_free.then_some(until)).map(sleep_until);
        answered = select! {
            () = waiting.receive() => 0,
            Some((calls, its_until)) = placing.next() => {
                // The last that began has ended: if others have not, nobody has to be patient with them twice.
                if its_until == until {
                    until = Instant::now();
                }
                calls
            }
            Some(()) = OptionFuture::from(look_again) => 0,
        };
        under_way -= answered;
    }
    while placing.next().await.is_some() {}
}

fn patience(calls: usize) -> Duration {
    PATIENCE + PATIENCE_PER_ORDER * u32::try_from(calls).unwrap_or(u32::MAX)
}

/// Calls whose orders are not on their way to the database yet.
struct Waiting {
    calls: mpsc::UnboundedReceiver<Call>,
    /// Whether anybody can bring an order yet.
    open: bool,
    /// Those that are received, in the order they came.
    group: Vec<Call>,
    /// How long they may wait for their turn.
    begin_limit: Duration,
}

impl Waiting {
    fn can_go_on(&self) -> bool {
        self.open || !self.group.is_empty()
    }

    /// Whether a group may begin: as the first one under way, or once the others have had the time `until` which they may take.
    fn may_begin(&self, as_first: bool, until: Instant) -> bool {
        !self.group.is_empty() && (as_first || Instant::now() >= until)
    }

    /// Receives what comes. Never ready while there is no room for it, or once nobody can bring an order any more.
    async fn receive(&mut self) {
        let room = GROUP_MAX - self.group.len();
        if room == 0 || !self.open {
            return pending().await;
        }
        self.open = self.calls.recv_many(&mut self.group, room).await > 0;
    }

    /// Receives also those that are on their way: what is ready to run, as a connection is that has calls to bring, is as a
    /// rule run before a task that yields. With nothing else to run this is a matter of microseconds.
    async fn let_arrive(&mut self) {
        let until = Instant::now() + GATHER_MAX;
        while self.group.len() < GROUP_MAX && Instant::now() < until {
            yield_now().await;
            if self.calls.is_empty() {
                break;
            }
            self.receive().await;
        }
    }

    /// Refuses those whose turn has not come in time.
    fn refuse_late(&mut self) {
        let now = Instant::now();
        let late = self.group.partition_point(|call| now.duration_since(call.came) >= self.begin_limit);
        let late = self.group.drain(..late).map(|call| call.answer);
        let refused: Vec<_> = late.filter(|answer| !answer.is_closed()).collect();
        if !refused.is_empty() {
            fail(refused, sqlx::Error::PoolTimedOut);
        }
    }

    /// When there is something to do if nothing happens: at `until`, or when the first has waited for too long.
    fn look_again(&self, until: Option<Instant>) -> Option<Instant> {
        let late = self.group.first()?.came + self.begin_limit;
        Some(until.map_or(late, |until| until.min(late)))
    }

    /// The next group: those who came first, of `elsewhere` more calls.
    fn take_half(&mut self, elsewhere: usize) -> Vec<Call> {
        let later = self.group.split_off(half(self.group.len(), elsewhere));
        mem::replace(&mut self.group, later)
    }
}

/// How many of those who wait are half of all calls, if half are worth a group.
fn half(waiting: usize, elsewhere: usize) -> usize {
    let half = (waiting + elsewhere).div_ceil(2);
    if half < WORTH_A_GROUP { waiting } else { waiting.min(half) }
}

/// Places the orders of those who still wait, and answers them.
async fn place_wanted(group: Vec<Call>, database: &Database, relay: &Notifier) {
    let wanted = group.into_iter().filter(|call| !call.answer.is_closed());
    let (drafts, answers): (Vec<_>, Vec<_>) = wanted.map(|call| (call.draft, call.answer)).unzip();
    if drafts.is_empty() {
        return;
    }
    let relay = relay.clone();
    let placed = database.run(|connection| Box::pin(place_group(connection, drafts, relay))).await;
    // Whoever does not wait for the answer any more learns it by repeating the call.
    match placed {
        Ok(orders) => answers.into_iter().zip(orders).for_each(|(answer, order)| drop(answer.send(order))),
        Err(cause) => fail(answers, cause),
    }
}

fn fail(answers: Vec<Answer>, cause: sqlx::Error) {
    let failed = CreateOrderError::of_database(cause, answers.len());
    answers.into_iter().for_each(|answer| drop(answer.send(Err(failed.clone()))));
}

async fn place_group(
    connection: &mut PgConnection,
    drafts: Vec<Draft>,
    relay: Notifier,
) -> Result<Vec<Result<Order, CreateOrderError>>, sqlx::Error> {
    let outcomes: Vec<_> = match create_orders(connection, &drafts).await {
        // One of them is at fault, and the others have to do without it. Nothing was written.
        Err(cause @ sqlx::Error::Database(_)) if drafts.len() > 1 && !may_pass(&cause) => {
            place_each_alone(connection, &drafts).await
        }
        outcomes => outcomes?,
    };
    if outcomes.iter().any(|outcome| matches!(outcome, Outcome::Placed(_))) {
        relay.notify();
    }
    let order = |(draft, outcome): (Draft, _)| match outcome {
        Outcome::Placed(created_at) => Ok(draft.placed_at(created_at)),
        Outcome::Found(order) => Ok(order),
        Outcome::RequestIdReused => Err(CreateOrderError::RequestIdReused),
        Outcome::Failed(cause) => Err(CreateOrderError::of_database(cause, 1)),
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

    use chassis::{Database, DatabaseSettings, DatabaseUrl};
    use outbox::Notifier;
    use testkit::TestDatabase;
    use tokio::{sync::mpsc, time::timeout};
    use tokio_util::sync::CancellationToken;

    use super::{Waiting, half, write};
    use crate::MIGRATORS;

    /// As they may be while the last of their orders is answered.
    #[tokio::test]
    async fn it_ends_if_all_who_could_bring_an_order_are_gone_before_it_looks() {
        let server = TestDatabase::create("orders_owner", &MIGRATORS).await;
        let url: DatabaseUrl = server.url_as("order_service").parse().unwrap();
        let settings = DatabaseSettings { database_connections: 1, database_acquire_ms: 1000, database_work_ms: 5000 };
        let shutdown = CancellationToken::new();
        let connected = Database::connect(&url, &settings, &MIGRATORS, &shutdown).await;
        let database = connected.unwrap().unwrap();
        let relay = Notifier::start(url.options(), outbox::CHANNEL);
        let (_, calls) = mpsc::unbounded_channel();
        let waiting = Waiting { calls, open: true, group: Vec::new(), begin_limit: Duration::from_secs(1) };
        timeout(Duration::from_secs(10), write(waiting, 1, database, relay)).await.unwrap();
    }

    #[test]
    fn few_calls_are_one_group() {
        for calls in 1..=30 {
            assert_eq!(half(calls, 0), calls);
        }
    }

    #[test]
    fn of_many_calls_half_are_a_group_wherever_the_others_are() {
        for (waiting, elsewhere, expected) in [(31, 0, 16), (64, 0, 32), (32, 32, 32), (48, 16, 32), (20, 44, 20)] {
            assert_eq!(half(waiting, elsewhere), expected, "{waiting} calls wait, {elsewhere} are elsewhere");
        }
    }
}
