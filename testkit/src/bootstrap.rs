//! What the superuser makes once per server: the roles, and the two databases.

use anyhow::{Context, Result};
use sqlx::{Connection, Executor, QueryBuilder};

use crate::postgres::Server;

/// One transaction under a lock of our own: test processes bootstrap at the same time, and PostgreSQL fails all but one
/// of those that alter a role at once ("tuple concurrently updated"). The end of the transaction unlocks.
const ROLES: &str = concat!(
    "-- testkit: make roles\n",
    "BEGIN; SELECT pg_advisory_xact_lock(7308895183250579834);\n",
    include_str!("../../migrations/bootstrap/1_roles.sql"),
    "\nCOMMIT;"
);

const DATABASES: &str = include_str!("../../migrations/bootstrap/2_databases.sql");

/// "duplicate_database", or "unique_violation" for the slower of two that make the same one at the same moment.
const EXISTS: [&str; 2] = ["42P04", "23505"];

/// Makes the roles, or brings them up to date.
pub async fn bootstrap(server: &Server) -> Result<()> {
    let mut connection = server.connect().await?;
    sqlx::raw_sql(ROLES).execute(&mut connection).await.context("cannot make the roles")?;
    Ok(())
}

/// Makes the databases that do not exist yet; their owners are roles of [`bootstrap`].
pub async fn create_databases(server: &Server) -> Result<()> {
    let mut connection = server.connect().await?;
    // One by one: several in one message are a transaction, in which CREATE DATABASE is not allowed.
    for statement in DATABASES.split_inclusive(';').filter(|statement| statement.ends_with(';')) {
        let outcome = sqlx::raw_sql(statement).execute(&mut connection).await;
        match outcome {
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| EXISTS.contains(&&*code)) => {}
            outcome => outcome.map(drop).context("cannot make the databases")?,
        }
    }
    Ok(())
}

/// Makes a database of any name; its owner is a role of [`bootstrap`].
pub async fn create_database(server: &Server, name: &str, owner: &str) -> Result<()> {
    let mut connection = server.connect().await?;
    // Of template0, which nobody can be connected to: a template in use cannot be copied.
    let mut statement = QueryBuilder::<sqlx::Postgres>::new("-- testkit: create database\nCREATE DATABASE ");
    statement.push(name).push(" TEMPLATE template0 OWNER ").push(owner);
    connection.execute(statement.build().persistent(false)).await?;
    Ok(connection.close().await?)
}
