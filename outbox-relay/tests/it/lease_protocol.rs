//! A model of lease, delivery and settlement, of which every state is visited. It has two relays, three events of one
//! aggregate, and any number of leases. A message may be delayed, repeated, reordered or lost, and any process killed.
//!
//! The model repeats in a few lines what `lease.rs`, `run.rs`, `isolate.rs`, `settle.rs` and `accept.rs` do. The other
//! tests check that the code does so. The model leaves out attempts, back-off, death and other aggregates. Its inbox
//! forgets nothing. It leaves out renewal too: a lease that is renewed is as it was before it expired.
//!
//! Time is not modelled: any step may be arbitrarily late. So a relay that is stopped beyond its lease is one that
//! takes no step, and no property depends on a deadline. A row that another relay frees is one that expired: both are
//! visible and keep the old token. So a relay that is taken for dead and goes on is one whose rows expired early.
//!
//! The model does not show that an event is delivered in the end. It shows that no event is deleted before it was.

use stateright::{Checker, HasDiscoveries, Model, Property};

const RELAYS: usize = 2;
const EVENTS: usize = 3;
/// More than a state has: one per row, relay and settlement, and those of the disk.
const TOKENS_MAX: usize = 16;

const LOST: &str = "no event is lost";
const REPEATED: &str = "no event is applied twice";
const OVERTAKEN: &str = "events are applied in sequence";
const TRESPASSED: &str = "none is settled by a relay that lost its lease";
const LEASED_TWICE: &str = "none is leased while another's lease of it runs";
const CROSSED: &str = "no run is taken behind an event of another's lease";

/// The parts of the protocol. Each can be turned off, to show that the properties need it.
#[derive(Clone, Copy, Debug)]
struct Protocol {
    /// A settlement names the token of its lease.
    fenced: bool,
    /// The receiver applies only events that are not in its inbox.
    deduplicated: bool,
    /// A lease begins with the first event that is left.
    sequenced: bool,
    /// A row is deleted after the answer, not after the delivery was sent.
    answered: bool,
    /// A run is taken only behind an event that still has the lease's token.
    headed: bool,
    /// An event is not delivered if one before it was missed when the run was taken.
    joined: bool,
    /// An event of a run is delivered only after the one before it was taken, or right behind it in the same batch.
    awaited: bool,
    /// A batch may have several events of a run.
    batched: bool,
    /// The receiver applies no event of a batch behind one that it refuses.
    ordered: bool,
    /// The database may crash.
    crashes: bool,
    /// Events that are in the outbox at the beginning: the last ones. Those before them were delivered.
    events: usize,
}

/// The receiver applies the events of a batch in order, so it may get several of an aggregate at once.
const IN_BATCHES: Protocol = Protocol {
    fenced: true,
    deduplicated: true,
    sequenced: true,
    answered: true,
    headed: true,
    joined: true,
    awaited: true,
    batched: true,
    ordered: true,
    crashes: false,
    events: EVENTS,
};
/// The receiver promises nothing, so it gets the events of an aggregate one by one.
const ONE_BY_ONE: Protocol = Protocol { batched: false, ordered: false, ..IN_BATCHES };

/// A set of events, in sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Events(u8);

impl Events {
    fn of(events: impl IntoIterator<Item = usize>) -> Self {
        events.into_iter().fold(Self::default(), Self::with)
    }

    fn with(self, event: usize) -> Self {
        Self(self.0 | 1 << event)
    }

    fn plus(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    fn has(self, event: usize) -> bool {
        self.0 & 1 << event != 0
    }

    fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn iter(self) -> impl DoubleEndedIterator<Item = usize> {
        (0..EVENTS).filter(move |event| self.has(*event))
    }

    fn index(self) -> usize {
        self.0.into()
    }

    fn begins_with(self, first: Self) -> bool {
        first.iter().next_back().is_some_and(|last| self.between(0, last) == first)
    }

    /// The events from one to another.
    fn between(self, from: usize, to: usize) -> Self {
        Self::of(self.iter().filter(|event| (from..=to).contains(event)))
    }
}

/// An event in the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Row {
    Visible,
    Leased { token: u8, expired: bool },
    Deleted,
}

