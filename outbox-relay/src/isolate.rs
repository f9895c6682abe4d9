//! Decides which events of a lease to deliver together, and what the results say of each. No I/O happens here.
//!
//! A failed delivery has one of two causes: the receiver cannot work, or an event cannot be applied. Both may look the
//! same, whatever the receiver's status says. So one rule tells them apart:
//!
//! > An event is charged an attempt only if it failed alone, and the same receiver took another event since that
//! > event's last attempt. (The same receiver: on the same worker's connection, since others may lead to replicas.)
//!
//! The event taken in between is the *witness*: it shows that the receiver worked. In an outage nothing is taken, so
//! nobody is charged. An event at fault among sound ones fails again and again while others are taken.
//!
//! If there is nothing else to deliver, no witness can come. Such an event is charged at most once an hour, and only if
//! the receiver answers Describe before and after it refuses the event.

use std::{collections::VecDeque, ops::Range, time::Duration};

use tokio::time::Instant;

use crate::{
    delivery::{Answer, Delivery, Failed, Failure},
    fate::{Fate, Wait},
};

/// Events in the first batch for a receiver that was unavailable: few, since they may well fail again. Each further
/// batch is twice as large, while the other workers wait. So a receiver that has just started does not get the whole
/// backlog at once, and an event that crashes it is found here.
pub(crate) const FIRST_BATCH: u32 = 8;
/// So many events in a row that fail alone, without a witness, do not depend on single events.
const OUTAGE_AFTER: usize = FIRST_BATCH as usize;

/// What a worker knows of the receiver before it delivers a lease.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Before {
    /// Whether it probes the route. Only then silence can be laid to a single event that had not failed before.
    pub(crate) probe: bool,
    /// The latest begin of a delivery on its own connection of which the receiver took an event. Another connection may
    /// lead to another replica, which shows nothing about this one.
    pub(crate) taken: Option<Instant>,
    /// Whether an event that is not of this lease has failed without a witness since the receiver last took one.
    pub(crate) others_fail: bool,
}

/// What is known of an event before it is delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    /// When it last failed alone, at the latest.
    pub(crate) attempted: Option<Instant>,
    /// Whether it had failed alone before this lease.
    pub(crate) known: bool,
    /// It is older than an hour, and was charged no attempt within the last hour.
    pub(crate) quiet: bool,
    /// Its size in a message.
    pub(crate) bytes: usize,
    /// The event before it, which the receiver has to take first. It may do so in the same call, if they share a batch.
    pub(crate) after: Option<usize>,
}

/// A delivery that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// Whether no other delivery of this route was in flight.
    pub(crate) alone: bool,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Deliver these events, and tell [`Isolation::learn`].
    Deliver(Range<usize>),
    /// Ask the receiver to describe itself, and tell [`Isolation::described`].
    Describe,
    /// Settle.
    End(Conclusion),
}

/// What the deliveries of a lease say of the receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Conclusion {
    /// It works: every event was answered, or failed for a reason of its own.
    Works,
    /// It cannot work now.
    Outage { reason: String, retry_after: Duration },
    /// It does not allow this relay to deliver.
    Barred { reason: String },
    /// Unknown: the deliveries were cut short.
    Unknown,
}

/// What was learned of an event.
#[derive(Clone, Debug)]
enum Finding {
    /// Nothing. It was not delivered, or the call says nothing about it.
    None,
    /// A delivery with it met silence or an outage. It may be the cause.
    Suspect,
    Taken,
    Rejected(String),
    /// It failed alone.
    Failed {
        charge: bool,
        failure: Failure,
        reason: String,
        retry_after: Duration,
    },
}

/// No receiver is taken to accept only messages that are smaller.
const MESSAGE_BYTES_LEAST: usize = 8 * 1024;

/// What is done once all batches were delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    /// The trial of an event that has no witness: Describe, one more delivery, Describe.
    DescribeBefore,
    Deliver,
    DescribeAfter,
    /// The last event may have crashed the receiver: Describe shows whether it is back.
    DescribeAgain,
}

/// The deliveries of one lease: what to deliver next, and what was learned.
#[derive(Debug)]
pub(crate) struct Isolation {
    cases: Vec<Case>,
    findings: Vec<Finding>,
    queue: VecDeque<Range<usize>>,
    probe: bool,
    /// The latest begin of a delivery on this connection of which the receiver took an event.
    taken: Option<Instant>,
    /// Whether the receiver took an event of this lease.
    took: bool,
    /// Whether another event has failed without a witness since the receiver last took one.
    others_fail: bool,
    failed_in_a_row: usize,
    /// Events that were delivered a second time, after the others.
    repeated: Vec<bool>,
    /// Whether the last delivery ended like one over which the receiver crashed.
    may_have_crashed: bool,
    last: Option<Last>,
    end: Option<Conclusion>,
    sizes: Sizes,
}

