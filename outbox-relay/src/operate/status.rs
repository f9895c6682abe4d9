//! Reads the status of an outbox: its events, its rates, and the routes of its relays.

use std::time::Duration;

use proto::relay::v1::{FailureCount, OutboxStatus, RelayRoute, TypeCount};
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{pause::read_pauses, slow_down::read_paces};
use crate::subscription::read_subscriptions;

/// Time between the two readings of a rate.
pub(crate) const SAMPLE: Duration = Duration::from_secs(1);

/// Counts of all events ever inserted and deleted, from the server's statistics.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Totals {
    inserted: i64,
    deleted: i64,
    /// Time of the reading, by the server's clock.
    at: OffsetDateTime,
}

/// Reads the statistics of the table.
///
/// They count events that came and went between two readings, at no cost. A counter of our own would mean one more row
/// to write for every event. A session reports its share about once a second, when a transaction ends; an idle session
/// reports the rest after some seconds. So a rate over one second jumps, and a rate over ten does not. Inserts that
/// were rolled back are counted. Deletes are only events that were delivered or discarded.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_totals(connection: &mut PgConnection) -> Result<Totals, sqlx::Error> {
    sqlx::query_as!(
        Totals,
        r#"-- operate: read totals
        SELECT pg_stat_get_tuples_inserted('outbox'::regclass) AS "inserted!",
            pg_stat_get_tuples_deleted('outbox'::regclass) AS "deleted!",
            clock_timestamp() AS "at!""#
    )
    .fetch_one(connection)
    .await
}

impl Totals {
    /// Inserted and deleted events per second. If the statistics were reset in between, both are zero.
    fn rates_since(&self, earlier: &Self) -> (f64, f64) {
        let seconds = (self.at - earlier.at).as_seconds_f64().max(0.001);
        let rate = |later: i64, earlier: i64| (later - earlier).max(0) as f64 / seconds;
        (rate(self.inserted, earlier.inserted), rate(self.deleted, earlier.deleted))
    }
}

/// Reads the status, with rates since the `earlier` totals. Also returns the new totals.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_status(
    connection: &mut PgConnection,
    earlier: &Totals,
) -> Result<(OutboxStatus, Totals), sqlx::Error> {
    let totals = read_totals(connection).await?;
    let (in_per_second, out_per_second) = totals.rates_since(earlier);
    let time = Some(outbox::timestamp(totals.at));
    let backlogs = read_backlogs(connection).await?;
    let status = OutboxStatus {
        time,
        in_per_second,
        out_per_second,
        held_back: count_held_back(connection).await?,
        failing: count_failures(connection).await?,
        routes: read_routes(connection).await?,
        ..backlogs
    };
    Ok((status, totals))
}

/// Reads the part of a status that is about subscriptions: the numbers of their events, and the pauses.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_backlogs(connection: &mut PgConnection) -> Result<OutboxStatus, sqlx::Error> {
    let subscriptions = read_subscriptions(connection).await?.into_iter().map(Into::into).collect();
    let mut status = OutboxStatus { subscriptions, ..OutboxStatus::default() };
    count_events(connection, &mut status).await?;
    for (name, pace) in read_paces(connection).await? {
        match status.subscriptions.iter_mut().find(|of| of.name == name) {
            Some(of) => of.pace = Some(pace),
            None => status.pace = Some(pace),
        }
    }
    for pause in read_pauses(connection).await? {
        match status.subscriptions.iter_mut().find(|of| of.name == pause.subscription) {
            Some(of) => of.pause = Some(pause),
            None => status.pause = Some(pause),
        }
    }
    Ok(status)
}

