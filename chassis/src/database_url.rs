//! The URL of a database: where it may be, and what its sessions are told.

use std::{
    fmt,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::sync::{Mutex, MutexGuard};

use crate::password_file::PasswordFile;

/// The URL of a database, with one host or several: postgres://user:password@one:5432,other:5432/database.
///
/// A new session is made at a host that accepts one which can write; they are tried in turn. That is what libpq calls
/// `target_session_attrs=read-write`. The parameter may be left out, because no process here has a use for a session
/// that can only read. `Debug` and `Display` omit the password.
#[derive(Clone)]
pub struct DatabaseUrl {
    /// At least one. They differ in host and port only.
    hosts: Vec<PgConnectOptions>,
    /// The host that a session was opened at last. Clones share it.
    last: Arc<AtomicUsize>,
    /// Held by whoever looks for another.
    search: Arc<Mutex<()>>,
    password_file: PasswordFile,
    pub(crate) told: Told,
}

/// What a session is told.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    /// These settings, by name.
    Settings(Vec<(&'static str, String)>),
    /// Nothing, because it is shared. Whoever runs a statement in it next would find the settings.
    Nothing,
}

/// A database URL that cannot be used. The error does not repeat the URL, which may contain a password.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidDatabaseUrl {
    /// It cannot be parsed.
    #[error("not a database URL; it looks like postgres://user:password@host:5432/database")]
    Unreadable,
    /// `target_session_attrs` wants sessions that may only be able to read.
    #[error("this process writes: leave target_session_attrs out, or say read-write or primary")]
    MayOnlyRead,
    /// The parameter `host` has several hosts.
    #[error("several hosts are written as postgres://user:password@one:5432,other:5432/database")]
    HostsInParameter,
    /// A CA is named, and the mode does not ask for its verdict. libpq would verify then, and sqlx does not.
    #[error("sslrootcert is for sslmode=verify-full, or verify-ca: with another sslmode, any certificate would do")]
    VerifiesNothing,
}

impl DatabaseUrl {
    /// Where the database may be, in the order of the URL.
    pub fn hosts(&self) -> &[PgConnectOptions] {
        &self.hosts
    }

    /// The place of the host that a session was opened at last. It comes first: one that is gone, and does not refuse,
    /// would otherwise cost every new session its time.
    pub(crate) fn last(&self) -> usize {
        self.last.load(Ordering::Relaxed)
    }

    /// Waits until nobody else looks for a host.
    pub(crate) async fn search(&self) -> MutexGuard<'_, ()> {
        self.search.lock().await
    }

    pub(crate) fn set_last(&self, place: usize) {
        self.last.store(place, Ordering::Relaxed);
    }

    /// The same database, whose password is in this file, if there is one.
    #[must_use]
    pub fn with_password_file(self, password_file: &PasswordFile) -> Self {
        Self { password_file: password_file.clone(), ..self }
    }

    /// The password for the next session, if it is in a file.
    pub(crate) async fn read_password(&self) -> Result<Option<String>, sqlx::Error> {
        self.password_file.read().await.map_err(|cause| sqlx::Error::Configuration(cause.into()))
    }

    /// The same database, whose sessions have this setting. A setting in the URL's `options` wins.
    #[must_use]
    pub fn with_setting(mut self, name: &'static str, value: impl Into<String>) -> Self {
        if let Told::Settings(settings) = &mut self.told {
            settings.retain(|(other, _)| *other != name);
            settings.push((name, value.into()));
        }
        self
    }

    /// The same database, where a session plans each statement once, whatever its parameters are. For a session whose
    /// statements have one good plan: planning a small batch anew takes longer than executing it.
    #[must_use]
    pub fn with_generic_plans(self) -> Self {
        self.with_setting("plan_cache_mode", "force_generic_plan")
    }

    /// The same database, whose sessions have this name in `pg_stat_activity`.
    #[must_use]
    pub fn with_application_name(mut self, name: &str) -> Self {
        self.hosts = self.hosts.into_iter().map(|host| host.application_name(name)).collect();
        self
    }

    /// Whether its sessions commit durably.
    pub(crate) fn is_durable(&self) -> bool {
        let says_off = |(name, value): &(&str, String)| *name == "synchronous_commit" && value == "off";
        !matches!(&self.told, Told::Settings(settings) if settings.iter().any(says_off))
    }

    /// The same database behind a pooler that shares sessions.
    pub(crate) fn shared(self) -> Self {
        Self { told: Told::Nothing, ..self }
    }

    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.told, Told::Nothing)
    }
}

impl FromStr for DatabaseUrl {
    type Err = InvalidDatabaseUrl;

