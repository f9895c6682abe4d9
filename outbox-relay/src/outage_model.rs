//! A model of the receiver's health and of the rule by which events are charged. Every state of it is visited.
//!
//! It has two sound events and one at fault. Whenever a sound event is taken, a new one is in its place. The receiver
//! may go away and come back before any call, a bounded number of times. Leases of any of the events are delivered by
//! the [`Isolation`] itself. The model adds what `settle.rs` and `lease.rs` do with its fates, in a few lines.

use std::{ops::Range, time::Duration};

use stateright::{Checker, HasDiscoveries, Model, Property};
use tokio::time::Instant;

use crate::{
    delivery::{Answer, Delivery, Failed, Failure},
    fate::{Fate, Wait},
    isolate::{Before, Call, Case, Isolation, Step},
};

const EVENTS: usize = 3;
/// The event at fault.
const FAULTY: usize = 2;
const ATTEMPTS: u8 = 3;
/// How often the receiver goes away: less often than an event has attempts.
const OUTAGES: u8 = 2;
/// No lease of the model needs as many calls.
const CALLS_MAX: usize = 12;

/// The parts of the rule, and what the receiver's failures look like.
#[derive(Clone, Copy, Debug)]
struct Rule {
    /// A failure is charged only with a witness.
    witnessed: bool,
    /// How the receiver fails while it is away.
    away: Failure,
    /// How it fails over the event at fault.
    fault: Failure,
}

/// A row of the outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Row {
    attempts: u8,
    dead: bool,
    attempted: bool,
    known: bool,
    /// Whether the receiver took another event since this one's last attempt.
    witness: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct System {
    rows: [Row; EVENTS],
    up: bool,
    outages: u8,
}

/// A lease is delivered and settled. The receiver's health changes before one call of it, or never.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lease {
    events: Vec<usize>,
    probe: bool,
    changes_before: Option<usize>,
}

impl System {
    fn change_health(&mut self) {
        self.up = !self.up;
        self.outages += u8::from(!self.up);
    }

    fn answer(&self, rule: Rule, events: &[usize]) -> Delivery {
        let fails = |failure| Delivery::Failed(Failed { failure, reason: "x".into(), retry_after: Duration::ZERO });
        match (self.up, events.contains(&FAULTY)) {
            (false, _) => fails(rule.away),
            (true, true) => fails(rule.fault),
            (true, false) => Delivery::Answered(vec![Answer::Taken; events.len()]),
        }
    }

    fn case(&self, event: usize, now: Instant) -> Case {
        let Row { attempted, known, witness, .. } = self.rows[event];
        // The witness of the calls below was taken a second ago.
        let age = Duration::from_secs(if witness { 2 } else { 0 });
        Case { attempted: attempted.then(|| now - age), known, quiet: false, bytes: 100, after: None }
    }

    /// Delivers and settles the lease. `None` if its calls are fewer than that its change could come.
    fn deliver(&mut self, rule: Rule, lease: &Lease) -> Option<()> {
        let mut now = Instant::now() + Duration::from_secs(3600);
        let taken = self.rows.iter().any(|row| row.witness).then(|| now - Duration::from_secs(1));
        let cases: Vec<_> = lease.events.iter().map(|event| self.case(*event, now)).collect();
        // As in `lease.rs`: events that have failed alone before are delivered alone, after the others.
        let fresh = cases.iter().take_while(|case| !case.known).count();
        let mut batches: Vec<Range<usize>> = (fresh > 0).then_some(0..fresh).into_iter().collect();
        batches.extend((fresh..cases.len()).map(|place| place..place + 1));
        let mut isolation = Isolation::of(cases, batches, Before { probe: lease.probe, taken, others_fail: false });
        let mut calls = 0;
        loop {
            match isolation.next() {
                Step::End(_) => break,
                Step::Describe => isolation.described(true),
                Step::Deliver(batch) => {
                    if lease.changes_before == Some(calls) {
                        self.change_health();
                    }
                    calls += 1;
                    now += Duration::from_secs(1);
                    let (began, delivery) = (now, self.answer(rule, &lease.events[batch.clone()]));
                    now += Duration::from_secs(1);
                    isolation.learn(batch, Call { began, ended: now, alone: lease.probe }, delivery);
                }
            }
        }
        if lease.changes_before.is_some_and(|before| before >= calls) || self.outages > OUTAGES {
            return None;
        }
        // Whatever was taken, the others have a witness; those that failed in this lease have none yet.
        let took = isolation.took();
        self.rows.iter_mut().filter(|row| row.attempted).for_each(|row| row.witness |= took);
        for (event, fate) in lease.events.iter().zip(isolation.fates()) {
            self.settle(rule, *event, &fate);
        }
        Some(())
    }

