//! Announces the condition of this relay's routes in the database, where operators read it.

use std::time::Duration;

use chassis::Database;
use sqlx::{Connection, PgConnection, types::time::OffsetDateTime};
use uuid::Uuid;

use crate::{
    live::{RelayId, SILENT_AFTER, is_dead},
    route::{Condition, Route, RouteSettings},
};

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
    paces_read_at: Option<OffsetDateTime>,
) -> Result<(), sqlx::Error> {
    let (relay_id, holds_lock) = (relay.uuid(), relay.holds_lock());
    let hidden_seconds = whole_seconds(longest_hidden);
    let subscriptions: Vec<_> = routes.iter().map(|route| route.name().to_owned()).collect();
    let receivers: Vec<_> = routes.iter().map(|route| route.settings().receiver.to_string()).collect();
    let states: Vec<_> = routes.iter().map(|route| route.condition().as_str().to_owned()).collect();
    // Reasons come from receivers, and text in Postgres has no NUL.
    let reasons: Vec<_> = routes.iter().map(|route| route.reason().replace('\0', "")).collect();
    let delivered: Vec<_> = routes.iter().map(|route| i64::try_from(route.delivered()).unwrap_or(i64::MAX)).collect();
    let seconds = |age: Duration| i32::try_from(age.as_secs()).unwrap_or(i32::MAX);
    let max_ages: Vec<_> = routes.iter().map(|route| route.max_age().map(seconds)).collect();
    database
        .run(move |connection| {
            Box::pin(async move {
                let told = Told {
                    subscriptions: &subscriptions,
                    receivers: &receivers,
                    states: &states,
                    reasons: &reasons,
                    delivered: &delivered,
                    paces_read_at,
                };
                upsert(connection, relay_id, holds_lock, hidden_seconds, told).await?;
                tell_ages(connection, &subscriptions, &max_ages).await?;
                sweep(connection).await
            })
        })
        .await
}

/// Rounded up. The settings allow a day at most.
fn whole_seconds(longest_hidden: Duration) -> i32 {
    i32::try_from(longest_hidden.as_secs() + 1).unwrap_or(i32::MAX)
}

/// Another relay that delivers one of the same subscriptions to another receiver.
#[derive(Debug)]
pub(crate) struct OtherReceiver {
    pub(crate) relay_id: Uuid,
    pub(crate) subscription: String,
    pub(crate) receiver: String,
    /// Its lock is free, and it reported just now: it has just started or died, or the database has restarted.
    pub(crate) may_be_dead: bool,
}

/// Announces this relay's routes for the first time, unless a relay that lives delivers one of these subscriptions to
/// another receiver. Two receivers of one subscription would share its events, and neither would get all of them.
///
/// # Errors
/// Those of the database.
pub(crate) async fn claim(
    connection: &mut PgConnection,
    relay_id: Uuid,
    routes: &[RouteSettings],
    longest_hidden: Duration,
) -> Result<Option<OtherReceiver>, sqlx::Error> {
    let subscriptions: Vec<_> = routes.iter().map(|route| route.subscription.clone()).collect();
    let receivers: Vec<_> = routes.iter().map(|route| route.receiver.to_string()).collect();
    let states = vec![Condition::Starting.as_str().to_owned(); routes.len()];
    let mut tx = connection.begin().await?;
    lock_claims(&mut tx).await?;
    for other in find_others(&mut tx, relay_id, &subscriptions, &receivers).await? {
        let is_dead = other.holds_lock && is_dead(&mut tx, other.relay_id).await?;
        if !is_dead || !other.silent {
            // Gives up the locks at once: one may be that of a relay that comes back.
            tx.rollback().await?;
            let OtherRow { relay_id, subscription, receiver, .. } = other;
            return Ok(Some(OtherReceiver {
                relay_id,
                subscription,
                receiver,
                may_be_dead: is_dead || !other.holds_lock,
            }));
        }
    }
    let (reasons, delivered) = (vec![String::new(); routes.len()], vec![0; routes.len()]);
    let told = Told {
        subscriptions: &subscriptions,
        receivers: &receivers,
        states: &states,
        reasons: &reasons,
        delivered: &delivered,
        paces_read_at: None,
    };
    upsert(&mut tx, relay_id, false, whole_seconds(longest_hidden), told).await?;
    tx.commit().await?;
    Ok(None)
}