/// What a relay knows of its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Lease {
    token: u8,
    run: Events,
    /// Events behind one that could not be taken. They are not delivered.
    adrift: Events,
    /// Events of which the receiver has said that they are applied.
    taken: Events,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Relay {
    Idle,
    Holding(Lease),
    /// The statement that takes a run has its snapshot: these events are free, and another may hold the first.
    Extending {
        lease: Lease,
        free: Events,
        behind_another: bool,
    },
    /// It has sent these events, and waits for the answer.
    Waiting {
        lease: Lease,
        sent: Events,
    },
}

/// A statement that deletes some rows and puts others back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Settlement {
    token: u8,
    handled: Events,
    back: Events,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct System {
    outbox: [Row; EVENTS],
    /// The outbox after a crash of the database: the relay's commits do not wait for the disk. All leases have expired
    /// by then, which only lets more happen.
    on_disk: [Row; EVENTS],
    /// In some order, since the relays are alike.
    relays: [Relay; RELAYS],
    /// Whether a delivery of these events is on its way. It may arrive any number of times.
    deliveries: [bool; 1 << EVENTS],
    /// A settlement on its way. It may be executed any number of times, since a relay repeats one without an answer.
    settlement: Option<Settlement>,
    /// Events that the receiver has applied. Its commits do wait for the disk.
    applied: Events,
    /// The token of the lease that runs on each event, whatever its row says. No relay sees this, and a crash of the
    /// database clears it.
    running: [Option<u8>; EVENTS],
    wrong: Wrong,
}

/// What must never happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Wrong {
    /// An event was applied a second time.
    repeated: bool,
    /// An event was applied before its predecessor.
    overtaken: bool,
    /// A row was settled with a token that it does not have.
    trespassed: bool,
    /// An event was leased while another lease of it ran.
    leased_twice: bool,
    /// A run was taken behind an event that another relay had leased.
    crossed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Lease {
        relay: usize,
        event: usize,
    },
    /// With room for so many events.
    Extend {
        relay: usize,
        room: usize,
    },
    Take(usize),
    Send {
        relay: usize,
        events: Events,
    },
    /// The receiver refuses one event of a delivery, or none.
    Apply {
        delivery: Events,
        refused: Option<usize>,
    },
    Answer(usize),
    Settle(usize),
    Execute(Settlement),
    Expire(usize),
    CrashRelay(usize),
    WriteToDisk,
    CrashDatabase,
}

impl System {
    fn is_free(&self, event: usize) -> bool {
        matches!(self.outbox[event], Row::Visible | Row::Leased { expired: true, .. })
    }

    fn is_anothers(&self, event: usize, token: u8) -> bool {
        self.outbox[event].token().is_some_and(|holder| holder != token)
    }

    fn may_be_leased(&self, protocol: Protocol, event: usize) -> bool {
        let first = self.outbox[..event].iter().all(|row| *row == Row::Deleted);
        self.is_free(event) && (first || !protocol.sequenced)
    }

    fn lease(&mut self, event: usize, token: u8) {
        self.outbox[event] = Row::Leased { token, expired: false };
        self.wrong.leased_twice |= self.running[event].replace(token).is_some_and(|other| other != token);
    }

    /// The snapshot of the statement that takes a run: the events behind the first, up to one that is not free.
    fn extend(&self, protocol: Protocol, lease: Lease, room: usize) -> Option<Relay> {
        let head = lease.run.iter().next()?;
        if protocol.headed && self.outbox[head].token() != Some(lease.token) {
            return None;
        }
        let left = (head + 1..EVENTS).filter(|event| self.outbox[*event] != Row::Deleted);
        let free = Events::of(left.take_while(|event| self.is_free(*event)).take(room));
        let behind_another = self.running[head].is_some_and(|other| other != lease.token);
        (free.iter().count() == room).then_some(Relay::Extending { lease, free, behind_another })
    }