/// What the batches so far say of the largest message that the receiver accepts.
#[derive(Debug, Default)]
struct Sizes {
    /// The smallest batch of several events that was too large.
    refused: Option<usize>,
    /// The largest batch that was answered.
    answered: usize,
}

impl Isolation {
    /// Delivers the `batches` of the lease, which together are all `cases` but those that are not to be delivered.
    pub(crate) fn of(cases: Vec<Case>, batches: Vec<Range<usize>>, before: Before) -> Self {
        Self {
            findings: vec![Finding::None; cases.len()],
            repeated: vec![false; cases.len()],
            cases,
            queue: batches.into(),
            probe: before.probe,
            taken: before.taken,
            took: false,
            others_fail: before.others_fail,
            failed_in_a_row: 0,
            may_have_crashed: false,
            last: None,
            end: None,
            sizes: Sizes::default(),
        }
    }

    /// What to do next. It stays the same until it is done.
    pub(crate) fn next(&mut self) -> Step {
        if let Some(end) = &self.end {
            return Step::End(end.clone());
        }
        match self.last {
            Some(Last::DescribeBefore | Last::DescribeAfter | Last::DescribeAgain) => return Step::Describe,
            Some(Last::Deliver) => return Step::Deliver(0..1),
            None => {}
        }
        while let Some(batch) = self.queue.pop_front() {
            // Without a witness since, a second delivery could show nothing.
            if self.repeated[batch.start] && !self.has_witness(batch.start) {
                continue;
            }
            let Some(waiting) = batch.clone().find(|event| self.waits(*event, &batch)) else {
                self.queue.push_front(batch.clone());
                return Step::Deliver(batch);
            };
            // The event comes back, to wait for its predecessor in the outbox.
            let around = [waiting + 1..batch.end, batch.start..waiting];
            around.into_iter().filter(|part| !part.is_empty()).for_each(|part| self.queue.push_front(part));
        }
        self.conclude()
    }

    /// Whether the receiver has not taken the event before it, and does not get that in the same batch.
    fn waits(&self, event: usize, batch: &Range<usize>) -> bool {
        self.cases[event].after.is_some_and(|before| !batch.contains(&before) && !self.is_taken(before))
    }

    /// Whether the event before it was not taken.
    fn is_behind(&self, event: usize) -> bool {
        self.cases[event].after.is_some_and(|before| !self.is_taken(before))
    }

    fn is_taken(&self, event: usize) -> bool {
        matches!(self.findings[event], Finding::Taken)
    }

    /// All events were delivered.
    fn conclude(&mut self) -> Step {
        let failed = self.without_witness().count();
        let worked = self.findings.iter().any(|finding| matches!(finding, Finding::Taken | Finding::Rejected(_)));
        let end = if failed > 0 && !worked && (failed > 1 || self.others_fail || self.is_barred()) {
            self.outage()
        } else if failed == 1
            && self.is_of_one_aggregate()
            && self.cases[0].quiet
            && self.first_failed_without_witness()
        {
            self.last = Some(Last::DescribeBefore);
            return Step::Describe;
        } else if self.probe && self.may_have_crashed {
            self.last = Some(Last::DescribeAgain);
            return Step::Describe;
        } else {
            Conclusion::Works
        };
        Step::End(self.end.insert(end).clone())
    }

    fn first_failed_without_witness(&self) -> bool {
        matches!(self.findings[0], Finding::Failed { charge: false, .. })
    }

    /// Whether all events wait for the first.
    fn is_of_one_aggregate(&self) -> bool {
        self.cases.iter().skip(1).all(|case| case.after.is_some())
    }

    /// The failures of events alone, without a witness, and their reasons.
    fn without_witness(&self) -> impl Iterator<Item = (Failure, &str)> {
        self.findings.iter().filter_map(|finding| match finding {
            Finding::Failed { charge: false, failure, reason, .. } => Some((*failure, reason.as_str())),
            _ => None,
        })
    }

    fn is_barred(&self) -> bool {
        self.without_witness().all(|(failure, _)| matches!(failure, Failure::Barred | Failure::Unmatched))
    }

    /// Events failed alone, and nothing was taken: whatever their status says, the receiver does not work.
    fn outage(&self) -> Conclusion {
        let reason = self.without_witness().last().map(|(_, reason)| reason.to_owned()).unwrap_or_default();
        // After a refusal, the time that was asked for is the event's.
        let retry_after = self.findings.iter().filter_map(|finding| match finding {
            Finding::Failed { failure: Failure::Unavailable, retry_after, .. } => Some(*retry_after),
            _ => None,
        });
        let retry_after = retry_after.max().unwrap_or_default();
        if self.is_barred() { Conclusion::Barred { reason } } else { Conclusion::Outage { reason, retry_after } }
    }

