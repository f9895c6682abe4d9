//! The relay against a real PostgreSQL, with a real gRPC server in the place of its peer. Run them with `make test`.
//!
//! A module per step of the relay; what they share is the outbox they fill (`outbox`), the peer they program
//! (`receiver`), the relay they run (`relay`, or as a process of its own, `binary`), an operator at the command line
//! (`operator`) and a line that can be cut (`line`).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod binary;
mod line;
mod operator;
mod outbox;
mod receiver;
mod relay;
mod wait;

mod back_off;
mod dead_letters;
mod deliver;
mod describe;
mod drain;
mod floor;
mod lease;
mod lease_protocol;
mod outage;
mod park;
mod pause;
mod poison;
mod refuse;
mod relay_admin;
mod requeue;
mod routes;
mod sequence;
mod settle;
mod start;
mod status;
mod stop;
mod wake;
