//! The protocol of lease, delivery and settlement as a model, of which every state is visited: two relays and two events of
//! one order, up to four leases, whatever is delayed, repeated, overtaken, lost or killed when. It repeats in a few lines what
//! `lease.rs`, `settle.rs` and `accept.rs` do with rows that are leased, released and deleted; that they do it is what the
//! other tests are about. Attempts, back-off, death, renewal and batches are left out, and the inbox forgets nothing.
//!
//! Time is not modelled: any step may be arbitrarily late, so a relay that is paused for longer than its lease is one that
//! takes no step, and nothing rests on a deadline being kept. Nor is it shown that anything arrives in the end: only that
//! nothing is deleted that has not.

use std::collections::BTreeSet;

use stateright::{Checker, HasDiscoveries, Model, Property};

const RELAYS: usize = 2;
const EVENTS: usize = 2;
/// Leases in one history: enough for each event to be taken once by each relay.
const LEASES: u8 = 4;

/// What the guarantees rest on. Each can be taken away, to see that the properties need it.
#[derive(Clone, Copy, Debug)]
struct Protocol {
    /// A settlement names its lease's token.
    fenced: bool,
    /// The receiver applies what is not in its inbox.
    deduplicated: bool,
    /// An event is leased when none of its order comes before it.
    sequenced: bool,
    /// A row is deleted after the reply, not when it was sent.
    answered: bool,
}

const SOUND: Protocol = Protocol { fenced: true, deduplicated: true, sequenced: true, answered: true };

/// An event in the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Row {
    Visible,
    Leased { token: u8, expired: bool },
    Deleted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Relay {
    Idle,
    Leased { token: u8, event: usize },
    Sent { token: u8, event: usize },
    Answered { token: u8, event: usize },
}

/// On its way between a relay, known by its lease, and the receiver. A delivery stays on its way: it may arrive again, at any
/// time, after any other; one that is lost never arrives. A reply that nobody waits for is gone, since it changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Deliver { token: u8, event: usize },
    Reply { token: u8 },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct System {
    outbox: [Row; EVENTS],
    /// What a crash of the database leaves of it: the relay's commits do not wait for the disk.
    on_disk: [Row; EVENTS],
    relays: [Relay; RELAYS],
    network: BTreeSet<Message>,
    /// By the receiver, in this order; its commits do wait.
    applied: Vec<usize>,
    leases: u8,
    /// Whose lease of an event runs, whatever its row says: seen by no relay, and forgotten with the database.
    running: [Option<u8>; EVENTS],
    /// Whether a row was changed under a token it does not carry.
    trespassed: bool,
    /// Whether an event was leased while a lease of it ran.
    taken: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    Lease { relay: usize, event: usize },
    Send(usize),
    Arrive(Message),
    GiveUp(usize),
    Settle(usize),
    Expire(usize),
    CrashRelay(usize),
    WriteToDisk,
    CrashDatabase,
}

impl System {
    fn may_be_leased(&self, protocol: Protocol, event: usize) -> bool {
        let visible = matches!(self.outbox[event], Row::Visible | Row::Leased { expired: true, .. });
        let first = self.outbox[..event].iter().all(|row| *row == Row::Deleted);
        visible && (first || !protocol.sequenced)
    }

    /// Puts the row into a new state, as one update with the token in its condition.
    fn settle(&mut self, protocol: Protocol, token: u8, event: usize, settled: Row) {
        if self.running[event] == Some(token) {
            self.running[event] = None;
        }
        let held = matches!(self.outbox[event], Row::Leased { token: holder, .. } if holder == token);
        if held || (!protocol.fenced && self.outbox[event] != Row::Deleted) {
            self.trespassed |= !held;
            self.outbox[event] = settled;
        }
    }

    fn arrive(&mut self, protocol: Protocol, message: Message) {
        match message {
            Message::Deliver { token, event } => {
                if !protocol.deduplicated || !self.applied.contains(&event) {
                    self.applied.push(event);
                }
                if self.relays.contains(&Relay::Sent { token, event }) {
                    self.network.insert(Message::Reply { token });
                }
            }
            Message::Reply { token } => {
                let waits = |relay: &Relay| matches!(relay, Relay::Sent { token: asked, .. } if *asked == token);
                let Some(relay) = self.relays.iter().position(waits) else { return };
                let Relay::Sent { event, .. } = self.relays[relay] else { return };
                self.becomes(relay, Relay::Answered { token, event });
            }
        }
    }

    fn becomes(&mut self, relay: usize, state: Relay) {
        if let Relay::Sent { token, .. } = self.relays[relay] {
            self.network.remove(&Message::Reply { token });
        }
        self.relays[relay] = state;
    }
}

impl Model for Protocol {
    type State = System;
    type Action = Step;

    fn init_states(&self) -> Vec<System> {
        vec![System {
            outbox: [Row::Visible; EVENTS],
            on_disk: [Row::Visible; EVENTS],
            relays: [Relay::Idle; RELAYS],
            network: BTreeSet::new(),
            applied: Vec::new(),
            leases: 0,
            running: [None; EVENTS],
            trespassed: false,
            taken: false,
        }]
    }

