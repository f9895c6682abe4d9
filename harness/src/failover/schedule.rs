//! Which faults strike, in which order.

use std::fmt;

use fastrand::Rng;

/// How often each fault strikes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) switchovers: usize,
    pub(super) crashes: usize,
    pub(super) etcd_losses: usize,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The synchronous standby takes over as planned.
    Switchover,
    /// The leader is killed.
    Crash,
    /// All etcd members but this one are stopped, so nobody may lead.
    EtcdLoss { left: usize },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Switchover => "switchover",
            Self::Crash => "crash",
            Self::EtcdLoss { .. } => "etcd loss",
        })
    }
}

/// All faults, in an order drawn from the seed.
pub(super) fn schedule(seed: u64, counts: Counts, etcd_members: usize) -> Vec<Fault> {
    let mut rng = Rng::with_seed(seed);
    let mut faults = vec![Fault::Switchover; counts.switchovers];
    faults.extend(vec![Fault::Crash; counts.crashes]);
    faults.extend((0..counts.etcd_losses).map(|_| Fault::EtcdLoss { left: rng.usize(..etcd_members) }));
    rng.shuffle(&mut faults);
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTS: Counts = Counts { switchovers: 10, crashes: 5, etcd_losses: 2 };

    #[test]
    fn a_schedule_has_as_many_faults_as_asked_for() {
        let faults = schedule(7, COUNTS, 3);
        let count = |is: fn(&Fault) -> bool| faults.iter().filter(|fault| is(fault)).count();
        assert_eq!(count(|fault| *fault == Fault::Switchover), 10);
        assert_eq!(count(|fault| *fault == Fault::Crash), 5);
        assert_eq!(count(|fault| matches!(fault, Fault::EtcdLoss { left: 0..3 })), 2);
        assert_eq!(faults.len(), 17);
    }

    #[test]
    fn a_seed_has_one_order_and_another_seed_another() {
        let without_etcd = Counts { etcd_losses: 0, ..COUNTS };
        assert_eq!(schedule(7, COUNTS, 3), schedule(7, COUNTS, 3));
        assert_ne!(schedule(7, without_etcd, 3), schedule(8, without_etcd, 3));
    }
}
