//! Finds out whether a pooler stands before the database, and whether work is safe behind it.

use sqlx::{Connection, PgConnection, Row};
use tokio::time::timeout;

use crate::{DatabaseUrl, SchemaError, session::timed_out};

/// How many clients ask. A name may lead to several poolers: if there are fewer than clients, two clients meet at one.
const CLIENTS: usize = 5;
/// How often each of them asks. A pooler that is busy with others may give the same session again by chance.
const LOOKS: usize = 4;

/// Whether a session serves one client until that leaves, or a transaction of one and then a transaction of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sessions {
    Own,
    Shared,
}

/// Why a session may be another client's, too.
#[derive(Debug, thiserror::Error)]
pub enum NotOwnSession {
    /// A pooler gives it to others in between.
    #[error("a pooler shares its sessions: name the database itself, or a pooler with pool_mode = session")]
    Pooler,
    /// It could not be found out.
    #[error("cannot look for a pooler")]
    Look(#[from] SchemaError),
}

/// Makes sure that what is locked or set in a session of this database stays there, and ends with it.
///
/// # Errors
/// [`NotOwnSession`].
pub async fn require_own_session(url: &DatabaseUrl) -> Result<(), NotOwnSession> {
    match timeout(url.connect_limit(), find_sessions(url)).await.unwrap_or_else(|_| Err(timed_out().into()))? {
        Sessions::Own => Ok(()),
        Sessions::Shared => Err(NotOwnSession::Pooler),
    }
}

/// Finds out how sessions are given out. Some clients ask in turn which process of the server serves them. Without a
/// pooler, or with one that gives a session to each client, the answers never change and never meet.
///
/// # Errors
/// Those of the database, and [`SchemaError::Pooler`] if work behind this pooler is not safe.
pub(crate) async fn find_sessions(url: &DatabaseUrl) -> Result<Sessions, SchemaError> {
    let is_durable = url.is_durable();
    url.first_host(|host| async move {
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(PgConnection::connect_with(&host).await?);
        }
        let found = match look(&mut clients, is_durable).await {
            // Another host may do.
            Err(SchemaError::Database(cause)) => return Err(cause),
            found => found,
        };
        for client in clients {
            client.close().await?;
        }
        Ok(found)
    })
    .await?
}

async fn look(clients: &mut [PgConnection], is_durable: bool) -> Result<Sessions, SchemaError> {
    let mut first = Vec::new();
    for client in &mut *clients {
        first.push(backend(client).await?);
    }
    for _ in 0..LOOKS {
        let mut now = Vec::new();
        for client in &mut *clients {
            now.push(backend(client).await?);
        }
        if now != first || has_twice(&now) {
            check_statements(clients).await?;
            check_role(&mut clients[0], is_durable).await?;
            return Ok(Sessions::Shared);
        }
    }
    Ok(Sessions::Own)
}

fn has_twice(backends: &[i32]) -> bool {
    backends.iter().enumerate().any(|(place, backend)| backends[..place].contains(backend))
}

/// The process that serves this statement. As a simple query: it needs no prepared statement, and leaves nothing behind.
async fn backend(client: &mut PgConnection) -> Result<i32, sqlx::Error> {
    sqlx::raw_sql("-- chassis: find backend\nSELECT pg_backend_pid()").fetch_one(client).await?.try_get(0)
}

/// Whether the pooler carries prepared statements from session to session. If it does not, clients execute each other's
/// statements, because all of them use the same names.
async fn check_statements(clients: &mut [PgConnection]) -> Result<(), SchemaError> {
    for number in 0..LOOKS {
        for client in &mut *clients {
            let asked = sqlx::query_scalar::<_, i64>("-- chassis: check statements\nSELECT $1::bigint");
            let number = i64::try_from(number).unwrap_or_default();
            let carried = match asked.bind(number).fetch_one(client).await {
                Ok(answer) => answer == number,
                // No such statement, or another of that name, in a session that was another client's.
                Err(sqlx::Error::Database(error))
                    if ["26000", "42P05"].map(Some).contains(&error.code().as_deref()) =>
                {
                    false
                }
                Err(other) => return Err(other.into()),
            };
            if !carried {
                return Err(SchemaError::Pooler(
                    "it shares sessions, but does not carry prepared statements: clients would execute each other's. \
                     Use PgBouncer 1.21 or later with max_prepared_statements above 0, or pool_mode = session, or \
                     connect to the database itself"
                        .into(),
                ));
            }
        }
    }
    Ok(())
}

/// A shared session is told nothing, so the role must say it.
async fn check_role(client: &mut PgConnection, is_durable: bool) -> Result<(), SchemaError> {
    let show = "-- chassis: check role
        SELECT current_user::text, current_setting('default_transaction_isolation'),
            coalesce(current_schema()::text, ''), current_setting('synchronous_commit')";
    let row = sqlx::raw_sql(show).fetch_one(client).await?;
    let (role, isolation): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    let (schema, commit): (String, String) = (row.try_get(2)?, row.try_get(3)?);
    let mut wrong = Vec::new();
    if isolation != "read committed" {
        wrong.push(format!("ALTER ROLE {role} SET default_transaction_isolation = 'read committed'"));
    }
    if schema.is_empty() {
        wrong.push(format!("ALTER ROLE {role} SET search_path = public"));
    }
    if is_durable && commit == "off" {
        wrong.push(format!("ALTER ROLE {role} SET synchronous_commit = on"));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(SchemaError::Pooler(format!(
        "it shares sessions, and those of {role} are not as work needs them: run {}, and reconnect the pooler",
        wrong.join("; ")
    )))
}
