//! Erases a customer from the tables of a service: the command `erase-customer`.
//!
//! Orders and what was done for them stay: stock, accounts and audits need them. The customer's id in them is replaced.
//!
//! It works in pieces. Each is one transaction, which also counts itself in the record of the erasure. Whatever stops the
//! command, the record says what was done, and the same command again does the rest.

use std::io::{self, Write};

use clap::Args;
use sqlx::{Connection, PgConnection, migrate::Migrator};

use crate::{DatabaseUrl, Fields, NotOwnSession, PasswordFile, SchemaError, check_schema, require_own_session};

/// What stands where the id of a customer was. [`Fields::name`] refuses it, so no caller can use it as an id.
///
/// It is the same for all customers, so no column tells which orders were of one customer. By a hash, whoever knows ids could
/// find out whose they were.
pub const ERASED: &str = "(erased)";

/// Arguments of a service's command `erase-customer`.
#[derive(Args, Clone, Debug)]
pub struct EraseArguments {
    /// Id of the customer.
    #[arg(value_parser = parse_customer)]
    customer_id: String,
    /// Your name, kept in the record.
    #[arg(long, env = "USER", value_parser = parse_text)]
    by: String,
    /// Reason, kept in the record. So it must not name the customer: give the number of the request.
    #[arg(long, value_parser = parse_text)]
    reason: String,
    /// Where the database's password is.
    #[command(flatten)]
    password_file: PasswordFile,
}

fn parse_customer(text: &str) -> Result<String, String> {
    let mut fields = Fields::default();
    fields.name("customer_id", text);
    fields.finish(text.to_owned()).map_err(|bad| bad.into_iter().map(|bad| bad.description).collect())
}

/// Parses a name or a reason that is kept.
///
/// # Errors
/// What is wrong with it.
pub fn parse_text(text: &str) -> Result<String, &'static str> {
    let text = text.trim();
    let is_sound = (1..=1000).contains(&text.chars().count()) && !text.chars().any(char::is_control);
    is_sound.then(|| text.to_owned()).ok_or("must be 1 to 1000 characters, none of them control characters")
}

impl EraseArguments {
    /// The record stays when the customer is gone.
    fn check(&self) -> Result<(), EraseError> {
        let kept = [("--by", &self.by), ("--reason", &self.reason)];
        let naming = kept.iter().filter(|(_, text)| names(text, &self.customer_id)).map(|(flag, _)| *flag);
        let naming: Vec<&str> = naming.collect();
        if naming.is_empty() { Ok(()) } else { Err(EraseError::NamesCustomer(naming.join(" and "))) }
    }
}

/// Whether the id is in the text, not as a part of a longer word.
fn names(text: &str, customer_id: &str) -> bool {
    text.match_indices(customer_id).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + customer_id.len()..].chars().next();
        ![before, after].into_iter().flatten().any(char::is_alphanumeric)
    })
}

/// What one transaction has erased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The customer's id is gone from so many orders, and from so many events that were kept.
    Erased {
        /// Orders, or what was done for them.
        orders: i64,
        /// Their events.
        events: i64,
    },
    /// Nothing is left, and the record says so.
    Finished,
    /// Nothing more can be erased now: why, and what to do.
    Held(String),
}

/// How a service erases a customer from its own tables.
pub trait Erase {
    /// Begins a record. Returns its id.
    ///
    /// # Errors
    /// Those of the database.
    fn begin(
        &self,
        connection: &mut PgConnection,
        by: &str,
        reason: &str,
    ) -> impl Future<Output = Result<i64, sqlx::Error>>;

    /// Makes PostgreSQL forget what it knew of the customer for planning, which a reader of a table can see. Of a table without
    /// a row it forgets nothing. So each of these must still have those that were erased.
    ///
    /// # Errors
    /// Those of the database.
    fn renew_statistics(&self, connection: &mut PgConnection) -> impl Future<Output = Result<(), sqlx::Error>>;

    /// Erases the customer from some hundred orders and counts them in the record, in one transaction.
    ///
    /// # Errors
    /// Those of the database.
    fn erase_piece(
        &self,
        connection: &mut PgConnection,
        erasure_id: i64,
        customer_id: &str,
    ) -> impl Future<Output = Result<Piece, sqlx::Error>>;
}

