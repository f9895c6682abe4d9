//! Finds the programs of a PostgreSQL server on this machine.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail, ensure};

/// PostgreSQL maintains no older version.
const OLDEST_MAJOR: u32 = 14;

const PROGRAMS: [&str; 3] = ["initdb", "postgres", "pg_ctl"];

/// The environment variable that names the directory of the programs. It is how to choose among several versions.
const NAMED_BY: &str = "POSTGRES_BIN";

pub(super) const WAYS_OUT: &str = "install the package `postgresql`, or name the directory of initdb in POSTGRES_BIN, \
                        or set POSTGRES_URL to a superuser's URL of an existing server";

/// A directory that holds `initdb`, `postgres` and `pg_ctl`, and their major version.
#[derive(Debug, Clone)]
pub struct Installation {
    directory: PathBuf,
    major: u32,
}

impl Installation {
    /// Where its programs are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The path of a client program, of the same version if possible. The directory may hold only links to the server's
    /// programs; then the clients are beside the files they lead to. Small builds have no clients at all. Then those of
    /// another installation do: clients speak to servers of other versions.
    pub fn client(&self, name: &str) -> PathBuf {
        let server = fs::canonicalize(self.program("postgres")).unwrap_or_default();
        let own = [server.with_file_name(name), self.program(name)];
        let others = candidates().map(|directory| directory.join(name));
        own.into_iter().chain(others).find(|client| client.is_file()).unwrap_or_else(|| self.program(name))
    }

    /// The major version, such as 17.
    pub fn major(&self) -> u32 {
        self.major
    }
}

/// The installation that POSTGRES_BIN names. Without the variable, the first one that is new enough, from PATH, `pg_config`,
/// Debian (newest first) or Homebrew.
pub fn find() -> Result<Installation> {
    match named_directory() {
        Some(directory) => take_named(&directory),
        None => take_first(),
    }
}

/// Whether there is something to take: a directory that is named, or any version, even an old one.
pub(super) fn is_installed() -> bool {
    is_named() || candidates().any(|directory| inspect(&directory).is_some())
}

/// Whether POSTGRES_BIN names a directory, be it right or wrong.
pub(super) fn is_named() -> bool {
    named_directory().is_some()
}

fn named_directory() -> Option<PathBuf> {
    // make and compose files pass an empty variable for one that is not set.
    env::var_os(NAMED_BY).filter(|directory| !directory.is_empty()).map(PathBuf::from)
}

/// Never another one instead: whoever names a version wants to know about that version.
fn take_named(directory: &Path) -> Result<Installation> {
    let Some(installation) = inspect(directory) else {
        bail!(
            "{NAMED_BY} is {}, and that is no absolute path of a directory whose initdb, postgres and pg_ctl run here",
            directory.display()
        );
    };
    ensure!(
        installation.major >= OLDEST_MAJOR,
        "PostgreSQL {} in {}, which {NAMED_BY} names, is too old; version {OLDEST_MAJOR} or newer is needed",
        installation.major,
        directory.display()
    );
    Ok(installation)
}

fn take_first() -> Result<Installation> {
    let found: Vec<Installation> = candidates().filter_map(|directory| inspect(&directory)).collect();
    match found.iter().find(|installation| installation.major >= OLDEST_MAJOR) {
        Some(installation) => Ok(installation.clone()),
        None => match found.first() {
            Some(old) => bail!(
                "PostgreSQL {} in {} is too old; version {OLDEST_MAJOR} or newer is needed: {WAYS_OUT}",
                old.major,
                old.directory.display()
            ),
            None => bail!("PostgreSQL is not installed: {WAYS_OUT}"),
        },
    }
}

fn candidates() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = env::split_paths(&path).collect();
    directories.extend(pg_config_directory());
    directories.extend(versions_in("/usr/lib/postgresql", ""));
    directories.extend(versions_in("/opt/homebrew/opt", "postgresql"));
    directories.extend(versions_in("/usr/local/opt", "postgresql"));
    directories.into_iter()
}

fn pg_config_directory() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").output().ok()?;
    let directory = String::from_utf8(output.stdout).ok()?;
    Some(PathBuf::from(directory.trim()))
}

/// The `bin` directories of versions installed side by side: `15`, `postgresql@17`; newest first.
fn versions_in(parent: &str, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut versions: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.trim_start_matches('@');
            // Homebrew's plain `postgresql` is a link to one of the others, or an old version: last.
            Some((version.parse().unwrap_or(0), entry.path().join("bin")))
        })
        .collect();
    versions.sort_by(|one, other| other.cmp(one));
    versions.into_iter().map(|(_, directory)| directory).collect()
}

fn inspect(directory: &Path) -> Option<Installation> {
    // The server runs in its own directory, where a relative entry of PATH would mean something else.
    let complete = directory.is_absolute() && PROGRAMS.iter().all(|name| directory.join(name).is_file());
    if !complete {
        return None;
    }
    let output = Command::new(directory.join("postgres")).arg("--version").output().ok()?;
    let major = parse_major(&String::from_utf8(output.stdout).ok()?)?;
    Some(Installation { directory: directory.to_owned(), major })
}

/// From `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)` or `… 18beta1`.
fn parse_major(version: &str) -> Option<u32> {
    let number = version.split_once("(PostgreSQL) ")?.1;
    let end = number.find(|character: char| !character.is_ascii_digit()).unwrap_or(number.len());
    number[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::parse_major;

    #[test]
    fn majors() {
        assert_eq!(parse_major("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_major("postgres (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(parse_major("postgres (PostgreSQL) 17\n"), Some(17));
        assert_eq!(parse_major("nonsense"), None);
    }
}
