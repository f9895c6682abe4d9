//! Paces: how fast a route may deliver while its subscription is resumed slowly.
//!
//! An operator sets the pace of a subscription, and its relays share it equally. Each counts for itself, so nothing is
//! written for an event. A relay that comes or goes is counted a second later.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use chassis::Database;
use sqlx::PgConnection;
use tokio::time::Instant;

/// How much of a second may be delivered at once, after a time with less to deliver.
const BURST: f64 = 0.25;

/// The pace of a route in this process; without one, it delivers as fast as it can.
#[derive(Debug, Default)]
pub(crate) struct Pace(Mutex<Option<Bucket>>);

/// Events that may be leased now, and how fast they become more.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_second: f64,
    available: f64,
    at: Instant,
}

impl Bucket {
    fn filled(self, now: Instant) -> Self {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        let most = (self.per_second * BURST).max(1.0);
        Self { available: (self.available + since * self.per_second).min(most), at: now, ..self }
    }
}

impl Pace {
    /// Sets the pace, in events of a second, or ends it. A new pace begins with nothing to spend.
    pub(crate) fn set(&self, per_second: Option<f64>, now: Instant) {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *bucket = per_second.map(|per_second| {
            let available = bucket.map_or(0.0, |bucket| bucket.filled(now).available);
            Bucket { per_second, available, at: now }
        });
    }

    /// How many events of at most `limit` may be leased now. They count as delivered until they are given back.
    ///
    /// # Errors
    /// How long to wait until one may be.
    pub(crate) fn take(&self, limit: u32, now: Instant) -> Result<u32, Duration> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bucket) = held.as_mut() else { return Ok(limit) };
        *bucket = bucket.filled(now);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is neither negative nor large")]
        let whole = bucket.available.min(f64::from(limit)) as u32;
        if whole == 0 {
            return Err(Duration::from_secs_f64((1.0 - bucket.available) / bucket.per_second));
        }
        bucket.available -= f64::from(whole);
        Ok(whole)
    }

    /// Gives back what was taken and not leased.
    pub(crate) fn give_back(&self, events: u32) {
        if let Some(bucket) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            bucket.available += f64::from(events);
        }
    }
}

/// Reads the share of this relay for each of the subscriptions, in this order; `None` for those without a pace.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_shares(
    database: &Database,
    subscription_ids: Vec<i16>,
) -> Result<Vec<Option<f64>>, sqlx::Error> {
    database.run(move |connection| Box::pin(read(connection, subscription_ids))).await
}

async fn read(connection: &mut PgConnection, subscription_ids: Vec<i16>) -> Result<Vec<Option<f64>>, sqlx::Error> {
    // As few rows as there are subscriptions, once a second.
    let rows = sqlx::query!(
        r#"-- relay: read paces
        SELECT (
                SELECT min(pace.events_per_second) FROM outbox_paces AS pace
                WHERE pace.subscription_id IN (0, own.subscription_id)) AS events_per_second,
            (SELECT count(*) FROM outbox_routes AS route JOIN outbox_subscriptions AS named ON named.name = route.route
             WHERE named.subscription_id = own.subscription_id AND named.ended_at IS NULL
               AND route.seen_at > now() - interval '10 s') AS "relays!"
        FROM unnest($1::smallint[]) WITH ORDINALITY AS own (subscription_id, place)
        ORDER BY place"#,
        &subscription_ids,
    );
    let share = |per_second: i32, relays: i64| f64::from(per_second) / relays.max(1) as f64;
    let rows = rows.fetch_all(connection).await?;
    Ok(rows.into_iter().map(|row| row.events_per_second.map(|per_second| share(per_second, row.relays))).collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::Pace;

    #[test]
    fn a_route_without_a_pace_takes_whatever_it_asks_for() {
        let pace = Pace::default();
        assert_eq!(pace.take(500, Instant::now()), Ok(500));
    }

    #[test]
    fn a_route_takes_its_pace_and_no_more_whatever_it_asks_for() {
        let (pace, began) = (Pace::default(), Instant::now());
        pace.set(Some(100.0), began);
        let (mut now, mut taken) = (began, 0);
        assert_eq!(pace.take(500, now), Err(Duration::from_millis(10)));
        while now < began + Duration::from_secs(10) {
            match pace.take(7, now) {
                Ok(events) => taken += events,
                Err(wait) => now += wait + Duration::from_millis(1),
            }
        }
        assert!((900..=1000).contains(&taken), "{taken}");
        // After an hour without events it may deliver a quarter of a second's at once.
        assert_eq!(pace.take(500, now + Duration::from_secs(3600)), Ok(25));
    }

    #[test]
    fn what_was_not_leased_can_be_taken_again_and_a_slower_pace_holds_at_once() {
        let (pace, now) = (Pace::default(), Instant::now());
        pace.set(Some(100.0), now);
        let later = now + Duration::from_secs(1);
        assert_eq!(pace.take(500, later), Ok(25));
        pace.give_back(20);
        assert_eq!(pace.take(500, later), Ok(20));
        pace.set(Some(0.5), later);
        assert_eq!(pace.take(500, later + Duration::from_secs(1)), Err(Duration::from_secs(1)));
        assert_eq!(pace.take(500, later + Duration::from_secs(2)), Ok(1));
        pace.set(None, later);
        assert_eq!(pace.take(500, later), Ok(500));
    }
}
