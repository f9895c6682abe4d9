//! loyalty-service, served in this process, called by real clients, on a real PostgreSQL. Run them with `make test`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod apply_events;

mod describe;

mod erase_customer;

mod get_balance;

mod loyalty;
mod rights;
