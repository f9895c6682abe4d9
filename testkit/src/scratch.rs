//! A directory for the files of one test.

use std::{env, fs, ops::Deref, path::PathBuf};

use uuid::Uuid;

/// A directory that is deleted after the test.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// In the temporary directory, because the server's user can enter it even if this process is root's.
    ///
    /// # Panics
    /// If it cannot be created.
    #[expect(clippy::new_without_default, reason = "a default value should not create a directory")]
    pub fn new() -> Scratch {
        let path = env::temp_dir().join(format!("outbox-scratch-{}", Uuid::new_v4().simple()));
        fs::create_dir(&path).expect("a directory for the test");
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