    fn settle(&mut self, rule: Rule, event: usize, fate: &Fate) {
        let row = &mut self.rows[event];
        match fate {
            Fate::Delete => *row = Row::default(),
            Fate::Dead(_) => row.dead = true,
            Fate::Failed { charge, wait, .. } => {
                row.attempts += u8::from(*charge || !rule.witnessed);
                row.dead = row.attempts >= ATTEMPTS;
                (row.attempted, row.witness) = (true, false);
                row.known |= *wait != Wait::None;
            }
            Fate::Held { .. } | Fate::Back(_) => {}
        }
    }

    /// Those that never failed alone come first.
    fn alive(&self) -> Vec<usize> {
        let mut alive: Vec<_> = (0..EVENTS).filter(|event| !self.rows[*event].dead).collect();
        alive.sort_by_key(|event| self.rows[*event].known);
        alive
    }

    /// Whether the event at fault dies soon if the receiver stays up and everything is delivered.
    fn faulty_dies(&self, rule: Rule) -> bool {
        let mut later = self.clone();
        (0..4 * ATTEMPTS).any(|round| {
            let probe = round % 2 == 0;
            let _ = later.deliver(rule, &Lease { events: later.alive(), probe, changes_before: None });
            later.rows[FAULTY].dead
        })
    }
}

impl Model for Rule {
    type State = System;
    type Action = Lease;

    fn init_states(&self) -> Vec<System> {
        vec![System { rows: [Row::default(); EVENTS], up: true, outages: 0 }]
    }

    fn actions(&self, system: &System, steps: &mut Vec<Lease>) {
        let alive = system.alive();
        let mut leases: Vec<_> = alive.iter().map(|event| vec![*event]).collect();
        leases.push(alive.iter().copied().filter(|event| *event != FAULTY).collect());
        leases.push(alive);
        leases.retain(|events| !events.is_empty());
        for events in leases {
            for probe in [false, true] {
                let changes = std::iter::once(None).chain((0..CALLS_MAX).map(Some));
                steps.extend(changes.map(|changes_before| Lease { events: events.clone(), probe, changes_before }));
            }
        }
    }

    fn next_state(&self, before: &System, lease: Lease) -> Option<System> {
        let mut system = before.clone();
        system.deliver(*self, &lease)?;
        (system != *before).then_some(system)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no sound event dies of outages", |_, system: &System| {
                system.rows.iter().enumerate().all(|(event, row)| event == FAULTY || !row.dead)
            }),
            Property::always("each outage costs a sound event at most one attempt", |_, system: &System| {
                let sound = system.rows.iter().enumerate().filter(|(event, _)| *event != FAULTY);
                sound.map(|(_, row)| row.attempts).max() <= Some(system.outages)
            }),
            Property::always("an event at fault beside sound ones dies", |rule: &Self, system: &System| {
                !system.up || system.rows[FAULTY].dead || system.faulty_dies(*rule)
            }),
            Property::always("nothing dies before its last attempt", |_, system: &System| {
                system.rows.iter().all(|row| !row.dead || row.attempts == ATTEMPTS)
            }),
            // The properties above would prove nothing if these never happened.
            Property::sometimes("the event at fault is dead", |_, system: &System| system.rows[FAULTY].dead),
            Property::sometimes("the receiver is back after its last outage", |_, system: &System| {
                system.up && system.outages == OUTAGES
            }),
        ]
    }
}

#[test]
fn in_every_state_no_event_dies_of_an_outage_and_an_event_at_fault_dies() {
    for away in [Failure::Refused, Failure::Unavailable, Failure::Silent, Failure::Barred, Failure::Unreachable] {
        for fault in [Failure::Refused, Failure::Silent, Failure::TooLarge, Failure::Barred, Failure::Unmatched] {
            let checked = Rule { witnessed: true, away, fault }.checker().threads(2).spawn_bfs().join();
            checked.assert_properties();
            println!("away: {away:?}, at fault: {fault:?}: {} different states", checked.unique_state_count());
        }
    }
}

#[test]
fn without_a_witness_an_event_would_die_of_an_outage() {
    let property = "no sound event dies of outages";
    let blind = Rule { witnessed: false, away: Failure::Refused, fault: Failure::Refused };
    let found = HasDiscoveries::AllOf([property].into());
    assert!(blind.checker().finish_when(found).spawn_bfs().join().discovery(property).is_some());
}
