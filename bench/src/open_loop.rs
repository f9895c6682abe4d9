//! Load for measuring latency: calls at a constant rate, however long the answers take.
//!
//! A thread says when each call is due, and its latency counts from then. So if the service stalls, the latencies of
//! all calls that become due meanwhile include the stall. Otherwise only the calls in flight would show it
//! ("coordinated omission"). At most [`AT_ONCE`] calls are in flight. Other calls that are due wait here, and their
//! latency counts. Calls that cannot be sent within [`GRACE`] after the end of the schedule are given up. The rate was
//! too high then, and the report says so.

use std::{
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use sqlx::PgConnection;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::timeout_at,
};
use uuid::Uuid;

use super::{
    quantiles::Latencies,
    requests::{Failures, Shape, connect, place},
};

/// The most calls in flight, as in part 1. An overloaded service refuses calls, rightly. This load measures how long
/// orders take, not when the service begins to refuse.
const AT_ONCE: u32 = 256;
/// How long calls may still be sent after the last one is due.
const GRACE: Duration = Duration::from_secs(1);

/// A constant rate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    /// Calls per second.
    pub(super) rate: u32,
    pub(super) time: Duration,
}

impl Schedule {
    fn calls(self) -> u32 {
        u32::try_from(u128::from(self.rate) * self.time.as_millis() / 1000).unwrap_or(u32::MAX)
    }

    /// When a call is due, counted from the beginning. So rounding errors do not add up.
    fn due(self, call: u32) -> Duration {
        Duration::from_secs_f64(f64::from(call) / f64::from(self.rate))
    }
}

/// Converts times of this process to the clock of the database, which commit timestamps use.
#[derive(Clone, Copy, Debug)]
pub(super) struct DatabaseClock {
    read_at: Instant,
    micros: i64,
}

impl DatabaseClock {
    /// Reads the clock a few times, and uses the fastest answer. The error is at most half the time that it took.
    pub(super) async fn read(connection: &mut PgConnection) -> Result<Self> {
        let mut best: Option<(Duration, Self)> = None;
        for _ in 0..20 {
            let asked = Instant::now();
            let micros = sqlx::query_scalar::<_, i64>(
                "-- bench: read clock
                SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
            )
            .fetch_one(&mut *connection)
            .await?;
            let took = asked.elapsed();
            if best.is_none_or(|(shortest, _)| took < shortest) {
                best = Some((took, Self { read_at: asked + took / 2, micros }));
            }
        }
        best.map(|(_, clock)| clock).ok_or_else(|| anyhow::anyhow!("the clock was not read"))
    }

    /// Microseconds since 1970.
    pub(super) fn at(self, instant: Instant) -> i64 {
        let after = instant.saturating_duration_since(self.read_at).as_micros();
        let before = self.read_at.saturating_duration_since(instant).as_micros();
        self.micros + i64::try_from(after).unwrap_or(i64::MAX) - i64::try_from(before).unwrap_or(i64::MAX)
    }
}

/// An acknowledged order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acknowledged {
    pub(super) order_id: Uuid,
    /// When its call was due.
    pub(super) due: Instant,
    pub(super) acknowledged: Instant,
}

/// The result of a schedule.
#[derive(Debug)]
pub(super) struct Offered {
    /// When the first call was due.
    pub(super) began: Instant,
    pub(super) orders: Vec<Acknowledged>,
    /// Calls that were due, and were given up.
    pub(super) unsent: u32,
    pub(super) failures: Failures,
}

impl Offered {
    /// Acknowledged orders per second, up to the last one.
    pub(super) fn achieved(&self, schedule: Schedule) -> f64 {
        let last = self.orders.iter().map(|order| order.acknowledged).max().unwrap_or(self.began);
        self.orders.len() as f64 / (last - self.began).max(schedule.time).as_secs_f64()
    }

    /// The times from due to acknowledged. For a call that was given up, the time to the end of the run, a lower bound.
    pub(super) fn acknowledgements(&self, schedule: Schedule) -> Latencies {
        let sent = self.orders.iter().map(|order| (order.acknowledged - order.due).as_secs_f64() * 1e3);
        let calls = schedule.calls();
        let end = schedule.time + GRACE;
        let unsent =
            (calls - self.unsent..calls).map(|call| end.saturating_sub(schedule.due(call)).as_secs_f64() * 1e3);
        Latencies::of(sent.chain(unsent).collect())
    }
}

/// Places orders when they are due.
pub(super) async fn offer(address: SocketAddr, schedule: Schedule, shape: Shape) -> Result<Offered> {
    let clients = connect(address, AT_ONCE)?;
    let began = Instant::now() + Duration::from_millis(20);
    let give_up = tokio::time::Instant::from_std(began + schedule.time + GRACE);
    let mut due = start_clock(schedule, began);
    let permits = Arc::new(Semaphore::new(usize::try_from(AT_ONCE)?));
    let mut calls = JoinSet::new();
    let mut clients = clients.iter().cycle();
    let mut sent = 0;
    let mut offered = Offered { began, orders: Vec::new(), unsent: 0, failures: Failures::default() };
    while let Some(due_at) = due.recv().await {
        let Ok(permit) = timeout_at(give_up, permits.clone().acquire_owned()).await else { break };
        let (permit, Some(mut client)) = (permit?, clients.next().cloned()) else { break };
        sent += 1;
        calls.spawn(async move {
            let placed = place(&mut client, shape).await;
            let acknowledged = Instant::now();
            drop(permit);
            let order_id = placed?.order_id.parse()?;
            Ok(Acknowledged { order_id, due: due_at, acknowledged })
        });
        while let Some(call) = calls.try_join_next() {
            offered.record(call?);
        }
    }
    while let Some(call) = calls.join_next().await {
        offered.record(call?);
    }
    offered.unsent = schedule.calls() - sent;
    Ok(offered)
}

impl Offered {
    fn record(&mut self, call: Result<Acknowledged>) {
        match call {
            Ok(order) => self.orders.push(order),
            Err(error) => self.failures.add(&error),
        }
    }
}

/// Uses a thread, because timers of the runtime are rounded to milliseconds.
pub(super) fn start_clock(schedule: Schedule, began: Instant) -> mpsc::UnboundedReceiver<Instant> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        for call in 0..schedule.calls() {
            let due = began + schedule.due(call);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if sender.send(due).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Acknowledged, Failures, Offered, Schedule};
    use crate::quantiles::P99;

    #[test]
    fn calls_are_due_at_a_constant_rate() {
        let schedule = Schedule { rate: 3000, time: Duration::from_secs(8) };
        assert_eq!(schedule.calls(), 24_000);
        assert_eq!(schedule.due(0), Duration::ZERO);
        assert_eq!(schedule.due(12_000), Duration::from_secs(4));
    }

    #[test]
    fn a_stall_counts_for_all_calls_that_become_due_meanwhile() {
        let schedule = Schedule { rate: 100, time: Duration::from_secs(1) };
        let began = Instant::now();
        // All were sent when the stall was over, a second after the first was due.
        let acknowledged = began + Duration::from_secs(1);
        let order = |call| Acknowledged { order_id: uuid::Uuid::nil(), due: began + schedule.due(call), acknowledged };
        let orders = (0..50).map(order).collect();
        let offered = Offered { began, orders, unsent: 50, failures: Failures::default() };
        assert_eq!(offered.achieved(schedule), 50.0);
        let latencies = offered.acknowledgements(schedule);
        assert_eq!(latencies.all().len(), 100);
        assert!((latencies.at(P99) - 1490.0).abs() < 1.0, "given up 2 s after the begin: {}", latencies.at(P99));
    }
}