/// One scan of the table, however many events there are. An event that is neither dead nor leased nor backing off is
/// waiting. That includes parked events: they are not visible, but have not failed, since none is delivered before its
/// predecessors.
async fn count_events(connection: &mut PgConnection, status: &mut OutboxStatus) -> Result<(), sqlx::Error> {
    let rows = sqlx::query!(
        r#"-- operate: count events
        SELECT event_type, coalesce(name, '') AS "subscription!", count(*) AS "events!",
            count(*) FILTER (WHERE visible_at = 'infinity') AS "dead!",
            count(*) FILTER (WHERE visible_at > now() AND lease_token IS NOT NULL) AS "leased!",
            count(*) FILTER (
                WHERE visible_at > now() AND visible_at < 'infinity' AND lease_token IS NULL
                  AND (failures > 0 OR attempts > attempts_before_requeue)
            ) AS "backing_off!",
            extract(epoch FROM now() - min(outbox.created_at) FILTER (WHERE visible_at < 'infinity'))::double precision
                AS oldest_seconds
        FROM outbox LEFT JOIN outbox_subscriptions USING (subscription_id)
        GROUP BY event_type, subscription_id, name
        ORDER BY event_type"#
    )
    .fetch_all(connection)
    .await?;
    for row in rows {
        let waiting = row.events - row.dead - row.leased - row.backing_off;
        status.waiting += waiting;
        status.leased += row.leased;
        status.backing_off += row.backing_off;
        status.dead += row.dead;
        status.oldest_seconds = older(status.oldest_seconds, row.oldest_seconds);
        if status.types.last().is_none_or(|of| of.r#type != row.event_type) {
            status.types.push(TypeCount { r#type: row.event_type, ..TypeCount::default() });
        }
        if let Some(of) = status.types.last_mut() {
            of.waiting += waiting;
            of.leased += row.leased;
            of.backing_off += row.backing_off;
            of.dead += row.dead;
        }
        if row.subscription.is_empty() {
            status.unrouted += row.events;
        } else if let Some(of) = status.subscriptions.iter_mut().find(|of| of.name == row.subscription) {
            of.waiting += waiting;
            of.leased += row.leased;
            of.backing_off += row.backing_off;
            of.dead += row.dead;
            of.oldest_seconds = older(of.oldest_seconds, row.oldest_seconds);
        }
    }
    Ok(())
}

fn older(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    one.into_iter().chain(other).reduce(f64::max)
}

/// An event that fails may be visible, leased or backing off at the moment. Reasons that begin with the same code count
/// as one, since many name ids.
async fn count_failures(connection: &mut PgConnection) -> Result<Vec<FailureCount>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"-- operate: count failures
        SELECT event_type, coalesce(name, '') AS "subscription!", coalesce(min(last_error), '') AS "reason!",
            count(*) AS "events!", sum(failures) AS "failures!"
        FROM outbox LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE (failures > 0 OR (attempts = 0 AND last_error IS NOT NULL)) AND visible_at < 'infinity'
        GROUP BY event_type, name, split_part(last_error, ':', 1)
        ORDER BY count(*) DESC, event_type, name, min(last_error)
        LIMIT 10"#
    )
    .fetch_all(connection)
    .await?;
    let counts = rows.into_iter().map(|row| FailureCount {
        r#type: row.event_type,
        reason: row.reason,
        events: row.events,
        failures: row.failures,
        subscription: row.subscription,
    });
    Ok(counts.collect())
}

async fn count_held_back(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: count held back
        SELECT count(*) AS "count!"
        FROM outbox AS dead JOIN outbox AS later USING (aggregate_id, subscription_id)
        WHERE dead.visible_at = 'infinity' AND later.sequence > dead.sequence"#
    )
    .fetch_one(connection)
    .await
}

/// Relays report every second. One that has not reported for ten seconds is taken for gone.
pub(super) async fn read_routes(connection: &mut PgConnection) -> Result<Vec<RelayRoute>, sqlx::Error> {
    let rows = sqlx::query!(
        "-- operate: read routes
        SELECT relay_id, route, receiver, state, since, reason, delivered
        FROM outbox_routes
        WHERE seen_at > now() - interval '10 s'
        ORDER BY route, relay_id"
    )
    .fetch_all(connection)
    .await?;
    let routes = rows.into_iter().map(|row| RelayRoute {
        relay_id: row.relay_id.to_string(),
        route: row.route,
        receiver: row.receiver,
        state: row.state,
        state_time: Some(outbox::timestamp(row.since)),
        reason: row.reason,
        delivered: row.delivered,
    });
    Ok(routes.collect())
}
