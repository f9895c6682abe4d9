//! The directory of a private cluster: its owner, its lock, and the server that a killed run left in it.
//!
//! ```text
//! <directory>/lock          held while the cluster's harness lives
//! <directory>/data/         the cluster
//! <directory>/postgres.log
//! ```

use std::{
    env, fs,
    fs::{File, Permissions},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, geteuid, test_kill_process};
use tokio::process::Command;

use super::find::Installation;

const LOCK: &str = "lock";

/// A directory that no other harness uses until this is dropped. Then it is deleted, unless `keep` is set.
#[derive(Debug)]
pub struct Home {
    directory: PathBuf,
    user: Option<User>,
    keep: bool,
    // The kernel releases the lock however this process ends, so a directory that can be locked has no live harness.
    _lock: File,
}

/// The user that runs the server if this process is root's: PostgreSQL refuses to run as root.
#[derive(Debug, Clone)]
struct User {
    name: &'static str,
    uid: u32,
    gid: u32,
}

impl Home {
    /// Creates the directory, or takes over that of an earlier run.
    ///
    /// # Errors
    /// If another harness uses it, or the server's user cannot reach it.
    pub fn open(directory: &Path, keep: bool) -> Result<Home> {
        let directory = std::path::absolute(directory)?;
        if !geteuid().is_root() {
            make(&directory, None)?;
            return Ok(Home { _lock: lock(&directory)?, directory, user: None, keep });
        }
        let user = unprivileged_user()?;
        let directory = make_reachable(directory, &user)?;
        Ok(Home { _lock: lock(&directory)?, directory, user: Some(user), keep })
    }

    /// Where it is: the directory asked for, or its stand-in if the server's user cannot reach that one.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.directory.join("postgres.log")
    }

    /// Deletes the directory, even if it was opened to be kept.
    pub(super) fn delete(mut self) {
        self.keep = false;
    }

    /// Writes a file that only the server's user can read.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_secret(&self, name: &str, content: &str) -> Result<PathBuf> {
        // Nobody else can enter the directory, so nobody can read the file before its owner changes.
        let path = self.directory.join(name);
        fs::write(&path, content)?;
        give(&path, self.user.as_ref())?;
        Ok(path)
    }

    /// A command that runs as the server's user, in this directory: that user may not enter the current one.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.directory).stdin(Stdio::null()).env("LC_ALL", "C");
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// Stops the server that a killed run left here, if there is one.
    pub(super) async fn stop_abandoned_server(&self, installation: &Installation) -> Result<()> {
        let pid_file = self.data().join("postmaster.pid");
        let Some(pid) = first_line(&pid_file).and_then(|line| Pid::from_raw(line.parse().ok()?)) else {
            return Ok(());
        };
        if test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
            return Ok(()); // PostgreSQL itself replaces the file of a dead server.
        }
        if !command_line(pid).await.is_some_and(|line| contains(&line, self.data().as_os_str().as_bytes())) {
            // Another program has this number by now, perhaps since a reboot. PostgreSQL might mistake that program for a
            // live server and refuse to start, and pg_ctl would stop it.
            return fs::remove_file(&pid_file).with_context(|| pid_file.display().to_string());
        }
        eprintln!("note: stopping the server that an earlier run left behind (pid {})", pid.as_raw_nonzero());
        let mut pg_ctl = self.command(&installation.program("pg_ctl"));
        pg_ctl.arg("stop").arg("-D").arg(self.data()).args(["-m", "fast", "-w", "-t", "30"]);
        let output = pg_ctl.kill_on_drop(true).output().await.context("cannot run pg_ctl")?;
        ensure!(
            output.status.success(),
            "cannot stop the server of an earlier run: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_dir_all(&self.directory)
        {
            eprintln!("warning: cannot delete {}: {error}", self.directory.display());
        }
    }
}

