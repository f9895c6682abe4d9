//! Creates, once per server and as the superuser, the roles and the databases.

use anyhow::{Context, Result, ensure};
use sqlx::{Connection, Executor, PgConnection, QueryBuilder};

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
const CONNECT: &str = include_str!("../../migrations/bootstrap/3_connect.sql");
/// Under the lock of [`ROLES`], and for the same reason.
const CONNECT_LOCKED: &str = concat!(
    "-- testkit: say who may connect\n",
    "BEGIN; SELECT pg_advisory_xact_lock(7308895183250579834);\n",
    include_str!("../../migrations/bootstrap/3_connect.sql"),
    "\nCOMMIT;"
);
/// The same.
const SCHEMA: &str = concat!(
    "-- testkit: say who may create tables\n",
    "BEGIN; SELECT pg_advisory_xact_lock(7308895183250579834);\n",
    include_str!("../../migrations/bootstrap/4_schema.sql"),
    "\nCOMMIT;"
);

/// The same.
const UNLIMITED: &str = "-- testkit: lift the limits of roles
    BEGIN;
    SELECT pg_advisory_xact_lock(7308895183250579834);
    DO $$
    DECLARE
        name text;
    BEGIN
        FOR name IN SELECT rolname FROM pg_roles WHERE rolconnlimit > 0 AND rolname IN
            ('order_service', 'inventory_service', 'loyalty_service', 'outbox_relay')
        LOOP
            EXECUTE format('ALTER ROLE %I CONNECTION LIMIT -1', name);
        END LOOP;
    END
    $$;
    COMMIT;";

/// "duplicate_database"; or "unique_violation", if two processes create it at the same moment.
const EXISTS: [&str; 2] = ["42P04", "23505"];

/// Creates the roles, or brings them up to date.
pub async fn bootstrap(server: &Server) -> Result<()> {
    let mut connection = server.connect().await?;
    sqlx::raw_sql(ROLES).execute(&mut connection).await.context("cannot create the roles")?;
    Ok(())
}

/// Lets a role have any number of sessions. The limits are those of one installation, and on a server that tests share
/// there are as many as tests.
pub async fn lift_limits(server: &Server) -> Result<()> {
    let mut connection = server.connect().await?;
    sqlx::raw_sql(UNLIMITED).execute(&mut connection).await.context("cannot lift the limits of the roles")?;
    Ok(())
}

/// Creates the databases that do not exist yet. Their owners are roles of [`bootstrap`]. Gives them the rights that the
/// bootstrap gives.
pub async fn create_databases(server: &Server) -> Result<()> {
    let mut connection = server.connect().await?;
    // One message each: several statements in one message are a transaction, which CREATE DATABASE refuses.
    for statement in statements(DATABASES) {
        let outcome = sqlx::raw_sql(statement).execute(&mut connection).await;
        match outcome {
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| EXISTS.contains(&&*code)) => {}
            outcome => outcome.map(drop).context("cannot create the databases")?,
        }
    }
    sqlx::raw_sql(CONNECT_LOCKED)
        .execute(&mut connection)
        .await
        .context("cannot say who may connect to the databases")?;
    for database in ["orders", "inventory", "loyalty"] {
        protect_schema(server, database).await?;
    }
    Ok(())
}

fn statements(sql: &'static str) -> impl Iterator<Item = &'static str> {
    sql.split_inclusive(';').filter(|statement| statement.ends_with(';'))
}

/// The template without connections: one that somebody is connected to cannot be copied.
pub const EMPTY: &str = "template0";

/// Creates a database of any name as a copy of `template`, such as [`EMPTY`]. Its owner is a role of [`bootstrap`], and the
/// roles that may connect to it are those that may connect to this owner's database in the bootstrap.
pub async fn create_database(server: &Server, name: &str, template: &str, owner: &str) -> Result<()> {
    let mut connection = server.connect().await?;
    let mut statement = QueryBuilder::<sqlx::Postgres>::new("-- testkit: create database\nCREATE DATABASE ");
    statement.push(name).push(" TEMPLATE ").push(template).push(" OWNER ").push(owner);
    connection.execute(statement.build().persistent(false)).await?;
    let rights = rights_like(owner.strip_suffix("_owner").unwrap_or(owner), name);
    ensure!(rights.len() == 2, "the bootstrap does not say who may connect to a database of {owner}");
    for right in rights {
        let mut statement = QueryBuilder::<sqlx::Postgres>::new(right);
        connection.execute(statement.build().persistent(false)).await?;
    }
    if template == EMPTY {
        protect_schema(server, name).await?;
    }
    Ok(connection.close().await?)
}

/// What the bootstrap says of who may connect to a database, as said of another.
fn rights_like(database: &str, another: &str) -> Vec<String> {
    let named = format!(" ON DATABASE {database} ");
    let said = statements(CONNECT).filter(|statement| statement.contains(&named));
    said.map(|statement| statement.replace(&named, &format!(" ON DATABASE {another} "))).collect()
}

/// Lets nobody but its owner create tables and functions in a database.
pub async fn protect_schema(server: &Server, database: &str) -> Result<()> {
    let mut connection = PgConnection::connect(&server.superuser_url(database)).await?;
    sqlx::raw_sql(SCHEMA).execute(&mut connection).await.context("cannot say who may create tables")?;
    Ok(connection.close().await?)
}
