//! Makes a signal a graceful shutdown.

use std::{io, process, time::Duration};

use clap::Args;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// A token that SIGTERM or SIGINT cancels.
///
/// A second signal ends the process at once. Its sender does not want to wait, and the system recovers from a crash at
/// any line.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn shutdown_signal() -> io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        for signals in 0.. {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if signals > 0 {
                warn!("{name} again: exiting at once");
                process::exit(130);
            }
            info!("{name}: finishing the work in flight");
            cancelled.cancel();
        }
    });
    Ok(token)
}

/// How a server and its connections end.
#[derive(Args, Clone, Debug)]
pub struct EndSettings {
    /// Seconds for which calls are accepted after SIGTERM, while health says NOT_SERVING already. Load balancers need some
    /// time to learn of it.
    #[arg(long, env = "LAME_DUCK_SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u64).range(0..=600))]
    pub lame_duck_seconds: u64,
    /// Seconds after which clients are asked to leave a connection, give or take a tenth. They connect again, perhaps to a
    /// replica that is new. 0 is never.
    #[arg(long, env = "CONNECTION_AGE_SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub connection_age_seconds: u64,
}

/// The two steps in which a server ends.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Health says so, and all else goes on.
    pub announced: CancellationToken,
    /// Nothing new is accepted.
    pub begun: CancellationToken,
    /// When clients are asked to leave a connection meanwhile.
    pub(crate) connection_age: Option<Duration>,
}

impl Ending {
    /// An end that begins some time after it is announced.
    pub fn after(announced: CancellationToken, settings: &EndSettings) -> Self {
        let connection_age = Some(Duration::from_secs(settings.connection_age_seconds)).filter(|age| !age.is_zero());
        let ending = Self { announced, begun: CancellationToken::new(), connection_age };
        let (waiting, lame_duck) = (ending.clone(), Duration::from_secs(settings.lame_duck_seconds));
        tokio::spawn(async move {
            waiting.announced.cancelled().await;
            sleep(lame_duck).await;
            waiting.begun.cancel();
        });
        ending
    }
}
