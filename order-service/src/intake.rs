//! Group commit: calls that come at the same time place their orders in one transaction, each as if it were alone.

use std::{slice, sync::Arc, time::Duration};

use chassis::{Database, begins_within, may_pass};
use clap::Args;
use outbox::Notifier;
use proto::orders::v1::Order;
use sqlx::PgConnection;
use tokio::{
    sync::{
        Mutex,
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    task::yield_now,
    time::{Instant, timeout},
};
use tracing::error;

use crate::create_order::{Draft, Outcome, create_orders};

/// Orders in one transaction at most: it bounds how long the first of them waits for the last, and 512 of the smallest
/// are past the size at which a larger group is any faster.
const GROUP_MAX: usize = 512;

/// How long a writer is the only one. A second one at once makes groups smaller, and each order dearer; none at all would
/// let one slow transaction, or one connection that is gone without a word, keep everybody waiting.
const ALONE_MAX: Duration = Duration::from_millis(5);
/// How long a group waits for what is on its way: where the processor is so busy that each look finds somebody, the first
/// of them is not to wait until the group is full.
const GATHER_MAX: Duration = Duration::from_millis(1);

/// How orders are taken in.
#[derive(Args, Clone, Debug)]
pub struct IntakeSettings {
    /// Transactions at most that place orders at once. The next begins when one has taken 5 ms; calls that come meanwhile
    /// share it.
    #[arg(long, env = "ORDER_SERVICE_WRITERS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub writers: u32,
    /// Orders that wait to be placed at most; what comes then is refused with a hint to retry.
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

/// Where calls bring their orders, to be placed by the writers behind it. The writers end with the last clone.
///
/// A lone order waits for nobody, and groups grow by themselves as far as the load asks for it: a writer begins when it has
/// committed what came before. It first lets arrive what is ready to, or the first call after a commit would be a group by
/// itself, with the others, who were answered at the same moment, a little behind it; and the next writer begins only when
/// this one takes long. (See the table in ARCHITECTURE.md.)
#[derive(Clone, Debug)]
pub(crate) struct Intake {
    queue: mpsc::Sender<Call>,
    begin_limit: Duration,
}

#[derive(Debug)]
struct Call {
    draft: Draft,
    /// Tells the caller that its order is on its way to the database. A caller who is gone, or has waited for too long,
    /// does not hear it any more, and then nothing is begun.
    begin: oneshot::Sender<()>,
    answer: oneshot::Sender<Result<Order, CreateOrderError>>,
}

impl Intake {
    /// Starts the writers; `relay` is told of new events. An order whose turn has not come within `begin_limit` is refused.
    pub(crate) fn start(
        database: &Database,
        settings: &IntakeSettings,
        relay: &Notifier,
        begin_limit: Duration,
    ) -> Self {
        let (queue, calls) = mpsc::channel(settings.queue as usize);
        let calls = Arc::new(Mutex::new(calls));
        for _ in 0..settings.writers {
            tokio::spawn(write(calls.clone(), database.clone(), relay.clone()));
        }
        Self { queue, begin_limit }
    }

    /// Places the order together with those of other calls, and answers once it is committed.
    ///
    /// From the moment its transaction has begun the order is placed whether or not the caller still waits.
    pub(crate) async fn place(&self, draft: Draft) -> Result<Order, CreateOrderError> {
        let (begin, begun) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        self.queue.try_send(Call { draft, begin, answer }).map_err(|refused| match refused {
            TrySendError::Full(_) => CreateOrderError::Overloaded,
            TrySendError::Closed(_) => CreateOrderError::of_database(sqlx::Error::WorkerCrashed, 1),
        })?;
        if !begins_within(self.begin_limit, begun).await {
            return Err(CreateOrderError::of_database(sqlx::Error::PoolTimedOut, 1));
        }
        answered.await.unwrap_or_else(|_| Err(CreateOrderError::of_database(sqlx::Error::WorkerCrashed, 1)))
    }
}

/// Places group after group until nobody can bring an order any more.
async fn write(calls: Arc<Mutex<mpsc::Receiver<Call>>>, database: Database, relay: Notifier) {
    loop {
        // The other writers wait for the lock meanwhile: each order goes to one of them.
        let mut calls = calls.lock().await;
        let group = gather(&mut calls).await;
        if group.is_empty() {
            return;
        }
        let placing = place_wanted(group, &database, &relay);
        tokio::pin!(placing);
        if timeout(ALONE_MAX, &mut placing).await.is_err() {
            drop(calls);
            placing.await;
        }
    }
}

/// Waits for a call, and lets others that are on their way arrive as well: what is ready to run, as a connection is that has
/// calls to bring, is as a rule run before a task that yields. With nothing else to run this is a matter of microseconds.
/// Empty when nobody can bring an order any more.
async fn gather(calls: &mut mpsc::Receiver<Call>) -> Vec<Call> {
    let mut group = Vec::new();
    calls.recv_many(&mut group, GROUP_MAX).await;
    let until = Instant::now() + GATHER_MAX;
    while !group.is_empty() && group.len() < GROUP_MAX && Instant::now() < until {
        yield_now().await;
        if calls.is_empty() {
            break;
        }
        let room = GROUP_MAX - group.len();
        calls.recv_many(&mut group, room).await;
    }
    group
}

/// Places the orders of those who still wait, and answers them.
async fn place_wanted(group: Vec<Call>, database: &Database, relay: &Notifier) {
    let wanted = group.into_iter().filter_map(|call| call.begin.send(()).is_ok().then_some((call.draft, call.answer)));
    let (drafts, answers): (Vec<_>, Vec<_>) = wanted.unzip();
    if drafts.is_empty() {
        return;
    }
    let relay = relay.clone();
    let placed = database.run(|connection| Box::pin(place_group(connection, drafts, relay))).await;
    // Whoever does not wait for the answer any more learns it by repeating the call.
    match placed {
        Ok(orders) => answers.into_iter().zip(orders).for_each(|(answer, order)| drop(answer.send(order))),
        Err(cause) => {
            let failed = CreateOrderError::of_database(cause, answers.len());
            answers.into_iter().for_each(|answer| drop(answer.send(Err(failed.clone()))));
        }
    }
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
