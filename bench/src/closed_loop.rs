//! Load for measuring throughput: each caller waits for an answer before its next call.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use proto::orders::v1::order_service_client::OrderServiceClient;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::{
    quantiles::Latencies,
    requests::{Failures, Shape, connect, place},
};

/// Callers that place a backlog.
const FILLERS: u32 = 128;

/// How many calls at once, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) at_once: u32,
    /// Answers within this time do not count.
    pub(super) warm_up: Duration,
    pub(super) time: Duration,
    pub(super) shape: Shape,
}

#[derive(Debug, Default)]
pub(super) struct Answered {
    /// Answers per second, within the time that counts.
    pub(super) rate: f64,
    pub(super) latencies: Latencies,
    /// All acknowledged orders, also outside that time.
    pub(super) acknowledged: u64,
    pub(super) failures: Failures,
}

/// Calls `CreateOrder` and checks every answer.
pub(super) async fn call(address: SocketAddr, load: Load) -> Result<Answered> {
    call_by(&connect(address, load.at_once)?, load).await
}

/// The same by these clients.
pub(super) async fn call_by(clients: &[OrderServiceClient<Channel>], load: Load) -> Result<Answered> {
    let begin = Instant::now() + load.warm_up;
    let mut callers = JoinSet::new();
    for client in clients.iter().cycle().zip(0..load.at_once).map(|(client, _)| client.clone()) {
        callers.spawn(call_until(client, load.shape, begin, begin + load.time));
    }
    let (mut latencies, mut acknowledged, mut failures) = (Vec::new(), 0, Failures::default());
    while let Some(caller) = callers.join_next().await {
        let (counted, answered, failed) = caller?;
        latencies.extend(counted);
        acknowledged += answered;
        failures.merge(failed);
    }
    let rate = latencies.len() as f64 / load.time.as_secs_f64();
    Ok(Answered { rate, latencies: Latencies::of(latencies), acknowledged, failures })
}

/// One caller. An answer after `end` does not count, since the other callers may have stopped already.
async fn call_until(
    mut client: OrderServiceClient<Channel>,
    shape: Shape,
    begin: Instant,
    end: Instant,
) -> (Vec<f64>, u64, Failures) {
    let (mut latencies, mut acknowledged, mut failures) = (Vec::new(), 0, Failures::default());
    loop {
        let called = Instant::now();
        if called >= end {
            return (latencies, acknowledged, failures);
        }
        let placed = place(&mut client, shape).await;
        let answered = Instant::now();
        match placed {
            Ok(_) => {
                acknowledged += 1;
                if answered >= begin && answered < end {
                    latencies.push((answered - called).as_secs_f64() * 1e3);
                }
            }
            Err(error) => failures.add(&error),
        }
    }
}

/// Places that many orders, as fast as the service accepts them.
///
/// # Errors
/// If an order is not accepted: the backlog would have another size.
pub(super) async fn fill(address: SocketAddr, orders: u64, shape: Shape) -> Result<()> {
    let left = Arc::new(AtomicU64::new(orders));
    let mut callers = JoinSet::new();
    let clients = connect(address, FILLERS)?;
    for mut client in clients.iter().cycle().zip(0..FILLERS).map(|(client, _)| client.clone()) {
        let left = left.clone();
        callers.spawn(async move {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                place(&mut client, shape).await?;
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller??;
    }
    ensure!(left.load(Ordering::Relaxed) == 0, "not all orders were placed");
    Ok(())
}