    /// The result of the delivery that [`Self::next`] asked for.
    pub(crate) fn learn(&mut self, batch: Range<usize>, call: Call, delivery: Delivery) {
        let in_trial = self.last.take().is_some();
        if !in_trial {
            self.queue.pop_front();
        }
        self.may_have_crashed =
            matches!(&delivery, Delivery::Failed(Failed { failure: Failure::Silent | Failure::Unavailable, .. }));
        match delivery {
            Delivery::Answered(answers) => self.learn_answers(batch, call, answers),
            Delivery::Failed(failed) => self.learn_failure(batch, call, failed),
        }
        if in_trial && self.end.is_none() && matches!(self.findings[0], Finding::Failed { .. }) {
            self.last = Some(Last::DescribeAfter);
        }
    }

    /// The result of Describe. The caller has closed the route if the receiver did not answer.
    pub(crate) fn described(&mut self, answered: bool) {
        match self.last.take() {
            Some(Last::DescribeBefore) if answered => {
                self.last = Some(Last::Deliver);
                return;
            }
            Some(Last::DescribeAfter) if answered => {
                if let Finding::Failed { charge, .. } = &mut self.findings[0] {
                    *charge = true;
                }
            }
            _ => {}
        }
        self.end = Some(if answered { Conclusion::Works } else { Conclusion::Unknown });
    }

    fn learn_answers(&mut self, batch: Range<usize>, call: Call, answers: Vec<Answer>) {
        let took = answers.contains(&Answer::Taken);
        if took {
            self.took = true;
            self.taken = self.taken.max(Some(call.began));
            self.failed_in_a_row = 0;
        }
        self.sizes.answered = self.sizes.answered.max(self.bytes(&batch));
        for (event, answer) in batch.zip(answers) {
            match answer {
                Answer::Taken => self.findings[event] = Finding::Taken,
                // The event before it was not applied. So a sound receiver has not tried this one, and what another says of
                // it may be due to that.
                Answer::Rejected(_) | Answer::Retry(_) if self.is_behind(event) => {}
                Answer::Rejected(reason) => self.findings[event] = Finding::Rejected(reason),
                Answer::Retry(reason) => {
                    let failed = Failed { failure: Failure::Refused, reason, retry_after: Duration::ZERO };
                    self.fails_alone(event, call, took, failed);
                }
            }
        }
    }

    fn learn_failure(&mut self, batch: Range<usize>, call: Call, failed: Failed) {
        let events = batch.len();
        match failed.failure {
            Failure::Unreachable => {
                self.end = Some(Conclusion::Outage { reason: failed.reason, retry_after: failed.retry_after });
            }
            _ if events == 1 && self.shows_the_event(&failed, batch.start, call) => {
                self.fails_alone(batch.start, call, false, failed);
            }
            Failure::Refused | Failure::TooLarge | Failure::Barred | Failure::Unmatched => {
                if failed.failure == Failure::TooLarge {
                    let bytes = self.bytes(&batch);
                    self.sizes.refused = Some(self.sizes.refused.map_or(bytes, |before| before.min(bytes)));
                }
                let middle = batch.start + events / 2;
                self.split(call, [batch.start..middle, middle..batch.end].into_iter());
            }
            // The events are delivered one by one. Halves of a batch over which the receiver hangs would each cost
            // their own wait.
            Failure::Silent if events > 1 && self.probe => self.split(call, batch.map(|event| event..event + 1)),
            // A larger batch is not split, since the receiver may be overloaded. The next probe begins with a small
            // batch of the same events.
            Failure::Unavailable if events > 1 && events <= OUTAGE_AFTER && self.probe => {
                self.split(call, batch.map(|event| event..event + 1));
            }
            Failure::Silent | Failure::Unavailable => {
                self.findings[batch].fill(Finding::Suspect);
                self.end = Some(Conclusion::Outage { reason: failed.reason, retry_after: failed.retry_after });
            }
        }
    }

    /// Whether the failure of an event that was alone in its call can be laid to it, if there is a witness.
    ///
    /// A refusal can. Silence, and a proxy's word that the receiver is away, may come from a crash over an event of
    /// another call. So then nothing else may have been in flight, as in a probe. An event that has failed alone before
    /// needs no second probe if there is a witness: each would close the route to all others meanwhile. But a receiver
    /// that asks for time has too much to do, and no event is the cause of that.
    fn shows_the_event(&self, failed: &Failed, event: usize, call: Call) -> bool {
        match failed.failure {
            Failure::Refused | Failure::TooLarge | Failure::Barred | Failure::Unmatched => true,
            Failure::Silent | Failure::Unavailable if self.probe => call.alone,
            Failure::Silent | Failure::Unavailable => {
                self.cases[event].known && self.has_witness(event) && failed.retry_after.is_zero()
            }
            Failure::Unreachable => false,
        }
    }

