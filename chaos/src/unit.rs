//! One process under test, started again whenever it ends, as an orchestrator would.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::process::ExitStatusExt;
use tokio::{
    select,
    sync::watch,
    time::{sleep, timeout},
};

use testkit::processes::{Process, binary};

/// A process ends by itself within its drain time.
const GRACE: Duration = Duration::from_secs(10);
/// How long it stays down at most before it is started again.
const DOWN_MAX: Duration = Duration::from_millis(400);

/// Stands in a plan's environment for the number of the start.
pub(super) const START: &str = "START";

/// What is run, and how.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) name: String,
    pub(super) program: &'static str,
    pub(super) address: SocketAddr,
    pub(super) environment: Vec<(String, String)>,
    pub(super) log: PathBuf,
}

/// The process, or the place where it will be.
#[derive(Clone, Debug)]
pub(super) struct Unit(Arc<State>);

#[derive(Debug)]
struct State {
    plan: Plan,
    wanted: watch::Sender<bool>,
    pid: Mutex<Option<Pid>>,
    /// Set beside the plan's, from the next start on.
    extra: Mutex<Vec<(String, String)>>,
    starts: AtomicU32,
    /// Ends that nobody asked for.
    unexpected: Mutex<Vec<String>>,
}

impl Unit {
    /// Runs until [`Unit::stop`].
    pub(super) fn start(plan: Plan) -> Self {
        let unit = Self(Arc::new(State {
            plan,
            wanted: watch::Sender::new(true),
            pid: Mutex::default(),
            extra: Mutex::default(),
            starts: AtomicU32::new(0),
            unexpected: Mutex::default(),
        }));
        tokio::spawn(unit.clone().supervise());
        unit
    }

    pub(super) fn name(&self) -> &str {
        &self.0.plan.name
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.0.plan
    }

    /// How often it was started.
    pub(super) fn starts(&self) -> u32 {
        self.0.starts.load(Ordering::Relaxed)
    }

    pub(super) fn unexpected(&self) -> Vec<String> {
        self.0.unexpected.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn pid(&self) -> Option<Pid> {
        *self.0.pid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a signal, and returns whether there was a process.
    pub(super) fn signal(&self, signal: Signal) -> bool {
        // Its number is another's only if that one began in the instant between its end and the lock.
        let pid = self.0.pid.lock().unwrap_or_else(PoisonError::into_inner);
        pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
    }

    /// What is set beside the plan's environment, from the next start on.
    pub(super) fn set_extra(&self, extra: Vec<(String, String)>) {
        *self.0.extra.lock().unwrap_or_else(PoisonError::into_inner) = extra;
    }

    /// Ends it in order and starts it again. Returns when it is healthy.
    pub(super) async fn restart(&self, limit: Duration) -> Result<()> {
        let starts = self.starts();
        self.signal(Signal::TERM);
        let began = Instant::now();
        while self.starts() == starts {
            ensure!(began.elapsed() < limit, "{} did not end and start again within {limit:?}", self.name());
            sleep(Duration::from_millis(10)).await;
        }
        self.wait_healthy(limit).await
    }

    pub(super) async fn wait_healthy(&self, limit: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            let Err(error) = chassis::healthcheck(self.0.plan.address).await else { return Ok(()) };
            if began.elapsed() > limit {
                return Err(error).with_context(|| format!("{} was not healthy within {limit:?}", self.name()));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends it in order, for good.
    pub(super) async fn stop(&self) -> Result<()> {
        self.0.wanted.send_replace(false);
        let began = Instant::now();
        while self.pid().is_some() {
            ensure!(began.elapsed() < GRACE + DOWN_MAX, "{} did not end", self.name());
            sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    async fn supervise(self) {
        let mut wanted = self.0.wanted.subscribe();
        while *wanted.borrow() {
            if let Err(error) = self.run_once(&mut wanted).await {
                self.note(format!("{error:#}"));
            }
            *self.0.pid.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let _ = timeout(DOWN_MAX.mul_f64(fastrand::f64()), unwanted(&mut wanted)).await;
        }
    }

    async fn run_once(&self, wanted: &mut watch::Receiver<bool>) -> Result<()> {
        let Plan { name, program, environment, log, .. } = &self.0.plan;
        let extra = self.0.extra.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let start = self.0.starts.load(Ordering::Relaxed).to_string();
        let environment = environment.iter().map(|(name, value)| (name.clone(), value.replace(START, &start)));
        let environment = environment.chain(extra);
        let mut process = Process::spawn(name, &binary(program)?, ["serve"], environment, log)?;
        *self.0.pid.lock().unwrap_or_else(PoisonError::into_inner) = Pid::from_raw(process.pid().cast_signed());
        self.0.starts.fetch_add(1, Ordering::Relaxed);
        let status = select! {
            status = process.wait() => status?,
            () = unwanted(wanted) => {
                let exit = process.terminate(GRACE).await?;
                if exit.killed {
                    self.note(format!("did not end within {GRACE:?} of SIGTERM"));
                }
                exit.status
            }
        };
        if status.signal() != Some(Signal::KILL.as_raw()) && !status.success() {
            self.note(format!("ended with {status}: {}", process.log_tail(2)));
        }
        Ok(())
    }

    fn note(&self, what: String) {
        self.0.unexpected.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }
}

async fn unwanted(wanted: &mut watch::Receiver<bool>) {
    // What it returns is a lock.
    drop(wanted.wait_for(|wanted| !wanted).await);
}
