//! Crashes at points with names: a process is killed at the moment something of it passes a proxy, and what passes is kept.

use std::{sync::Arc, time::Duration};

use rustix::process::Signal;
use tokio::{sync::oneshot, time::timeout};

use super::{
    proxy::{Hold, Link, Trap, TrapGuard},
    site::{Part, Site},
    wire::Mark,
};

/// How long a point may take to be reached.
const REACH_LIMIT: Duration = Duration::from_secs(8);

/// Where a process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CrashPoint {
    pub(super) name: &'static str,
    victim: Victim,
    at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Orders,
    Inventory,
    /// Either relay of the orders' outbox.
    OrdersRelay,
    InventoryRelay,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// A statement is about to be sent.
    Before(&'static str),
    /// A statement was executed, and the process does not know.
    After(&'static str),
    BeforeSend,
    AfterSend,
    AfterReply,
}

const fn point(victim: Victim, at: At, name: &'static str) -> CrashPoint {
    CrashPoint { name, victim, at }
}

/// Placing an order is one statement, with its begin and its commit in it; the points between are those of a cancellation,
/// which writes order and event with a statement each.
pub(super) const POINTS: [CrashPoint; 27] = [
    point(Victim::Orders, At::Before("orders: create orders"), "order-service before it places orders"),
    point(Victim::Orders, At::After("orders: create orders"), "order-service after it has placed orders"),
    point(Victim::Orders, At::After("BEGIN"), "order-service after BEGIN"),
    point(Victim::Orders, At::After("orders: cancel"), "order-service after the order"),
    point(Victim::Orders, At::After("outbox: enqueue"), "order-service after the outbox"),
    point(Victim::Orders, At::Before("COMMIT"), "order-service before COMMIT"),
    point(Victim::Orders, At::After("COMMIT"), "order-service after COMMIT"),
    point(Victim::Orders, At::After("inbox: accept"), "order-service after the dedupe of answers"),
    point(Victim::Orders, At::After("orders: apply replies"), "order-service after it has applied answers"),
    point(Victim::Inventory, At::After("BEGIN"), "inventory-service after BEGIN"),
    point(Victim::Inventory, At::After("inbox: accept"), "inventory-service after the dedupe"),
    point(Victim::Inventory, At::After("inventory: lock stock"), "inventory-service after the locks on stock"),
    point(Victim::Inventory, At::After("inventory: write batch"), "inventory-service after stock and answers"),
    point(Victim::Inventory, At::Before("COMMIT"), "inventory-service before COMMIT"),
    point(Victim::Inventory, At::After("COMMIT"), "inventory-service after COMMIT"),
    point(Victim::OrdersRelay, At::After("relay: lease"), "orders-relay after the lease"),
    point(Victim::OrdersRelay, At::BeforeSend, "orders-relay before it sends"),
    point(Victim::OrdersRelay, At::AfterSend, "orders-relay after it has sent"),
    point(Victim::OrdersRelay, At::AfterReply, "orders-relay after the reply"),
    point(Victim::OrdersRelay, At::Before("relay: delete handled"), "orders-relay before the delete"),
    point(Victim::OrdersRelay, At::After("relay: delete handled"), "orders-relay after the delete"),
    point(Victim::InventoryRelay, At::After("relay: lease"), "inventory-relay after the lease"),
    point(Victim::InventoryRelay, At::BeforeSend, "inventory-relay before it sends"),
    point(Victim::InventoryRelay, At::AfterSend, "inventory-relay after it has sent"),
    point(Victim::InventoryRelay, At::AfterReply, "inventory-relay after the reply"),
    point(Victim::InventoryRelay, At::Before("relay: delete handled"), "inventory-relay before the delete"),
    point(Victim::InventoryRelay, At::After("relay: delete handled"), "inventory-relay after the delete"),
];

impl Victim {
    fn parts(self) -> &'static [Part] {
        match self {
            Self::Orders => &[Part::Orders],
            Self::Inventory => &[Part::Inventory],
            Self::OrdersRelay => &[Part::OrdersRelay1, Part::OrdersRelay2],
            Self::InventoryRelay => &[Part::InventoryRelay1, Part::InventoryRelay2],
        }
    }
}

impl At {
    fn hold(self) -> Hold {
        if self == Self::AfterSend { Hold::PassBefore } else { Hold::Keep }
    }

    fn is_on_database(self) -> bool {
        matches!(self, Self::Before(_) | Self::After(_))
    }

    fn is_at(self, mark: &Mark) -> bool {
        match (self, mark) {
            (Self::Before(name), Mark::Statement(passing)) | (Self::After(name), Mark::Executed(passing)) => {
                **passing == *name
            }
            (Self::BeforeSend | Self::AfterSend, mark) => is_delivery(mark),
            (Self::AfterReply, mark) => is_answer(mark),
            _ => false,
        }
    }
}

/// What a relay sends to a receiver is a delivery, or asks nothing but to be told about it, which takes no bytes.
fn is_delivery(mark: &Mark) -> bool {
    matches!(mark, Mark::Request(message) if !message.is_empty())
}

/// A result holds the id of its event; the answer to `Describe` is a few bytes.
pub(super) fn is_answer(mark: &Mark) -> bool {
    matches!(mark, Mark::Reply(message) if message.len() > 36)
}

/// Kills whichever of the victims comes to the point first. Returns whether one did in time.
pub(super) async fn crash_at(site: &Site, point: CrashPoint) -> bool {
    let mut reached = tokio::task::JoinSet::new();
    let mut guards: Vec<TrapGuard> = Vec::new();
    for part in point.victim.parts() {
        let link: &Arc<Link> =
            if point.at.is_on_database() { site.to_database(*part) } else { site.to_receiver(*part) };
        let (sprung, springs) = oneshot::channel();
        let (unit, at) = (site.unit(*part).clone(), point.at);
        guards.push(link.set_trap(Trap {
            at: Box::new(move |mark| at.is_at(mark)),
            hold: at.hold(),
            deed: Box::new(move || _ = unit.signal(Signal::KILL)),
            times: 1,
            sprung: Some(sprung),
        }));
        reached.spawn(springs);
    }
    let first = timeout(REACH_LIMIT, reached.join_next()).await;
    matches!(first, Ok(Some(Ok(Ok(())))))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::{At, POINTS};

    /// All that a directory's Rust files say.
    fn read_sources(directory: &Path) -> String {
        let entries = fs::read_dir(directory).expect("a crate of this workspace").flatten();
        let read = |path: &Path| match path.is_dir() {
            true => read_sources(path),
            false => fs::read_to_string(path).expect("a source"),
        };
        entries.map(|entry| read(&entry.path())).collect()
    }

    /// A statement that is given another name would take its points away without a word.
    #[test]
    fn the_statements_that_points_are_known_by_exist() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let crates = ["order-service", "inventory-service", "outbox", "outbox-relay"];
        let sources: String = crates.iter().map(|name| read_sources(&root.join(name).join("src"))).collect();
        for point in POINTS {
            if let At::Before(name) | At::After(name) = point.at
                && !["BEGIN", "COMMIT"].contains(&name)
            {
                assert!(sources.contains(&format!("-- {name}\n")), "no statement is called \"{name}\"");
            }
        }
    }
}