    /// The event failed alone: alone in its call, or by a result of its own. The receiver `took` others in the same
    /// call, or not.
    fn fails_alone(&mut self, event: usize, call: Call, took: bool, failed: Failed) {
        let charge = took || self.has_witness(event);
        let Failed { failure, mut reason, retry_after } = failed;
        if failure == Failure::Silent {
            reason.insert_str(0, "NO_REPLY: ");
        }
        self.findings[event] = Finding::Failed { charge, failure, reason, retry_after };
        self.cases[event].attempted = Some(call.ended);
        if charge {
            return;
        }
        if !std::mem::replace(&mut self.repeated[event], true) {
            self.queue.push_back(event..event + 1);
        }
        self.failed_in_a_row += 1;
        if self.failed_in_a_row >= OUTAGE_AFTER {
            self.end = Some(self.outage());
        }
    }

    /// Whether the receiver took an event in a call that began after this event's last attempt. The begin counts: what
    /// a receiver took was committed after that, and perhaps before the attempt.
    fn has_witness(&self, event: usize) -> bool {
        self.cases[event].attempted.is_some_and(|attempted| self.taken.is_some_and(|taken| taken > attempted))
    }

    /// A call with several events failed: an attempt of each. They are delivered again, in these batches.
    fn split(&mut self, call: Call, batches: impl DoubleEndedIterator<Item = Range<usize>>) {
        for batch in batches.rev() {
            for case in &mut self.cases[batch.clone()] {
                case.attempted = Some(call.ended);
            }
            self.queue.push_front(batch);
        }
    }

    fn bytes(&self, batch: &Range<usize>) -> usize {
        self.cases[batch.clone()].iter().map(|case| case.bytes).sum()
    }

    /// An event that the receiver took though it did not take the one before it.
    pub(crate) fn taken_out_of_sequence(&self) -> Option<usize> {
        (0..self.cases.len()).find(|event| self.is_taken(*event) && self.is_behind(*event))
    }

    /// The latest begin of a delivery on this connection of which the receiver took an event.
    pub(crate) fn taken(&self) -> Option<Instant> {
        self.taken
    }

    /// Whether the receiver took an event of this lease.
    pub(crate) fn took(&self) -> bool {
        self.took
    }

    /// The event that failed without a witness, if the others of the lease are no evidence that the receiver works.
    pub(crate) fn failed_without_witness(&self) -> Option<usize> {
        let failed = |finding: &Finding| matches!(finding, Finding::Failed { charge: false, .. });
        self.findings.iter().position(failed).filter(|_| !self.took)
    }

    /// The largest message that the receiver accepts, if this lease has shown one: batches up to it were answered, and
    /// all larger ones were refused for their size. If a smaller batch was refused than was answered, the reason was
    /// not the size. Nor if it is very small: then the receiver limits something else, such as calls at once.
    pub(crate) fn message_bytes_max(&self) -> Option<usize> {
        let Sizes { refused, answered } = self.sizes;
        (answered >= MESSAGE_BYTES_LEAST && refused? > answered).then_some(answered)
    }

    /// The fate of each event.
    pub(crate) fn fates(self) -> Vec<Fate> {
        let down = matches!(self.end, Some(Conclusion::Outage { .. } | Conclusion::Barred { .. }));
        let fate = |finding| match finding {
            Finding::None => Fate::Back(Wait::None),
            Finding::Suspect => Fate::Back(Wait::BeforeAllOthers),
            Finding::Taken => Fate::Delete,
            Finding::Rejected(reason) => Fate::Dead(reason),
            Finding::Failed { charge, reason, retry_after, .. } => {
                // In an outage the route's back-off holds, and the events come back with it. They do not count as
                // having failed before: sound ones would be delivered alone from then on.
                let wait = if down && !charge { Wait::None } else { Wait::BackOff { at_least: retry_after } };
                Fate::Failed { charge, wait, reason }
            }
        };
        self.findings.into_iter().map(fate).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        ops::Range,
        time::Duration,
    };

    use proptest::prelude::*;
    use tokio::time::Instant;

    use super::{Before, Call, Case, Conclusion, Isolation, OUTAGE_AFTER, Step};
    use crate::{
        delivery::{Answer, Delivery, Failed, Failure},
        fate::{Fate, Wait},
    };

    const SILENT_OR_REFUSED: [Failure; 6] = [
        Failure::Silent,
        Failure::Unavailable,
        Failure::Refused,
        Failure::TooLarge,
        Failure::Barred,
        Failure::Unmatched,
    ];
    const PROBE: Before = Before { probe: true, taken: None, others_fail: false };
    const OPEN: Before = Before { probe: false, ..PROBE };

    fn one() -> Vec<Range<usize>> {
        std::iter::once(0..1).collect()
    }

    fn fresh(events: usize) -> Vec<Case> {
        vec![Case { attempted: None, known: false, quiet: false, bytes: 100, after: None }; events]
    }

    fn fails(failure: Failure) -> Delivery {
        Delivery::Failed(Failed { failure, reason: format!("{failure:?}"), retry_after: Duration::ZERO })
    }