    /// The update of the same statement. It leaves out what another has taken since.
    fn take(&mut self, protocol: Protocol, mut lease: Lease, free: Events, behind_another: bool) -> Lease {
        let mut gap = false;
        for event in free.iter() {
            if !self.is_free(event) {
                gap = protocol.joined;
                continue;
            }
            self.lease(event, lease.token);
            self.wrong.crossed |= behind_another;
            let part = if gap { &mut lease.adrift } else { &mut lease.run };
            *part = part.with(event);
        }
        lease
    }

    /// Settles a row with one statement that has the token in its condition.
    fn settle(&mut self, protocol: Protocol, token: u8, event: usize, settled: Row) {
        if self.running[event] == Some(token) {
            self.running[event] = None;
        }
        let held = self.outbox[event].token() == Some(token);
        if held || (!protocol.fenced && self.outbox[event] != Row::Deleted) {
            self.wrong.trespassed |= !held;
            self.outbox[event] = settled;
        }
    }

    /// Applies the events of a delivery one after the other.
    fn apply(&mut self, protocol: Protocol, delivery: Events, refused: Option<usize>) {
        for event in delivery.iter() {
            if refused == Some(event) {
                if protocol.ordered { break } else { continue }
            }
            if protocol.deduplicated && self.applied.has(event) {
                continue;
            }
            self.wrong.repeated |= self.applied.has(event);
            self.wrong.overtaken |= event > 0 && !self.applied.has(event - 1);
            self.applied = self.applied.with(event);
        }
    }

    /// Brings states together that differ in nothing that matters.
    fn tidy(&mut self, protocol: Protocol) {
        if protocol.deduplicated && (protocol.ordered || !protocol.batched) {
            self.forget_deliveries();
        }
        if protocol.fenced && protocol.headed && protocol.deduplicated {
            self.forget_lost_leases();
        }
        if protocol.fenced {
            self.forget_tokens();
        }
        self.rename_tokens();
        self.relays.sort_unstable();
    }

    /// Only events that were not applied make a difference. A delivery that begins with another one stands for both,
    /// since the receiver may refuse the rest.
    fn forget_deliveries(&mut self) {
        let before = std::mem::take(&mut self.deliveries);
        for delivery in (0..1 << EVENTS).map(Events).rev().filter(|events| before[events.index()]) {
            let new = delivery.without(self.applied);
            let is_covered = || self.on_their_way().any(|other| other.begins_with(new));
            if !new.is_empty() && !is_covered() {
                self.deliveries[new.index()] = true;
            }
        }
    }

    fn on_their_way(&self) -> impl Iterator<Item = Events> + use<> {
        let deliveries = self.deliveries;
        (0..1 << EVENTS).map(Events).filter(move |events| deliveries[events.index()])
    }

    /// A relay that lost its lease, and all of whose events are applied, can only end. A settlement changes nothing if
    /// no row has its token, or will have it after a crash.
    fn forget_lost_leases(&mut self) {
        let rows = [self.outbox, self.on_disk];
        let is_lost = |token| rows.iter().flatten().all(|row| row.token() != Some(token));
        for relay in &mut self.relays {
            if let Relay::Holding(lease) | Relay::Waiting { lease, .. } = relay
                && lease.run.without(self.applied).is_empty()
                && is_lost(lease.token)
            {
                *relay = Relay::Idle;
            }
        }
        self.settlement = self.settlement.filter(|settlement| !is_lost(settlement.token));
    }

    /// The token of a row that is free makes no difference if nobody can name it.
    fn forget_tokens(&mut self) {
        let leases = self.relays.iter().filter_map(|relay| relay.lease().map(|lease| lease.token));
        let named =
            leases.chain(self.settlement.map(|settlement| settlement.token)).fold(0, |set, token| set | 1 << token);
        for row in self.outbox.iter_mut().chain(&mut self.on_disk) {
            if matches!(row, Row::Leased { token, expired: true } if named & (1 << *token) == 0) {
                *row = Row::Visible;
            }
        }
    }

    /// A token says only whether it is the same as another. So any names will do.
    fn rename_tokens(&mut self) {
        let mut names = [None; TOKENS_MAX];
        let mut next = 0..;
        for token in self.tokens() {
            *token = *names[usize::from(*token)].get_or_insert_with(|| next.next().unwrap());
        }
    }