struct OtherRow {
    relay_id: Uuid,
    subscription: String,
    receiver: String,
    holds_lock: bool,
    silent: bool,
}

/// Only one relay looks and announces at a time. Otherwise two that start together would not see each other.
async fn lock_claims(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- relay: claim one at a time
        SELECT pg_advisory_xact_lock('outbox_routes'::regclass::oid::bigint)"
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Relays report every second. A relay without a lock is taken for gone after ten. One that holds its lock lives, however
/// busy it is, and one whose lock is free is taken for dead once it is silent, as by those who free its rows.
async fn find_others(
    connection: &mut PgConnection,
    relay_id: Uuid,
    subscriptions: &[String],
    receivers: &[String],
) -> Result<Vec<OtherRow>, sqlx::Error> {
    sqlx::query_as!(
        OtherRow,
        r#"-- relay: find other receivers
        SELECT other.relay_id, other.route AS subscription, other.receiver, other.holds_lock,
            other.seen_at < now() - make_interval(secs => $4) AS "silent!"
        FROM outbox_routes AS other
        JOIN unnest($2::text[], $3::text[]) AS own (subscription, receiver)
            ON own.subscription = other.route AND own.receiver <> other.receiver
        WHERE other.relay_id <> $1 AND (other.holds_lock OR other.seen_at > now() - interval '10 s')
        ORDER BY other.seen_at DESC"#,
        relay_id,
        subscriptions,
        receivers,
        SILENT_AFTER.as_secs_f64(),
    )
    .fetch_all(connection)
    .await
}

/// Removes this relay's row of a route that has ended, or all of its rows before it ends itself.
///
/// # Errors
/// Those of the database.
pub(crate) async fn withdraw(database: &Database, relay_id: Uuid, route: Option<String>) -> Result<(), sqlx::Error> {
    database.run(move |connection| Box::pin(delete(connection, relay_id, route))).await
}

/// What a relay tells of its routes, an element of each for a route.
#[derive(Clone, Copy)]
struct Told<'r> {
    subscriptions: &'r [String],
    receivers: &'r [String],
    states: &'r [String],
    reasons: &'r [String],
    delivered: &'r [i64],
    paces_read_at: Option<OffsetDateTime>,
}

async fn upsert(
    connection: &mut PgConnection,
    relay_id: Uuid,
    holds_lock: bool,
    hidden_seconds: i32,
    told: Told<'_>,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- relay: announce
        INSERT INTO outbox_routes (relay_id, route, receiver, state, reason, delivered, paces_read_at, holds_lock, hidden_seconds_max)
        SELECT $1::uuid, route, receiver, state, reason, delivered, $9, $5, $6
        FROM unnest($2::text[], $3::text[], $4::text[], $7::text[], $8::bigint[])
            AS routes (route, receiver, state, reason, delivered)
        ON CONFLICT (relay_id, route) DO UPDATE
        SET state = excluded.state,
            reason = excluded.reason,
            delivered = excluded.delivered,
            paces_read_at = excluded.paces_read_at,
            holds_lock = excluded.holds_lock,
            since = CASE WHEN outbox_routes.state = excluded.state THEN outbox_routes.since ELSE now() END,
            seen_at = now()",
        relay_id,
        told.subscriptions,
        told.receivers,
        told.states,
        holds_lock,
        hidden_seconds,
        told.reasons,
        told.delivered,
        told.paces_read_at,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// How old an event may be, for the operators who requeue it. Receivers say so rarely something else, so this finds
/// nothing to write as a rule.
async fn tell_ages(
    connection: &mut PgConnection,
    subscriptions: &[String],
    max_ages: &[Option<i32>],
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- relay: tell ages
        UPDATE outbox_subscriptions AS told
        SET max_age_seconds = route.max_age
        FROM unnest($1::text[], $2::integer[]) AS route (subscription, max_age)
        WHERE told.name = route.subscription AND told.ended_at IS NULL
          AND route.max_age IS NOT NULL AND told.max_age_seconds IS DISTINCT FROM route.max_age",
        subscriptions,
        max_ages as &[Option<i32>],
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

async fn delete(connection: &mut PgConnection, relay_id: Uuid, route: Option<String>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "-- relay: withdraw
        DELETE FROM outbox_routes WHERE relay_id = $1 AND ($2::text IS NULL OR route = $2)",
        relay_id,
        route,
    )
    .execute(connection)
    .await?;
    Ok(())
}
