//! The clock by which the inbox ages what it remembers.
//!
//! If the server's clock jumps ahead, all that the inbox remembers looks old. If it forgot that, it would have to reject
//! the sound events of the last hour when the clock is set right: it cannot tell them from those that it has forgotten. So
//! it ages by a clock that no jump ahead moves at once. That is kept in the database, since a process that starts cannot
//! tell a jump from the time in which no process ran. It advances by what has passed on the monotonic clocks of the
//! processes that watch it. Several do not make it faster: each starts from what it has read, and the furthest one counts.
//!
//! Backwards it follows at once. If it stayed ahead for long, a second jump of the server's clock would count at once,
//! since the earlier of the two counts (see `accept` and `prune`). If the server's clock was set back only for a moment, the
//! inbox keeps ids for longer until its clock has returned.

use std::time::Duration;

use chassis::{Database, LogLimit};
use sqlx::{PgConnection, types::time::OffsetDateTime};
use tokio::time::Instant;
use tracing::warn;

use crate::prune::CLOCK_MARGIN;

/// How often it moves. A pruned id may be kept for as long in vain.
const INTERVAL: Duration = Duration::from_secs(10);
/// It is at most twice as fast as time passes. So it reaches the server's clock after a stop of the service, in as much
/// time as that took. Meanwhile the inbox keeps ids for longer. Few are added by that, since none were recorded while the
/// service stood still.
const PACE: u32 = 2;
/// What was read longer ago does not count. A process that could not move the clock for hours would move it by hours. The
/// step is less than [`CLOCK_MARGIN`], since `accept` may have read the clock just before.
const SEEN_MAX: Duration = Duration::from_secs(300);
/// While the server's clock is ahead by more than the margin, the log says so at this interval.
const WARNING_INTERVAL: Duration = Duration::from_secs(600);

/// Moves the inbox's clock.
#[derive(Debug, Default)]
pub(crate) struct InboxClock {
    seen: Option<Seen>,
    warned: LogLimit,
}

/// The clock, as this process read it last.
#[derive(Clone, Copy, Debug)]
struct Seen {
    clock: OffsetDateTime,
    /// After it was read.
    at: Instant,
}

impl Seen {
    /// The latest time that the clock may show by now; `None` if it has to be read first.
    fn limit(self, now: Instant) -> Option<OffsetDateTime> {
        let passed = now - self.at;
        (passed <= SEEN_MAX).then(|| self.clock + passed * PACE)
    }
}

struct Moved {
    clock: OffsetDateTime,
    /// Of the server's clock.
    behind_seconds: f64,
}

impl InboxClock {
    /// Moves the clock towards the server's, if that is due.
    pub(crate) async fn move_if_due(&mut self, database: &Database) -> Result<(), sqlx::Error> {
        let now = Instant::now();
        if self.seen.is_some_and(|seen| now - seen.at < INTERVAL) {
            return Ok(());
        }
        let limit = self.seen.and_then(|seen| seen.limit(now));
        let moved = database.write(move |connection| Box::pin(move_towards_servers(connection, limit))).await?;
        self.seen = Some(Seen { clock: moved.clock, at: Instant::now() });
        self.warn_if_far(moved.behind_seconds);
        Ok(())
    }

    fn warn_if_far(&self, behind_seconds: f64) {
        if behind_seconds <= CLOCK_MARGIN.as_secs_f64() {
            self.warned.reset();
        } else if self.warned.allows(Instant::now(), WARNING_INTERVAL) {
            let hours = behind_seconds / 3600.0;
            warn!(
                "the database server's clock is {hours:.1} h ahead of the inbox's: after a stop of the service this passes in \
                 as much time; otherwise check the server's clock"
            );
        }
    }
}

/// Without a limit it does not advance.
async fn move_towards_servers(
    connection: &mut PgConnection,
    limit: Option<OffsetDateTime>,
) -> Result<Moved, sqlx::Error> {
    sqlx::query_as!(
        Moved,
        r#"-- inbox: move clock
        INSERT INTO inbox_pruned AS inbox (until, clock) VALUES ('-infinity', now())
        ON CONFLICT (singleton) DO UPDATE SET clock = least(now(), greatest(inbox.clock, $1))
        RETURNING clock, extract(epoch FROM now() - clock)::double precision AS "behind_seconds!""#,
        limit,
    )
    .fetch_one(connection)
    .await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sqlx::types::time::OffsetDateTime;
    use tokio::time::Instant;

    use super::{CLOCK_MARGIN, INTERVAL, PACE, SEEN_MAX, Seen};

    #[test]
    fn the_clock_catches_up_twice_as_fast_as_time_passes_and_never_by_the_margin_at_once() {
        let seen = Seen { clock: OffsetDateTime::UNIX_EPOCH, at: Instant::now() };
        let advances = |after| seen.limit(seen.at + after).map(|limit| limit - seen.clock);
        assert_eq!(advances(Duration::ZERO), Some(Duration::ZERO.try_into().unwrap()));
        assert_eq!(advances(INTERVAL), Some((2 * INTERVAL).try_into().unwrap()));
        assert_eq!(advances(Duration::from_hours(24 * 365)), None);
        assert!(SEEN_MAX * PACE < CLOCK_MARGIN);
    }
}
