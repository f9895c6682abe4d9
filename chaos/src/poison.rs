//! Events that cannot be applied, or that crash their receiver.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use prost::{Message, Name};
use proto::{
    inventory::v1::StockReserved,
    orders::v1::{CreateOrderRequest, OrderCreated},
};
use rustix::process::Signal;
use tokio::time::sleep;
use uuid::Uuid;

use super::{
    callers::{PATIENCE, client},
    clients::request,
    faults::Poison,
    site::{Part, Route},
    trap::{Hold, Trap, TrapGuard},
    wire::Mark,
    world::World,
};

/// A type of events that no receiver knows.
pub(super) const UNHEARD: &str = "orders.v1.Unheard";
/// How long the relays may take to dead-letter an event that crashes its receiver.
const DEADLY_LIMIT: Duration = Duration::from_secs(110);
/// Longer than any fault keeps a database down.
const ENQUEUE_LIMIT: Duration = Duration::from_secs(100);

/// Enqueues an event that nobody can apply, as a service with a bug would. It must become a dead letter, or wait if
/// its type is unknown, and no other event may.
pub(super) async fn poison(world: &Arc<World>, poison: Poison) -> Result<bool> {
    if poison == Poison::Deadly {
        return crash_until_dead(world).await;
    }
    let aggregate = Uuid::now_v7();
    let of_orders: (Part, &[Part]) = (Part::Orders, &[Part::Inventory, Part::Loyalty]);
    let ((part, receivers), event_type, payload) = match poison {
        Poison::Undecodable => (of_orders, OrderCreated::full_name(), vec![0xff; 64]),
        Poison::UnknownType => (of_orders, UNHEARD.into(), Vec::new()),
        _ => {
            let reserved = StockReserved { order_id: aggregate.into() };
            let of_inventory: (Part, &[Part]) = (Part::Inventory, &[Part::Orders]);
            (of_inventory, StockReserved::full_name(), reserved.encode_to_vec())
        }
    };
    let event_id = Uuid::now_v7();
    let began = Instant::now();
    loop {
        let enqueued = enqueue(world, part, aggregate, event_id, &event_type, &payload).await;
        // After a failure nobody knows whether the event was committed. If it was, it must become a dead letter.
        if enqueued.is_ok() || began.elapsed() > ENQUEUE_LIMIT {
            world.poison(aggregate, receivers);
            return enqueued.map(|()| true);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

async fn enqueue(
    world: &World,
    part: Part,
    aggregate: Uuid,
    event_id: Uuid,
    event_type: &str,
    payload: &[u8],
) -> Result<()> {
    sqlx::query(
        "-- chaos: enqueue poison
        SELECT outbox_enqueue(ARRAY[$1], ARRAY[1], ARRAY[$2], ARRAY[$3], ARRAY[$4], ARRAY[NULL], ARRAY[NULL])
        WHERE NOT EXISTS (SELECT FROM outbox WHERE aggregate_id = $1)",
    )
    .bind(aggregate)
    .bind(event_id)
    .bind(event_type)
    .bind(payload)
    .execute(&mut world.site.connect(part).await?)
    .await?;
    Ok(())
}

/// One event crashes the receiver a few times, and is then applied. No other event may suffer from it.
pub(super) async fn crash_on_event(world: &Arc<World>, receiver: Part, times: u32) -> Result<bool> {
    let (customer, kills) = (format!("deadly-{}", Uuid::new_v4()), Count::default());
    let _guards = kill_on_events_of(world, receiver, &customer, times, &kills);
    let placed = place_for(world, customer).await;
    let began = Instant::now();
    while placed.is_some() && kills.get() < times && began.elapsed() < PATIENCE {
        sleep(Duration::from_millis(50)).await;
    }
    Ok(kills.get() >= times)
}

/// One event crashes inventory-service every time, until the relays have found it and made it a dead letter.
async fn crash_until_dead(world: &Arc<World>) -> Result<bool> {
    let (customer, kills) = (format!("deadly-{}", Uuid::new_v4()), Count::default());
    let _guards = kill_on_events_of(world, Part::Inventory, &customer, u32::MAX, &kills);
    let Some(order_id) = place_for(world, customer).await else { return Ok(false) };
    let began = Instant::now();
    while began.elapsed() < DEADLY_LIMIT {
        // If the database is down, the next look finds it.
        if is_dead(world, order_id).await.unwrap_or(false) {
            world.poison(order_id, &[Part::Inventory]);
            return Ok(true);
        }
        sleep(Duration::from_millis(200)).await;
    }
    world.history.violation(format!(
        "an event that has killed its receiver {} times is not dead after {DEADLY_LIMIT:?}: order {order_id}",
        kills.get()
    ));
    Ok(false)
}

/// Sets traps between the relays and a receiver. They kill it when it is sent an event of the customer, at most `times`
/// times.
fn kill_on_events_of(world: &World, receiver: Part, customer: &str, times: u32, kills: &Count) -> Vec<TrapGuard> {
    let set = |route| {
        let (seen, counted) = (kills.clone(), kills.clone());
        let (customer, receiver) = (customer.to_owned(), world.site.unit(receiver).clone());
        world.site.to_receiver(route).set_trap(Trap {
            at: Box::new(move |mark| {
                let names = |message: &[u8]| message.windows(customer.len()).any(|part| part == customer.as_bytes());
                seen.get() < times && matches!(mark, Mark::Request(message) if names(message))
            }),
            hold: Hold::Keep,
            action: Box::new(move || {
                counted.add();
                receiver.signal(Signal::KILL);
            }),
            times: u32::MAX,
            sprung: None,
        })
    };
    Route::to(receiver).map(set).collect()
}

async fn place_for(world: &World, customer: String) -> Option<Uuid> {
    let order = CreateOrderRequest { customer_id: customer, ..request() };
    client(world, "deadly").place(&order, PATIENCE, None).await?.order_id.parse().ok()
}

async fn is_dead(world: &World, order_id: Uuid) -> Result<bool> {
    let dead = sqlx::query_scalar(
        "-- chaos: is dead
        SELECT EXISTS (SELECT FROM outbox WHERE aggregate_id = $1 AND visible_at = 'infinity')",
    );
    Ok(dead.bind(order_id).fetch_one(&mut world.site.connect(Part::Orders).await?).await?)
}

/// A counter that traps share.
#[derive(Clone, Debug, Default)]
struct Count(Arc<AtomicU32>);

impl Count {
    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
