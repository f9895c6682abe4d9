//! Reads the command line and the environment.

use std::{error::Error, process};

use clap::{
    Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};

/// Longer than any name of ours. A token is longer than this.
const NAME_CHARS_MAX: usize = 40;

/// Parses flags and environment variables, or ends the process.
///
/// Help that was asked for goes to stdout, with exit code 0. Without a command, the help goes to stderr, and the exit
/// code is 2. A mistake is one line on stderr, with exit code 2.
pub fn parse<C: Parser>() -> C {
    C::try_parse().unwrap_or_else(|error| {
        if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            error.exit();
        }
        eprintln!("{}", one_line(&error));
        process::exit(2);
    })
}

fn one_line(error: &clap::Error) -> String {
    // clap prints the refused value, which may be a URL with a password. The cause explains the mistake without it.
    if error.kind() == ErrorKind::ValueValidation
        && let (Some(flag), Some(cause)) = (error.get(ContextKind::InvalidArg), error.source())
    {
        return format!("error: {flag}: {cause}");
    }
    let mut text = error.to_string();
    // It also repeats a word that it does not expect, such as a URL in the wrong place.
    for (kind, value) in error.context() {
        if matches!(kind, ContextKind::InvalidArg | ContextKind::InvalidSubcommand | ContextKind::InvalidValue)
            && let ContextValue::String(word) = value
            && may_be_secret(word)
        {
            text = text.replace(word, "…");
        }
    }
    let sentences = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    sentences.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

fn may_be_secret(word: &str) -> bool {
    if word.contains('@') || word.contains("://") {
        return true;
    }
    // What begins like a flag is one, with the name of its value, such as `--by <BY>`, or with a value.
    let Some(flag) = word.strip_prefix('-') else {
        return word.chars().count() > NAME_CHARS_MAX || word.contains([' ', '=']) || names_password(word);
    };
    flag.split_once('=').is_some_and(|(_, value)| may_be_secret(value))
}

fn names_password(word: &str) -> bool {
    word.to_ascii_lowercase().contains("password")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::one_line;

    #[derive(Debug, Parser)]
    enum Command {
        Status {
            #[arg(long)]
            json: bool,
            #[arg(long)]
            connection_age_seconds_of_all_listeners: Option<u32>,
            #[arg(long)]
            database_password_file: Option<String>,
        },
    }

    fn refuse(arguments: &[&str]) -> String {
        one_line(&Command::try_parse_from([&["program"], arguments].concat()).expect_err("wrong arguments"))
    }

    #[test]
    fn a_mistake_is_named_unless_it_may_be_secret() {
        assert_eq!(refuse(&["status", "json"]), "error: unexpected argument 'json' found");
        let again = "--connection-age-seconds-of-all-listeners";
        assert!(refuse(&["status", again, "1", again, "2"]).contains(again));
        for secret in [
            "postgres://me:secret@db/orders",
            "me:secret@db",
            "postgres:///orders?password=secret",
            "user=me pass=secret",
        ] {
            assert_eq!(refuse(&["status", secret]), "error: unexpected argument '…' found");
            assert_eq!(refuse(&[secret]), "error: unrecognized subcommand '…'");
            for flag in ["--json=", "--jso=", "--json"] {
                let said = refuse(&["status", &format!("{flag}{secret}")]);
                assert!(said.starts_with("error: ") && !said.contains("secret"), "{said}");
            }
        }
        assert!(!refuse(&["status", &"secret".repeat(10)]).contains("secret"));
        for secret in ["password=secret", "PGPASSWORD=secret", "pwd=secret", "secretPassword"] {
            assert!(!refuse(&["status", secret]).to_lowercase().contains("secret"), "{secret}");
        }
        let flag = "--database-password-file";
        assert!(refuse(&["status", flag, "a", flag, "b"]).contains(flag));
        assert!(refuse(&["status", flag]).contains(flag));
        assert!(refuse(&["status", "--database-password", "secret"]).contains("--database-password"));
        assert!(!refuse(&["status", "--database-password", "secret"]).contains("secret"));
        assert!(!refuse(&["status", "--database-password=secret"]).contains("secret"));
    }
}
