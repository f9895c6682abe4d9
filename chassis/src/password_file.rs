//! The file with the password of a database's role.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::Args;
use tokio::{sync::Mutex, task::spawn_blocking, time::timeout};

/// A longer one is no password, but another file.
const BYTES_MAX: u64 = 4096;
/// How long reading the file may take.
const READ_LIMIT: Duration = Duration::from_secs(2);

/// Where the password of the database's role is, if it is not in the URL.
#[derive(Args, Clone, Debug, Default)]
pub struct PasswordFile {
    /// File with the password of the database's role. It counts instead of one in the URL. It is read for each new
    /// connection, so a new password needs no restart. Everybody on the machine must not be able to read it.
    #[arg(long = "database-password-file", env = "DATABASE_PASSWORD_FILE", value_name = "FILE")]
    pub(crate) path: Option<PathBuf>,
    /// Held while it is read. So a file system that hangs takes one thread, and not one for each attempt to connect.
    #[arg(skip)]
    reading: Arc<Mutex<()>>,
}

/// Why a password file cannot be used. It never repeats what is in the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PasswordFileError {
    #[error("cannot read the password file {}: {cause}", .file.display())]
    Unreadable { file: PathBuf, cause: io::Error },
    /// A container's secrets are often given to the group of its process. So a group may read it, unlike in libpq.
    #[error("everybody may read the password file {}: take that away, by chmod o= or by the mode of the secret", .0.display())]
    Open(PathBuf),
    #[error("the password file {} is empty", .0.display())]
    Empty(PathBuf),
    #[error("the password file {} holds something else: a password is one line of text, up to {BYTES_MAX} bytes", .0.display())]
    NoPassword(PathBuf),
}

impl PasswordFile {
    /// The password, if there is a file.
    ///
    /// # Errors
    /// The file cannot be used. It may be usable a moment later, for example while it is written.
    pub(crate) async fn read(&self) -> Result<Option<String>, PasswordFileError> {
        let Some(file) = self.path.clone() else { return Ok(None) };
        // A network's file system may hang, and there is only one thread for everything else.
        let reading = async {
            let (held, file) = (self.reading.clone().lock_owned().await, file.clone());
            spawn_blocking(move || {
                let read = read(&file);
                drop(held);
                read
            })
            .await
        };
        match timeout(READ_LIMIT, reading).await {
            Ok(Ok(read)) => read.map(Some),
            Ok(Err(panicked)) => Err(PasswordFileError::Unreadable { file, cause: io::Error::other(panicked) }),
            Err(_) => Err(PasswordFileError::Unreadable { file, cause: io::ErrorKind::TimedOut.into() }),
        }
    }
}

fn read(file: &Path) -> Result<String, PasswordFileError> {
    let unreadable = |cause| PasswordFileError::Unreadable { file: file.to_owned(), cause };
    let opened = File::open(file).map_err(unreadable)?;
    // Of the file that is open: another one may take its place meanwhile.
    if opened.metadata().map_err(unreadable)?.permissions().mode() & 0o007 != 0 {
        return Err(PasswordFileError::Open(file.to_owned()));
    }
    let mut content = Vec::new();
    opened.take(BYTES_MAX + 1).read_to_end(&mut content).map_err(unreadable)?;
    password(&content, file)
}

/// Editors and `echo` end a line, and the password does not contain that end.
fn password(content: &[u8], file: &Path) -> Result<String, PasswordFileError> {
    let no_password = || PasswordFileError::NoPassword(file.to_owned());
    if content.len() as u64 > BYTES_MAX {
        return Err(no_password());
    }
    let text = str::from_utf8(content).map_err(|_| no_password())?;
    let line = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
    if line.is_empty() {
        return Err(PasswordFileError::Empty(file.to_owned()));
    }
    if line.contains(['\n', '\r', '\0']) {
        return Err(no_password());
    }
    Ok(line.to_owned())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{BYTES_MAX, password};

    #[test]
    fn a_password_is_the_one_line_of_its_file_without_the_lines_end() {
        let long = "x".repeat(usize::try_from(BYTES_MAX).unwrap());
        for (content, read) in [
            ("secret", "secret"),
            ("secret\n", "secret"),
            ("secret\r\n", "secret"),
            (" se cret \n", " se cret "),
            (&long, &long),
        ] {
            assert_eq!(password(content.as_bytes(), Path::new("a-file")).unwrap(), read);
        }
    }

    #[test]
    fn what_is_no_password_is_refused_with_the_files_name_and_without_its_content() {
        let long = "x".repeat(usize::try_from(BYTES_MAX).unwrap() + 1);
        for (content, reason) in [
            ("", "is empty"),
            ("\n", "is empty"),
            ("\r\n", "is empty"),
            ("secret\nxxx\n", "something else"),
            ("secret\n\n", "something else"),
            ("xxx\0", "something else"),
            (&long, "something else"),
        ] {
            let refused = password(content.as_bytes(), Path::new("a-file")).unwrap_err();
            let shown = format!("{refused} {refused:?}");
            assert!(shown.contains("a-file") && shown.contains(reason), "{shown}");
            assert!(!shown.contains("secret") && !shown.contains("xxx"), "{shown}");
        }
        assert!(password(&[0xff], Path::new("a-file")).is_err());
    }
}
