//! The relay against a real PostgreSQL, with a real gRPC server in the place of its peer. Run them with `make test`.
//!
//! A module per step of the relay; what they share is the outbox they fill (`outbox`), the peer they program
//! (`receiver`), the relay they run (`relay`, or as a process of its own, `binary`) and a line that can be cut (`line`).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod binary;
mod line;
mod outbox;
mod receiver;
mod relay;
mod wait;

mod back_off;
mod deliver;
mod describe;
mod drain;
mod lease;
mod outage;
mod park;
mod poison;
mod refuse;
mod routes;
mod sequence;
mod settle;
mod start;
mod stop;
mod wake;
