//! Paces: how fast a route may deliver while its subscription is resumed slowly.
//!
//! An operator sets the pace of a subscription, and the relays whose routes are open share it equally. Each counts for itself,
//! so nothing is written for an event. A relay that is killed is counted for ten seconds more.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use chassis::Database;
use sqlx::{PgConnection, types::time::OffsetDateTime};
use tokio::time::Instant;
use uuid::Uuid;

/// How much of a second may be delivered at once, after a time with less to deliver.
const BURST: f64 = 0.25;
/// A lease waits for so much of a second. Otherwise each event would have a lease and a call of its own.
const BATCH: f64 = 0.1;
/// How long to wait until the pace is known.
const UNKNOWN_PAUSE: Duration = Duration::from_millis(20);

/// The pace of a route in this process.
#[derive(Debug, Default)]
pub(crate) struct Pace(Mutex<State>);

#[derive(Clone, Copy, Debug, Default)]
enum State {
    /// The relay has not read it yet. Until then it delivers nothing, or each start would be a burst.
    #[default]
    Unknown,
    Unlimited,
    Limited(Bucket),
}

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
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let available = match *state {
            State::Limited(bucket) => bucket.filled(now).available,
            State::Unknown | State::Unlimited => 0.0,
        };
        *state = match per_second {
            Some(per_second) => State::Limited(Bucket { per_second, available, at: now }),
            None => State::Unlimited,
        };
    }

    /// How many events of at most `limit` may be leased now. They count as delivered until they are given back.
    ///
    /// # Errors
    /// How long to wait until there are enough for a lease.
    pub(crate) fn take(&self, limit: u32, now: Instant) -> Result<u32, Duration> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = match &mut *state {
            State::Unknown => return Err(UNKNOWN_PAUSE),
            State::Unlimited => return Ok(limit),
            State::Limited(bucket) => bucket,
        };
        *bucket = bucket.filled(now);
        let enough = (bucket.per_second * BATCH).min(f64::from(limit)).floor().max(1.0);
        if bucket.available < enough {
            return Err(Duration::from_secs_f64((enough - bucket.available) / bucket.per_second));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is neither negative nor large")]
        let whole = bucket.available.min(f64::from(limit)) as u32;
        bucket.available -= f64::from(whole);
        Ok(whole)
    }

    /// Gives back what was taken and not leased.
    pub(crate) fn give_back(&self, events: u32) {
        if let State::Limited(bucket) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            bucket.available += f64::from(events);
        }
    }
}

/// The shares of a relay, as they were at a time of the database.
#[derive(Debug)]
pub(crate) struct Shares {
    /// In the order of the subscriptions; `None` for those without a pace.
    pub(crate) per_second: Vec<Option<f64>>,
    pub(crate) read_at: OffsetDateTime,
}

/// Reads the share of this relay for each of the subscriptions.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_shares(
    database: &Database,
    relay_id: Uuid,
    subscription_ids: Vec<i16>,
) -> Result<Shares, sqlx::Error> {
    database.run(move |connection| Box::pin(read(connection, relay_id, subscription_ids))).await
}

async fn read(
    connection: &mut PgConnection,
    relay_id: Uuid,
    subscription_ids: Vec<i16>,
) -> Result<Shares, sqlx::Error> {
    // As few rows as there are subscriptions, once a second.
    let rows = sqlx::query!(
        r#"-- relay: read paces
        SELECT (
                SELECT min(pace.events_per_second) FROM outbox_paces AS pace
                WHERE pace.subscription_id IN (0, own.subscription_id)) AS events_per_second,
            (SELECT count(*) FROM outbox_routes AS route JOIN outbox_subscriptions AS named ON named.name = route.route
             WHERE named.subscription_id = own.subscription_id AND named.ended_at IS NULL
               AND route.seen_at > now() - interval '10 s'
               AND route.state = 'OPEN' AND route.relay_id <> $2) AS "others!",
            now() AS "now!"
        FROM unnest($1::smallint[]) WITH ORDINALITY AS own (subscription_id, place)
        ORDER BY place"#,
        &subscription_ids,
        relay_id,
    );
    let rows = rows.fetch_all(connection).await?;
    let read_at = rows.first().map_or(OffsetDateTime::UNIX_EPOCH, |row| row.now);
    let share = |per_second: i32, others: i64| f64::from(per_second) / (others + 1) as f64;
    let per_second = rows.into_iter().map(|row| Some(share(row.events_per_second?, row.others))).collect();
    Ok(Shares { per_second, read_at })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::Pace;

    #[test]
    fn a_route_delivers_nothing_until_its_pace_is_known_and_then_what_it_asks_for_if_there_is_none() {
        let (pace, now) = (Pace::default(), Instant::now());
        pace.take(500, now).unwrap_err();
        pace.set(None, now);
        assert_eq!(pace.take(500, now), Ok(500));
    }

    #[test]
    fn a_route_takes_its_pace_and_no_more_in_leases_that_are_worth_it() {
        let (pace, began) = (Pace::default(), Instant::now());
        pace.set(Some(100.0), began);
        let (mut now, mut taken, mut leases) = (began, 0, 0);
        assert_eq!(pace.take(500, now), Err(Duration::from_millis(100)));
        while now < began + Duration::from_secs(10) {
            match pace.take(500, now) {
                Ok(events) => (taken, leases) = (taken + events, leases + 1),
                Err(wait) => now += wait + Duration::from_millis(1),
            }
        }
        assert!((900..=1000).contains(&taken) && leases <= 100, "{taken} in {leases}");
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
