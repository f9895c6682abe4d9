//! The directory of a cluster, the user who owns it, and every process that works in it.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use testkit::{postgres::Home, processes::Process};
use tokio::{process::Command, time::sleep};

/// The programs that a cluster consists of, and those that they run to make a node.
const PROGRAMS: [&str; 8] =
    ["etcd", "haproxy", "patroni", "postgres", "initdb", "pg_basebackup", "pg_ctl", "pg_rewind"];
const END_LIMIT: Duration = Duration::from_secs(5);
const WITHOUT_REPLICATION: Duration = Duration::from_millis(500);

/// A directory for a cluster. When it is dropped, all processes in it are ended, and it is deleted.
#[derive(Debug)]
pub(super) struct Ground {
    logs: PathBuf,
    // Last, because the directory may be deleted only after the processes have ended.
    home: Home,
}

impl Ground {
    /// Creates the directory, and an empty one for logs. If a killed run has left a cluster there, ends its processes
    /// and deletes its files.
    pub(super) fn open(directory: &Path, logs: &Path) -> Result<Self> {
        let home = Home::open(directory, false)?;
        end_processes_in(home.directory());
        for entry in fs::read_dir(home.directory())?.filter_map(Result::ok) {
            let path = entry.path();
            if path.is_dir() {
                fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
            }
        }
        if logs.exists() {
            fs::remove_dir_all(logs).with_context(|| logs.display().to_string())?;
        }
        fs::create_dir_all(logs).with_context(|| logs.display().to_string())?;
        Ok(Self { logs: logs.to_owned(), home })
    }

    /// The path of a file or directory in it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.home.directory().join(name)
    }

    /// Writes a file that belongs to the cluster's user.
    pub(super) fn write(&self, name: &str, content: &str) -> Result<PathBuf> {
        self.home.write_secret(name, content)
    }

    /// Starts a process of the cluster. Its log is called like it.
    pub(super) fn spawn(&self, name: &str, program: &Path, arguments: &[&str]) -> Result<Process> {
        let mut command = self.command(program);
        command.args(arguments);
        Process::spawn_command(name, command, &self.logs.join(format!("{name}.log")))
    }

    /// Runs a program to its end.
    pub(super) async fn execute(&self, program: &Path, arguments: &[&str]) -> Result<()> {
        let output = self.command(program).args(arguments).kill_on_drop(true).output().await;
        let output = output.with_context(|| format!("cannot run {}", program.display()))?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} failed: {}", program.display(), message.trim());
        Ok(())
    }

    /// The environment is empty but for this: PGPASSWORD would win over the password files that Patroni writes.
    fn command(&self, program: &Path) -> Command {
        let mut command = self.home.command(program);
        let home = self.home.directory();
        command.env_clear().env("HOME", home).env("LC_ALL", "C.UTF-8").env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        end_processes_in(self.home.directory());
    }
}

/// The path of a program that this machine has. Administrators' programs are not in everybody's PATH.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    directories.map(|directory| directory.join(name)).find(|path| path.is_absolute() && path.is_file())
}

/// Kills the server of a data directory, and all its backends, as if its machine had died.
///
/// Before that, the server goes on for a moment without sending anything to its standbys. On one machine they would
/// otherwise have it all, even if no commit waited for them. Whatever is acknowledged in that moment is lost.
pub(super) async fn kill_server(data: &Path) -> Result<()> {
    let (server, backends) = processes_of(data)?;
    for sender in backends.iter().filter(|pid| is_sender(**pid)) {
        send(*sender, Signal::STOP)?;
    }
    sleep(WITHOUT_REPLICATION).await;
    let (_, backends) = processes_of(data)?;
    // The server first: otherwise it would see its backends die, and recover.
    for pid in [server].into_iter().chain(backends) {
        send(pid, Signal::KILL)?;
    }
    Ok(())
}

/// The server of a data directory, and its backends.
fn processes_of(data: &Path) -> Result<(Pid, Vec<Pid>)> {
    let path = data.join("postmaster.pid");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let parse = |pid: &str| Pid::from_raw(pid.parse().ok()?);
    let server = text.lines().next().and_then(parse).with_context(|| path.display().to_string())?;
    let number = server.as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{number}/task/{number}/children"))?;
    Ok((server, children.split_whitespace().filter_map(parse).collect()))
}

/// Whether this backend sends to a standby. PostgreSQL shows in the command line what a backend does.
fn is_sender(pid: Pid) -> bool {
    let line = fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    line.contains("walsender")
}

fn send(pid: Pid, signal: Signal) -> Result<()> {
    match kill_process(pid, signal) {
        // A backend may have ended by itself meanwhile.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Ends all processes that work in this directory, also those that Patroni has started. Returns when they have ended.
fn end_processes_in(directory: &Path) {
    let deadline = Instant::now() + END_LIMIT;
    // In rounds: a Patroni that is killed last may have started a server.
    loop {
        let found = processes_in(directory);
        if found.is_empty() || Instant::now() > deadline {
            return;
        }
        for (pid, program) in &found {
            // A server that is killed would leave its shared memory. This signal ends it at once as well.
            let signal = if program == "postgres" { Signal::QUIT } else { Signal::KILL };
            let _ = kill_process(*pid, signal);
        }
        while found.iter().any(|(pid, _)| test_kill_process(*pid).is_ok() && !is_zombie(*pid))
            && Instant::now() < deadline
        {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// By the command line, which names the directory. PostgreSQL's backends have none of their own, and end with their
/// server.
fn processes_in(directory: &Path) -> Vec<(Pid, String)> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = processes.filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let program = program_in(directory, &fs::read(entry.path().join("cmdline")).ok()?)?;
        Some((pid, program))
    });
    found.collect()
}

/// Which of [`PROGRAMS`] this command line runs with files of the directory. Patroni's first word is its interpreter.
fn program_in(directory: &Path, command_line: &[u8]) -> Option<String> {
    let mut words = command_line.split(|byte| *byte == 0);
    let program = words.by_ref().take(2).find_map(|word| {
        let name = Path::new(OsStr::from_bytes(word)).file_name()?.to_str()?;
        PROGRAMS.contains(&name).then(|| name.to_owned())
    })?;
    let path = [directory.as_os_str().as_bytes(), b"/"].concat();
    command_line.windows(path.len()).any(|window| window == path).then_some(program)
}

/// A killed child of this process is one until it is awaited. It has no files open any more.
fn is_zombie(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clusters_programs_in_the_directory_are_found() {
        let program = |line: &str| program_in(Path::new("/d/cluster"), line.replace(' ', "\0").as_bytes());
        assert_eq!(program("/usr/lib/bin/postgres -D /d/cluster/n1"), Some("postgres".into()));
        assert_eq!(program("/usr/bin/python3 /usr/bin/patroni /d/cluster/n1.json"), Some("patroni".into()));
        assert_eq!(program("/usr/bin/etcd --data-dir /d/cluster/e1"), Some("etcd".into()));
        assert_eq!(program("/usr/bin/etcd --data-dir /d/cluster-2/e1"), None, "another directory");
        assert_eq!(program("/usr/bin/tail -f /d/cluster/n1/postgres"), None, "another program");
        assert_eq!(program(""), None);
    }

    #[test]
    fn a_program_is_found_on_this_machine_or_not() {
        assert!(find_program("sh").is_some_and(|path| path.is_absolute()));
        assert_eq!(find_program("no-such-program"), None);
    }
}
