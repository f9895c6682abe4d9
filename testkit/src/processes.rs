//! Child processes, their signals and their logs; free ports.

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
use chassis::TlsFiles;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tokio::{
    process::{Child, Command},
    task::spawn_blocking,
    time::{sleep, timeout},
};

const LOG_LINES_SHOWN: usize = 15;
/// Time limit of a process that is started for one command.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A child process. It has a process group of its own, so a terminal's Ctrl-C reaches only the harness, which ends its
/// processes in the right order. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: u32,
    log: PathBuf,
}

/// How a process ended after it was told to.
#[derive(Debug, Clone, Copy)]
pub struct Exit {
    /// Its exit status.
    pub status: ExitStatus,
    /// Whether it was killed because it was still running after its grace.
    pub killed: bool,
}

impl Process {
    /// Starts a program, which messages call `name`. Its output is appended to the file `log`.
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

    /// Starts a command. Its output is appended to the file `log`.
    pub fn spawn_command(name: &str, mut command: Command, log: &Path) -> Result<Process> {
        let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.process_group(0).kill_on_drop(true).spawn();
        let child = child.with_context(|| format!("cannot run {}", command.as_std().get_program().display()))?;
        let pid = child.id().context("a process that was not awaited yet has a pid")?;
        Ok(Process { name: name.to_owned(), child, pid, log: log.to_owned() })
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id. After it has exited, another process may have the same.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its exit status, if it has exited.
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

    /// Waits until it has executed the `command` it was started for.
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

    /// Stops it with SIGSTOP until SIGCONT. Returns when all of it has stopped: the signal reaches one thread, and on a busy
    /// machine the others run on until that thread is scheduled.
    pub async fn suspend(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let Some(pid) = self.awaitable_pid() else { return Ok(()) };
        // NOWAIT leaves the status for the caller that awaits the exit. EXITED ends this wait if the process exits instead.
        let stopped = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        spawn_blocking(move || waitid(WaitId::Pid(pid), stopped)).await??;
        Ok(())
    }

    /// None after its exit has been awaited: then another process may have the number.
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

    /// Kills it with SIGKILL, like a crash.
    pub async fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait().await
    }

    /// Its log file, including what earlier processes wrote to it.
    pub fn log(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| self.log.display().to_string())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The last `lines` lines of its log, for messages.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log().unwrap_or_else(|error| format!("(no log: {error:#})"));
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Waits until the gRPC health service at `address` reports the whole server as serving.
    pub async fn wait_healthy(&mut self, address: SocketAddr, limit: Duration) -> Result<()> {
        self.wait_healthy_by(&TlsFiles::default(), address, limit).await
    }

    /// The same, of a server with these certificates.
    pub async fn wait_healthy_by(&mut self, tls: &TlsFiles, address: SocketAddr, limit: Duration) -> Result<()> {
        let mut last_answer = String::from("no answer");
        let outcome = timeout(limit, async {
            while self.is_running() {
                match chassis::healthcheck(address, tls).await {
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

/// Below the ports of outgoing connections (Linux from 32768, macOS from 49152). A port that the system chose would be free
/// again until its process listens, and between two starts of that process, and an outgoing connection could get it.
const PORTS: Range<u32> = 20_000..30_700;
/// Roughly how many ports one program needs. Programs that run at once begin this far apart, if their ids allow.
const PORTS_OF_ONE_PROGRAM: u32 = 512;

/// A port of 127.0.0.1 that nobody listens on. No later call in this process returns it again, so a process that uses it can
/// be stopped and started.
///
/// # Errors
/// If none is free.
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

/// Resident memory of a process; `None` without /proc, or without such a process.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    resident.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The path of another binary of this workspace, which is beside the running one.
///
/// # Errors
/// If it is missing; the error says how to build it.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let directory = own.parent().context("a program is in a directory")?;
    // Test binaries are one level below, in `deps`.
    let directory = if directory.ends_with("deps") { directory.parent().unwrap_or(directory) } else { directory };
    let path = directory.join(name);
    // Cargo names the directory after the profile, except for `dev`.
    let profile = match directory.file_name().and_then(OsStr::to_str) {
        Some("debug") | None => String::new(),
        Some(profile) => format!(" --profile {profile}"),
    };
    ensure!(path.is_file(), "{} is missing: build it with `cargo build{profile} -p {name}`", path.display());
    Ok(path)
}
