//! Property tests of a running service: values of a strategy are sent to it, and it may neither panic nor keep memory.
//!
//! A target runs for 1.5 s. `FUZZ_SECONDS=600` makes that ten minutes.
//!
//! A failure prints the smallest input found and a seed. With that seed in `FUZZ_SEED`, a run begins with the same case.
//! Each case has a seed of its own, the one of the case before plus one. So the seed a run began with, which is printed
//! too, repeats the whole run: a failure may need what earlier cases left in the database.

mod contract;
mod input;

use std::{
    cell::RefCell,
    env,
    fmt::Debug,
    future::Future,
    hash::{BuildHasher, RandomState},
    mem,
    panic::{self, AssertUnwindSafe, PanicHookInfo},
    process,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestCaseResult, TestError, TestRng, TestRunner},
};
use tokio::runtime::{Builder, Runtime};

pub use contract::{call, is_refused_by_transport, is_result_of_each};
pub use input::{
    Damage, EventChange, Text, change_event, damage, doublings, event_changes, id, number, number_i32, repeat, text,
};

use crate::processes::resident_bytes;

/// The largest message that a service accepts of a caller by default.
pub const MESSAGE_MAX: usize = 64 * 1024;
/// The largest message that a receiver of events accepts.
pub const BATCH_MAX: usize = 16 * 1024 * 1024;

/// For how long a target runs by default.
const TEST_TIME: Duration = Duration::from_millis(1500);
/// For how long a smaller input is searched for.
const SHRINK_TIME: Duration = Duration::from_secs(20);
/// How much a process may grow that keeps no input: pools, caches, and other tests in the same process need some.
const GROWTH_MAX: u64 = 256 * 1024 * 1024;

thread_local! {
    static WATCHED: RefCell<Option<Arc<Panics>>> = const { RefCell::new(None) };
}

/// The panics of watched threads.
#[derive(Debug, Default)]
struct Panics {
    seen: Mutex<Vec<String>>,
    /// Whether they are only kept, not reported: a search for a smaller input causes hundreds.
    quiet: AtomicBool,
}

impl Panics {
    /// Keeps the panic, and returns whether that is all to be done.
    fn keep(&self, panicked: &PanicHookInfo<'_>) -> bool {
        self.seen.lock().expect("nobody panics while holding it").push(panicked.to_string());
        self.quiet.load(Ordering::Relaxed)
    }

    fn take(&self) -> Vec<String> {
        mem::take(&mut *self.seen.lock().expect("nobody panics while holding it"))
    }

    /// Runs `work` with this thread watched too, and reports no panic meanwhile.
    fn quietly<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        WATCHED.set(Some(Arc::clone(self)));
        self.quiet.store(true, Ordering::Relaxed);
        let result = work();
        self.quiet.store(false, Ordering::Relaxed);
        WATCHED.set(None);
        result
    }
}

/// tokio and hyper catch the panic of a task, and nobody awaits most of these tasks: only the hook sees all panics.
fn install_hook() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panicked| {
            let quiet = WATCHED.with_borrow(|panics| panics.as_ref().is_some_and(|panics| panics.keep(panicked)));
            if !quiet {
                report(panicked);
            }
        }));
    });
}

/// Runs a service on threads of its own: other tests run in the same process, and their panics are not the service's.
#[derive(Debug)]
pub struct Host {
    runtime: Runtime,
    panics: Arc<Panics>,
    resident: Option<u64>,
}

impl Host {
    /// A host that runs nothing yet.
    ///
    /// # Panics
    /// If no thread can be started.
    pub fn start() -> Self {
        install_hook();
        let panics: Arc<Panics> = Arc::default();
        let of_threads = Arc::clone(&panics);
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(2).enable_all();
        builder.on_thread_start(move || WATCHED.set(Some(of_threads.clone())));
        Self { runtime: builder.build().expect("threads"), panics, resident: resident_bytes(process::id()) }
    }

