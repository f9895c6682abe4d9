//! One process under test. It is restarted whenever it ends, as an orchestrator would.

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

use chassis::TlsFiles;
use testkit::processes::{Process, binary};

/// A process must end within this time of SIGTERM: its drain time, and some reserve.
const GRACE: Duration = Duration::from_secs(10);
/// The longest time before it is restarted.
const DOWN_MAX: Duration = Duration::from_millis(400);

/// A placeholder in the environment of a plan, replaced by the number of the start.
pub(super) const START: &str = "START";

/// How to run a process.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) name: String,
    pub(super) program: &'static str,
    pub(super) address: SocketAddr,
    /// Its certificates, if it speaks with TLS.
    pub(super) tls: TlsFiles,
    pub(super) environment: Vec<(String, String)>,
    pub(super) log: PathBuf,
}

/// A supervised process, whether it runs at the moment or not. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Unit(Arc<State>);

#[derive(Debug)]
struct State {
    plan: Plan,
    wanted: watch::Sender<bool>,
    pid: Mutex<Option<Pid>>,
    /// Variables besides those of the plan, from the next start on.
    extra: Mutex<Vec<(String, String)>>,
    starts: AtomicU32,
    /// Failures that no fault has caused.
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
        // Another process could have this id only if it started between the end of this one and the lock. That is a
        // moment, and ids are not reused so soon.
        let pid = self.0.pid.lock().unwrap_or_else(PoisonError::into_inner);
        pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
    }

    /// Sets variables besides those of the plan, from the next start on.
    pub(super) fn set_extra(&self, extra: Vec<(String, String)>) {
        *self.0.extra.lock().unwrap_or_else(PoisonError::into_inner) = extra;
    }

    /// Stops it with SIGTERM, and returns once it has restarted and is healthy.
    pub(super) async fn restart(&self, limit: Duration) -> Result<()> {
        let starts = self.terminate_healthy(limit).await?;
        let began = Instant::now();
        while self.starts() == starts {
            ensure!(began.elapsed() < limit, "{} did not restart within {limit:?}", self.name());
            sleep(Duration::from_millis(10)).await;
        }
        self.wait_healthy(limit).await
    }

    /// Sends SIGTERM to a healthy process, and returns its number of starts. A process that has just started after a
    /// crash does not handle SIGTERM yet, and would seem to fail. So this begins again if a crash comes in between.
    async fn terminate_healthy(&self, limit: Duration) -> Result<u32> {
        let began = Instant::now();
        loop {
            let starts = self.starts();
            self.wait_healthy(limit.saturating_sub(began.elapsed())).await?;
            if self.starts() == starts && self.signal(Signal::TERM) {
                return Ok(starts);
            }
            ensure!(began.elapsed() < limit, "{} kept crashing for {limit:?}, so it was not restarted", self.name());
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) async fn wait_healthy(&self, limit: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            let Err(error) = chassis::healthcheck(self.0.plan.address, &self.0.plan.tls).await else {
                return Ok(());
            };
            if began.elapsed() > limit {
                return Err(error).with_context(|| format!("{} was not healthy within {limit:?}", self.name()));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops it with SIGTERM for good.
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
        // The count comes first: no process with an id is taken for the one before it.
        self.0.starts.fetch_add(1, Ordering::Relaxed);
        *self.0.pid.lock().unwrap_or_else(PoisonError::into_inner) = Pid::from_raw(process.pid().cast_signed());
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
    // The value that `wait_for` returns holds a lock.
    drop(wanted.wait_for(|wanted| !wanted).await);
}
