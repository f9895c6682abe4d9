//! What a run has shown, and whether that is good enough. No I/O.

use std::{fmt, ops::Range, time::Duration};

use anyhow::Result;

use super::schedule::Fault;

/// How much longer than the cluster's own outage that of a caller may be.
const EXCESS_MAX: Duration = Duration::from_secs(2);
/// How long after the last failover the backlog must be gone.
const BACKLOG_MAX: Duration = Duration::from_secs(5);

/// What one fault cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outage {
    pub(super) fault: Fault,
    /// For the bare INSERT loop.
    pub(super) cluster: Duration,
    /// For the caller that waited longest.
    pub(super) callers: Duration,
    /// From the first INSERT afterwards until all that was placed before it was settled.
    pub(super) backlog: Duration,
}

impl Outage {
    /// How much longer a caller waited than the bare loop.
    pub(super) fn excess(&self) -> Duration {
        self.callers.saturating_sub(self.cluster)
    }
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [cluster, callers, backlog] = [self.cluster, self.callers, self.backlog].map(|time| time.as_secs_f64());
        write!(f, "{:<10}  cluster {cluster:>4.1} s  callers {callers:>4.1} s  backlog {backlog:>4.1} s", self.fault)
    }
}

/// The longest time without an acknowledgement, of those that lie in the window, in order.
pub(super) fn longest_gap(acknowledged: &[Duration], window: &Range<Duration>) -> Duration {
    let first = acknowledged.partition_point(|at| *at < window.start);
    let end = acknowledged.partition_point(|at| *at < window.end);
    let mut longest = Duration::ZERO;
    let mut before = window.start;
    for at in acknowledged[first..end].iter().copied().chain([window.end]) {
        longest = longest.max(at - before);
        before = at;
    }
    longest
}

/// What a run has shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown {
    pub(super) outages: Vec<Outage>,
    /// Orders that were acknowledged.
    pub(super) orders: usize,
    /// Acknowledged orders that are not there.
    pub(super) lost: usize,
    /// Orders beyond one for each request.
    pub(super) doubled: usize,
    /// Rows of the bare loop that were acknowledged and are not there: the cluster itself has lost them.
    pub(super) lost_by_cluster: usize,
    /// What else is wrong, the audit's findings among it.
    pub(super) findings: Vec<String>,
}

impl Shown {
    /// Keeps an error as a finding; `what` it means.
    pub(super) fn note(&mut self, what: &str, outcome: Result<()>) {
        self.findings.extend(outcome.err().map(|error| format!("{what}: {error:#}")));
    }

    fn longest(&self, of: impl Fn(&Outage) -> Duration) -> Duration {
        self.outages.iter().map(of).max().unwrap_or_default()
    }

    fn last_backlog(&self) -> Duration {
        self.outages.last().map(|outage| outage.backlog).unwrap_or_default()
    }

    /// The targets that were missed, each with its figure; none if the run is good.
    pub(super) fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        let mut demand = |holds: bool, text: String| {
            if !holds {
                missed.push(text);
            }
        };
        demand(self.orders > 0, "no order was acknowledged".into());
        demand(self.lost == 0, format!("{} acknowledged orders are lost", self.lost));
        demand(self.doubled == 0, format!("{} orders are doubled", self.doubled));
        demand(self.lost_by_cluster == 0, format!("the cluster itself has lost {} rows", self.lost_by_cluster));
        demand(self.findings.is_empty(), format!("{} findings", self.findings.len()));
        let excess = self.longest(Outage::excess);
        demand(excess <= EXCESS_MAX, format!("a caller waited {excess:.1?} longer than the cluster was away"));
        let backlog = self.last_backlog();
        demand(backlog <= BACKLOG_MAX, format!("the last backlog was gone only after {backlog:.1?}"));
        missed
    }

    /// The figures of the last line, the times in seconds.
    pub(super) fn figures(&self) -> String {
        let count = |is: fn(&Fault) -> bool| self.outages.iter().filter(|outage| is(&outage.fault)).count();
        format!(
            "switchovers={} crashes={} etcd_losses={} orders={} lost={} doubled={} findings={} cluster_max={:.1} \
             callers_max={:.1} excess_max={:.1} backlog_max={:.1} backlog_last={:.1}",
            count(|fault| *fault == Fault::Switchover),
            count(|fault| *fault == Fault::Crash),
            count(|fault| matches!(fault, Fault::EtcdLoss { .. })),
            self.orders,
            self.lost,
            self.doubled,
            self.findings.len(),
            self.longest(|outage| outage.cluster).as_secs_f64(),
            self.longest(|outage| outage.callers).as_secs_f64(),
            self.longest(Outage::excess).as_secs_f64(),
            self.longest(|outage| outage.backlog).as_secs_f64(),
            self.last_backlog().as_secs_f64(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(all: &[u64]) -> Vec<Duration> {
        all.iter().copied().map(Duration::from_secs).collect()
    }

    fn gap(acknowledged: &[u64], from: u64, to: u64) -> u64 {
        longest_gap(&seconds(acknowledged), &(Duration::from_secs(from)..Duration::from_secs(to))).as_secs()
    }

    #[test]
    fn a_gap_is_between_two_acknowledgements_or_the_ends_of_the_window() {
        assert_eq!(gap(&[1, 2, 3, 8, 9], 0, 10), 5);
        assert_eq!(gap(&[1, 2, 3, 8, 9], 4, 10), 4, "from the start of the window");
        assert_eq!(gap(&[1, 2, 3], 0, 10), 7, "to the end of the window");
        assert_eq!(gap(&[1, 20], 5, 10), 5, "nothing in the window");
        assert_eq!(gap(&[], 0, 10), 10);
        assert_eq!(gap(&[0, 9, 10, 11, 12], 10, 12), 1, "the gap before is of another fault");
    }

    fn outage(cluster: u64, callers: u64, backlog: u64) -> Outage {
        let [cluster, callers, backlog] = [cluster, callers, backlog].map(Duration::from_secs);
        Outage { fault: Fault::Crash, cluster, callers, backlog }
    }

    fn good() -> Shown {
        Shown { outages: vec![outage(20, 22, 9), outage(3, 2, 5)], orders: 7, ..Shown::default() }
    }

    #[test]
    fn a_run_at_its_limits_is_good() {
        assert_eq!(good().missed(), Vec::<String>::new());
        assert_eq!(
            good().figures(),
            "switchovers=0 crashes=2 etcd_losses=0 orders=7 lost=0 doubled=0 findings=0 cluster_max=20.0 \
             callers_max=22.0 excess_max=2.0 backlog_max=9.0 backlog_last=5.0"
        );
    }

    #[test]
    fn each_target_can_be_missed() {
        let missed = |change: fn(&mut Shown)| {
            let mut shown = good();
            change(&mut shown);
            shown.missed().join("; ")
        };
        assert_eq!(missed(|shown| shown.orders = 0), "no order was acknowledged");
        assert_eq!(missed(|shown| shown.lost = 1), "1 acknowledged orders are lost");
        assert_eq!(missed(|shown| shown.doubled = 1), "1 orders are doubled");
        assert_eq!(missed(|shown| shown.lost_by_cluster = 1), "the cluster itself has lost 1 rows");
        assert_eq!(missed(|shown| shown.findings.push("WRONG".into())), "1 findings");
        let late = missed(|shown| shown.outages.insert(0, outage(1, 4, 0)));
        assert_eq!(late, "a caller waited 3.0s longer than the cluster was away");
        assert_eq!(missed(|shown| shown.outages.push(outage(1, 1, 6))), "the last backlog was gone only after 6.0s");
    }
}
