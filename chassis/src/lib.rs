//! What every process needs, in this order: a command line, logs, a shutdown signal, a database with the right schema,
//! a server. Also the conventions of every API: field checks, pages, errors.
//!
//! The crate knows no table, no message of the contract, and nothing about orders or stock.

mod accept;
mod authorize;
mod calls;
mod cli;
mod connect;
mod connections;
mod database;
mod database_url;
mod entry;
mod erase;
mod fields;
mod guard;
mod health;
mod log_limit;
mod migrate;
mod ops;
mod page;
mod password_file;
mod policy;
mod pooler;
mod probe;
mod refuse;
mod reread;
mod schema;
mod serve;
mod session;
mod sessions;
mod shed;
mod shutdown;
mod standby;
mod telemetry;
mod tls;
pub mod trace;
mod unread;
mod validity;

pub use accept::{address_of_peer, names_in, peer_has_certificate};
pub use authorize::{NotAllowed, count_denied};
pub use calls::{CallsMade, code_name};
pub use cli::parse;
pub use connect::{connect_lazily, explain};
pub use connections::ConnectionSettings;
pub use database::{Database, DatabaseSettings, Work, WorkError};
pub use database_url::{DatabaseUrl, InvalidDatabaseUrl};
pub use entry::{RunError, main, serve_until_signal};
pub use erase::{ERASED, Erase, EraseArguments, EraseError, Piece, erase, keep_erasures_out, parse_text};
pub use fields::Fields;
pub use health::{NotServing, healthcheck};
pub use log_limit::LogLimit;
pub use migrate::{MigrateArguments, MigrateError, migrate};
pub use ops::Ops;
pub use page::{decode_page_token, encode_page_token};
pub use password_file::PasswordFile;
pub use policy::Allowed;
pub use pooler::{NotOwnSession, require_own_session};
pub use refuse::{Refuse, log_failure, may_pass};
pub use schema::{SchemaError, check_schema};
pub use serve::{Listener, ServeError, ServeSettings, Services, serve};
pub use session::{confirm_seen, timed_out};
pub use shed::CallSettings;
pub use shutdown::{EndSettings, Ending, shutdown_signal};
pub use telemetry::log_to_stdout;
pub use tls::{Tls, TlsError, TlsFiles, TlsSettings};