    fn takes(batch: &Range<usize>) -> Delivery {
        Delivery::Answered(batch.clone().map(|_| Answer::Taken).collect())
    }

    /// Fails every batch with an event at fault, and takes all others.
    fn receiver(faults: &[Option<Failure>]) -> impl Fn(&Range<usize>) -> Delivery {
        move |batch| match faults[batch.clone()].iter().flatten().next() {
            Some(failure) => fails(*failure),
            None => takes(batch),
        }
    }

    /// How a lease ended.
    struct Ended {
        fates: Vec<Fate>,
        conclusion: Conclusion,
        calls: Vec<Range<usize>>,
        message_bytes_max: Option<usize>,
    }

    impl Ended {
        fn charged(&self) -> Vec<usize> {
            let charged = |fate: &Fate| matches!(fate, Fate::Failed { charge: true, .. });
            self.fates.iter().enumerate().filter(|(_, fate)| charged(fate)).map(|(event, _)| event).collect()
        }

        fn taken(&self) -> usize {
            self.fates.iter().filter(|fate| **fate == Fate::Delete).count()
        }
    }

    /// Delivers a lease to the receiver, a second per call.
    fn deliver(cases: Vec<Case>, probe: bool, receiver: impl Fn(&Range<usize>) -> Delivery) -> Ended {
        let whole = std::iter::once(0..cases.len()).collect();
        deliver_batches(cases, whole, probe, receiver)
    }

    fn deliver_batches(
        cases: Vec<Case>,
        batches: Vec<Range<usize>>,
        probe: bool,
        receiver: impl Fn(&Range<usize>) -> Delivery,
    ) -> Ended {
        let mut isolation = Isolation::of(cases, batches, if probe { PROBE } else { OPEN });
        let (mut calls, mut now) = (Vec::new(), Instant::now() + Duration::from_secs(3600));
        let conclusion = loop {
            assert!(calls.len() < 5000, "it does not end");
            match isolation.next() {
                Step::End(conclusion) => break conclusion,
                Step::Describe => isolation.described(true),
                Step::Deliver(batch) => {
                    let began = now;
                    now += Duration::from_secs(1);
                    calls.push(batch.clone());
                    let delivery = receiver(&batch);
                    isolation.learn(batch, Call { began, ended: now, alone: probe }, delivery);
                    now += Duration::from_secs(1);
                }
            }
        };
        let message_bytes_max = isolation.message_bytes_max();
        Ended { fates: isolation.fates(), conclusion, calls, message_bytes_max }
    }

    #[test]
    fn an_outage_charges_no_event_whatever_its_code() {
        for failure in SILENT_OR_REFUSED {
            for probe in [false, true] {
                for events in [2, 3, 8, 50, 500] {
                    let ended = deliver(fresh(events), probe, |_| fails(failure));
                    assert_eq!(ended.charged(), Vec::<usize>::new(), "{failure:?}, {events} events");
                    let closed = match failure {
                        Failure::Barred | Failure::Unmatched => matches!(ended.conclusion, Conclusion::Barred { .. }),
                        _ => matches!(ended.conclusion, Conclusion::Outage { .. }),
                    };
                    assert!(closed, "{failure:?}, {events} events: {:?}", ended.conclusion);
                    // So few that a receiver in trouble is not flooded.
                    assert!(ended.calls.len() <= 32, "{failure:?}, {events} events: {} calls", ended.calls.len());
                }
            }
        }
    }

    #[test]
    fn a_receiver_that_retries_every_event_does_not_work() {
        let ended = deliver(fresh(20), false, |batch| {
            Delivery::Answered(batch.clone().map(|_| Answer::Retry("BUSY".into())).collect())
        });
        assert_eq!(ended.charged(), Vec::<usize>::new());
        assert!(matches!(ended.conclusion, Conclusion::Outage { .. }), "{:?}", ended.conclusion);
        let kept = |fate: &Fate| matches!(fate, Fate::Failed { reason, wait: Wait::None, .. } if reason == "BUSY");
        assert!(ended.fates.iter().all(kept), "{:?}", ended.fates);
    }

    #[test]
    fn an_event_that_is_retried_beside_others_that_are_taken_is_charged() {
        let ended = deliver(fresh(3), false, |batch| {
            let answer = |event| if event == 1 { Answer::Retry("BUSY".into()) } else { Answer::Taken };
            Delivery::Answered(batch.clone().map(answer).collect())
        });
        assert_eq!((ended.charged(), ended.taken(), ended.calls.len()), (vec![1], 2, 1));
        assert_eq!(ended.conclusion, Conclusion::Works);
    }

    #[test]
    fn a_single_event_without_a_witness_is_put_off_with_its_reason_and_not_charged() {
        let ended = deliver(fresh(1), false, |_| fails(Failure::Refused));
        let wait = Wait::BackOff { at_least: Duration::ZERO };
        let back = Fate::Failed { charge: false, wait, reason: "Refused".into() };
        assert_eq!((ended.fates, ended.conclusion), (vec![back], Conclusion::Works));
    }

