//! A PostgreSQL server with TLS.

use std::path::PathBuf;

use chassis::DatabaseUrl;
use order_service::MIGRATORS;
use testkit::{
    OwnServer, Scratch, TestDatabase,
    certificates::{Authority, replace},
};

use crate::service::{Service, eventually, order};

/// Sessions of the service, by whether they are encrypted.
const SESSIONS: &str = "SELECT count(*) FILTER (WHERE ssl) > 0 AND count(*) FILTER (WHERE NOT ssl) = 0
    FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'order_service'";

/// A server with TLS, and what a client needs to trust it.
struct Site {
    server: OwnServer,
    database: TestDatabase,
    authority: Authority,
    scratch: Scratch,
}

impl Site {
    /// `name` is the one in the server's certificate.
    async fn start(name: &str) -> Option<Self> {
        let server = OwnServer::start().await?;
        let authority = Authority::new().unwrap();
        server.speak_tls(&authority.sign(&[name]).unwrap(), authority.pem()).await;
        let database = server.database("orders_owner", &MIGRATORS).await;
        Some(Self { server, database, authority, scratch: Scratch::new() })
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        replace(&self.scratch.join(name), text).unwrap();
        self.scratch.join(name)
    }

    /// The database's URL for a client that trusts this authority alone.
    fn url(&self, trusted: &Authority) -> String {
        let ca = self.file("ca.pem", trusted.pem());
        format!("{}?sslmode=verify-full&sslrootcert={}", self.database.url_as("order_service"), ca.display())
    }
}

async fn refusal(url: &str) -> String {
    url.parse::<DatabaseUrl>().unwrap().connect().await.unwrap_err().to_string()
}

#[tokio::test]
async fn all_sessions_are_with_a_server_whose_certificate_is_verified() {
    let Some(site) = Site::start("127.0.0.1").await else { return };
    let url = site.url(&site.authority);
    let Site { database, .. } = site;
    let service = Service::start_on(database, &["--database-url", &url]).await;
    service.place(order()).await;
    assert!(sqlx::query_scalar::<_, bool>(SESSIONS).fetch_one(&service.pool).await.unwrap());
    service.end().await;
}

#[tokio::test]
async fn a_server_that_is_not_the_one_is_refused_with_the_cause() {
    let Some(site) = Site::start("127.0.0.1").await else { return };
    let stranger = Authority::new().unwrap();
    let refused = refusal(&site.url(&stranger)).await;
    assert!(refused.contains("certificate") && refused.contains("UnknownIssuer"), "{refused}");

    let url = site.url(&site.authority);
    url.parse::<DatabaseUrl>().unwrap().connect().await.unwrap();
    site.server.write("own.pem", &site.authority.sign(&["elsewhere.example"]).unwrap()).await;
    site.server.execute("SELECT pg_reload_conf()").await;
    eventually("another name is refused", async || {
        let connected = url.parse::<DatabaseUrl>().unwrap().connect().await;
        connected.is_err_and(|refused| {
            let refused = refused.to_string();
            refused.contains("not valid for name") && refused.contains("elsewhere.example")
        })
    })
    .await;

    let missing = url.replace("ca.pem", "missing.pem");
    let refused = refusal(&missing).await;
    assert!(refused.contains("No such file") && refused.contains("the database's URL names a file"), "{refused}");

    site.server.set("ssl = off").await;
    let refused = refusal(&url).await;
    assert!(refused.contains("does not support TLS"), "{refused}");
}

/// In place of a password.
#[tokio::test]
async fn a_client_is_known_by_its_certificate_where_the_server_demands_one() {
    let Some(site) = Site::start("127.0.0.1").await else { return };
    site.server
        .write(
            "pg_hba.conf",
            "host all postgres all md5\nhostssl all order_service all cert\nhostssl all all all md5\n",
        )
        .await;
    site.server.execute("SELECT pg_reload_conf()").await;
    let url = site.url(&site.authority);
    eventually("a certificate is demanded", async || {
        let connected = url.parse::<DatabaseUrl>().unwrap().connect().await;
        connected.is_err_and(|refused| refused.to_string().contains("valid client certificate"))
    })
    .await;
    let with_certificate = |name: &str, role: &str| {
        let own = site.file(name, &site.authority.sign_for_role(role).unwrap());
        format!("{url}&sslcert={0}&sslkey={0}", own.display())
    };
    let other = refusal(&with_certificate("other.pem", "outbox_relay")).await;
    assert!(other.contains("certificate authentication failed"), "{other}");

    let url = with_certificate("own.pem", "order_service");
    let Site { database, server: _server, scratch: _scratch, .. } = site;
    let service = Service::start_on(database, &["--database-url", &url]).await;
    service.place(order()).await;
    service.end().await;
}
