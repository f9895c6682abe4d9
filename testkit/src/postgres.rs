//! A PostgreSQL server: the one of `POSTGRES_URL`, or a private cluster.
//!
//! A private cluster runs the PostgreSQL binaries of this machine ([`find()`]), which apt installs if it can. POSTGRES_BIN
//! names others. It has a directory of its own and listens on 127.0.0.1 only. For root it runs as an unprivileged user. It ends with its harness:
//! if a killed harness left one behind, the next start in the same directory stops it.

mod server;

mod find;

mod install;

mod home;

mod cluster;

use std::{env, path::Path};

use anyhow::Result;

pub use cluster::{Cluster, FixedPort, Options};
pub use find::{Installation, find};
pub use home::Home;
pub use install::try_to_install;
pub use server::Server;

/// The server of `url`, or else a private cluster, which the caller has to stop.
pub async fn provide(url: Option<&str>, options: Options) -> Result<(Server, Option<Cluster>)> {
    // make and compose files pass an empty variable for one that is not set.
    if let Some(url) = url.filter(|url| !url.is_empty()) {
        return Ok((Server::parse(url)?, None));
    }
    let cluster = Cluster::start(options).await?;
    Ok((cluster.server().clone(), Some(cluster)))
}

/// Whether a test of a private cluster can run: this machine has the programs, and POSTGRES_URL is set. Without the variable
/// [`TestDatabase::create`](crate::TestDatabase::create), called by another test, ends the whole process at any moment. That
/// would leave the cluster behind. If POSTGRES_BIN is wrong, the test runs, and fails with the reason.
pub fn can_test_clusters() -> bool {
    env::var_os("POSTGRES_URL").is_some_and(|url| !url.is_empty()) && (find::is_named() || find().is_ok())
}

/// Stops and deletes the clusters of killed runs in directories whose path begins with `prefix`. Leaves those in use.
pub async fn remove_abandoned(prefix: &Path) -> Result<()> {
    let directories = home::abandoned(prefix)?;
    // Without one, no binaries are needed either.
    if directories.is_empty() {
        return Ok(());
    }
    let installation = find()?;
    for home in directories {
        home.stop_abandoned_server(&installation).await?;
        home.delete();
    }
    Ok(())
}
