//! Opens sessions of a database, tells them what work in them relies on, and asks whether they can write.

use std::{io, time::Duration};

use sqlx::{Connection, PgConnection, Row, postgres::PgConnectOptions};
use tokio::time::timeout;

use crate::{DatabaseUrl, database_url::Told};

/// How long a host may take, if it is the only one.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long one of several hosts may take, since another may be the one that can write.
const HOST_LIMIT: Duration = Duration::from_secs(2);

/// What every session relies on. A role, a database or a server may have other defaults.
///
/// - Statements are written for read committed. At a higher level they fail when others write, and callers of an order
///   would see that.
/// - `migrate` makes the tables in the first schema of the path that exists. The path then ends there: a session that
///   looks elsewhere too could find a stranger's tables.
/// - A unit of work has a time limit of its own, and a lock that it waits for is part of it. PostgreSQL 17 and later
///   have a limit for transactions.
/// - A commit is on disk when it is acknowledged. Any level above `off` is left as it is.
///
/// What the URL itself says in `options` wins, even over the last.
///
/// sqlx itself sends the time zone (UTC), the format of dates and the encoding when a session starts.
const EVERY_SESSION: [(&str, &str); 5] = [
    ("default_transaction_isolation", "read committed"),
    ("search_path", "public"),
    ("lock_timeout", "0"),
    ("transaction_timeout", "0"),
    ("synchronous_commit", "on"),
];

impl DatabaseUrl {
    /// Opens a session that can write, at the first host that offers one.
    ///
    /// # Errors
    /// Those of the server; of several hosts, what each of them said.
    pub async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        self.first_host(|host| async move {
            let connection = PgConnection::connect_with(&host).await?;
            prepare(connection, &self.told).await
        })
        .await
    }

    /// The same within [`Self::connect_limit`].
    ///
    /// # Errors
    /// Those of [`Self::connect`], and an [`sqlx::Error::Io`] of kind `TimedOut`.
    pub async fn connect_in_time(&self) -> Result<PgConnection, sqlx::Error> {
        timeout(self.connect_limit(), self.connect()).await.unwrap_or_else(|_| Err(timed_out()))
    }

    /// How long [`Self::connect`] may take. It does not limit itself.
    pub fn connect_limit(&self) -> Duration {
        CONNECT_LIMIT.max(HOST_LIMIT * u32::try_from(self.hosts().len()).unwrap_or(u32::MAX))
    }

    /// Connects to the first host for which `connect` succeeds. The one that it succeeded for last comes first. The password
    /// is read from its file each time, if it is in one.
    ///
    /// # Errors
    /// Those of `connect`; of several hosts, what each of them said. [`sqlx::Error::Configuration`] if the password file
    /// cannot be used.
    pub async fn first_host<T, F>(&self, connect: impl Fn(PgConnectOptions) -> F) -> Result<T, sqlx::Error>
    where
        F: Future<Output = Result<T, sqlx::Error>>,
    {
        let password = self.read_password().await?;
        let host = |place: usize| match &password {
            Some(password) => self.hosts()[place].clone().password(password),
            None => self.hosts()[place].clone(),
        };
        if self.hosts().len() == 1 {
            return connect(host(0)).await.map_err(name_files);
        }
        let at = async |place: usize| {
            let connected = timeout(HOST_LIMIT, connect(host(place))).await;
            connected.unwrap_or_else(|_| Err(timed_out())).map_err(name_files)
        };
        let first = self.last();
        let cause = match at(first).await {
            Err(cause) => cause,
            connected => return connected,
        };
        // One looks at the other hosts for all. After a failover every session is opened anew, and if each of them logged
        // in everywhere, the server that can write would have no time for it.
        let _search = self.search().await;
        if self.last() != first
            && let Ok(connected) = at(self.last()).await
        {
            return Ok(connected);
        }
        let mut failed = vec![(&self.hosts()[first], cause)];
        for place in (0..self.hosts().len()).filter(|place| *place != first) {
            match at(place).await {
                Ok(connected) => {
                    self.set_last(place);
                    return Ok(connected);
                }
                Err(cause) => failed.push((&self.hosts()[place], cause)),
            }
        }
        Err(of_all(failed))
    }
}

/// sqlx leaves out which file it cannot read.
fn name_files(error: sqlx::Error) -> sqlx::Error {
    match error {
        sqlx::Error::Io(cause)
            if [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied].contains(&cause.kind()) =>
        {
            let text = format!("{cause}; the database's URL names a file or a socket that this process cannot read");
            sqlx::Error::Io(io::Error::new(cause.kind(), text))
        }
        error => error,
    }
}

