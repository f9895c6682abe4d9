//! Finds the programs of a PostgreSQL server on this machine.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

/// PostgreSQL maintains no older version.
const OLDEST_MAJOR: u32 = 14;

const PROGRAMS: [&str; 3] = ["initdb", "postgres", "pg_ctl"];

pub(super) const WAYS_OUT: &str = "install the package `postgresql`, or put initdb in PATH, \
                        or set POSTGRES_URL to a superuser's URL of an existing server";

/// A directory that holds `initdb`, `postgres` and `pg_ctl`, and their major version.
#[derive(Debug, Clone)]
pub struct Installation {
    directory: PathBuf,
    major: u32,
}

impl Installation {
    /// The path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The path of a client program of the same version. The directory may hold only links to the server's programs; then
    /// the clients are beside the files they lead to.
    pub fn client(&self, name: &str) -> PathBuf {
        let server = fs::canonicalize(self.program("postgres")).unwrap_or_default();
        let beside_server = server.with_file_name(name);
        if beside_server.is_file() { beside_server } else { self.program(name) }
    }

    /// The major version, such as 17.
    pub fn major(&self) -> u32 {
        self.major
    }
}

/// The first installation that is new enough, from PATH, `pg_config`, Debian (newest first) or Homebrew.
pub fn find() -> Result<Installation> {
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

/// Whether any version is installed.
pub(super) fn is_installed() -> bool {
    candidates().any(|directory| inspect(&directory).is_some())
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
