//! A small disk that a fault can fill.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command as Blocking,
};

use anyhow::{Context, Result, ensure};
use tokio::{process::Command, task::spawn_blocking};

use testkit::postgres;

/// An empty cluster with its WAL needs less than this, and a minute of a run adds less than `MINUTE_MIB`.
const BASE_MIB: f64 = 300.0;
const MINUTE_MIB: f64 = 15.0;
/// The limit for long runs, since the disk is memory.
const MOST_MIB: f64 = 4096.0;

/// A file system in memory with a fixed size. Unmounted when dropped.
#[derive(Debug)]
pub(super) struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts it if that is allowed, as it is to root on Linux. Replaces the disk of a run that was killed.
    ///
    /// It is below the temporary directory, where the user of PostgreSQL has access whichever user runs this program.
    pub(super) async fn mount(run: &Path, minutes: f64) -> Option<Self> {
        let path = std::env::temp_dir().join(format!("outbox-disk{}", run.display().to_string().replace('/', "-")));
        let disk = Self { path };
        // Once the old disk is unmounted, the server of a run that was killed could not be found any more.
        postgres::remove_abandoned(&disk.path.join("postgres")).await.ok()?;
        disk.unmount();
        fs::create_dir_all(&disk.path).ok()?;
        let size = format!("size={:.0}m,mode=0755", MOST_MIB.min(BASE_MIB + MINUTE_MIB * minutes));
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "outbox-chaos"]).arg(&disk.path);
        let mounted = mount.kill_on_drop(true).output().await.is_ok_and(|output| output.status.success());
        mounted.then_some(disk)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Fills it to the last block, until the ballast is dropped.
    ///
    /// # Errors
    /// If nothing can be written to it.
    pub(super) async fn fill(&self) -> Result<Ballast> {
        let ballast = Ballast { path: self.path.join("ballast") };
        spawn_blocking(|| ballast.grow()).await?
    }

    fn unmount(&self) {
        let _ = Blocking::new("umount").arg("-l").arg(&self.path).output();
        let _ = fs::remove_dir(&self.path);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// A file that fills the disk. Removed when dropped.
#[derive(Debug)]
pub(super) struct Ballast {
    path: PathBuf,
}

impl Ballast {
    fn grow(self) -> Result<Self> {
        let mut file = File::create(&self.path).with_context(|| self.path.display().to_string())?;
        // Large pieces first, then blocks.
        for size in [1 << 20, 1 << 12] {
            let piece = vec![0; size];
            while file.write_all(&piece).is_ok() {}
        }
        ensure!(file.metadata()?.len() > 0, "nothing could be written to {}", self.path.display());
        Ok(self)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
