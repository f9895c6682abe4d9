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
    /// Locks the SKUs, all at once in the order of their names, so that two batches never wait for each other.
    ///
    /// NO KEY UPDATE is the lock the deduction itself takes; it lets the ledger's foreign key be checked meanwhile.
    pub(crate) async fn lock(
        tx: &mut Transaction<'_, Postgres>,
        skus: impl Iterator<Item = &String>,
    ) -> Result<Self, sqlx::Error> {
        let skus: BTreeSet<&String> = skus.collect();
        let skus: Vec<String> = skus.into_iter().cloned().collect();
        let rows = sqlx::query!(
            "-- inventory: lock stock
            SELECT sku, available FROM stock WHERE sku = ANY ($1) ORDER BY sku FOR NO KEY UPDATE",
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

    pub(crate) async fn write(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), sqlx::Error> {
        if self.movements.is_empty() {
            return Ok(());
        }
        self.insert_ledger(tx).await?;
        self.update_stock(tx).await
    }

    async fn insert_ledger(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), sqlx::Error> {
        let order_ids: Vec<Uuid> = self.movements.iter().map(|entry| entry.order_id).collect();
        let kinds: Vec<String> = self.movements.iter().map(|entry| entry.movement.kind().to_owned()).collect();
        let skus: Vec<String> = self.movements.iter().map(|entry| entry.sku.clone()).collect();
        let deltas: Vec<i64> = self.movements.iter().map(|entry| entry.delta).collect();
        sqlx::query!(
            "-- inventory: insert ledger
            INSERT INTO stock_ledger (reference, kind, sku, delta)
            SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bigint[])",
            &order_ids,
            &kinds,
            &skus,
            &deltas,
        )
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    /// The rows are locked and were decided on, so the table's check (never below zero) is here a second look, not the
    /// guard.
    async fn update_stock(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), sqlx::Error> {
        let mut totals: BTreeMap<&String, i64> = BTreeMap::new();
        for Entry { sku, delta, .. } in &self.movements {
            *totals.entry(sku).or_default() += delta;
        }
        let (skus, deltas): (Vec<String>, Vec<i64>) =
            totals.into_iter().map(|(sku, delta)| (sku.clone(), delta)).unzip();
        sqlx::query!(
            "-- inventory: update stock
            UPDATE stock SET available = available + moved.delta
            FROM unnest($1::text[], $2::bigint[]) AS moved (sku, delta)
            WHERE stock.sku = moved.sku",
            &skus,
            &deltas,
        )
        .execute(&mut **tx)
        .await?;
        Ok(())
    }
}
