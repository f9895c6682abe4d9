//! Orders that are placed all the time, until told to stop.

use std::{
    collections::HashSet,
    fmt, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proto::orders::v1::{GetOrderRequest, OrderStatus, order_service_client::OrderServiceClient};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{
    stress::{place_order, request},
    target::Target,
};

/// For how long a call is repeated. Longer than a service takes to be replaced.
const RETRY_FOR: Duration = Duration::from_secs(10);
/// Within which a new order is confirmed.
const CONFIRM_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// How many orders to place.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Calls at the same time
    #[arg(long, short = 'c', default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    concurrency: u32,
    /// Orders per second, if the calls are answered fast enough
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
}

pub(super) struct Load {
    target: Target,
    pace: Pace,
    callers: JoinSet<Result<()>>,
    stop: CancellationToken,
    placed: Arc<Mutex<Placed>>,
}

/// What was acknowledged since the load began.
#[derive(Default)]
pub(super) struct Placed {
    pub(super) order_ids: HashSet<String>,
    /// The order that was acknowledged last.
    last: String,
    /// Orders whose call had to be repeated.
    pub(super) repeated: u32,
    pub(super) slowest: Duration,
    /// Of the orders since they were last taken.
    latencies: Vec<Duration>,
}

/// The orders of a step.
pub(super) struct Taken(Vec<Duration>);

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(latencies) = self;
        let at = |hundredths: usize| latencies.get(latencies.len() * hundredths / 100).copied().unwrap_or_default();
        let slowest = latencies.last().copied().unwrap_or_default();
        write!(f, "{:>6} orders, p50 {:.1?}, p99 {:.1?}, slowest {slowest:.1?}", latencies.len(), at(50), at(99))
    }
}

impl Load {
    pub(super) fn start(target: &Target, pace: Pace) -> Result<Self> {
        let Pace { concurrency, rate } = pace;
        let (stop, placed) = (CancellationToken::new(), Arc::new(Mutex::new(Placed::default())));
        let mut callers = JoinSet::new();
        for _ in 0..concurrency {
            let every = Duration::from_secs(concurrency.into()) / rate;
            callers.spawn(call(target.orders()?, every, stop.clone(), placed.clone()));
        }
        Ok(Self { target: target.clone(), pace, callers, stop, placed })
    }

    /// Returns when the orders of a second have been placed since, and more than are in flight.
    pub(super) async fn goes_on(&mut self) -> Result<()> {
        let count = |load: &Self| lock(&load.placed).order_ids.len();
        let wanted = count(self) + self.pace.rate.max(2 * self.pace.concurrency) as usize;
        while count(self) < wanted {
            if let Some(ended) = self.callers.try_join_next() {
                ended?.context("a call failed")?;
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Returns when an order that was placed since is confirmed, so every process has done its part.
    pub(super) async fn gets_through(&mut self) -> Result<()> {
        self.goes_on().await?;
        let order_id = lock(&self.placed).last.clone();
        let mut client = self.target.orders()?;
        let confirmed = async {
            loop {
                let order = client.get_order(GetOrderRequest { order_id: order_id.clone() }).await;
                if order.is_ok_and(|order| order.get_ref().status() == OrderStatus::Confirmed) {
                    return;
                }
                sleep(POLL).await;
            }
        };
        timeout(CONFIRM_LIMIT, confirmed)
            .await
            .with_context(|| format!("order {order_id} was not confirmed within {CONFIRM_LIMIT:?}"))
    }

    /// The orders since they were last taken.
    pub(super) fn take(&self) -> Taken {
        let mut latencies = mem::take(&mut lock(&self.placed).latencies);
        latencies.sort_unstable();
        Taken(latencies)
    }

    /// All orders that were acknowledged. Each call in flight is answered first.
    pub(super) async fn stop(mut self) -> Result<Placed> {
        self.stop.cancel();
        while let Some(ended) = self.callers.join_next().await {
            ended?.context("a call failed")?;
        }
        Ok(mem::take(&mut *lock(&self.placed)))
    }
}

/// One caller.
async fn call(
    mut client: OrderServiceClient<Channel>,
    every: Duration,
    stop: CancellationToken,
    placed: Arc<Mutex<Placed>>,
) -> Result<()> {
    let mut next = interval(every);
    next.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 0.. {
        next.tick().await;
        if stop.is_cancelled() {
            break;
        }
        let began = Instant::now();
        let (order, retries) = place_order(&mut client, &request(number), RETRY_FOR).await?;
        let took = began.elapsed();
        let mut placed = lock(&placed);
        ensure!(placed.order_ids.insert(order.order_id.clone()), "two requests have the same order {}", order.order_id);
        placed.last = order.order_id;
        placed.repeated += u32::from(retries > 0);
        placed.slowest = placed.slowest.max(took);
        placed.latencies.push(took);
    }
    Ok(())
}

fn lock(placed: &Mutex<Placed>) -> MutexGuard<'_, Placed> {
    placed.lock().unwrap_or_else(PoisonError::into_inner)
}