/// Why a customer is not erased, on one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    /// What is kept would name the customer.
    #[error("{0} must not name the customer, since the record of the erasure is kept: give the number of the request")]
    NamesCustomer(String),
    /// The database cannot be reached.
    #[error("cannot connect to {database}")]
    Connect {
        /// The database, without the password.
        database: String,
        /// The cause.
        source: sqlx::Error,
    },
    /// The lock would not keep others out.
    #[error("cannot erase in {database}")]
    Session {
        /// The database, without the password.
        database: String,
        /// The cause.
        source: NotOwnSession,
    },
    /// The database has another schema.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// Another command holds the lock.
    #[error("another erase-customer or a resend works on this database: repeat the command when it has ended")]
    Busy,
    /// The role may not erase.
    #[error("this role may not erase customers: run the command as the role that owns the database")]
    NotOwner,
    /// Some orders still name the customer.
    #[error("not all is erased: {0}")]
    Held(String),
    /// The output cannot be written.
    #[error("cannot write the output; what was erased until then stays erased: repeat the command to go on")]
    Output(#[from] io::Error),
    /// The planner may still know the customer.
    #[error("PostgreSQL's statistics may still hold the customer's id: repeat the command")]
    Statistics(#[source] sqlx::Error),
    /// The database failed.
    #[error("the database failed; what was erased until then stays erased: repeat the command to go on")]
    Database(#[source] sqlx::Error),
}

impl From<sqlx::Error> for EraseError {
    fn from(cause: sqlx::Error) -> Self {
        let code = cause.as_database_error().and_then(sqlx::error::DatabaseError::code);
        if code.as_deref() == Some("42501") { Self::NotOwner } else { Self::Database(cause) }
    }
}

/// The lock that an erasure holds against others, and against whoever sends events again: those were made from orders that may
/// have been erased since.
const LOCK: i64 = 0x6f75_7462_6f78_0001;

/// Keeps erasures out until this connection ends. False if one is under way.
///
/// # Errors
/// Those of the database.
pub async fn keep_erasures_out(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let lock = "-- erase: keep erasures out
        SELECT pg_try_advisory_lock_shared($1)";
    sqlx::query_scalar(lock).bind(LOCK).fetch_one(connection).await
}

async fn keep_others_out(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let lock = "-- erase: keep others out
        SELECT pg_try_advisory_lock($1)";
    sqlx::query_scalar(lock).bind(LOCK).fetch_one(connection).await
}

/// The command `erase-customer`, as the owner of the database.
///
/// It erases what it can, and does not refuse because of one order that has to wait. So a customer who orders all the time
/// cannot hold up the erasure, and what is personal is there for no longer than it must.
///
/// The last transaction has found no order of the customer that it could erase. An order that is placed later belongs to a
/// customer who came back.
///
/// # Errors
/// [`EraseError`].
pub async fn erase(
    url: &DatabaseUrl,
    migrators: &[&Migrator],
    arguments: &EraseArguments,
    service: &impl Erase,
) -> Result<(), EraseError> {
    arguments.check()?;
    let EraseArguments { customer_id, by, reason, password_file } = arguments;
    let mut connection = connect(url.clone().with_password_file(password_file)).await?;
    check_schema(&mut connection, migrators).await?;
    if !keep_others_out(&mut connection).await? {
        return Err(EraseError::Busy);
    }
    let erasure_id = service.begin(&mut connection, by, reason).await?;
    let (mut orders_erased, mut events_erased) = (0, 0);
    let held = loop {
        match service.erase_piece(&mut connection, erasure_id, customer_id).await? {
            Piece::Erased { orders, events } => {
                orders_erased += orders;
                events_erased += events;
                say(&format!("erased from {orders_erased} orders so far\n"))?;
            }
            Piece::Finished => break None,
            Piece::Held(why) => break Some(why),
        }
    };
    say(&summary(orders_erased, events_erased, erasure_id))?;
    let wait = "-- erase: wait longer\n SET statement_timeout = '10min'";
    // It reads a sample of a whole table, and waits for a VACUUM of it.
    sqlx::query(wait).execute(&mut connection).await?;
    service.renew_statistics(&mut connection).await.map_err(EraseError::Statistics)?;
    connection.close().await?;
    held.map_or(Ok(()), |why| Err(EraseError::Held(why)))
}

/// Whoever mistypes an id has to notice: the record cannot tell.
fn summary(orders: i64, events: i64, erasure_id: i64) -> String {
    if orders == 0 {
        return format!(
            "erased nothing, since no order that can be erased names this customer: erasure {erasure_id}\n"
        );
    }
    format!("erased from {orders} orders and {events} discarded events: erasure {erasure_id}\n")
}

/// Like the services, it plans no scan of a whole table. No statement and no lock waits for ever, and the server undoes a piece
/// that a sleeping machine has left open.
async fn connect(url: DatabaseUrl) -> Result<PgConnection, EraseError> {
    let url = url.with_setting("enable_seqscan", "off").with_setting("statement_timeout", "30s");
    let url = url.with_setting("idle_in_transaction_session_timeout", "10s");
    let connected = url.connect_in_time().await;
    let connection = connected.map_err(|source| EraseError::Connect { database: url.to_string(), source })?;
    require_own_session(&url).await.map_err(|source| EraseError::Session { database: url.to_string(), source })?;
    Ok(connection)
}

fn say(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use super::{ERASED, EraseArguments, EraseError, PasswordFile, names, parse_customer};

    #[test]
    fn no_customer_can_be_called_what_stands_for_an_erased_one() {
        assert!(parse_customer(ERASED).is_err());
        assert_eq!(parse_customer("ann"), Ok("ann".to_owned()));
    }

    #[test]
    fn a_text_names_a_customer_by_the_whole_id_only() {
        for text in ["ann", "request of ann.", "(ann) 4711", "joann and ann", "ann\u{2026}"] {
            assert!(names(text, "ann"), "{text}");
        }
        for text in ["", "request 4711", "annual cleaning of joann", "ann7", "ANN"] {
            assert!(!names(text, "ann"), "{text}");
        }
        assert!(names("about a.b-c", "a.b-c") && !names("about xa.b-c", "a.b-c"));
    }

    #[test]
    fn a_record_that_would_name_the_customer_is_refused_with_each_flag_that_does() {
        let check = |by: &str, reason: &str| {
            let arguments = EraseArguments {
                customer_id: "ann".into(),
                by: by.into(),
                reason: reason.into(),
                password_file: PasswordFile::default(),
            };
            arguments.check().map_err(|error| match error {
                EraseError::NamesCustomer(flags) => flags,
                other => panic!("{other}"),
            })
        };
        assert_eq!(check("bob", "request 4711"), Ok(()));
        assert_eq!(check("bob", "ann asked"), Err("--reason".into()));
        assert_eq!(check("ann", "ann asked"), Err("--by and --reason".into()));
    }
}