    fn new_token(&mut self) -> u8 {
        self.tokens().max().map_or(0, |last| *last + 1)
    }

    fn tokens(&mut self) -> impl Iterator<Item = &mut u8> {
        let rows = self.outbox.iter_mut().chain(&mut self.on_disk).filter_map(Row::token_mut);
        let running = self.running.iter_mut().flatten();
        let relays = self.relays.iter_mut().filter_map(|relay| relay.lease_mut().map(|lease| &mut lease.token));
        rows.chain(running).chain(relays).chain(self.settlement.iter_mut().map(|settlement| &mut settlement.token))
    }
}

impl Row {
    fn token(mut self) -> Option<u8> {
        self.token_mut().copied()
    }

    fn token_mut(&mut self) -> Option<&mut u8> {
        if let Self::Leased { token, .. } = self { Some(token) } else { None }
    }

    fn expired(self) -> Self {
        self.token().map_or(self, |token| Self::Leased { token, expired: true })
    }
}

impl Relay {
    fn lease(mut self) -> Option<Lease> {
        self.lease_mut().copied()
    }

    fn lease_mut(&mut self) -> Option<&mut Lease> {
        match self {
            Self::Idle => None,
            Self::Holding(lease) | Self::Extending { lease, .. } | Self::Waiting { lease, .. } => Some(lease),
        }
    }
}

impl Protocol {
    fn relay_steps(self, system: &System, relay: usize, steps: &mut Vec<Step>) {
        match system.relays[relay] {
            Relay::Idle => {
                let events = (0..EVENTS).filter(|event| system.may_be_leased(self, *event));
                steps.extend(events.map(|event| Step::Lease { relay, event }));
                return;
            }
            Relay::Holding(lease) => {
                if lease.run.iter().count() == 1 && lease.taken.is_empty() {
                    steps.extend((1..EVENTS).map(|room| Step::Extend { relay, room }));
                }
                steps.extend(self.batches(lease).map(|events| Step::Send { relay, events }));
                if system.settlement.is_none() {
                    steps.push(Step::Settle(relay));
                }
            }
            Relay::Extending { .. } => steps.push(Step::Take(relay)),
            Relay::Waiting { .. } => steps.push(Step::Answer(relay)),
        }
        steps.push(Step::CrashRelay(relay));
    }

    /// What may be sent: an event whose predecessor in the run was taken, or several from there on.
    fn batches(self, Lease { run, taken, .. }: Lease) -> impl Iterator<Item = Events> {
        let left = run.without(taken);
        let may_begin = move |event: &usize| {
            let before = run.iter().rfind(|before| before < event);
            !self.awaited || before.is_none_or(|before| taken.has(before))
        };
        left.iter().filter(may_begin).flat_map(move |from| {
            let last = if self.batched { EVENTS } else { from + 1 };
            left.iter().filter(move |to| (from..last).contains(to)).map(move |to| left.between(from, to))
        })
    }
}

impl Model for Protocol {
    type State = System;
    type Action = Step;

    fn init_states(&self) -> Vec<System> {
        let delivered = Events::of(0..EVENTS - self.events);
        let outbox = std::array::from_fn(|event| if delivered.has(event) { Row::Deleted } else { Row::Visible });
        vec![System {
            outbox,
            on_disk: outbox,
            relays: [Relay::Idle; RELAYS],
            deliveries: [false; 1 << EVENTS],
            settlement: None,
            applied: delivered,
            running: [None; EVENTS],
            wrong: Wrong::default(),
        }]
    }

    fn actions(&self, system: &System, steps: &mut Vec<Step>) {
        (0..RELAYS).for_each(|relay| self.relay_steps(system, relay, steps));
        for delivery in system.on_their_way() {
            let refusals = delivery.iter().map(Some).chain([None]);
            steps.extend(refusals.map(|refused| Step::Apply { delivery, refused }));
        }
        steps.extend(system.settlement.map(Step::Execute));
        let runs = |event: &usize| matches!(system.outbox[*event], Row::Leased { expired: false, .. });
        steps.extend((0..EVENTS).filter(runs).map(Step::Expire));
        if self.crashes {
            steps.extend([Step::WriteToDisk, Step::CrashDatabase]);
        }
    }

