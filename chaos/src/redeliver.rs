//! Deliveries of events that were applied long ago.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use proto::events::v1::{DeliverRequest, Event, Outcome, event_receiver_client::EventReceiverClient};
use tokio::time::sleep;
use tonic::transport::Endpoint;
use uuid::Uuid;

use super::{clients::limited, site::Part, world::World};
use chassis::connect_lazily;
use harness::replay::event_again;

/// How long the inbox may take to prune an old event.
const PRUNE_LIMIT: Duration = Duration::from_secs(20);
/// Events delivered again.
const AGAIN: i64 = 20;

/// Delivers the events of old orders again, one of them after the inbox has pruned it. None may be applied.
pub(super) async fn deliver_again(world: &Arc<World>) -> Result<bool> {
    let mut events = read_delivered(world).await?;
    let Some(forgotten) = events.pop() else { return Ok(false) };
    let mut suppressed = true;
    for receiver in [Part::Inventory, Part::Loyalty] {
        suppressed &= deliver_to(world, receiver, &events).await?;
    }
    let pruned = deliver_pruned(world, forgotten).await?;
    Ok(suppressed && pruned)
}

/// Returns whether any event was answered as a duplicate.
async fn deliver_to(world: &Arc<World>, receiver: Part, events: &[Event]) -> Result<bool> {
    let (again, of) = (outcomes(world, receiver, events.to_vec()).await?, receiver.name());
    for (Event { id, subject, .. }, (outcome, reason)) in events.iter().zip(&again) {
        match outcome {
            Outcome::Applied => {
                world.history.violation(format!("DOUBLED: {of} has applied event {id} of order {subject} again"));
            }
            Outcome::Rejected => {
                world
                    .history
                    .violation(format!("{of} has rejected event {id} of order {subject}, applied long ago: {reason}"));
            }
            _ => {}
        }
    }
    Ok(again.iter().any(|(outcome, _)| *outcome == Outcome::Duplicate))
}

/// Makes the event look old, waits until the service prunes it from its inbox, and delivers it again.
async fn deliver_pruned(world: &Arc<World>, mut event: Event) -> Result<bool> {
    let id: Uuid = event.id.parse()?;
    let mut inventory = world.site.connect(Part::Inventory).await?;
    world.forgotten.lock().unwrap_or_else(PoisonError::into_inner).push(id);
    sqlx::query(
        "-- chaos: age processed message
        UPDATE processed_messages SET processed_at = now() - interval '9 days' WHERE message_id = $1",
    )
    .bind(id)
    .execute(&mut inventory)
    .await?;
    let began = Instant::now();
    let on_record = "-- chaos: is on record
        SELECT EXISTS (SELECT FROM processed_messages WHERE message_id = $1)";
    while sqlx::query_scalar(on_record).bind(id).fetch_one(&mut inventory).await? {
        if began.elapsed() > PRUNE_LIMIT {
            return Ok(false);
        }
        sleep(Duration::from_millis(100)).await;
    }
    if let Some(time) = &mut event.time {
        time.seconds -= 9 * 24 * 3600;
    }
    let answers = outcomes(world, Part::Inventory, vec![event.clone()]).await?;
    let Some((outcome, reason)) = answers.first() else { return Ok(false) };
    if *outcome == Outcome::Applied {
        world.history.violation(format!("DOUBLED: event {} was applied again after it was forgotten", event.id));
    }
    Ok(*outcome == Outcome::Rejected && reason == "STALE")
}

async fn outcomes(world: &World, receiver: Part, events: Vec<Event>) -> Result<Vec<(Outcome, String)>> {
    let relay = world.site.tls_of(Part::OrdersRelay1.identity())?;
    let endpoint = Endpoint::from(world.site.events_url_of(receiver)?);
    let mut client = EventReceiverClient::new(connect_lazily(&endpoint, &relay));
    let answer = client.deliver(limited(DeliverRequest { events })).await?.into_inner();
    Ok(answer.results.into_iter().map(|result| (result.outcome(), result.reason)).collect())
}

/// Reads events that were applied some seconds ago, as a relay has delivered them.
async fn read_delivered(world: &World) -> Result<Vec<Event>> {
    let order_ids: Vec<Uuid> = sqlx::query_scalar(
        "-- chaos: choose delivered
        SELECT order_id FROM orders
        WHERE created_at < now() - interval '6 s' AND NOT EXISTS (SELECT FROM outbox WHERE aggregate_id = order_id)
        ORDER BY order_id DESC LIMIT $1",
    )
    .bind(AGAIN)
    .fetch_all(&mut world.site.connect(Part::Orders).await?)
    .await?;
    let effects: Vec<(Uuid, Uuid)> = sqlx::query_as(
        "-- chaos: find their events
        SELECT order_id, event_id FROM reservations WHERE order_id = ANY ($1) AND event_id IS NOT NULL",
    )
    .bind(order_ids)
    .fetch_all(&mut world.site.connect(Part::Inventory).await?)
    .await?;
    let mut events = Vec::with_capacity(effects.len());
    for (order_id, event_id) in effects {
        events.push(event_again(&world.target, &order_id.to_string(), event_id).await?);
    }
    Ok(events)
}
