//! Reads the command line and the environment.

use std::{error::Error, process};

use clap::{
    Parser,
    error::{ContextKind, ErrorKind},
};

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
    let text = error.to_string();
    let sentences = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    sentences.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}
