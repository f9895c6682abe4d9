//! Installs missing packages with apt, if this user may.

use std::process::Stdio;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

use super::find::{Installation, WAYS_OUT, find, is_installed};

/// Debian's package creates and starts a cluster, which nobody asked for, so a drop-in forbids that during the installation.
/// A failed update does not matter: the old lists may do, and if not, the installation's own message is better.
const SCRIPT: &str = "
set -e
export DEBIAN_FRONTEND=noninteractive
drop_in=/etc/postgresql-common/createcluster.d/outbox-harness.conf
trap 'rm -f $drop_in' EXIT
mkdir -p /etc/postgresql-common/createcluster.d
echo 'create_main_cluster = false' > $drop_in
apt-get update -q -o DPkg::Lock::Timeout=60 || true
apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=60 \"$1\"
";

/// The installation found, or else what apt installs. An old one is not replaced: apt would install the same.
pub(super) async fn find_or_install() -> Result<Installation> {
    if !is_installed()
        && let Some(shell) = privileged_shell().await
    {
        install(shell, "postgresql").await.context(WAYS_OUT)?;
    }
    find()
}

/// Installs a package if this user may. A failure is only printed: the caller can do without.
pub async fn try_to_install(package: &str) {
    if let Some(shell) = privileged_shell().await
        && let Err(error) = install(shell, package).await
    {
        eprintln!("note: {error:#}");
    }
}

/// A shell that may run apt without a password.
async fn privileged_shell() -> Option<Command> {
    if !succeeds(Command::new("apt-get").arg("--version")).await {
        return None;
    }
    if rustix::process::geteuid().is_root() {
        return Some(Command::new("sh"));
    }
    if !succeeds(Command::new("sudo").args(["-n", "true"])).await {
        return None;
    }
    let mut shell = Command::new("sudo");
    shell.args(["-n", "sh"]);
    Some(shell)
}

async fn succeeds(command: &mut Command) -> bool {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().await;
    status.is_ok_and(|status| status.success())
}

async fn install(mut shell: Command, package: &str) -> Result<()> {
    eprintln!("installing the package `{package}` with apt-get, once; this takes up to a minute");
    let output = shell.args(["-c", SCRIPT, "sh", package]).stdin(Stdio::null()).output().await;
    let output = output.context("cannot run apt-get")?;
    if !output.status.success() {
        eprint!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("apt-get could not install {package} and says why above");
    }
    Ok(())
}