    #[test]
    fn a_single_event_is_charged_after_a_quiet_hour_if_describe_answers_before_and_after() {
        let quiet = Case { quiet: true, ..fresh(1)[0] };
        for (probe, failure) in [(false, Failure::Refused), (true, Failure::Silent), (true, Failure::Unavailable)] {
            let ended = deliver(vec![quiet], probe, |_| fails(failure));
            assert_eq!((ended.charged(), ended.calls.len()), (vec![0], 2), "{failure:?}");
        }
        let mut isolation = Isolation::of(vec![quiet], one(), OPEN);
        let now = Instant::now();
        let call = Call { began: now, ended: now, alone: false };
        assert_eq!(isolation.next(), Step::Deliver(0..1));
        isolation.learn(0..1, call, fails(Failure::Refused));
        assert_eq!(isolation.next(), Step::Describe);
        isolation.described(true);
        assert_eq!(isolation.next(), Step::Deliver(0..1));
        isolation.learn(0..1, call, fails(Failure::Refused));
        assert_eq!(isolation.next(), Step::Describe);
        isolation.described(false);
        assert_eq!(isolation.next(), Step::End(Conclusion::Unknown));
        assert!(matches!(isolation.fates()[..], [Fate::Failed { charge: false, .. }]));
    }

    #[test]
    fn an_event_that_failed_alone_before_is_charged_if_others_were_taken_since_and_only_then() {
        let now = Instant::now();
        let known = Case { attempted: Some(now), known: true, ..fresh(1)[0] };
        let later = Some(now + Duration::from_secs(1));
        for (taken, charged) in [(None, false), (Some(now), false), (later, true)] {
            for failure in SILENT_OR_REFUSED {
                let mut isolation = Isolation::of(vec![known], one(), Before { taken, ..OPEN });
                let began = now + Duration::from_secs(2);
                isolation.learn(0..1, Call { began, ended: began, alone: false }, fails(failure));
                let end = isolation.next();
                // The route stays open to the others.
                let closed = matches!(end, Step::End(Conclusion::Outage { .. } | Conclusion::Barred { .. }));
                assert!(!charged || !closed, "{failure:?}: {end:?}");
                let is_charged = matches!(isolation.fates()[..], [Fate::Failed { charge: true, .. }]);
                assert_eq!(is_charged, charged, "{failure:?}");
            }
        }
    }

    #[test]
    fn silence_over_an_event_that_never_failed_alone_charges_it_only_in_a_probe_with_nothing_else_in_flight() {
        for failure in [Failure::Silent, Failure::Unavailable] {
            let now = Instant::now();
            let taken = Some(now + Duration::from_secs(1));
            let mut isolation = Isolation::of(fresh(2), vec![0..1, 1..2], Before { taken, ..PROBE });
            let call = Call { began: now, ended: now, alone: false };
            isolation.learn(0..1, call, fails(failure));
            assert!(matches!(isolation.next(), Step::End(Conclusion::Outage { .. })));
            assert_eq!(isolation.fates(), [Fate::Back(Wait::BeforeAllOthers), Fate::Back(Wait::None)]);
        }
    }

    #[test]
    fn batches_are_halved_to_the_size_that_the_receiver_accepts() {
        for limit in [40_000, 64_000, 999_999] {
            let large = vec![Case { bytes: 4_000, ..fresh(1)[0] }; 300];
            let ended = deliver(large, false, |batch| match batch.len() * 4_000 > limit {
                true => fails(Failure::TooLarge),
                false => takes(batch),
            });
            assert_eq!((ended.taken(), ended.conclusion), (300, Conclusion::Works));
            let learned = ended.message_bytes_max.unwrap();
            assert!(learned <= limit && 4 * learned >= limit, "{learned} of {limit}");
        }
    }

    #[test]
    fn an_event_that_is_refused_as_too_large_whatever_its_batch_says_nothing_of_the_size() {
        let mut faults = vec![None; 100];
        faults[37] = Some(Failure::TooLarge);
        let ended = deliver(fresh(100), false, receiver(&faults));
        assert_eq!((ended.charged(), ended.taken(), ended.message_bytes_max), (vec![37], 99, None));
    }

    #[test]
    fn a_receiver_that_limits_calls_says_nothing_of_the_size() {
        let ended = deliver(fresh(100), false, |batch| match batch.len() > 50 {
            true => fails(Failure::TooLarge),
            false => takes(batch),
        });
        assert_eq!((ended.taken(), ended.message_bytes_max), (100, None));
    }

