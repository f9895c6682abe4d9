//! Moves stock, and keeps the ledger of it.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::{Postgres, Transaction};
use uuid::Uuid;

/// Why stock is moved.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Movement {
    Reservation,
    Release,
}

impl Movement {
    /// As `stock_ledger_kind_known` has it.
    fn kind(self) -> &'static str {
        match self {
            Self::Reservation => "RESERVATION",
            Self::Release => "RELEASE",
        }
    }
}

/// Stock under lock, and how it was moved since.
#[derive(Debug)]
pub(crate) struct Stock {
    available: BTreeMap<String, i64>,
    movements: Vec<Entry>,
}

/// An entry of the ledger to be.
#[derive(Debug)]
struct Entry {
    order_id: Uuid,
    movement: Movement,
    sku: String,
    delta: i64,
}

impl Stock {
    /// Locks the SKUs, all at once in the order of their names, so that two batches never wait for each other in a circle.
    ///
    /// NO KEY UPDATE is the lock the deduction itself takes. The SKUs are joined, not compared with `ANY`: each row that
    /// another batch has changed meanwhile would be looked for again in the whole array, and that with stock under lock.
    pub(crate) async fn lock(
        tx: &mut Transaction<'_, Postgres>,
        skus: impl Iterator<Item = &String>,
    ) -> Result<Self, sqlx::Error> {
        let skus: BTreeSet<&String> = skus.collect();
        let skus: Vec<String> = skus.into_iter().cloned().collect();
        let rows = sqlx::query!(
            "-- inventory: lock stock
            SELECT stock.sku, stock.available
            FROM unnest($1::text[]) AS wanted (sku) JOIN stock ON stock.sku = wanted.sku
            ORDER BY stock.sku
            FOR NO KEY UPDATE OF stock",
            &skus,
        )
        .fetch_all(&mut **tx)
        .await?;
        let available = rows.into_iter().map(|row| (row.sku, row.available)).collect();
        Ok(Self { available, movements: Vec::new() })
    }

    /// What there is; `None` of a SKU nobody knows.
    pub(crate) fn available(&self, sku: &str) -> Option<i64> {
        self.available.get(sku).copied()
    }

    /// Moves stock of a SKU that is under lock.
    pub(crate) fn move_by(&mut self, order_id: Uuid, movement: Movement, sku: &str, delta: i64) {
        if let Some(available) = self.available.get_mut(sku) {
            *available += delta;
        }
        self.movements.push(Entry { order_id, movement, sku: sku.to_owned(), delta });
    }

    /// The entries of the ledger to be, as the arrays a statement takes.
    pub(crate) fn ledger(&self) -> LedgerRows<'_> {
        let mut rows = LedgerRows::default();
        for entry in &self.movements {
            rows.order_ids.push(entry.order_id);
            rows.kinds.push(entry.movement.kind());
            rows.skus.push(&entry.sku);
            rows.deltas.push(entry.delta);
        }
        rows
    }

    /// How much each SKU was moved. The rows are locked and were decided on, so the table's check (never below zero) is
    /// a second look, not the guard.
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
    pub(crate) order_ids: Vec<Uuid>,
    pub(crate) kinds: Vec<&'static str>,
    pub(crate) skus: Vec<&'s str>,
    pub(crate) deltas: Vec<i64>,
}

#[derive(Debug)]
pub(crate) struct TotalRows<'s> {
    pub(crate) skus: Vec<&'s str>,
    pub(crate) deltas: Vec<i64>,
}
