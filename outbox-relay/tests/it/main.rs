//! Tests of the relay with a real PostgreSQL, and a real gRPC server as its receiver. Run them with `make test`.
//!
//! There is a module per step of the relay. They share these fixtures: the outbox (`outbox`), the receiver
//! (`receiver`), the relay in this process (`relay`) or in its own (`binary`), the operator's command line
//! (`operator`), a TCP line that can be cut (`line`), and a server that sends any HTTP response (`http_stub`).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod binary;
mod console;
mod console_page;
mod http_stub;
mod line;
mod live;
mod operator;
mod outbox;
mod receiver;
mod relay;
mod wait;

mod back_off;
mod database_tls;
mod dead_letters;
mod deeds;
mod deliver;
mod describe;
mod doctor;
mod drain;
mod expand;
mod floor;
mod held_horizon;
mod http_answers;
mod journey;
mod lease;
mod lease_protocol;
mod metrics;
mod obey_pause;
mod outage;
mod pace;
mod park;
mod password;
mod pause;
mod poison;
mod pooler;
mod refuse;
mod relay_admin;
mod requeue;
mod rights;
mod runs;
mod sequence;
mod settle;
mod start;
mod status;
mod stop;
mod subscriptions;
mod tls;
mod unhide;
mod wake;
mod witness;
