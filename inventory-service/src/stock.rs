//! Stock in memory: the SKUs that a batch has under lock, and their movements.

use std::collections::BTreeMap;

use crate::order_event::OrderId;

outbox::id! {
    /// What moved stock, as the ledger names it. A batch moves stock for orders only.
    pub(crate) struct Reference
}

/// Why stock is moved.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Movement {
    Reservation,
    Release,
}

impl Movement {
    /// The name that `stock_ledger_kind_known` allows.
    fn kind(self) -> &'static str {
        match self {
            Self::Reservation => "RESERVATION",
            Self::Release => "RELEASE",
        }
    }
}

/// Stock under lock, and its movements since.
#[derive(Debug)]
pub(crate) struct Stock {
    available: BTreeMap<String, i64>,
    movements: Vec<Entry>,
}

/// A movement that will be in the ledger.
#[derive(Debug)]
struct Entry {
    order_id: OrderId,
    movement: Movement,
    sku: String,
    delta: i64,
}

impl Stock {
    /// The quantity available of each SKU under lock.
    pub(crate) fn of(available: BTreeMap<String, i64>) -> Self {
        Self { available, movements: Vec::new() }
    }

    /// The quantity available; `None` if the SKU is unknown.
    pub(crate) fn available(&self, sku: &str) -> Option<i64> {
        self.available.get(sku).copied()
    }

    /// Moves stock of a SKU that is under lock.
    pub(crate) fn move_by(&mut self, order_id: OrderId, movement: Movement, sku: &str, delta: i64) {
        if let Some(available) = self.available.get_mut(sku) {
            *available += delta;
        }
        self.movements.push(Entry { order_id, movement, sku: sku.to_owned(), delta });
    }

    /// The movements as the arrays that a statement takes.
    pub(crate) fn ledger(&self) -> LedgerRows<'_> {
        let mut rows = LedgerRows::default();
        for entry in &self.movements {
            rows.references.push(entry.order_id.uuid().into());
            rows.kinds.push(entry.movement.kind());
            rows.skus.push(&entry.sku);
            rows.deltas.push(entry.delta);
        }
        rows
    }

    /// The sum of the movements of each SKU.
    ///
    /// The table's check (never below zero) is only a second line of defence. These rows are under lock, and the batch
    /// has decided on the quantities in them.
    pub(crate) fn totals(&self) -> TotalRows<'_> {
        let mut totals: BTreeMap<&str, i64> = BTreeMap::new();
        for Entry { sku, delta, .. } in &self.movements {
            *totals.entry(sku).or_default() += delta;
        }
        let (skus, deltas) = totals.into_iter().unzip();
        TotalRows { skus, deltas }
    }
}

#[derive(Debug, Default)]
pub(crate) struct LedgerRows<'s> {
    pub(crate) references: Vec<Reference>,
    pub(crate) kinds: Vec<&'static str>,
    pub(crate) skus: Vec<&'s str>,
    pub(crate) deltas: Vec<i64>,
}

#[derive(Debug)]
pub(crate) struct TotalRows<'s> {
    pub(crate) skus: Vec<&'s str>,
    pub(crate) deltas: Vec<i64>,
}
