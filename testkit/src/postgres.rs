//! A PostgreSQL server to work with: the one of `POSTGRES_URL`, or a private cluster of our own.
//!
//! A private cluster is made of the machine's PostgreSQL binaries ([`find()`]; installed with apt where that is
//! possible), in a directory of ours, listening on 127.0.0.1 only, under an unprivileged user when we are root. It lives
//! no longer than the harness: one that a killed harness left behind is stopped by the next start in its directory.

mod server;

mod find;

mod install;

mod home;

mod cluster;

use std::path::Path;

use anyhow::Result;

pub use cluster::{Cluster, Options};
pub use find::{Installation, find};
pub use install::try_to_install;
pub use server::Server;

/// The server of `url` when there is one (then nothing is started, and there is no cluster to stop), else that of a
/// private cluster.
pub async fn provide(url: Option<&str>, options: Options) -> Result<(Server, Option<Cluster>)> {
    // An empty variable is how make and compose files say "not set".
    if let Some(url) = url.filter(|url| !url.is_empty()) {
        return Ok((Server::parse(url)?, None));
    }
    let cluster = Cluster::start(options).await?;
    Ok((cluster.server().clone(), Some(cluster)))
}

/// Stops and deletes the clusters that killed runs left in directories whose path begins with `prefix`; leaves those in use.
pub async fn remove_abandoned(prefix: &Path) -> Result<()> {
    let directories = home::abandoned(prefix)?;
    // Without one there is nothing to stop, and so no need of binaries either.
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
