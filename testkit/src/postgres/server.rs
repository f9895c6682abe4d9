//! The addresses of a server: the URL of each role and database.

use std::{net::SocketAddr, str::FromStr, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use url::Url;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// A PostgreSQL server, identified by its superuser's URL.
#[derive(Clone)]
pub struct Server {
    superuser: Url,
}

impl Server {
    /// Takes a superuser's URL, such as `postgres://postgres:postgres@localhost:5432/postgres?sslmode=require`.
    /// The database is `postgres` if the URL names none.
    pub fn parse(url: &str) -> Result<Server> {
        let mut superuser = Url::parse(url).context("POSTGRES_URL")?;
        ensure!(
            matches!(superuser.scheme(), "postgres" | "postgresql") && superuser.has_host(),
            "POSTGRES_URL must name a host: postgres://user:password@host:port/database"
        );
        // These parameters override the part before the `?`, so every URL made from this one would name the same role.
        if let Some((name, _)) =
            superuser.query_pairs().find(|(name, _)| matches!(&**name, "user" | "password" | "dbname"))
        {
            bail!("POSTGRES_URL must not have the parameter `{name}`: put it before the `?`");
        }
        if superuser.path().trim_start_matches('/').is_empty() {
            superuser.set_path("postgres");
        }
        Ok(Server { superuser })
    }

    /// The superuser's URL of one database.
    pub fn superuser_url(&self, database: &str) -> String {
        let mut url = self.superuser.clone();
        url.set_path(database);
        url.into()
    }

    /// The URL of one database for a role of the bootstrap, whose password is its name.
    pub fn url_for(&self, role: &str, database: &str) -> String {
        let mut url = self.superuser.clone();
        url.set_username(role).expect("parse() refuses a URL that cannot have a user");
        url.set_password(Some(role)).expect("parse() refuses a URL that cannot have a password");
        url.set_path(database);
        url.into()
    }

    /// The same server through a proxy.
    pub fn through(&self, proxy: SocketAddr) -> Server {
        let mut superuser = self.superuser.clone();
        superuser.set_ip_host(proxy.ip()).expect("parse() refuses a URL without a host");
        superuser.set_port(Some(proxy.port())).expect("parse() refuses a URL without a host");
        Server { superuser }
    }

    /// The address it listens on, for a server on this machine.
    ///
    /// # Errors
    /// If its host is a name.
    pub fn socket(&self) -> Result<SocketAddr> {
        Ok(self.address().parse()?)
    }

    /// The superuser's URL of the maintenance database.
    pub fn url(&self) -> &str {
        self.superuser.as_str()
    }

    /// Connects as the superuser to the maintenance database.
    pub async fn connect(&self) -> Result<PgConnection> {
        // The driver has no timeout of its own, and a host that drops packets would hold this up for minutes.
        let connecting = PgConnectOptions::from_str(self.url())?;
        let connection = tokio::time::timeout(CONNECT_TIMEOUT, connecting.connect()).await;
        let connection = connection.map_err(|_| anyhow::anyhow!("no answer within {} s", CONNECT_TIMEOUT.as_secs()));
        connection?.with_context(|| format!("cannot connect to PostgreSQL at {}", self.address()))
    }

    /// Host and port, for messages: the URL has a password in it.
    pub fn address(&self) -> String {
        format!("{}:{}", self.superuser.host_str().unwrap_or_default(), self.superuser.port().unwrap_or(5432))
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Server").field(&self.address()).finish()
    }
}
