//! Directories for the files of one test.

use std::{env, fs, ops::Deref, path::PathBuf};

use uuid::Uuid;

/// A directory that is gone after the test.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// In the temporary directory, which the server's user can reach when we are root.
    pub(crate) fn new() -> Scratch {
        let path = env::temp_dir().join(format!("outbox-scratch-{}", Uuid::new_v4().simple()));
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }
}

impl Deref for Scratch {
    type Target = PathBuf;

    fn deref(&self) -> &PathBuf {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