/// The error of whoever gives up waiting for the database.
pub fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(io::ErrorKind::TimedOut.into())
}

/// One error for several hosts. If all of them refuse for good, so does this error.
fn of_all(mut failed: Vec<(&PgConnectOptions, sqlx::Error)>) -> sqlx::Error {
    if failed.iter().all(|(_, cause)| is_refused(cause)) {
        return failed.swap_remove(0).1;
    }
    let said = |(host, cause): &(&PgConnectOptions, _)| format!("{}:{}: {cause}", host.get_host(), host.get_port());
    let said: Vec<_> = failed.iter().map(said).collect();
    sqlx::Error::Io(io::Error::other(said.join("; ")))
}

/// Whether the server refuses for good: the credentials (SQLSTATE class 28), or a database that does not exist.
pub(crate) fn is_refused(error: &sqlx::Error) -> bool {
    let for_good = |code: &str| code.starts_with("28") || code == "3D000";
    matches!(error, sqlx::Error::Database(error) if error.code().is_some_and(|code| for_good(&code)))
}

/// Refuses a session that can only read, and tells another what it has to know.
///
/// A session that can only read is of no use: after a failover the old server may still accept some, or a proxy may
/// lead to a standby.
async fn prepare(mut connection: PgConnection, told: &Told) -> Result<PgConnection, sqlx::Error> {
    // A simple query goes through any pooler.
    let ask = "-- chassis: ask whether it can write\nSELECT current_setting('transaction_read_only')";
    let read_only: String = sqlx::raw_sql(ask).fetch_one(&mut connection).await?.try_get(0)?;
    if read_only == "on" {
        drop(timeout(HOST_LIMIT, connection.close()).await);
        return Err(sqlx::Error::Io(io::Error::new(
            io::ErrorKind::ReadOnlyFilesystem,
            "this session can only read: it is a standby's, or its default_transaction_read_only is on",
        )));
    }
    if let Told::Settings(of_url) = told {
        tell(&mut connection, of_url).await?;
    }
    Ok(connection)
}

/// A server of an earlier version lacks some of the settings, and the limits that they would change.
async fn tell(connection: &mut PgConnection, of_url: &[(&'static str, String)]) -> Result<(), sqlx::Error> {
    let (names, settings): (Vec<_>, Vec<_>) = all(of_url).into_iter().unzip();
    let tell = sqlx::query(
        "-- chassis: tell session
        SELECT set_config(name, CASE name
            WHEN 'search_path' THEN coalesce(quote_ident(current_schema()), told.setting) ELSE told.setting END, false)
        FROM unnest($1::text[], $2::text[]) AS told (name, setting) JOIN pg_settings USING (name)
        WHERE source <> 'client'
          AND NOT (name = 'synchronous_commit' AND told.setting = 'on' AND pg_settings.setting <> 'off')",
    );
    tell.bind(names).bind(settings).persistent(false).execute(connection).await.map(drop)
}

/// Makes sure that what this transaction has seen is as durable as its own writes: once its commit is acknowledged, or the
/// statement if it is a transaction by itself. For whoever answers that earlier work is done, and writes nothing.
///
/// To see a commit is not enough. If a server crashes while a commit waits for a synchronous standby, it shows that
/// commit after its restart. The standby may never have had it, and may take over later. A record in the log is behind
/// everything that was seen, so what waits for this record waits for all of that.
///
/// # Errors
/// Those of the database.
pub async fn confirm_seen(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let confirm = "-- chassis: confirm what was seen
        SELECT pg_logical_emit_message(true, 'outbox.seen', '')::text";
    sqlx::query(confirm).execute(connection).await.map(drop)
}

/// A setting of the URL replaces the one of every session.
fn all<'s>(of_url: &'s [(&'static str, String)]) -> Vec<(&'static str, &'s str)> {
    let replaced = |name| of_url.iter().any(|(other, _)| *other == name);
    let kept = EVERY_SESSION.into_iter().filter(|(name, _)| !replaced(*name));
    kept.chain(of_url.iter().map(|(name, setting)| (*name, setting.as_str()))).collect()
}

#[cfg(test)]
mod tests {
    use super::{EVERY_SESSION, all};

    #[test]
    fn a_setting_of_the_url_replaces_that_of_every_session() {
        let of_url = [("synchronous_commit", "off".into()), ("jit", "off".into())];
        let told = all(&of_url);
        assert_eq!(told.len(), EVERY_SESSION.len() + 1);
        assert!(told.contains(&("synchronous_commit", "off")) && !told.contains(&("synchronous_commit", "on")));
        assert!(told.contains(&("jit", "off")) && told.contains(&("lock_timeout", "0")));
    }
}
