//! What faults work on and write down.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use uuid::Uuid;

use super::{
    faults::{Fault, TOGETHER},
    history::History,
    site::Site,
};
use crate::target::Target;

/// One run.
pub(super) struct World {
    pub(super) site: Site,
    pub(super) target: Target,
    pub(super) history: Arc<History>,
    /// Where libfaketime is, if it is.
    pub(super) clock: Option<std::path::PathBuf>,
    /// Aggregates whose event is poison, and has to be dead in the end: no other may be.
    pub(super) poisoned: Mutex<BTreeSet<Uuid>>,
    pub(super) tally: Mutex<Tally>,
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

impl World {
    pub(super) fn poison(&self, aggregate: Uuid) {
        self.poisoned.lock().unwrap_or_else(PoisonError::into_inner).insert(aggregate);
    }

    pub(super) fn struck(&self, fault: &Fault, bit: bool) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        *tally.struck.entry(fault.class()).or_default() += 1;
        if bit {
            *tally.bit.entry(fault.class()).or_default() += 1;
            if let Fault::Crash(point) = fault {
                *tally.crashes.entry(point.name).or_default() += 1;
            }
        }
    }
}
