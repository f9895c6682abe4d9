//! Knows whether the receiver takes deliveries, and spares it while it does not.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Mutex, MutexGuard};
use tracing::info;

/// Events in the first probe of a receiver that was down: few, since they are likely to come back. Each further one is
/// half as large, down to one event: should the receiver be down *because* of an event, that one stands alone in the end,
/// at the back of the queue since it was released, and the others arrive.
const PROBE_BATCH: u32 = 8;
/// The first pause before a probe lasts at most this long, each further one twice as long, up to the cap. The cap is
/// also the longest a backlog waits after the receiver has returned.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The way to the receiver, shared by the workers of a process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Route {
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Failures in a row; 0: the route is open.
    failures: AtomicU32,
    /// Held by the one worker that probes a route that is down.
    probing: Mutex<()>,
}

/// Leave to lease and deliver one batch.
pub(crate) enum Admission<'a> {
    /// Of any size.
    Open,
    /// A small one, to see whether the receiver is back, while the other workers wait.
    Probe { batch: u32, _guard: MutexGuard<'a, ()> },
}

impl Admission<'_> {
    pub(crate) fn batch(&self, full: u32) -> u32 {
        match self {
            Self::Open => full,
            Self::Probe { batch, .. } => full.min(*batch),
        }
    }
}

impl Route {
    /// Waits while the route is down: for another worker's probe, or for this worker's turn to probe, after a pause with
    /// full jitter. Dropping the future gives the turn up.
    pub(crate) async fn admit(&self) -> Admission<'_> {
        if self.failures() == 0 {
            return Admission::Open;
        }
        let guard = self.state.probing.lock().await;
        match self.failures() {
            0 => Admission::Open,
            failures => {
                tokio::time::sleep(pause_max(failures).mul_f64(fastrand::f64())).await;
                Admission::Probe { batch: probe_batch(failures), _guard: guard }
            }
        }
    }

    /// The receiver answered, whatever it said.
    pub(crate) fn reached(&self) {
        if self.state.failures.swap(0, Ordering::Relaxed) > 0 {
            info!("receiver answers again");
        }
    }

    /// The receiver did not answer.
    pub(crate) fn failed(&self) {
        self.state.failures.fetch_add(1, Ordering::Relaxed);
    }

    fn failures(&self) -> u32 {
        self.state.failures.load(Ordering::Relaxed)
    }
}

fn probe_batch(failures: u32) -> u32 {
    PROBE_BATCH.checked_shr(failures - 1).unwrap_or(0).max(1)
}

fn pause_max(failures: u32) -> Duration {
    PAUSE.saturating_mul(2_u32.saturating_pow(failures - 1)).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::{Admission, Route, pause_max, probe_batch};
    use std::time::Duration;

    #[test]
    fn pauses_double_up_to_their_cap() {
        assert_eq!(pause_max(1), Duration::from_millis(50));
        assert_eq!(pause_max(3), Duration::from_millis(200));
        assert_eq!(pause_max(u32::MAX), Duration::from_secs(1));
    }

    #[test]
    fn probes_shrink_to_a_single_event() {
        assert_eq!([1, 2, 3, 4, 5, 40].map(probe_batch), [8, 4, 2, 1, 1, 1]);
    }

    #[tokio::test]
    async fn one_worker_probes_a_route_that_is_down_and_the_others_wait_for_it() {
        let route = Route::default();
        route.failed();
        let probe = route.admit().await;
        assert_eq!(probe.batch(100), 8);
        let waiting = tokio::spawn({
            let route = route.clone();
            async move { route.admit().await.batch(100) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        route.reached();
        drop(probe);
        assert_eq!(waiting.await.unwrap(), 100);
        assert!(matches!(route.admit().await, Admission::Open));
    }
}
