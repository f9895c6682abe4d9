//! Group commit: calls that come at the same time place their orders in one transaction, each as if it were alone.

use std::{future::pending, mem, slice, sync::Arc, time::Duration};

use chassis::{Database, begins_within, may_pass};
use clap::Args;
use futures_util::{
    future::FutureExt,
    stream::{FuturesUnordered, StreamExt},
};
use outbox::Notifier;
use proto::orders::v1::Order;
use sqlx::PgConnection;
use tokio::{
    select,
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    task::yield_now,
    time::{Instant, sleep_until},
};
use tracing::error;

use crate::create_order::{Draft, Outcome, create_orders};

/// Orders in one transaction at most: it bounds how long the first of them waits for the last, and 512 of the smallest
/// are past the size at which a larger group is any faster.
const GROUP_MAX: usize = 512;

/// Calls that have to wait, at the least, for a transaction to begin beside another. A transaction costs as much as 16 orders
/// do in one that begins anyway, so smaller ones make each order dearer.
const WORTH_ANOTHER: usize = 32;
/// How long fewer calls wait for the transactions that are under way: one that is slow, or a connection that is gone without
/// a word, is not to keep everybody waiting. (As many as there are writers do, until the database's work is given up.)
const PATIENCE: Duration = Duration::from_millis(5);
/// How long a group waits for what is on its way: where the processor is so busy that each look finds somebody, the first
/// of them is not to wait until the group is full.
const GATHER_MAX: Duration = Duration::from_millis(1);

/// How orders are taken in.
#[derive(Args, Clone, Debug)]
pub struct IntakeSettings {
    /// Transactions at most that place orders at once. Calls share one as far as they wait; another begins beside those under
    /// way once as many wait as these hold on average, and at least 32, or 5 ms after the last.
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

/// Where calls bring their orders, to be placed by the task behind it, which ends with the last clone.
///
/// Groups grow by themselves as far as the load asks for it: a transaction begins when none is under way, with what waits,
/// so an order that is alone waits for nobody. It first lets arrive what is ready to, or the first call after a commit would
/// be a group by itself, with the others, who were answered at the same moment, a little behind it. Another begins beside it
/// when as many wait as are in it, if they are worth it: were it for fewer, groups would become smaller and smaller. (See the
/// tables in ARCHITECTURE.md.)
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
    /// Starts the task; `relay` is told of new events. An order whose turn has not come within `begin_limit` is refused.
    pub(crate) fn start(
        database: &Database,
        settings: &IntakeSettings,
        relay: &Notifier,
        begin_limit: Duration,
    ) -> Self {
        let (queue, calls) = mpsc::channel(settings.queue as usize);
        let waiting = Waiting { calls, open: true, group: Vec::new() };
        tokio::spawn(write(waiting, settings.writers as usize, database.clone(), relay.clone()));
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
async fn write(mut waiting: Waiting, writers: usize, database: Database, relay: Notifier) {
    let mut placing = FuturesUnordered::new();
    // Calls in the groups that are under way.
    let mut under_way = 0;
    let mut until = Instant::now();
    while waiting.can_go_on() {
        let is_one_free = placing.len() < writers;
        let worth = WORTH_ANOTHER.max(under_way / placing.len().max(1));
        if is_one_free && waiting.may_begin(placing.is_empty(), worth, until) {
            if placing.is_empty() {
                waiting.let_arrive().await;
            }
            let group = waiting.take_share(writers - placing.len(), worth);
            let calls = group.len();
            placing.push(place_wanted(group, &database, &relay).map(move |()| calls));
            under_way += calls;
            until = Instant::now() + PATIENCE;
            continue;
        }
        select! {
            // What is not received yet waits in the queue, which is bounded.
            () = waiting.receive(), if is_one_free => {}
            Some(ended) = placing.next() => under_way -= ended,
            () = sleep_until(until), if is_one_free && !waiting.group.is_empty() => {}
        }
    }
    while placing.next().await.is_some() {}
}

/// Calls whose orders are not on their way to the database yet.
struct Waiting {
    calls: mpsc::Receiver<Call>,
    /// Whether anybody can bring an order yet.
    open: bool,
    /// Those that are received, in the order they came.
    group: Vec<Call>,
}

impl Waiting {
    fn can_go_on(&self) -> bool {
        self.open || !self.group.is_empty()
    }

    /// Whether a group may begin: as the first one under way; or beside others, when at least `worth` calls wait, or once the
    /// others have had the time `until` which they may take to end.
    fn may_begin(&self, as_first: bool, worth: usize, until: Instant) -> bool {
        let waiting = self.group.len();
        waiting > 0 && (as_first || waiting >= worth || Instant::now() >= until)
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

    /// The next group: those who came first, but a share for each writer that is free, if each is `worth` a group. Else all of a
    /// burst's orders would be written one after the other by a single process of PostgreSQL.
    fn take_share(&mut self, free: usize, worth: usize) -> Vec<Call> {
        let later = self.group.split_off(share(self.group.len(), free, worth));
        mem::replace(&mut self.group, later)
    }
}

/// Rounded down: what is left is then worth a group as large as this one.
fn share(waiting: usize, free: usize, worth: usize) -> usize {
    waiting / (waiting / worth).clamp(1, free)
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

#[cfg(test)]
mod tests {
    use super::{GROUP_MAX, WORTH_ANOTHER, share};

    #[test]
    fn what_waits_is_shared_unless_groups_become_small() {
        for (waiting, free, expected) in [(1, 4, 1), (63, 4, 63), (64, 4, 32), (65, 4, 32), (200, 4, 50), (200, 1, 200)]
        {
            assert_eq!(share(waiting, free, WORTH_ANOTHER), expected, "{waiting} calls, {free} writers");
        }
    }

    #[test]
    fn beside_large_groups_no_small_ones_begin() {
        assert_eq!(share(130, 3, 128), 130);
        assert_eq!(share(256, 3, 128), 128);
    }

    #[test]
    fn every_writer_gets_a_share_of_a_burst() {
        for (waiting, writers) in
            (2..=8).flat_map(|writers| (WORTH_ANOTHER * writers..=GROUP_MAX).map(move |calls| (calls, writers)))
        {
            let (mut left, mut worth) = (waiting, WORTH_ANOTHER);
            for begun in 1..=writers {
                assert!(left >= worth, "{waiting} calls, {writers} writers: group {begun} waits, of {left}");
                left -= share(left, writers + 1 - begun, worth);
                worth = WORTH_ANOTHER.max((waiting - left) / begun);
            }
            assert_eq!(left, 0, "{waiting} calls, {writers} writers");
        }
    }
}