    #[test]
    fn a_receiver_that_asks_for_time_charges_nobody_on_an_open_route() {
        let now = Instant::now();
        let known = Case { attempted: Some(now), known: true, ..fresh(1)[0] };
        let taken = Some(now + Duration::from_secs(1));
        let mut isolation = Isolation::of(vec![known], one(), Before { taken, ..OPEN });
        let (failure, retry_after) = (Failure::Unavailable, Duration::from_secs(5));
        let failed = Failed { failure, reason: "busy".into(), retry_after };
        let began = now + Duration::from_secs(2);
        isolation.learn(0..1, Call { began, ended: began, alone: false }, Delivery::Failed(failed));
        assert_eq!(isolation.next(), Step::End(Conclusion::Outage { reason: "busy".into(), retry_after }));
        assert_eq!(isolation.fates(), [Fate::Back(Wait::BeforeAllOthers)]);
    }

    #[test]
    fn a_second_event_that_fails_without_a_witness_is_an_outage_though_each_came_alone() {
        let quiet = Case { quiet: true, ..fresh(1)[0] };
        let mut isolation = Isolation::of(vec![quiet], one(), Before { others_fail: true, ..OPEN });
        let now = Instant::now();
        isolation.learn(0..1, Call { began: now, ended: now, alone: false }, fails(Failure::Refused));
        assert!(matches!(isolation.next(), Step::End(Conclusion::Outage { .. })));
        assert_eq!(isolation.failed_without_witness(), Some(0));
        let released = Fate::Failed { charge: false, wait: Wait::None, reason: "Refused".into() };
        assert_eq!(isolation.fates(), [released]);
    }

