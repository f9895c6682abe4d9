//! The points at which a process can be crashed: before and after each statement that it executes, at the begin and the
//! end of its transactions, and around each delivery.
//!
//! The statements come from the sources (see `build.rs`), so a new one has its points at once.

use std::fmt;

use super::{site::Part, trap::Hold, wire::Mark};

/// The named statements of the processes under test, each with the crate that has it.
pub(super) const STATEMENTS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/statements.rs"));

/// Statements without points: the name, or `owner: *` for all of an owner; the processes that never execute it in a
/// fault run; the reason.
const EXCEPTIONS: &[(&str, &[Kind], &str)] = &[
    ("operate: *", &Kind::RELAYS, "an operator's command, and no operator is at work while faults strike"),
    (
        "erase: *",
        &[Kind::OrderService, Kind::LoyaltyService],
        "a command of its own, and nobody is erased in a fault run",
    ),
    (
        "relay: unhide",
        &Kind::RELAYS,
        "frees rows that a wrong clock has hidden, and no fault sets the database's clock",
    ),
    (
        "inbox: correct pruned",
        &Kind::SERVICES,
        "corrects a time of a wrong clock, and no fault sets the database's clock",
    ),
    ("inventory: seed", &[Kind::InventoryService], "executed once, before the services start"),
    ("inventory: list stock", &[Kind::InventoryService], "no client lists stock"),
    ("orders: list ids", &[Kind::OrderService], "no client lists orders"),
    ("outbox: enqueue", &[Kind::InventoryService], "enqueues in the statement that writes a batch"),
    ("outbox: *", &[Kind::LoyaltyService], "it only receives"),
];

/// Processes that run the same program on the same database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    OrderService,
    InventoryService,
    LoyaltyService,
    OrdersRelay,
    InventoryRelay,
}

impl Kind {
    pub(super) const ALL: [Self; 5] =
        [Self::OrderService, Self::InventoryService, Self::LoyaltyService, Self::OrdersRelay, Self::InventoryRelay];
    const SERVICES: [Self; 3] = [Self::OrderService, Self::InventoryService, Self::LoyaltyService];
    const RELAYS: [Self; 2] = [Self::OrdersRelay, Self::InventoryRelay];

    /// The kinds that execute the statements of a crate. All services link `outbox` for their inbox and their events.
    fn that_execute(name: &str) -> &'static [Self] {
        match name {
            "order-service" => &[Self::OrderService],
            "inventory-service" => &[Self::InventoryService],
            "loyalty-service" => &[Self::LoyaltyService],
            "outbox" => &Self::SERVICES,
            "outbox-relay" => &Self::RELAYS,
            _ => &[],
        }
    }

    pub(super) fn of(part: Part) -> Self {
        match part {
            Part::Orders => Self::OrderService,
            Part::Inventory => Self::InventoryService,
            Part::Loyalty => Self::LoyaltyService,
            Part::OrdersRelay1 | Part::OrdersRelay2 => Self::OrdersRelay,
            Part::InventoryRelay1 | Part::InventoryRelay2 => Self::InventoryRelay,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::OrderService => "order-service",
            Self::InventoryService => "inventory-service",
            Self::LoyaltyService => "loyalty-service",
            Self::OrdersRelay => "orders-relay",
            Self::InventoryRelay => "inventory-relay",
        }
    }
}

