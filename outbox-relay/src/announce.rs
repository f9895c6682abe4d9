//! Announces the condition of this relay's routes in the database, where operators read it.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{live::RelayId, route::Route};

/// Writes the condition of each route, and how long this relay hides rows at most. Removes the rows of relays that have
/// not reported for a minute.
///
/// # Errors
/// Those of the database.
pub(crate) async fn announce(
    database: &Database,
    relay: &RelayId,
    routes: &[Route],
    longest_hidden: Duration,
) -> Result<(), sqlx::Error> {
    let (relay_id, holds_lock) = (relay.uuid(), relay.holds_lock());
    // Rounded up. The settings allow a day at most.
    let hidden_seconds = i32::try_from(longest_hidden.as_secs() + 1).unwrap_or(i32::MAX);
    let patterns: Vec<_> = routes.iter().map(|route| route.pattern().to_owned()).collect();
    let receivers: Vec<_> = routes.iter().map(|route| route.settings().receiver.to_string()).collect();
    let states: Vec<_> = routes.iter().map(|route| route.condition().as_str().to_owned()).collect();
    database
        .run(move |connection| {
            Box::pin(async move {
                upsert(connection, relay_id, holds_lock, hidden_seconds, &patterns, &receivers, &states).await?;
                sweep(connection).await
            })
        })
        .await
}

/// Removes this relay's rows, before it ends.
///
/// # Errors
/// Those of the database.
pub(crate) async fn withdraw(database: &Database, relay_id: Uuid) -> Result<(), sqlx::Error> {
    database.run(move |connection| Box::pin(delete(connection, relay_id))).await
}

async fn upsert(
    connection: &mut PgConnection,
    relay_id: Uuid,
    holds_lock: bool,
    hidden_seconds: i32,
    patterns: &[String],
    receivers: &[String],
    states: &[String],
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- relay: announce
        INSERT INTO outbox_routes (relay_id, route, receiver, state, holds_lock, hidden_seconds_max)
        SELECT $1::uuid, route, receiver, state, $5, $6
        FROM unnest($2::text[], $3::text[], $4::text[]) AS routes (route, receiver, state)
        ON CONFLICT (relay_id, route) DO UPDATE
        SET state = excluded.state,
            holds_lock = excluded.holds_lock,
            since = CASE WHEN outbox_routes.state = excluded.state THEN outbox_routes.since ELSE now() END,
            seen_at = now()",
        relay_id,
        patterns,
        receivers,
        states,
        holds_lock,
        hidden_seconds,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A time ahead comes from a clock that was set back. Its relay reports again within a second, if it still runs.
async fn sweep(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- relay: sweep routes
        DELETE FROM outbox_routes
        WHERE seen_at < now() - CASE WHEN holds_lock THEN interval '1 hour' ELSE interval '1 minute' END
           OR (seen_at > now() + interval '1 minute' AND NOT holds_lock)"
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn delete(connection: &mut PgConnection, relay_id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- relay: withdraw
        DELETE FROM outbox_routes WHERE relay_id = $1",
        relay_id
    )
    .execute(connection)
    .await?;
    Ok(())
}
