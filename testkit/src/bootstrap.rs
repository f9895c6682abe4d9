//! Creates, once per server and as the superuser, the roles and the databases.

use anyhow::{Context, Result};
use sqlx::{Connection, Executor, QueryBuilder};

use crate::postgres::Server;

/// Test processes bootstrap at the same time. If several alter a role at once, PostgreSQL fails all but one ("tuple
/// concurrently updated"), so each does it under an advisory lock. The end of the transaction unlocks.
const ROLES: &str = concat!(
    "-- testkit: make roles\n",
    "BEGIN; SELECT pg_advisory_xact_lock(7308895183250579834);\n",
    include_str!("../../migrations/bootstrap/1_roles.sql"),
    "\nCOMMIT;"
);

const DATABASES: &str = include_str!("../../migrations/bootstrap/2_databases.sql");

/// "duplicate_database"; or "unique_violation", if two processes create it at the same moment.
const EXISTS: [&str; 2] = ["42P04", "23505"];

/// Creates the roles, or brings them up to date.
pub async fn bootstrap(server: &Server) -> Result<()> {
    let mut connection = server.connect().await?;
    sqlx::raw_sql(ROLES).execute(&mut connection).await.context("cannot create the roles")?;
    Ok(())
}

/// Creates the databases that do not exist yet. Their owners are roles of [`bootstrap`].
pub async fn create_databases(server: &Server) -> Result<()> {
    let mut connection = server.connect().await?;
    // One message each: several statements in one message are a transaction, which CREATE DATABASE refuses.
    for statement in DATABASES.split_inclusive(';').filter(|statement| statement.ends_with(';')) {
        let outcome = sqlx::raw_sql(statement).execute(&mut connection).await;
        match outcome {
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| EXISTS.contains(&&*code)) => {}
            outcome => outcome.map(drop).context("cannot create the databases")?,
        }
    }
    Ok(())
}

/// The template without connections: one that somebody is connected to cannot be copied.
pub const EMPTY: &str = "template0";

/// Creates a database of any name as a copy of `template`, such as [`EMPTY`]. Its owner is a role of [`bootstrap`].
pub async fn create_database(server: &Server, name: &str, template: &str, owner: &str) -> Result<()> {
    let mut connection = server.connect().await?;
    let mut statement = QueryBuilder::<sqlx::Postgres>::new("-- testkit: create database\nCREATE DATABASE ");
    statement.push(name).push(" TEMPLATE ").push(template).push(" OWNER ").push(owner);
    connection.execute(statement.build().persistent(false)).await?;
    Ok(connection.close().await?)
}