/// A place in what a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CrashPoint {
    pub(super) kind: Kind,
    pub(super) place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// A statement is about to be sent.
    Before(&'static str),
    /// A statement was executed, and the process does not know. An UPDATE or DELETE that found no row does not count.
    After(&'static str),
    BeforeDelivery,
    /// The receiver has the batch.
    AfterDelivery,
    /// The receiver has answered, and the relay does not know.
    AfterReply,
}

/// Points that ordinary work passes, so a run of some minutes reaches each. A share of all points alone would not show
/// that the proxies have lost one of these: the others could make up for it.
const COMMON: &[(Kind, &[Place])] = &[
    (
        Kind::OrderService,
        &[
            Place::Before("orders: create orders"),
            Place::After("orders: create orders"),
            Place::After("BEGIN"),
            Place::After("orders: cancel"),
            Place::After("outbox: enqueue"),
            Place::Before("COMMIT"),
            Place::After("COMMIT"),
            Place::After("inbox: accept"),
            Place::After("orders: apply replies"),
        ],
    ),
    (
        Kind::InventoryService,
        &[
            Place::After("BEGIN"),
            Place::After("inbox: accept"),
            Place::After("inventory: lock stock"),
            Place::After("inventory: write batch"),
            Place::Before("COMMIT"),
            Place::After("COMMIT"),
        ],
    ),
    (
        Kind::LoyaltyService,
        &[
            Place::After("BEGIN"),
            Place::After("inbox: accept"),
            Place::After("loyalty: award and take back points"),
            Place::Before("COMMIT"),
            Place::After("COMMIT"),
        ],
    ),
    (Kind::OrdersRelay, COMMON_IN_RELAYS),
    (Kind::InventoryRelay, COMMON_IN_RELAYS),
];
const COMMON_IN_RELAYS: &[Place] = &[
    Place::After("relay: lease"),
    Place::BeforeDelivery,
    Place::AfterDelivery,
    Place::AfterReply,
    Place::Before("relay: settle"),
    Place::After("relay: settle"),
];

impl CrashPoint {
    /// Whether ordinary work passes it.
    pub(super) fn is_common(self) -> bool {
        COMMON.iter().any(|(kind, places)| *kind == self.kind && places.contains(&self.place))
    }
}

/// All points, in the order of their processes.
pub(super) fn points() -> Vec<CrashPoint> {
    Kind::ALL
        .into_iter()
        .flat_map(|kind| places(kind).into_iter().map(move |place| CrashPoint { kind, place }))
        .collect()
}

fn places(kind: Kind) -> Vec<Place> {
    let executed = STATEMENTS.iter().filter(|(of, _)| Kind::that_execute(of).contains(&kind));
    let named = executed.map(|(_, name)| *name).filter(|name| !is_excepted(kind, name));
    let mut places: Vec<Place> = named.flat_map(|name| [Place::Before(name), Place::After(name)]).collect();
    if Kind::SERVICES.contains(&kind) {
        places.extend([Place::After("BEGIN"), Place::Before("COMMIT"), Place::After("COMMIT")]);
    } else {
        places.extend([Place::BeforeDelivery, Place::AfterDelivery, Place::AfterReply]);
    }
    places
}

fn is_excepted(kind: Kind, name: &str) -> bool {
    EXCEPTIONS.iter().any(|(exception, kinds, _)| kinds.contains(&kind) && names(exception, name))
}

/// Whether an exception names the statement, or all of its owner.
fn names(exception: &str, name: &str) -> bool {
    exception.strip_suffix('*').map_or(exception == name, |owner| name.starts_with(owner))
}

impl Place {
    /// What becomes of the bytes in which a process comes to the point.
    pub(super) fn hold(self) -> Hold {
        if self == Self::AfterDelivery { Hold::PassBefore } else { Hold::Keep }
    }

    pub(super) fn is_at(self, mark: &Mark) -> bool {
        match (self, mark) {
            (Self::Before(name), Mark::Statement(passing)) | (Self::After(name), Mark::Executed(passing)) => {
                **passing == *name
            }
            (Self::BeforeDelivery | Self::AfterDelivery, mark) => is_delivery(mark),
            (Self::AfterReply, mark) => is_answer(mark),
            _ => false,
        }
    }

    /// The words that name it: whether before or after, and what.
    pub(super) fn words(self) -> (&'static str, String) {
        match self {
            Self::Before(statement) => ("before", format!("`{statement}`")),
            Self::After(statement) => ("after", format!("`{statement}`")),
            Self::BeforeDelivery => ("before", "a delivery".into()),
            Self::AfterDelivery => ("after", "a delivery".into()),
            Self::AfterReply => ("after", "the reply to a delivery".into()),
        }
    }
}

/// A relay sends deliveries, and `Describe`, whose request is empty.
fn is_delivery(mark: &Mark) -> bool {
    matches!(mark, Mark::Request(message) if !message.is_empty())
}

/// A result holds the id of its event; the answer to `Describe` is a few bytes.
pub(super) fn is_answer(mark: &Mark) -> bool {
    matches!(mark, Mark::Reply(message) if message.len() > 36)
}

impl fmt::Display for CrashPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (when, what) = self.place.words();
        write!(f, "{} {when} {what}", self.kind.name())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{COMMON, CrashPoint, EXCEPTIONS, Kind, Place, STATEMENTS, is_excepted, names, points};

    #[test]
    fn every_statement_has_points_in_each_process_that_executes_it_or_an_exception() {
        let points = points();
        for (of, name) in STATEMENTS {
            let kinds = Kind::that_execute(of);
            assert!(!kinds.is_empty(), "no process is known to execute the statements of {of}");
            for kind in kinds {
                let at = |place| points.iter().filter(|point| point.kind == *kind && point.place == place).count();
                let found = at(Place::Before(name)) + at(Place::After(name));
                assert_eq!(found, if is_excepted(*kind, name) { 0 } else { 2 }, "{name} in {}", kind.name());
            }
        }
        assert_eq!(points.iter().collect::<BTreeSet<_>>().len(), points.len(), "a point is listed twice");
    }

    /// If a statement gets another name, its common point would silently be required no more.
    #[test]
    fn every_common_point_is_among_the_points() {
        let points = points();
        for (kind, places) in COMMON {
            for place in *places {
                let point = CrashPoint { kind: *kind, place: *place };
                assert!(points.contains(&point), "there is no point {point}");
            }
        }
        assert_eq!(points.iter().filter(|point| point.is_common()).count(), 32);
    }

    #[test]
    fn every_exception_has_a_reason_and_names_a_statement_that_its_processes_would_execute() {
        for (exception, kinds, reason) in EXCEPTIONS {
            assert!(!reason.is_empty() && !kinds.is_empty(), "{exception}");
            for kind in *kinds {
                let mut executed = STATEMENTS.iter().filter(|(of, _)| Kind::that_execute(of).contains(kind));
                assert!(
                    executed.any(|(_, name)| names(exception, name)),
                    "{} has no statement called \"{exception}\"",
                    kind.name()
                );
            }
        }
    }
}
