//! What faults work on and write down.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use uuid::Uuid;

use super::{
    faults::{Fault, TOGETHER},
    history::History,
    site::{Part, Site},
};
use harness::target::Target;

/// One run.
pub(super) struct World {
    pub(super) site: Site,
    pub(super) target: Target,
    pub(super) history: Arc<History>,
    /// Where libfaketime is, if it is.
    pub(super) clock: Option<PathBuf>,
    /// Aggregates whose event is poison, and has to be dead in the end: no other may be.
    pub(super) poisoned: Mutex<BTreeSet<Uuid>>,
    /// Events that the inbox was made to forget.
    pub(super) forgotten: Mutex<Vec<Uuid>>,
    /// Until when a part is not at fault for a session that idles: it stands still, or its database cannot hear it.
    disturbed: Mutex<BTreeMap<Part, Instant>>,
    tally: Mutex<Tally>,
}

/// Faults by class.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) struck: BTreeMap<usize, u32>,
    /// Those that were seen to have had an effect.
    pub(super) bit: BTreeMap<usize, u32>,
    /// Crashes by point.
    pub(super) crashes: BTreeMap<&'static str, u32>,
    /// Classes that this machine cannot have, and why.
    pub(super) impossible: BTreeMap<usize, &'static str>,
}

impl Tally {
    /// How many have struck; those that struck together are counted one by one.
    pub(super) fn faults(&self) -> u32 {
        self.struck.iter().filter(|(class, _)| **class != TOGETHER).map(|(_, faults)| faults).sum()
    }

    /// Classes that have had no effect yet, and could have.
    pub(super) fn left(&self) -> Vec<usize> {
        let had_none = |class: &usize| self.bit.get(class).is_none_or(|bit| *bit == 0);
        (1..=TOGETHER).filter(had_none).filter(|class| !self.impossible.contains_key(class)).collect()
    }
}

/// A connection that was swallowed lasts for so long, and its session a little longer.
const DISTURBED_FOR: Duration = Duration::from_secs(25);

impl World {
    pub(super) fn of(site: Site, history: History, clock: Option<PathBuf>) -> Result<Self> {
        let mut tally = Tally::default();
        if clock.is_none() {
            tally.impossible.insert(9, "needs libfaketime (Debian: apt-get install libfaketime)");
        }
        if site.disk.is_none() {
            tally.impossible.insert(12, "needs the right to mount a small file system, as root has on Linux");
        }
        Ok(Self {
            target: site.target()?,
            site,
            history: Arc::new(history),
            clock,
            poisoned: Mutex::default(),
            forgotten: Mutex::default(),
            disturbed: Mutex::default(),
            tally: Mutex::new(tally),
        })
    }

    /// From now on, for as long as the fault lasts, and for what it leaves behind.
    pub(super) fn disturb(&self, part: Part, lasts: Duration) {
        let until = Instant::now() + lasts + DISTURBED_FOR;
        self.disturbed.lock().unwrap_or_else(PoisonError::into_inner).insert(part, until);
    }

    /// By the name of one of its sessions.
    pub(super) fn is_disturbed(&self, session: &str) -> bool {
        let disturbed = self.disturbed.lock().unwrap_or_else(PoisonError::into_inner);
        disturbed.iter().any(|(part, until)| {
            session.strip_prefix(part.name()).is_some_and(|start| start.starts_with('.')) && *until > Instant::now()
        })
    }

    pub(super) fn poison(&self, aggregate: Uuid) {
        self.poisoned.lock().unwrap_or_else(PoisonError::into_inner).insert(aggregate);
    }

    pub(super) fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn struck(&self, fault: &Fault, bit: bool) {
        let mut tally = self.tally();
        *tally.struck.entry(fault.class()).or_default() += 1;
        if bit {
            *tally.bit.entry(fault.class()).or_default() += 1;
            if let Fault::Crash(point) = fault {
                *tally.crashes.entry(point.name).or_default() += 1;
            }
        }
    }
}
