//! inventory-service, served in this process, called by real clients, on a real PostgreSQL. Run them with `make test`.
//!
//! Every test has a database of its own. It ends with [`inventory::Inventory::stop`], which audits the invariants.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod client;

mod inventory;

mod orders;

mod deliver;

mod describe;

mod recall;

mod compressed;

mod reserve_stock;
mod rights;

mod release_stock;

mod answer;

mod stale;

mod concurrent_batches;

mod failed_batch;
mod failover;

mod abandoned_calls;

mod adjust_stock;

mod list_stock;

mod fuzz;

mod seed;

mod serve;