    prop_compose! {
        /// Up to 60 events, of which fewer than an outage needs are at fault.
        fn faults()(events in 2..=60_usize)(
            places in prop::collection::btree_set(0..events, 0..OUTAGE_AFTER.min(events)),
            failures in prop::collection::vec(prop::sample::select(&SILENT_OR_REFUSED[2..]), OUTAGE_AFTER),
            events in Just(events),
        ) -> Vec<Option<Failure>> {
            let mut faults = vec![None; events];
            for (place, failure) in places.into_iter().zip(failures) {
                faults[place] = Some(failure);
            }
            faults
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_sound_event_is_taken_and_every_one_at_fault_is_charged_at_its_second_lease_at_the_latest(
            faults in faults()
        ) {
            let at_fault: Vec<_> = faults.iter().copied().filter(Option::is_some).collect();
            let sound = faults.len() - at_fault.len();
            prop_assume!(sound > 0);
            let first = deliver(fresh(faults.len()), false, receiver(&faults));
            prop_assert_eq!(first.taken(), sound);
            prop_assert_eq!(&first.conclusion, &Conclusion::Works);
            prop_assert!(first.charged().iter().all(|event| faults[*event].is_some()));
            let failed = |fate: &&Fate| matches!(fate, Fate::Failed { .. });
            prop_assert_eq!(first.fates.iter().filter(failed).count(), at_fault.len());

            // They come back one by one, after a new event.
            let known = Case { attempted: Some(Instant::now()), known: true, ..fresh(1)[0] };
            let cases = [fresh(1), vec![known; at_fault.len()]].concat();
            let batches = (0..cases.len()).map(|event| event..event + 1).collect();
            let faults = [vec![None], at_fault].concat();
            let second = deliver_batches(cases, batches, false, receiver(&faults));
            prop_assert_eq!(second.charged(), (1..faults.len()).collect::<Vec<_>>());
        }

        #[test]
        fn in_a_probe_silence_is_laid_to_the_events_at_fault_and_to_no_other(
            events in 2..=8_usize, place in 0..8_usize, failure in prop::sample::select(&SILENT_OR_REFUSED[..2])
        ) {
            let mut faults = vec![None; events];
            faults[place % events] = Some(failure);
            let ended = deliver(fresh(events), true, receiver(&faults));
            prop_assert_eq!((ended.charged(), ended.taken()), (vec![place % events], events - 1));
        }

        /// The receiver goes away at some call, and stays away.
        #[test]
        fn an_outage_that_begins_in_a_lease_charges_no_event_that_is_sound(
            faults in faults(), from in 0..40_usize, failure in prop::sample::select(&SILENT_OR_REFUSED[..])
        ) {
            let sound = receiver(&faults);
            let calls = Cell::new(0);
            let ended = deliver(fresh(faults.len()), false, |batch| {
                calls.set(calls.get() + 1);
                if calls.get() > from { fails(failure) } else { sound(batch) }
            });
            for event in ended.charged() {
                prop_assert!(faults[event].is_some(), "event {} is sound", event);
            }
        }
    }

    /// The first event of a run was taken, and the next one fails. The receiver has both once, and the rest not at all.
    #[test]
    fn a_run_ends_at_the_event_that_fails_and_repeats_none_that_was_taken() {
        let mut cases = fresh(3);
        cases[0].quiet = true;
        (cases[1].after, cases[2].after) = (Some(0), Some(1));
        let mut isolation = Isolation::of(cases, vec![0..1, 1..2, 2..3], Before::default());
        let (mut delivered, mut now) = (Vec::new(), Instant::now());
        for _ in 0..20 {
            let batch = match isolation.next() {
                Step::Deliver(batch) => batch,
                Step::Describe => {
                    isolation.described(true);
                    continue;
                }
                Step::End(_) => break,
            };
            delivered.push(batch.start);
            let call = Call { began: now, ended: now + Duration::from_millis(1), alone: true };
            now += Duration::from_millis(2);
            let refused = Failed { failure: Failure::Refused, reason: "no".into(), retry_after: Duration::ZERO };
            let taken = Delivery::Answered(vec![Answer::Taken]);
            let delivery = if batch.start == 0 { taken } else { Delivery::Failed(refused) };
            isolation.learn(batch, call, delivery);
        }
        assert_eq!(delivered, [0, 1]);
        let fates = isolation.fates();
        assert_eq!((&fates[0], &fates[2]), (&Fate::Delete, &Fate::Back(Wait::None)));
        assert!(matches!(fates[1], Fate::Failed { .. }));
    }

    #[test]
    fn an_event_that_a_receiver_takes_out_of_sequence_is_told() {
        for (first, told) in [(Answer::Taken, None), (Answer::Rejected("no".into()), Some(1))] {
            let mut cases = fresh(3);
            (cases[1].after, cases[2].after) = (Some(0), Some(1));
            let mut isolation = Isolation::of(cases, std::iter::once(0..3).collect(), OPEN);
            let now = Instant::now();
            let answers = vec![first, Answer::Taken, Answer::Taken];
            isolation.learn(0..3, Call { began: now, ended: now, alone: false }, Delivery::Answered(answers));
            assert_eq!(isolation.taken_out_of_sequence(), told);
        }
    }

    /// Runs of up to five events, in waves as a lease has them, and the batches of each wave; of all waves together, if
    /// the receiver is `ordered`.
    fn runs(lengths: &[usize], batch: usize, ordered: bool) -> (Vec<Case>, Vec<Range<usize>>) {
        let (mut cases, mut batches, mut last) = (Vec::new(), Vec::new(), vec![None; lengths.len()]);
        for wave in 0..5 {
            let from = cases.len();
            for run in (0..lengths.len()).filter(|run| lengths[*run] > wave) {
                cases.push(Case { after: last[run].replace(cases.len()), ..fresh(1)[0] });
            }
            let starts = (from..cases.len()).step_by(batch);
            batches.extend(starts.map(|start| start..cases.len().min(start + batch)));
        }
        if ordered {
            let starts = (0..cases.len()).step_by(batch);
            batches = starts.map(|start| start..cases.len().min(start + batch)).collect();
        }
        (cases, batches)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the receiver answers, and however its calls fail.
        #[test]
        fn no_event_is_delivered_before_its_predecessor_was_taken_and_what_is_taken_of_a_run_is_its_beginning(
            lengths in prop::collection::vec(1..=5_usize, 1..=6),
            batch in 1..=8_usize,
            ordered: bool,
            probe: bool,
            calls in prop::collection::vec(prop_oneof![
                2 => Just(None),
                1 => prop::sample::select(&SILENT_OR_REFUSED[..]).prop_map(Some),
            ], 1..=12),
            answers in prop::collection::vec(0..8_u8, 1..=31),
        ) {
            let (cases, batches) = runs(&lengths, batch, ordered);
            let (taken, made) = (RefCell::new(vec![false; cases.len()]), Cell::new(0));
            let after: Vec<_> = cases.iter().map(|case| case.after).collect();
            let ended = deliver_batches(cases, batches, probe, |batch| {
                let mut taken = taken.borrow_mut();
                for event in batch.clone() {
                    let in_time = |before: usize| taken[before] || (ordered && batch.contains(&before));
                    assert!(after[event].is_none_or(in_time), "{event} of {batch:?} came too early");
                    assert!(!taken[event], "{event} was taken before");
                }
                let call = made.replace(made.get() + 1);
                if let Some(failure) = calls[call % calls.len()] {
                    return fails(failure);
                }
                let mut answer = |event: usize| {
                    let answer = match answers[(call + event) % answers.len()] {
                        0 => Answer::Rejected("no".into()),
                        1 => Answer::Retry("not now".into()),
                        _ if after[event].is_some_and(|before| !taken[before]) => Answer::Retry("behind".into()),
                        _ => Answer::Taken,
                    };
                    taken[event] = answer == Answer::Taken;
                    answer
                };
                Delivery::Answered(batch.clone().map(&mut answer).collect())
            });
            for (event, (fate, taken)) in ended.fates.iter().zip(taken.into_inner()).enumerate() {
                prop_assert_eq!(*fate == Fate::Delete, taken, "event {}", event);
                let has_begun = after[event].is_none_or(|before| ended.fates[before] == Fate::Delete);
                prop_assert!(has_begun || matches!(fate, Fate::Back(_)), "event {}: {:?}", event, fate);
            }
        }
    }
}
