//! Traps: each waits for something to pass a proxy, and then acts on a process or on the bytes that pass.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::oneshot;

use super::wire::Mark;

/// What happens to the bytes in which the mark was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// They never arrive.
    Keep,
    /// They never arrive, and the connection is reset.
    Lose,
    /// They arrive before the action.
    PassBefore,
    /// They arrive after the action.
    PassAfter,
}

pub(super) struct Trap {
    pub(super) at: Box<dyn Fn(&Mark) -> bool + Send>,
    pub(super) hold: Hold,
    pub(super) action: Box<dyn FnMut() + Send>,
    /// How many more times it springs.
    pub(super) times: u32,
    /// Notified when it has sprung for the last time.
    pub(super) sprung: Option<oneshot::Sender<()>>,
}

/// The traps of one link.
#[derive(Default)]
pub(super) struct Traps {
    set: Mutex<BTreeMap<u64, Trap>>,
    next: AtomicU64,
}

impl Traps {
    pub(super) fn set(self: &Arc<Self>, trap: Trap) -> TrapGuard {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number, trap);
        TrapGuard { traps: self.clone(), number }
    }

    /// Springs the traps at these marks: those that act after the bytes have passed, or else the others.
    pub(super) fn spring(&self, marks: &[Mark], passed: bool) -> Option<Hold> {
        let mut held = None;
        self.lock().retain(|_, trap| {
            if (trap.hold == Hold::PassBefore) != passed || !marks.iter().any(|mark| (trap.at)(mark)) {
                return true;
            }
            (trap.action)();
            held = Some(trap.hold);
            trap.times -= 1;
            if trap.times == 0
                && let Some(sprung) = trap.sprung.take()
            {
                let _ = sprung.send(());
            }
            trap.times > 0
        });
        held
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Trap>> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the trap when dropped.
pub(super) struct TrapGuard {
    traps: Arc<Traps>,
    number: u64,
}

impl Drop for TrapGuard {
    fn drop(&mut self) {
        self.traps.lock().remove(&self.number);
    }
}