/// The directories that killed runs left behind: their path begins with `prefix` or its stand-in.
pub(super) fn abandoned(prefix: &Path) -> Result<Vec<Home>> {
    let prefix = std::path::absolute(prefix)?;
    let mut homes = Vec::new();
    for prefix in [stand_in(&prefix), prefix] {
        let siblings = prefix.parent().and_then(|parent| fs::read_dir(parent).ok()).into_iter().flatten().flatten();
        let ours = siblings.map(|entry| entry.path()).filter(|path| {
            path.as_os_str().as_bytes().starts_with(prefix.as_os_str().as_bytes()) && path.join(LOCK).is_file()
        });
        // One that cannot be opened is in use, or another user's.
        homes.extend(ours.filter_map(|path| Home::open(&path, true).ok()));
    }
    Ok(homes)
}

fn make(directory: &Path, user: Option<&User>) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create the directory {}", directory.display()))?;
    let owner = fs::symlink_metadata(directory)?.uid();
    let expected = user.map_or(geteuid().as_raw(), |user| user.uid);
    // Anybody may have put a directory where the stand-in goes, so only our own, or a new one, changes its owner.
    ensure!(
        owner == expected || owner == geteuid().as_raw(),
        "{} belongs to another user (uid {owner}): delete it, or run as that user",
        directory.display()
    );
    let is_empty = fs::read_dir(directory)?.next().is_none();
    ensure!(
        is_empty || directory.join(LOCK).is_file(),
        "{} has files in it that are not of a private cluster: choose another directory",
        directory.display()
    );
    fs::set_permissions(directory, Permissions::from_mode(0o700))?;
    give(directory, user)
}

/// Creates the directory; or its stand-in, if the user cannot enter a parent, such as root's home.
fn make_reachable(directory: PathBuf, user: &User) -> Result<PathBuf> {
    make(&directory, Some(user))?;
    if reaches(user, &directory) {
        return Ok(directory);
    }
    let _ = fs::remove_dir(&directory); // It is empty, unless a parent became private later.
    let reachable = stand_in(&directory);
    make(&reachable, Some(user))?;
    ensure!(reaches(user, &reachable), "user {} can reach neither {directory:?} nor {reachable:?}", user.name);
    eprintln!(
        "note: user {} cannot reach {}, so the database is in {}",
        user.name,
        directory.display(),
        reachable.display()
    );
    Ok(reachable)
}

fn give(path: &Path, user: Option<&User>) -> Result<()> {
    if let Some(user) = user {
        chown(path, Some(user.uid), Some(user.gid)).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn lock(directory: &Path) -> Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(directory.join(LOCK))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another harness is using {}: stop it, or choose another directory", directory.display())
        }
        Err(fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", directory.display()))
        }
    }
}

/// The same for every run, so that kept data is found again: `/tmp/outbox-home-me-target-postgres`.
fn stand_in(directory: &Path) -> PathBuf {
    env::temp_dir().join(format!("outbox{}", directory.display().to_string().replace('/', "-")))
}

fn unprivileged_user() -> Result<User> {
    let accounts = fs::read_to_string("/etc/passwd").context("/etc/passwd")?;
    let user = |name: &'static str| {
        let line = accounts.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let mut ids = line.split(':').skip(1).map(str::parse);
        Some(User { name, uid: ids.next()?.ok()?, gid: ids.next()?.ok()? })
    };
    user("postgres")
        .or_else(|| user("nobody"))
        .context("PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody`: run as another user")
}

/// Lets the kernel decide instead of comparing permissions: a command that does nothing runs there as that user.
fn reaches(user: &User, directory: &Path) -> bool {
    use std::os::unix::process::CommandExt;
    let outcome = std::process::Command::new("true").current_dir(directory).uid(user.uid).gid(user.gid).status();
    !matches!(outcome, Err(error) if error.kind() == io::ErrorKind::PermissionDenied)
}

fn first_line(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.trim().to_owned())
}

/// The command line of a process, from /proc if possible: slim images have no `ps`.
async fn command_line(pid: Pid) -> Option<Vec<u8>> {
    let pid = pid.as_raw_nonzero();
    if let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) {
        return Some(line);
    }
    let output = Command::new("ps").args(["-o", "args=", "-p", &pid.to_string()]).output().await.ok()?;
    Some(output.stdout)
}

fn contains(line: &[u8], part: &[u8]) -> bool {
    line.windows(part.len()).any(|window| window == part)
}
