//! A receiver that is away delays no other one: each subscription has a queue of its own.
//!
//! Shortly before the load ends, a proxy answers for loyalty-service that it is away. Events pile up for it. All other
//! events must be delivered meanwhile, and those once it is back.

use std::time::{Duration, Instant};

use anyhow::Result;
use sqlx::PgConnection;
use tokio::time::sleep;

use super::{
    inflict::set_stand_in,
    poison::UNHEARD,
    site::Part,
    stand_in::{Answer, StandIn},
    world::World,
};

const AWAY: Part = Part::Loyalty;
/// How long it is away before the load ends: time for some hundred events.
const UNDER_LOAD: Duration = Duration::from_secs(2);

/// Sends the receiver away while clients still place orders.
pub(super) async fn send_away(world: &World) {
    set_stand_in(world, AWAY, Some(StandIn { answer: Answer::Page(503), describes: false }));
    sleep(UNDER_LOAD).await;
}

/// Events that are to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) for_it: i64,
    pub(super) for_others: i64,
}

/// Waits until the others have their events, or for `limit`. Then the receiver is back. Returns what was left before.
pub(super) async fn drain_apart(
    world: &World,
    orders: &mut PgConnection,
    inventory: &mut PgConnection,
    limit: Duration,
) -> Result<Waiting> {
    let began = Instant::now();
    let left = loop {
        // Inventory commits a reply before its event is deleted, so none is missed between the two reads.
        let (of_orders, of_inventory) = (count_waiting(orders).await?, count_waiting(inventory).await?);
        let for_others = of_orders.for_others + of_inventory.for_others;
        if for_others == 0 || began.elapsed() > limit {
            break Waiting { for_others, ..of_orders };
        }
        sleep(Duration::from_millis(50)).await;
    };
    set_stand_in(world, AWAY, None);
    Ok(left)
}

/// Counts neither dead events nor those that wait because nobody knows their type.
async fn count_waiting(connection: &mut PgConnection) -> Result<Waiting> {
    let (for_it, for_others) = sqlx::query_as(
        "-- chaos: count waiting apart
        SELECT count(*) FILTER (WHERE name = $1), count(*) FILTER (WHERE name IS DISTINCT FROM $1)
        FROM outbox LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE visible_at < 'infinity' AND event_type <> $2",
    )
    .bind(AWAY.database())
    .bind(UNHEARD)
    .fetch_one(connection)
    .await?;
    Ok(Waiting { for_it, for_others })
}
