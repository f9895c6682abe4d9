//! Finds the transactions that hold a migration up.

use std::fmt;

use sqlx::{FromRow, PgConnection};

/// A transaction that holds a migration up, or would.
#[derive(Clone, Debug, FromRow, PartialEq)]
pub(super) struct Holder {
    /// Tells it from all others of the server.
    transaction: String,
    /// None of a prepared transaction, which has no session.
    pid: Option<i32>,
    role: Option<String>,
    application_name: Option<String>,
    /// Only roles with the rights of `pg_read_all_stats` see this of another role's session.
    state: Option<String>,
    since: Option<String>,
}

impl Holder {
    pub(super) fn is_in(&self, others: &[Self]) -> bool {
        others.iter().any(|other| other.transaction == self.transaction)
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(pid) = self.pid.filter(|pid| *pid != 0) else {
            return write!(f, "a prepared transaction (see pg_prepared_xacts)");
        };
        write!(f, "pid {pid}")?;
        let of = |label: &str, value: &Option<String>| {
            value.as_ref().filter(|value| !value.is_empty()).map(|value| format!("{label}{value}"))
        };
        let known = [
            of("", &self.application_name),
            of("role ", &self.role),
            of("", &self.state),
            of("open since ", &self.since),
        ];
        let known: Vec<String> = known.into_iter().flatten().collect();
        if known.is_empty() { Ok(()) } else { write!(f, " ({})", known.join(", ")) }
    }
}

/// As messages list them.
pub(super) fn list(holders: &[Holder]) -> String {
    holders.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// The transactions that are open on a table which the statements name. They may name more than they lock: to wait for
/// one transaction too many costs nobody anything.
///
/// A vacuum is left out. If the server began it by itself, it gives way to a migration, so to wait would take longer.
pub(super) async fn find_open(connection: &mut PgConnection, statements: &str) -> Result<Vec<Holder>, sqlx::Error> {
    let open = sqlx::query_as(
        "-- migrate: find open transactions
        SELECT DISTINCT virtualtransaction AS transaction, holding.pid, usename::text AS role, application_name, state,
            date_trunc('second', xact_start)::text AS since
        FROM pg_locks AS holding
        JOIN pg_class ON pg_class.oid = holding.relation
        LEFT JOIN pg_stat_activity AS session ON session.pid = holding.pid
        WHERE holding.database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND holding.granted
          AND holding.mode <> 'ShareUpdateExclusiveLock'
          AND holding.pid IS DISTINCT FROM pg_backend_pid()
          AND relkind IN ('r', 'p')
          AND relnamespace = current_schema()::regnamespace
          AND strpos($1, relname) > 0",
    );
    open.bind(statements).fetch_all(connection).await
}

/// The transactions that a session waits for at this moment.
pub(super) async fn find_blocking(connection: &mut PgConnection, pid: i32) -> Result<Vec<Holder>, sqlx::Error> {
    let blocking = sqlx::query_as(
        "-- migrate: find blocking transactions
        SELECT DISTINCT blocking.pid::text AS transaction, blocking.pid, usename::text AS role, application_name, state,
            date_trunc('second', xact_start)::text AS since
        FROM unnest(pg_blocking_pids($1)) AS blocking (pid)
        LEFT JOIN pg_stat_activity AS session USING (pid)",
    );
    blocking.bind(pid).fetch_all(connection).await
}