    fn from_str(text: &str) -> Result<Self, InvalidDatabaseUrl> {
        let (scheme, rest) = text.split_once("://").ok_or(InvalidDatabaseUrl::Unreadable)?;
        if !["postgres", "postgresql"].contains(&scheme) {
            return Err(InvalidDatabaseUrl::Unreadable);
        }
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (path, parameters) = path.split_once('?').unwrap_or((path, ""));
        let (user, hosts) = authority.rsplit_once('@').map_or(("", authority), |(user, hosts)| (user, hosts));
        let parameters = understood(parameters)?;
        let one = |host: &str| {
            if host.is_empty() && hosts.contains(',') {
                return Err(InvalidDatabaseUrl::Unreadable);
            }
            let url = format!("{scheme}://{user}{}{host}{path}?{parameters}", if user.is_empty() { "" } else { "@" });
            // sqlx would send extra_float_digits at the start of a session, which poolers refuse. No column is a float.
            let options = PgConnectOptions::from_str(&url).map_err(|_| InvalidDatabaseUrl::Unreadable)?;
            if names_ca(&parameters) && !matches!(options.get_ssl_mode(), PgSslMode::VerifyFull | PgSslMode::VerifyCa) {
                return Err(InvalidDatabaseUrl::VerifiesNothing);
            }
            Ok(options.extra_float_digits(None))
        };
        let hosts = hosts.split(',').map(one).collect::<Result<_, _>>()?;
        Ok(Self {
            hosts,
            last: Arc::default(),
            search: Arc::default(),
            password_file: PasswordFile::default(),
            told: Told::Settings(Vec::new()),
        })
    }
}

/// The parameters without those that are understood here.
fn understood(parameters: &str) -> Result<String, InvalidDatabaseUrl> {
    let mut others = Vec::new();
    for parameter in parameters.split('&') {
        match parameter.split_once('=') {
            Some(("target_session_attrs", "read-write" | "primary")) => {}
            Some(("target_session_attrs", _)) => return Err(InvalidDatabaseUrl::MayOnlyRead),
            Some(("host" | "hostaddr", hosts)) if hosts.contains(',') || hosts.contains("%2C") => {
                return Err(InvalidDatabaseUrl::HostsInParameter);
            }
            _ => others.push(parameter),
        }
    }
    Ok(others.join("&"))
}

fn names_ca(parameters: &str) -> bool {
    let mut names = parameters.split('&').filter_map(|parameter| parameter.split_once('=').map(|(name, _)| name));
    names.any(|name| ["sslrootcert", "ssl-root-cert", "ssl-ca"].contains(&name))
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = &self.hosts[0];
        let hosts: Vec<_> = self.hosts.iter().map(|host| format!("{}:{}", host.get_host(), host.get_port())).collect();
        write!(f, "{}@{}/{}", first.get_username(), hosts.join(","), first.get_database().unwrap_or(""))
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::{DatabaseUrl, InvalidDatabaseUrl};

    fn parse(text: &str) -> Result<String, InvalidDatabaseUrl> {
        text.parse::<DatabaseUrl>().map(|url| url.to_string())
    }

    #[test]
    fn a_url_names_one_host_or_several_each_with_its_port() {
        for (text, read) in [
            ("postgres://me:secret@db/orders", "me@db:5432/orders"),
            ("postgresql://me:secret@db:6000/orders?sslmode=disable", "me@db:6000/orders"),
            ("postgres://me:secret@a:1,b,c:3/orders?target_session_attrs=read-write", "me@a:1,b:5432,c:3/orders"),
            ("postgres://me@[::1]:5433,[::2]/orders?target_session_attrs=primary", "me@[::1]:5433,[::2]:5432/orders"),
            ("postgres://me:p%40ss@a,b/orders", "me@a:5432,b:5432/orders"),
            ("postgres://me@db/orders?sslrootcert=ca.pem&sslmode=verify-full", "me@db:5432/orders"),
            ("postgres://me@db/orders?sslmode=verify-ca&sslrootcert=ca.pem", "me@db:5432/orders"),
        ] {
            assert_eq!(parse(text).as_deref(), Ok(read), "{text}");
        }
    }

    #[test]
    fn a_url_that_cannot_be_used_is_refused_with_the_reason() {
        for (text, reason) in [
            ("db:5432/orders", InvalidDatabaseUrl::Unreadable),
            ("mysql://me@db/orders", InvalidDatabaseUrl::Unreadable),
            ("postgres://me@a:one,b/orders", InvalidDatabaseUrl::Unreadable),
            ("postgres://me@a,,b/orders", InvalidDatabaseUrl::Unreadable),
            ("postgres://me@a,b/orders?target_session_attrs=any", InvalidDatabaseUrl::MayOnlyRead),
            ("postgres://me@a,b/orders?sslmode=disable&target_session_attrs=standby", InvalidDatabaseUrl::MayOnlyRead),
            ("postgres://me@/orders?host=a,b", InvalidDatabaseUrl::HostsInParameter),
            ("postgres://me@/orders?host=a%2Cb", InvalidDatabaseUrl::HostsInParameter),
            ("postgres://me@db/orders?sslrootcert=ca.pem", InvalidDatabaseUrl::VerifiesNothing),
            ("postgres://me@db/orders?sslmode=require&sslrootcert=ca.pem", InvalidDatabaseUrl::VerifiesNothing),
        ] {
            assert_eq!(parse(text), Err(reason), "{text}");
        }
    }

    #[test]
    fn no_form_of_a_url_shows_the_password() {
        let url: DatabaseUrl = "postgres://me:secret@a,b/orders".parse().unwrap();
        assert!(!format!("{url} {url:?}").contains("secret"));
    }
}