    fn next_state(&self, before: &System, step: Step) -> Option<System> {
        let mut system = *before;
        match step {
            Step::Lease { relay, event } => {
                let token = system.new_token();
                system.lease(event, token);
                let run = Events::of([event]);
                let (adrift, taken) = (Events::default(), Events::default());
                system.relays[relay] = Relay::Holding(Lease { token, run, adrift, taken });
            }
            Step::Extend { relay, room } => {
                let Relay::Holding(lease) = system.relays[relay] else { return None };
                system.relays[relay] = system.extend(*self, lease, room)?;
            }
            Step::Take(relay) => {
                let Relay::Extending { lease, free, behind_another } = system.relays[relay] else { return None };
                system.relays[relay] = Relay::Holding(system.take(*self, lease, free, behind_another));
            }
            Step::Send { relay, events } => {
                let Relay::Holding(lease) = system.relays[relay] else { return None };
                if !self.answered {
                    events.iter().for_each(|event| system.settle(*self, lease.token, event, Row::Deleted));
                }
                system.deliveries[events.index()] = true;
                system.relays[relay] = Relay::Waiting { lease, sent: events };
            }
            Step::Apply { delivery, refused } => system.apply(*self, delivery, refused),
            Step::Answer(relay) => {
                let Relay::Waiting { mut lease, sent } = system.relays[relay] else { return None };
                let taken = sent.iter().filter(|event| system.applied.has(*event));
                lease.taken = lease.taken.plus(Events::of(taken));
                system.relays[relay] = Relay::Holding(lease);
            }
            Step::Settle(relay) => {
                let Relay::Holding(Lease { token, run, adrift, taken }) = system.relays[relay] else { return None };
                system.settlement = Some(Settlement { token, handled: taken, back: run.plus(adrift).without(taken) });
                system.relays[relay] = Relay::Idle;
            }
            Step::Execute(Settlement { token, handled, back }) => {
                handled.iter().for_each(|event| system.settle(*self, token, event, Row::Deleted));
                back.iter().for_each(|event| system.settle(*self, token, event, Row::Visible));
            }
            Step::Expire(event) => {
                if let Row::Leased { expired, .. } = &mut system.outbox[event] {
                    *expired = true;
                    system.running[event] = None;
                }
            }
            Step::CrashRelay(relay) => system.relays[relay] = Relay::Idle,
            Step::WriteToDisk => system.on_disk = system.outbox.map(Row::expired),
            Step::CrashDatabase => {
                system.outbox = system.on_disk;
                system.running = [None; EVENTS];
            }
        }
        system.tidy(*self);
        (system != *before).then_some(system)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(LOST, |_, system: &System| {
                (0..EVENTS).all(|event| system.outbox[event] != Row::Deleted || system.applied.has(event))
            }),
            Property::always(REPEATED, |_, system: &System| !system.wrong.repeated),
            Property::always(OVERTAKEN, |_, system: &System| !system.wrong.overtaken),
            // The condition of a settlement, and its purpose.
            Property::always(TRESPASSED, |_, system: &System| !system.wrong.trespassed),
            Property::always(LEASED_TWICE, |_, system: &System| !system.wrong.leased_twice),
            Property::always(CROSSED, |_, system: &System| !system.wrong.crossed),
            // The properties above would prove nothing if these never happened.
            Property::sometimes("all are delivered", |_, system: &System| system.outbox == [Row::Deleted; EVENTS]),
            Property::sometimes("an event of a lost lease is applied", |_, system: &System| {
                system.relays.iter().any(|relay| match relay {
                    Relay::Waiting { lease, sent } => {
                        sent.iter().any(|event| system.applied.has(event) && system.is_anothers(event, lease.token))
                    }
                    _ => false,
                })
            }),
            Property::sometimes("a run is about to be settled in part", |_, system: &System| {
                system.settlement.is_some_and(|Settlement { token, handled, back }| {
                    let held = |event: usize| system.outbox[event].token() == Some(token);
                    !handled.is_empty() && !back.is_empty() && handled.plus(back).iter().all(held)
                })
            }),
            Property::sometimes("a run is taken over in the middle", |_, system: &System| {
                let mut leases = system.relays.iter().filter_map(|relay| relay.lease());
                leases.any(|Lease { token, run, taken, .. }| {
                    !taken.is_empty() && run.without(taken).iter().any(|event| system.is_anothers(event, token))
                })
            }),
            Property::sometimes("a settlement is too late for an event that was taken", |_, system: &System| {
                system.settlement.is_some_and(|Settlement { token, handled, .. }| {
                    handled.iter().any(|event| system.is_anothers(event, token))
                })
            }),
            Property::sometimes("the first is lost in the statement that takes the rest", |_, system: &System| {
                system.relays.iter().any(|relay| match relay {
                    Relay::Extending { lease, .. } => {
                        lease.run.iter().any(|event| system.is_anothers(event, lease.token))
                    }
                    _ => false,
                })
            }),
        ];
        if self.events == EVENTS {
            properties.push(Property::sometimes("an event is adrift", |_, system: &System| {
                system.relays.iter().any(|relay| relay.lease().is_some_and(|lease| !lease.adrift.is_empty()))
            }));
        }
        if self.crashes {
            properties.push(Property::sometimes("a deleted event is back after a crash", |_, system: &System| {
                let first = |lease: Lease| lease.run.iter().next().unwrap_or_default();
                let mut firsts = system.relays.iter().filter_map(|relay| relay.lease().map(first));
                firsts.any(|first| system.outbox[..first].iter().any(|row| *row != Row::Deleted))
            }));
        }
        properties
    }
}

