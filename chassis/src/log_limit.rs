//! Limits how often the log says something again.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// When it was said last, while it holds.
#[derive(Debug, Default)]
pub struct LogLimit(Mutex<Option<Instant>>);

impl LogLimit {
    /// It was never said.
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Whether to say it now: for the first time, or once the interval is over.
    pub fn allows(&self, now: Instant, interval: Duration) -> bool {
        let mut said_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = said_at.is_none_or(|at| now - at >= interval);
        if due {
            *said_at = Some(now);
        }
        due
    }

    /// It holds no more. If it comes again, that is said at once.
    pub fn reset(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
