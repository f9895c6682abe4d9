//! With `--secure`: a certificate for each process and each caller. All of them are renewed again and again.
//!
//! A proxy uses the renewed files, too. So both processes see other certificates than before on each new connection, as
//! they would without a proxy. One that kept its own would hide whether a renewed one is trusted.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::time::{MissedTickBehavior, interval};

use super::{history::History, site::Part, stream::Identity};
use chassis::Tls;
use harness::identities::{CUSTOMERS, Identities, OPERATORS};
use testkit::certificates::Authority;

/// Often enough for a run of a minute, and so seldom that each process uses most of them.
const RENEWED_EVERY: Duration = Duration::from_secs(10);

/// Those of one system.
pub(super) struct Certificates {
    authority: Authority,
    pub(super) identities: Identities,
    /// As the files have them now, by name. Whoever stands for one shares them.
    current: BTreeMap<&'static str, Tls>,
    renewals: AtomicU32,
}

impl Certificates {
    pub(super) fn make(directory: &Path) -> Result<Self> {
        let authority = Authority::new()?;
        let identities = Identities::make(directory, &authority)?;
        let mut current = BTreeMap::new();
        for name in Part::ALL.map(Part::identity).into_iter().chain([CUSTOMERS, OPERATORS]) {
            current.insert(name, Tls::read(&identities.files(name))?);
        }
        Ok(Self { authority, identities, current, renewals: AtomicU32::new(0) })
    }

    pub(super) fn tls_of(&self, name: &str) -> Result<Tls> {
        self.current.get(name).cloned().with_context(|| format!("nobody is called {name}"))
    }

    pub(super) fn identity(&self, name: &'static str) -> Result<Identity> {
        Ok(Identity { name, tls: self.tls_of(name)? })
    }

    /// Renews all of them until it is dropped.
    pub(super) async fn keep_renewing(&self, history: &History) {
        let mut ticks = interval(RENEWED_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first is at once, and they are new.
        ticks.tick().await;
        loop {
            ticks.tick().await;
            match self.identities.renew(&self.authority) {
                Ok(()) => {
                    self.renewals.fetch_add(1, Ordering::Relaxed);
                    history.fault("all certificates are renewed", "effective");
                }
                Err(error) => history.violation(format!("the certificates were not renewed: {error:#}")),
            }
        }
    }

    /// How often they were.
    pub(super) fn renewals(&self) -> u32 {
        self.renewals.load(Ordering::Relaxed)
    }
}