    fn actions(&self, system: &System, steps: &mut Vec<Step>) {
        for (relay, state) in system.relays.iter().enumerate() {
            match state {
                Relay::Idle if system.leases < LEASES => {
                    let events = (0..EVENTS).filter(|event| system.may_be_leased(*self, *event));
                    steps.extend(events.map(|event| Step::Lease { relay, event }));
                }
                Relay::Idle => {}
                Relay::Leased { .. } => steps.extend([Step::Send(relay), Step::CrashRelay(relay)]),
                Relay::Sent { .. } => steps.extend([Step::GiveUp(relay), Step::CrashRelay(relay)]),
                Relay::Answered { .. } => steps.extend([Step::Settle(relay), Step::CrashRelay(relay)]),
            }
        }
        steps.extend(system.network.iter().map(|message| Step::Arrive(*message)));
        steps.extend((0..EVENTS).map(Step::Expire));
        steps.extend([Step::WriteToDisk, Step::CrashDatabase]);
    }

    fn next_state(&self, before: &System, step: Step) -> Option<System> {
        let mut system = before.clone();
        match step {
            Step::Lease { relay, event } => {
                system.leases += 1;
                let token = system.leases;
                system.outbox[event] = Row::Leased { token, expired: false };
                system.taken |= system.running[event].replace(token).is_some();
                system.becomes(relay, Relay::Leased { token, event });
            }
            Step::Send(relay) => {
                let Relay::Leased { token, event } = system.relays[relay] else { return None };
                system.network.insert(Message::Deliver { token, event });
                system.becomes(relay, Relay::Sent { token, event });
                if !self.answered {
                    system.settle(*self, token, event, Row::Deleted);
                }
            }
            Step::Arrive(message) => system.arrive(*self, message),
            Step::GiveUp(relay) => {
                let Relay::Sent { token, event } = system.relays[relay] else { return None };
                system.settle(*self, token, event, Row::Visible);
                system.becomes(relay, Relay::Idle);
            }
            Step::Settle(relay) => {
                let Relay::Answered { token, event } = system.relays[relay] else { return None };
                system.settle(*self, token, event, Row::Deleted);
                system.becomes(relay, Relay::Idle);
            }
            Step::Expire(event) => {
                if let Row::Leased { expired, .. } = &mut system.outbox[event] {
                    *expired = true;
                    system.running[event] = None;
                }
            }
            Step::CrashRelay(relay) => system.becomes(relay, Relay::Idle),
            Step::WriteToDisk => system.on_disk = system.outbox,
            Step::CrashDatabase => {
                system.outbox = system.on_disk;
                system.running = [None; EVENTS];
            }
        }
        (system != *before).then_some(system)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no event is lost", |_, system: &System| {
                (0..EVENTS).all(|event| system.outbox[event] != Row::Deleted || system.applied.contains(&event))
            }),
            Property::always("no event is applied twice", |_, system: &System| {
                system.applied.iter().collect::<BTreeSet<_>>().len() == system.applied.len()
            }),
            Property::always("events are applied in sequence", |_, system: &System| system.applied.is_sorted()),
            // What a settlement's condition says; and what that is for.
            Property::always("none is settled by a relay that lost its lease", |_, system: &System| !system.trespassed),
            Property::always("none is leased while another's lease of it runs", |_, system: &System| !system.taken),
            // Nothing is proved of what never happens.
            Property::sometimes("all are delivered", |_, system: &System| system.outbox == [Row::Deleted; EVENTS]),
            Property::sometimes("an answer comes for a lease that is lost", |_, system: &System| {
                system.relays.iter().any(|relay| match relay {
                    Relay::Answered { token, event } => {
                        matches!(system.outbox[*event], Row::Leased { token: holder, .. } if holder != *token)
                    }
                    _ => false,
                })
            }),
            Property::sometimes("an event that was deleted is back", |_, system: &System| {
                system.outbox[0] != Row::Deleted && system.applied.len() == EVENTS
            }),
        ]
    }
}

/// Whether the property is found violated.
fn violates(protocol: Protocol, property: &'static str) -> bool {
    let found = HasDiscoveries::AllOf([property].into());
    protocol.checker().finish_when(found).spawn_bfs().join().discovery(property).is_some()
}

#[test]
fn in_every_state_nothing_is_lost_nor_doubled_nor_out_of_sequence_nor_settled_without_a_lease() {
    let checked = SOUND.checker().threads(2).spawn_bfs().join();
    checked.assert_properties();
    println!("{} states, {} of them different", checked.state_count(), checked.unique_state_count());
}

#[test]
fn every_part_of_the_protocol_is_needed() {
    let unfenced = Protocol { fenced: false, ..SOUND };
    assert!(violates(unfenced, "none is settled by a relay that lost its lease"));
    assert!(violates(unfenced, "none is leased while another's lease of it runs"));
    assert!(violates(Protocol { deduplicated: false, ..SOUND }, "no event is applied twice"));
    assert!(violates(Protocol { sequenced: false, ..SOUND }, "events are applied in sequence"));
    assert!(violates(Protocol { answered: false, ..SOUND }, "no event is lost"));
}
