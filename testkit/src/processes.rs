//! The system's processes: spawned, awaited, signalled, and read when they fail.

use std::{
    ffi::OsStr,
    fs,
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    ops::Range,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tokio::{
    process::{Child, Command},
    task::spawn_blocking,
    time::{sleep, timeout},
};

const LOG_LINES_SHOWN: usize = 15;
/// How long a process may take that is started to do one thing.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A child process in a process group of its own, so that a terminal's Ctrl-C reaches only the harness, which then ends
/// its processes in the right order. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: u32,
    log: PathBuf,
}

/// How a process ended that was told to.
#[derive(Debug, Clone, Copy)]
pub struct Exit {
    /// What it left with.
    pub status: ExitStatus,
    /// Whether it outlived its grace and was killed.
    pub killed: bool,
}

impl Process {
    /// Starts a program; `name` is what messages call it. What it prints is appended to the file `log`.
    pub fn spawn(
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        environment: impl IntoIterator<Item = (impl AsRef<OsStr>, impl AsRef<OsStr>)>,
        log: &Path,
    ) -> Result<Process> {
        let mut command = Command::new(program);
        command.args(arguments).envs(environment);
        Process::spawn_command(name, command, log)
    }

    /// Starts a command; what it prints is appended to the file `log`.
    pub fn spawn_command(name: &str, mut command: Command, log: &Path) -> Result<Process> {
        let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.process_group(0).kill_on_drop(true).spawn();
        let child = child.with_context(|| format!("cannot run {}", command.as_std().get_program().display()))?;
        let pid = child.id().context("a process that was never awaited has a pid")?;
        Ok(Process { name: name.to_owned(), child, pid, log: log.to_owned() })
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, which the system may have given away again once it has exited.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it exited, if it has.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Whether it has not exited yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it exits by itself.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        Ok(self.child.wait().await?)
    }

    /// Waits until it has done what it was started for with `command`.
    pub async fn finish(&mut self, command: &str) -> Result<()> {
        let status = timeout(COMMAND_LIMIT, self.wait())
            .await
            .with_context(|| format!("{} {command} took over {COMMAND_LIMIT:?}", self.name))??;
        ensure!(status.success(), "{} {command} failed: {}", self.name, self.log_tail(5));
        Ok(())
    }

    /// Sends a signal; does nothing to a process that has exited.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.awaitable_pid()
            .map_or(Ok(()), |pid| kill_process(pid, signal))
            .with_context(|| format!("cannot signal {}", self.name))
    }

    /// Stops it with SIGSTOP, until it is sent SIGCONT. Returns when it stands still: the signal reaches one thread, and
    /// on a busy machine the others work on until that one is scheduled.
    pub async fn suspend(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let Some(pid) = self.awaitable_pid() else { return Ok(()) };
        // The status is left where it is, for whoever awaits the process's exit; an exit is waited for too, lest it be
        // missed.
        let stopped = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        spawn_blocking(move || waitid(WaitId::Pid(pid), stopped)).await??;
        Ok(())
    }

    /// None once its exit has been awaited: the number may then be another process's.
    fn awaitable_pid(&self) -> Option<Pid> {
        self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()))
    }

    /// Asks it to exit with SIGTERM, and kills it after `grace`.
    pub async fn terminate(&mut self, grace: Duration) -> Result<Exit> {
        self.stop(Signal::TERM, grace).await
    }

    /// Asks it to exit with `signal`, and kills it after `grace`.
    pub async fn stop(&mut self, signal: Signal, grace: Duration) -> Result<Exit> {
        self.signal(signal)?;
        match timeout(grace, self.child.wait()).await {
            Ok(status) => Ok(Exit { status: status?, killed: false }),
            Err(_) => Ok(Exit { status: self.kill().await?, killed: true }),
        }
    }

    /// Kills it with SIGKILL, as a crash would.
    pub async fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait().await
    }

    /// All that is in its log, of earlier processes too that used the same file.
    pub fn log(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| self.log.display().to_string())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The last `lines` lines of its log, to be shown when it failed.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log().unwrap_or_else(|error| format!("(no log: {error:#})"));
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Waits until the gRPC health service at `address` says that the whole server is serving.
    pub async fn wait_healthy(&mut self, address: SocketAddr, limit: Duration) -> Result<()> {
        let mut last_answer = String::from("no answer");
        let outcome = timeout(limit, async {
            while self.is_running() {
                match chassis::healthcheck(address).await {
                    Ok(()) => return Ok(()),
                    Err(not_serving) => last_answer = not_serving.to_string(),
                }
                sleep(Duration::from_millis(20)).await;
            }
            let status = self.exit_status()?.map(|status| status.to_string()).unwrap_or_default();
            bail!("{} exited before it was healthy ({status})", self.name)
        });
        let outcome = outcome
            .await
            .unwrap_or_else(|_| bail!("{} at {address} was not healthy within {limit:?} ({last_answer})", self.name));
        outcome.or_else(|error| bail!("{error:#}; its log ends in\n{}", self.log_tail(LOG_LINES_SHOWN)))
    }
}

/// Below the ports that systems lend to outgoing connections (Linux from 32768, macOS from 49152). A port that the system
/// chose would be free again as soon as it is let go, and be lent to the next connection before the process it was meant
/// for is up, or while that process is down between two starts.
const PORTS: Range<u32> = 20_000..32_000;
/// How many ports one program asks for, roughly; programs that run at once begin apart, as far as their ids allow.
const PORTS_OF_ONE_PROGRAM: u32 = 512;

/// A port of 127.0.0.1 that nobody listens on. No later call of this program gives it again, so it stays free for whoever
/// it was asked for, however often that one is stopped and started.
///
/// # Errors
/// When none is free.
pub fn free_port() -> Result<u16> {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(PORTS_OF_ONE_PROGRAM);
    for _ in PORTS {
        let next = first.wrapping_add(ASKED.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(PORTS.start + next % (PORTS.end - PORTS.start))?;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("every port of 127.0.0.1 from {} to {} is in use", PORTS.start, PORTS.end)
}

/// What a process has of the machine's memory; `None` where there is no /proc, or no such process.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    resident.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The path of another binary of this workspace, which Cargo or the image put beside the running one.
///
/// # Errors
/// When it is not there; the error says how to build it.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let directory = own.parent().context("a program is in a directory")?;
    // Test programs are one level below the binaries, in `deps`.
    let directory = if directory.ends_with("deps") { directory.parent().unwrap_or(directory) } else { directory };
    let path = directory.join(name);
    // Cargo names a directory after its profile, but for that of `dev`.
    let profile = match directory.file_name().and_then(OsStr::to_str) {
        Some("debug") | None => String::new(),
        Some(profile) => format!(" --profile {profile}"),
    };
    ensure!(path.is_file(), "{} is missing: build it with `cargo build{profile} -p {name}`", path.display());
    Ok(path)
}
