//! Faults of callers: they hang up, they reuse a request id, or there are too many of them.

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::Result;
use proto::orders::v1::{CreateOrderRequest, Order};
use tokio::{task::JoinSet, time::sleep};

use super::{
    clients::{Client, HANG_UP_MAX, ending_of, limited, request},
    history::Ending,
    world::World,
};

/// How long a caller repeats its call.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
const HANG_UPS: u32 = 200;
const SAME: usize = 50;
/// Calls at once, far more than a service takes.
const OVERLOAD: usize = 1500;
const OVERLOAD_ATTEMPTS: u32 = 3;
const CALLS_PER_CONNECTION: usize = 150;

pub(super) fn client(world: &World, name: &str) -> Client {
    Client::new(name.into(), world)
}

/// Many callers hang up, each at a random moment of its call.
pub(super) async fn hang_up(world: &Arc<World>) -> bool {
    let mut callers = JoinSet::new();
    let hung_up = || world.history.known().hung_up;
    let (caller, before) = (client(world, "hang-up"), hung_up());
    for _ in 0..HANG_UPS {
        let mut caller = caller.clone();
        callers.spawn(async move {
            sleep(HANG_UP_MAX.mul_f64(fastrand::f64())).await;
            // Most of them hang up early, since most calls are short.
            let hang_up = HANG_UP_MAX.mul_f64(fastrand::f64().powi(2));
            caller.place(&request(), Duration::ZERO, Some(hang_up)).await
        });
    }
    callers.join_all().await;
    // The clients of the run hang up as well, but rarely.
    hung_up() - before > u64::from(HANG_UPS / 10)
}

/// Many calls at once with the same request id must all be answered with the same order. A call with that id and
/// another customer must be refused.
pub(super) async fn same_request(world: &Arc<World>) -> Result<bool> {
    let content = request();
    let mut callers = JoinSet::new();
    for number in 0..SAME {
        let (mut caller, content) = (client(world, &format!("same-{number}")), content.clone());
        callers.spawn(async move { caller.place(&content, PATIENCE, None).await });
    }
    let placed: Vec<Order> = callers.join_all().await.into_iter().flatten().collect();
    let ids: HashSet<&str> = placed.iter().map(|order| order.order_id.as_str()).collect();
    if ids.len() > 1 {
        world.history.violation(format!("request {} was answered with {} orders", content.request_id, ids.len()));
    }
    if placed.is_empty() {
        return Ok(false);
    }
    let other = CreateOrderRequest { customer_id: "somebody-else".into(), ..content };
    match world.target.orders()?.create_order(limited(other.clone())).await {
        Ok(order) => {
            let order_id = &order.get_ref().order_id;
            world.history.violation(format!("request {} was used again, for order {order_id}", other.request_id));
            Ok(true)
        }
        Err(status) => Ok(placed.len() > SAME / 2 && ending_of(&status) == Ending::Fail),
    }
}

/// More calls at once than a service takes. It must refuse some of them at once, and lose none.
pub(super) async fn overload(world: &Arc<World>) -> bool {
    let refused = || world.history.known().codes.get("ResourceExhausted").copied().unwrap_or_default();
    let before = refused();
    for _ in 0..OVERLOAD_ATTEMPTS {
        let mut callers = JoinSet::new();
        let mut caller = client(world, "overload");
        for number in 0..OVERLOAD {
            if number % CALLS_PER_CONNECTION == 0 {
                caller = client(world, "overload");
            }
            let mut caller = caller.clone();
            callers.spawn(async move { caller.place(&request(), Duration::ZERO, None).await });
        }
        callers.join_all().await;
        if refused() > before {
            return true;
        }
    }
    false
}
