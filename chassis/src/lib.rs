//! What every process of the system needs before it can do its work, in the order it needs it: settings, logs, a signal
//! to stop by, a database, a schema it knows, a server; and the manners of an API: field checks, pages, refusals.
//!
//! There is no SQL here, nothing of the contract and nothing of any domain.

mod cli;
mod database;
mod fields;
mod health;
mod page;
mod refuse;
mod run;
mod schema;
mod serve;
mod shutdown;
mod telemetry;

pub use cli::parse;
pub use database::{Database, DatabaseSettings, DatabaseUrl, InvalidDatabaseUrl, Work};
pub use fields::Fields;
pub use health::{NotServing, healthcheck};
pub use page::{decode_page_token, encode_page_token};
pub use refuse::{Refuse, may_pass};
pub use run::{RunError, bind, run};
pub use schema::{SchemaError, migrate};
pub use serve::{ServeError, ServeSettings, Services, serve};
pub use shutdown::shutdown_signal;
pub use telemetry::log_to_stdout;
