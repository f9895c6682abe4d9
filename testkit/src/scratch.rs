//! A directory for the files of one test.

use std::{env, fs, ops::Deref, path::PathBuf};

use uuid::Uuid;

/// A directory that is gone after the test.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// In the temporary directory, which the server's user can reach when we are root.
    ///
    /// # Panics
    /// When it cannot be made.
    #[expect(clippy::new_without_default, reason = "a default value would make a directory")]
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
