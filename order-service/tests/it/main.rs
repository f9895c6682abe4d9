//! order-service as callers see it: over gRPC, with a real PostgreSQL, served by this process or by its binary.
//! Run with `make test`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod service;

mod create_order;

mod failed_writes;

mod intake;

mod repeat_request;

mod cancelled_callers;

mod validate_order;

mod apply_reply;

mod cancel_order;

mod watch_order;

mod failover;
mod fuzz;

mod attacks;

mod get_order;

mod list_orders;

mod wake_relays;

mod database_tls;
mod outage;
mod password;
mod pooler;

mod ops;

mod serve;
mod tls;

mod migrate;

mod migrate_under_load;

mod command_line;

mod describe;

mod refuse;

mod resend;

mod erase_customer;

mod rights;