#[test]
fn in_every_state_all_properties_hold() {
    // A state that can crash has each row twice, so it has fewer. Batches of one event are among the batches.
    let crashing = Protocol { crashes: true, events: 2, ..IN_BATCHES };
    for protocol in [IN_BATCHES, crashing] {
        let checked = protocol.checker().threads(2).spawn_bfs().join();
        println!("{} states, {} of them different", checked.state_count(), checked.unique_state_count());
        checked.assert_properties();
    }
}

/// The properties that a protocol violates, when every state of it with two events is visited.
fn violated(protocol: Protocol) -> Vec<&'static str> {
    let checked = Protocol { events: 2, ..protocol }.checker().threads(2).spawn_bfs().join();
    let all = [LOST, REPEATED, OVERTAKEN, TRESPASSED, LEASED_TWICE, CROSSED];
    all.into_iter().filter(|property| checked.discovery(property).is_some()).collect()
}

#[test]
fn every_part_of_the_protocol_is_needed() {
    for sound in [ONE_BY_ONE, IN_BATCHES] {
        assert_eq!(violated(sound), [""; 0]);
        assert_eq!(violated(Protocol { fenced: false, ..sound }), [TRESPASSED, LEASED_TWICE]);
        assert_eq!(violated(Protocol { deduplicated: false, ..sound }), [REPEATED]);
        assert_eq!(violated(Protocol { sequenced: false, ..sound }), [OVERTAKEN]);
        assert_eq!(violated(Protocol { answered: false, ..sound }), [LOST, OVERTAKEN]);
        assert_eq!(violated(Protocol { awaited: false, ..sound }), [OVERTAKEN]);
        // This harms no event. It only hides some from the relay that has the first, and will need them next. So it is
        // harmless too that another relay may take the first while the statement runs that has checked it.
        assert_eq!(violated(Protocol { headed: false, ..sound }), [CROSSED]);
    }
    // Only a receiver that stops at an event that it refuses may get several of an aggregate at once.
    assert_eq!(violated(Protocol { ordered: false, ..IN_BATCHES }), [OVERTAKEN]);
}

/// Of two relays that take runs at once, one may miss an event that the other has taken. A gap has an event before it
/// and one behind it, so this takes three.
#[test]
fn an_event_behind_a_gap_must_not_be_delivered() {
    let protocol = Protocol { joined: false, ..ONE_BY_ONE };
    let checked = protocol.checker().finish_when(HasDiscoveries::AnyFailures).threads(2).spawn_bfs().join();
    assert!(checked.discovery(OVERTAKEN).is_some());
}
