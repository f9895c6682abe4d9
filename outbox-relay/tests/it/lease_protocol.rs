//! A model of lease, delivery and settlement, of which every state is visited. It has two relays, two events of one
//! order, and up to four leases. Any message may be delayed, repeated, reordered or lost, and any process killed.
//!
//! The model repeats in a few lines how `lease.rs`, `settle.rs` and `accept.rs` lease, release and delete rows. The
//! other tests check that the code does so. The model leaves out attempts, back-off, death, renewal and batches, and
//! its inbox forgets nothing.
//!
//! Time is not modelled: any step may be arbitrarily late. So a relay that is stopped beyond its lease is one that
//! takes no step, and no property depends on a deadline. A row that another relay frees is one that expired. The model does not show that an event is delivered in the end.
//! It shows that no event is deleted before it was.

use std::collections::BTreeSet;

use stateright::{Checker, HasDiscoveries, Model, Property};

const RELAYS: usize = 2;
const EVENTS: usize = 2;
/// Leases in one history: enough for each relay to lease each event once.
const LEASES: u8 = 4;

/// The parts of the protocol. Each can be turned off, to show that the properties need it.
#[derive(Clone, Copy, Debug)]
struct Protocol {
    /// A settlement names the token of its lease.
    fenced: bool,
    /// The receiver applies only events that are not in its inbox.
    deduplicated: bool,
    /// An event is leased only once all earlier events of its order are gone.
    sequenced: bool,
    /// A row is deleted after the reply, not after the delivery was sent.
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

/// A message between a relay, known by its lease, and the receiver. A delivery stays in the network: it may arrive
/// again at any time, after any other, or never. A reply that no relay waits for is removed, since it changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Deliver { token: u8, event: usize },
    Reply { token: u8 },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct System {
    outbox: [Row; EVENTS],
    /// The outbox after a crash of the database: the relay's commits do not wait for the disk.
    on_disk: [Row; EVENTS],
    relays: [Relay; RELAYS],
    network: BTreeSet<Message>,
    /// Events that the receiver has applied, in this order. Its commits do wait for the disk.
    applied: Vec<usize>,
    leases: u8,
    /// The token of the lease that runs on each event, whatever its row says. No relay sees this, and a crash of the
    /// database clears it.
    running: [Option<u8>; EVENTS],
    /// Whether a row was settled with a token that it does not have.
    trespassed: bool,
    /// Whether an event was leased while another lease of it ran.
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

    /// Settles a row with one update that has the token in its condition.
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
            // The condition of a settlement, and its purpose.
            Property::always("none is settled by a relay that lost its lease", |_, system: &System| !system.trespassed),
            Property::always("none is leased while another's lease of it runs", |_, system: &System| !system.taken),
            // The properties above would prove nothing if these never happened.
            Property::sometimes("all are delivered", |_, system: &System| system.outbox == [Row::Deleted; EVENTS]),
            Property::sometimes("a reply arrives for a lease that is lost", |_, system: &System| {
                system.relays.iter().any(|relay| match relay {
                    Relay::Answered { token, event } => {
                        matches!(system.outbox[*event], Row::Leased { token: holder, .. } if holder != *token)
                    }
                    _ => false,
                })
            }),
            Property::sometimes("a deleted event is back after a crash", |_, system: &System| {
                system.outbox[0] != Row::Deleted && system.applied.len() == EVENTS
            }),
        ]
    }
}

/// Whether the checker finds a violation of the property.
fn violates(protocol: Protocol, property: &'static str) -> bool {
    let found = HasDiscoveries::AllOf([property].into());
    protocol.checker().finish_when(found).spawn_bfs().join().discovery(property).is_some()
}

#[test]
fn in_every_state_all_properties_hold() {
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
