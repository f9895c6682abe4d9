//! What runs while the faults strike: callers that place orders, and a bare INSERT loop beside them.
//!
//! All of them do the same: one statement or call after the other, each repeated until it is acknowledged. So the times
//! between their acknowledgements can be compared.

use std::{
    collections::{BTreeMap, HashMap},
    error::Error,
    ops::Range,
    str::FromStr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use proto::orders::v1::{CreateOrderRequest, Order, order_service_client::OrderServiceClient};
use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use testkit::postgres::Server;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{Code, Request, Status, transport::Channel};

use super::{outage::longest_gap, until};
use crate::{
    stress::{check_reply, request},
    target::Target,
};

const CALLERS: u32 = 8;
/// The deadline of a call.
const CALL_LIMIT: Duration = Duration::from_secs(2);
/// How long the bare loop waits for a connection or a statement. It is short, to come near to the cluster's own outage.
const INSERT_LIMIT: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(50);
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long after a failover each caller must have had an answer.
const ANSWERED_LIMIT: Duration = Duration::from_secs(120);

/// The running load. Dropping it ends it at once.
#[derive(Debug)]
pub(super) struct Load {
    record: Arc<Record>,
    callers: JoinSet<()>,
    inserts: JoinSet<()>,
}

/// What callers and the bare loop have seen.
#[derive(Debug)]
struct Record {
    began: Instant,
    stopped: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// When each caller's calls were acknowledged.
    calls: Vec<Vec<Duration>>,
    /// When the bare loop's rows were. Each has the number of its place here.
    inserts: Vec<Duration>,
    /// Order ids by request id.
    orders: HashMap<String, String>,
    /// Calls that were not acknowledged, by code and message.
    failures: BTreeMap<String, u64>,
    wrong: Vec<String>,
}

/// What the load knows at its end.
#[derive(Debug)]
pub(super) struct Known {
    /// Order ids by request id.
    pub(super) orders: HashMap<String, String>,
    /// Rows of the bare loop.
    pub(super) inserts: usize,
    /// Calls that were not acknowledged, by code and message.
    pub(super) failures: BTreeMap<String, u64>,
    /// Answers that are wrong in themselves.
    pub(super) wrong: Vec<String>,
}

impl Load {
    /// Starts the callers of a system, and the bare loop against its server.
    pub(super) async fn start(target: &Target, server: &Server) -> Result<Self> {
        let mut connection = server.connect().await?;
        sqlx::query("CREATE TABLE failover_rows (number bigint PRIMARY KEY)").execute(&mut connection).await?;
        let seen = Seen { calls: vec![Vec::new(); CALLERS as usize], ..Seen::default() };
        let record = Record { began: Instant::now(), stopped: AtomicBool::new(false), seen: Mutex::new(seen) };
        let record = Arc::new(record);
        let mut callers = JoinSet::new();
        for caller in 0..CALLERS {
            callers.spawn(place_orders(target.orders()?, caller, record.clone()));
        }
        let mut inserts = JoinSet::new();
        inserts.spawn(insert_rows(PgConnectOptions::from_str(server.url())?, record.clone()));
        Ok(Self { record, callers, inserts })
    }

    /// The time since the load began.
    pub(super) fn now(&self) -> Duration {
        self.record.began.elapsed()
    }

    /// Waits until the bare loop has inserted another row. Returns when that was.
    pub(super) async fn wait_for_insert(&self) -> Result<Duration> {
        let asked = self.now();
        let last = || self.record.seen().inserts.last().copied().unwrap_or_default();
        until(ANSWERED_LIMIT, "the bare loop writes again", async || last() > asked).await?;
        Ok(last())
    }

    /// Waits until each caller has had another answer.
    pub(super) async fn wait_for_callers(&self) -> Result<()> {
        let asked = self.now();
        let all_after = || self.record.seen().calls.iter().all(|calls| calls.last().is_some_and(|at| *at > asked));
        until(ANSWERED_LIMIT, "each caller has an answer", async || all_after()).await
    }

    /// The longest outage for the bare loop, and for the caller that waited longest.
    pub(super) fn outage(&self, window: &Range<Duration>) -> (Duration, Duration) {
        let seen = self.record.seen();
        let callers = seen.calls.iter().map(|calls| longest_gap(calls, window));
        (longest_gap(&seen.inserts, window), callers.max().unwrap_or_default())
    }

    /// Ends the load. Each caller still repeats its last call until it is acknowledged.
    pub(super) async fn finish(mut self) -> Known {
        self.record.stopped.store(true, Ordering::Relaxed);
        let ended = timeout(ANSWERED_LIMIT, async {
            while self.callers.join_next().await.is_some() {}
            while self.inserts.join_next().await.is_some() {}
        });
        let in_time = ended.await.is_ok();
        let seen = &mut *self.record.seen();
        if !in_time {
            seen.wrong.push(format!("a caller still had no answer {ANSWERED_LIMIT:?} after the last fault"));
        }
        Known {
            orders: std::mem::take(&mut seen.orders),
            inserts: seen.inserts.len(),
            failures: std::mem::take(&mut seen.failures),
            wrong: std::mem::take(&mut seen.wrong),
        }
    }
}

impl Record {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn acknowledge(&self, caller: u32, request: &CreateOrderRequest, order: &Order) {
        let mut seen = self.seen();
        seen.calls[caller as usize].push(self.began.elapsed());
        if let Err(error) = check_reply(request, order) {
            seen.wrong.push(format!("{error:#}"));
        }
        seen.orders.insert(request.request_id.clone(), order.order_id.clone());
    }

    fn fail(&self, status: &Status) {
        *self.seen().failures.entry(format!("{:?}: {}", status.code(), status.message())).or_default() += 1;
    }
}

/// One caller.
async fn place_orders(mut client: OrderServiceClient<Channel>, caller: u32, record: Arc<Record>) {
    for number in (caller..).step_by(CALLERS as usize) {
        if record.is_stopped() {
            return;
        }
        let content = request(number);
        while let Err(status) = place_order(&mut client, &content).await.map(|order| {
            record.acknowledge(caller, &content, &order);
        }) {
            record.fail(&status);
            if is_refusal(&status) {
                record.seen().wrong.push(format!("a valid order was refused: {status}"));
                return;
            }
            sleep(RETRY_PAUSE).await;
        }
        sleep(PAUSE).await;
    }
}

async fn place_order(client: &mut OrderServiceClient<Channel>, content: &CreateOrderRequest) -> Result<Order, Status> {
    let mut request = Request::new(content.clone());
    request.set_timeout(CALL_LIMIT);
    client.create_order(request).await.map(tonic::Response::into_inner)
}

/// Whether the service says that it will never place this order. A status with a source comes from a broken connection.
fn is_refusal(status: &Status) -> bool {
    let refused = [Code::InvalidArgument, Code::FailedPrecondition, Code::AlreadyExists, Code::NotFound];
    status.source().is_none() && refused.contains(&status.code())
}

/// The bare loop: a plain connection, made anew at once whenever it fails.
async fn insert_rows(options: PgConnectOptions, record: Arc<Record>) {
    let mut connection = None;
    while !record.is_stopped() {
        let number = i64::try_from(record.seen().inserts.len()).unwrap_or(i64::MAX);
        match insert_row(connection.take(), &options, number).await {
            Some(kept) => {
                connection = Some(kept);
                let mut seen = record.seen();
                seen.inserts.push(record.began.elapsed());
            }
            None => sleep(RETRY_PAUSE).await,
        }
        sleep(PAUSE).await;
    }
}

/// Returns the connection if the row is there, and committed. A row that is there already is written again: only a
/// commit that writes waits for the standby.
async fn insert_row(connection: Option<PgConnection>, options: &PgConnectOptions, number: i64) -> Option<PgConnection> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => timeout(INSERT_LIMIT, options.connect()).await.ok()?.ok()?,
    };
    let inserting = sqlx::query(
        "-- failover: insert a row
        INSERT INTO failover_rows VALUES ($1) ON CONFLICT (number) DO UPDATE SET number = excluded.number",
    );
    let inserted = timeout(INSERT_LIMIT, inserting.bind(number).execute(&mut connection)).await;
    matches!(inserted, Ok(Ok(_))).then_some(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_services_own_refusal_ends_an_order() {
        assert!(is_refusal(&Status::invalid_argument("a field")));
        assert!(!is_refusal(&Status::unavailable("the database")));
        let mut broken = Status::invalid_argument("a stream that broke");
        broken.set_source(Arc::new(std::io::Error::other("reset")));
        assert!(!is_refusal(&broken));
    }
}
