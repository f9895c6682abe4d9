//! The state of a run: the system under test, and what faults and clients have done to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use tonic::transport::Uri;
use uuid::Uuid;

use super::{
    crash::Crashes,
    faults::{Fault, TOGETHER},
    history::History,
    site::{Part, Site},
};
use chassis::Tls;
use harness::{identities::CUSTOMERS, target::Target};

pub(super) struct World {
    pub(super) site: Site,
    pub(super) target: Target,
    /// Where clients find loyalty-service.
    pub(super) loyalty: Uri,
    /// Who the clients are.
    pub(super) customers: Tls,
    pub(super) history: Arc<History>,
    pub(super) crashes: Arc<Crashes>,
    /// The path of libfaketime, if it is installed.
    pub(super) clock: Option<PathBuf>,
    /// Aggregates with a poison event, and for whom it is poison. It must be dead there at the end, and no other event
    /// may be.
    pub(super) poisoned: Mutex<BTreeSet<(Uuid, Part)>>,
    /// Events that the inbox was made to prune early.
    pub(super) forgotten: Mutex<Vec<Uuid>>,
    /// Until when an idle session of a process is no finding: the process is stopped, or its database cannot hear it.
    disturbed: Mutex<BTreeMap<Part, Instant>>,
    tally: Mutex<Tally>,
}

/// Faults by class.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) injected: BTreeMap<usize, u32>,
    /// Those that were seen to have an effect.
    pub(super) effective: BTreeMap<usize, u32>,
    /// Classes that are impossible on this machine, and why.
    pub(super) impossible: BTreeMap<usize, &'static str>,
}

impl Tally {
    /// The number of faults. Those at the same time count one by one.
    pub(super) fn faults(&self) -> u32 {
        self.injected.iter().filter(|(class, _)| **class != TOGETHER).map(|(_, faults)| faults).sum()
    }

    /// Possible classes that have had no effect yet.
    pub(super) fn left(&self) -> Vec<usize> {
        let had_none = |class: &usize| self.effective.get(class).is_none_or(|faults| *faults == 0);
        (1..=TOGETHER).filter(had_none).filter(|class| !self.impossible.contains_key(class)).collect()
    }
}

/// How long the session of a connection in a black hole lasts, with some reserve.
const DISTURBED_FOR: Duration = Duration::from_secs(25);

impl World {
    pub(super) fn of(site: Site, history: History, clock: Option<PathBuf>, seed: u64) -> Result<Self> {
        let mut tally = Tally::default();
        if clock.is_none() {
            for class in [9, 26] {
                tally.impossible.insert(class, "needs libfaketime (Debian: apt-get install libfaketime)");
            }
        }
        if site.disk.is_none() {
            tally.impossible.insert(12, "needs the right to mount a file system, as root has on Linux");
        }
        Ok(Self {
            target: site.target()?,
            loyalty: site.url_of(Part::Loyalty)?,
            customers: site.tls_of(CUSTOMERS)?,
            site,
            history: Arc::new(history),
            crashes: Arc::new(Crashes::of(seed)),
            clock,
            poisoned: Mutex::default(),
            forgotten: Mutex::default(),
            disturbed: Mutex::default(),
            tally: Mutex::new(tally),
        })
    }

    /// Notes that a fault may leave sessions of the process idle, while it lasts and for a while after it.
    pub(super) fn disturb(&self, part: Part, lasts: Duration) {
        let until = Instant::now() + lasts + DISTURBED_FOR;
        self.disturbed.lock().unwrap_or_else(PoisonError::into_inner).insert(part, until);
    }

    /// Whether such a fault explains an idle session. Its name begins with that of the process.
    pub(super) fn is_disturbed(&self, session: &str) -> bool {
        let disturbed = self.disturbed.lock().unwrap_or_else(PoisonError::into_inner);
        disturbed.iter().any(|(part, until)| {
            session.strip_prefix(part.name()).is_some_and(|start| start.starts_with('.')) && *until > Instant::now()
        })
    }

    pub(super) fn poison(&self, aggregate: Uuid, receivers: &[Part]) {
        let poison = receivers.iter().map(|receiver| (aggregate, *receiver));
        self.poisoned.lock().unwrap_or_else(PoisonError::into_inner).extend(poison);
    }

    pub(super) fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn injected(&self, fault: &Fault, effective: bool) {
        let mut tally = self.tally();
        *tally.injected.entry(fault.class()).or_default() += 1;
        *tally.effective.entry(fault.class()).or_default() += u32::from(effective);
    }
}