    /// Runs the future on this thread, which is not watched, and the tasks it spawns on the host's, which are.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Runs `test` with values of the strategy until the time is up.
    ///
    /// # Panics
    /// If a value fails the test, makes the service panic, or makes the process grow too much.
    #[track_caller]
    pub fn test_each<S: Strategy>(&self, strategy: &S, test: &impl AsyncFn(&S::Value)) {
        let time = setting("FUZZ_SECONDS").map_or(TEST_TIME, Duration::from_secs);
        assert!(!time.is_zero(), "FUZZ_SECONDS must be at least 1, not 0: no case would be tested");
        let first = setting("FUZZ_SEED").unwrap_or_else(|| RandomState::new().hash_one("seed"));
        let started = Instant::now();
        let mut seed = first;
        while started.elapsed() < time {
            let tested = self.panics.quietly(|| self.test_case(seed, strategy, test));
            if let Err(error) = tested {
                let why = explain(error);
                panic!("{why}\nto repeat this case: FUZZ_SEED={seed}; to repeat the whole run: FUZZ_SEED={first}");
            }
            seed = seed.wrapping_add(1);
        }
        println!("{} cases, beginning with FUZZ_SEED={first}", seed.wrapping_sub(first));
    }

    /// Tests one value; if it fails, the error has the smallest value found that fails as well.
    fn test_case<S: Strategy>(
        &self,
        seed: u64,
        strategy: &S,
        test: &impl AsyncFn(&S::Value),
    ) -> Result<(), TestError<S::Value>> {
        let mut seed_bytes = [0; 32];
        seed_bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let max_shrink_time = u32::try_from(SHRINK_TIME.as_millis()).expect("some seconds");
        let config = Config { failure_persistence: None, max_shrink_time, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed_bytes));
        let value = strategy.new_tree(&mut runner).map_err(TestError::Abort)?;
        runner.run_one(value, |value| self.test_value(&value, test)).map(drop)
    }

    fn test_value<T>(&self, value: &T, test: &impl AsyncFn(&T)) -> TestCaseResult {
        // Nothing here is left half-changed by a panic: the state is the service's, which must bear any input.
        let tested = panic::catch_unwind(AssertUnwindSafe(|| self.block_on(test(value))));
        // Taken, so that a smaller value fails only if it causes a panic itself.
        let panics = self.panics.take();
        if tested.is_err() || !panics.is_empty() {
            return Err(TestCaseError::fail(panics.join("\n")));
        }
        match (self.resident, resident_bytes(process::id())) {
            (Some(before), Some(now)) if now.saturating_sub(before) >= GROWTH_MAX => {
                Err(TestCaseError::fail(format!("memory has grown from {before} to {now} bytes")))
            }
            _ => Ok(()),
        }
    }
}

/// Fails the target if its service has panicked after the last case, such as while it stopped.
impl Drop for Host {
    fn drop(&mut self) {
        // A second panic would abort the process, and hide the first.
        if !thread::panicking() {
            let panics = self.panics.take();
            assert!(panics.is_empty(), "the service panicked outside a case:\n{}", panics.join("\n"));
        }
    }
}

fn explain<T: Debug>(error: TestError<T>) -> String {
    match error {
        TestError::Fail(why, value) => format!("{why}\nthe smallest input found that fails: {value:?}"),
        TestError::Abort(why) => format!("the strategy made no value: {why}"),
    }
}

/// A number from the environment; an empty variable is none.
fn setting(name: &str) -> Option<u64> {
    let value = env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} must be a whole number, not {value:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "the service panicked outside a case:\n")]
    fn a_panic_after_the_last_case_fails_the_target() {
        let host = Host::start();
        let late = async { tokio::spawn(async { panic!("late") }).await };
        let ended: Result<(), _> = host.panics.quietly(|| host.block_on(late));
        assert!(ended.is_err());
    }
}
