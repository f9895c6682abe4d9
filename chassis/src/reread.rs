//! Files that an operator replaces while the process runs: certificates, the policy.

use std::{fmt::Display, sync::Arc, time::Duration};

use metrics::counter;
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info};

const INTERVAL: Duration = Duration::from_secs(1);

/// How the log and the metrics name such files.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    /// Such as "certificates".
    pub(crate) what: &'static str,
    /// Their paths.
    pub(crate) files: String,
    /// Counts changes by outcome.
    pub(crate) metric: &'static str,
    /// Whether a part of what is written can be used, too. Then the contents count once they have been the same for a second.
    pub(crate) in_parts: bool,
}

/// What the files hold, as the process uses it. Clones share it.
#[derive(Debug)]
pub(crate) struct Reread<T> {
    current: watch::Receiver<Arc<T>>,
    /// Ends with the last clone.
    _reading: Option<Arc<AbortOnDropHandle<()>>>,
}

impl<T> Clone for Reread<T> {
    fn clone(&self) -> Self {
        Self { current: self.current.clone(), _reading: self._reading.clone() }
    }
}

impl<T: Send + Sync + 'static> Reread<T> {
    /// What never changes.
    pub(crate) fn constant(value: T) -> Self {
        Self { current: watch::channel(Arc::new(value)).1, _reading: None }
    }

    /// Reads the files, and goes on to read them every second while this is there.
    ///
    /// # Errors
    /// Those of the first reading.
    pub(crate) fn start<C, E>(
        named: Named,
        read: impl Fn() -> Result<C, E> + Clone + Send + 'static,
        make: impl Fn(&C) -> Result<T, E> + Send + 'static,
    ) -> Result<Self, E>
    where
        C: Clone + Default + PartialEq + Send + 'static,
        E: Display + Send + 'static,
    {
        let first = read()?;
        let (sender, current) = watch::channel(Arc::new(make(&first)?));
        let reading = tokio::spawn(read_again(named, first, read, make, sender));
        Ok(Self { current, _reading: Some(Arc::new(AbortOnDropHandle::new(reading))) })
    }

    /// What they held when they could be used last.
    pub(crate) fn current(&self) -> Arc<T> {
        Arc::clone(&self.current.borrow())
    }
}

/// Reads the files until it is dropped. A broken file changes nothing.
///
/// Files that belong together are not replaced at once. So what is broken counts once it has been the same for a second.
async fn read_again<C, T, E>(
    Named { what, files, metric, in_parts }: Named,
    mut used: C,
    read: impl Fn() -> Result<C, E> + Clone + Send + 'static,
    make: impl Fn(&C) -> Result<T, E>,
    sender: watch::Sender<Arc<T>>,
) where
    C: Clone + Default + PartialEq + Send + 'static,
    E: Display + Send + 'static,
{
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut seen, mut told) = (used.clone(), None);
    loop {
        ticks.tick().await;
        // On a thread of its own: they may be on a network, and hang.
        let Ok(contents) = spawn_blocking(read.clone()).await else { continue };
        if contents.as_ref().is_ok_and(|contents| *contents == used) {
            (seen, told) = (used.clone(), None);
            continue;
        }
        let (contents, made) = match contents {
            Ok(contents) => {
                let made = make(&contents);
                (contents, made)
            }
            Err(why) => (C::default(), Err(why)),
        };
        let is_settled = contents == seen;
        seen = contents.clone();
        match made {
            Ok(now) if is_settled || !in_parts => {
                info!(files, "the files of the {what} have changed, and count from now on");
                counter!(metric, "outcome" => "used").increment(1);
                sender.send_replace(Arc::new(now));
                (used, told) = (contents, None);
            }
            Err(why) if is_settled && told.as_ref() != Some(&contents) => {
                error!(%why, "the files of the {what} have changed, and cannot be read or used: what they held before is kept");
                counter!(metric, "outcome" => "broken").increment(1);
                told = Some(contents);
            }
            Ok(_) | Err(_) => {}
        }
    }
}
