//! Makes gRPC errors that tell a caller what to do.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};
use tracing::error;

use crate::standby::is_away;

/// When a caller may retry if the database is down or overloaded.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Time between two lines about an outage.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// How many bad fields the message names. The details name more.
const FIELDS_IN_MESSAGE: usize = 10;
/// How many bytes of bad fields the details may hold.
const DETAILS_BYTES_MAX: usize = 6 * 1024;
/// At most this many bytes of an entry are not its text.
const ENTRY_BYTES: usize = 10;

/// Makes the errors of a service. Each holds `google.rpc.ErrorInfo` with a constant reason and the service as its
/// domain.
#[derive(Clone, Copy, Debug)]
pub struct Refuse {
    /// The service, as `ErrorInfo.domain`.
    pub domain: &'static str,
}

impl Refuse {
    /// An error that a retry does not fix.
    pub fn with(self, code: Code, reason: &str, message: impl Into<String>) -> Status {
        Status::with_error_details(code, message, self.details(reason))
    }

    /// INVALID_ARGUMENT, with the bad fields in `google.rpc.BadRequest` and the first of them in the message.
    ///
    /// Message and details are sent as headers. Clients accept at most 16 KiB of headers; beyond that they report a
    /// broken connection. So fields that do not fit into `DETAILS_BYTES_MAX` are only counted, in a last entry.
    pub fn invalid(self, reason: &str, mut violations: Vec<FieldViolation>) -> Status {
        let named: Vec<_> =
            violations.iter().take(FIELDS_IN_MESSAGE).map(|bad| format!("{} {}", bad.field, bad.description)).collect();
        let unnamed = violations.len() - named.len();
        let mut message = named.join("; ");
        if unnamed > 0 {
            message += &format!("; and {unnamed} more bad fields");
        }
        cut_to_size(&mut violations);
        let mut details = self.details(reason);
        details.set_bad_request(violations);
        Status::with_error_details(Code::InvalidArgument, message, details)
    }

    /// An error for a failure of the database. The caller learns whether a retry may help, and nothing of the SQL. The
    /// cause is logged here, once.
    pub fn database(self, cause: &sqlx::Error) -> Status {
        log_failure(cause, "database work failed");
        self.database_logged(cause)
    }

    /// The same for a cause that is already logged.
    pub fn database_logged(self, cause: &sqlx::Error) -> Status {
        if !may_pass(cause) {
            return self.with(Code::Internal, "INTERNAL", "internal error");
        }
        self.later(Code::Unavailable, "DATABASE_UNAVAILABLE", "the database does not answer; try again")
    }

    /// An error that a later retry may fix, with `google.rpc.RetryInfo`.
    pub fn later(self, code: Code, reason: &str, message: impl Into<String>) -> Status {
        let mut details = self.details(reason);
        details.set_retry_info(Some(RETRY_AFTER));
        Status::with_error_details(code, message, details)
    }

    /// RESOURCE_EXHAUSTED for a caller who has its own share already, whatever is left for others: with
    /// `google.rpc.QuotaFailure`, which names whose share it is.
    pub fn over_share(self, reason: &str, message: impl Into<String>, subject: impl Into<String>) -> Status {
        let message = message.into();
        let mut details = self.details(reason);
        details.set_retry_info(Some(RETRY_AFTER));
        details.add_quota_failure_violation(subject, &message);
        Status::with_error_details(Code::ResourceExhausted, message, details)
    }

    fn details(self, reason: &str) -> ErrorDetails {
        ErrorDetails::with_error_info(reason, self.domain, HashMap::new())
    }
}

fn cut_to_size(violations: &mut Vec<FieldViolation>) {
    let mut bytes = 0;
    let fitting = violations.iter().take_while(|bad| {
        bytes += bad.field.len() + bad.description.len() + ENTRY_BYTES;
        bytes <= DETAILS_BYTES_MAX
    });
    let fitting = fitting.count();
    let unnamed = violations.len() - fitting;
    if unnamed > 0 {
        violations.truncate(fitting);
        violations.push(FieldViolation::new("", format!("{unnamed} more fields are wrong")));
    }
}

/// Logs a failure of database work. In an outage every call fails for the same reason, so such failures have a line once
/// a second, which says how many others there were.
pub fn log_failure(cause: &sqlx::Error, what: &'static str) {
    static OUTAGE: Mutex<Option<(Instant, u32)>> = Mutex::new(None);
    if !may_pass(cause) {
        error!(%cause, "{what}");
        return;
    }
    if is_away(cause) {
        // That was said when it began.
        return;
    }
    let mut outage = OUTAGE.lock().unwrap_or_else(PoisonError::into_inner);
    match &mut *outage {
        Some((logged_at, others)) if logged_at.elapsed() < LOG_INTERVAL => *others += 1,
        _ => {
            let others = outage.replace((Instant::now(), 0)).map_or(0, |(_, others)| others);
            error!(%cause, others, "{what}");
        }
    }
}

/// Whether the same call may succeed later.
///
/// Only its own input makes a call fail for good. SQLSTATE says so by a class: bad data, a violated constraint, or an
/// exception of a trigger. All other errors, such as a read-only standby, a missing privilege or a changed password,
/// are for an operator to fix. A relay must not count them against an event.
pub fn may_pass(cause: &sqlx::Error) -> bool {
    match cause {
        sqlx::Error::Database(error) => {
            !error.code().is_some_and(|code| ["22", "23", "P0"].iter().any(|class| code.starts_with(class)))
        }
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_with_any_number_of_bad_fields_fits_into_the_headers_that_clients_accept() {
        for fields in [1, 7, 300, 100_000] {
            let violation = FieldViolation::new("items[99].unit_price_minor", "must be from 0 to 9223372036854775807");
            let refused = Refuse { domain: "order-service" }.invalid("INVALID_ORDER", vec![violation; fields]);
            // Details are sent in base64: 4 bytes for 3.
            assert!(refused.message().len() + refused.details().len() * 4 / 3 < 12 * 1024);
            let named = refused.get_error_details().bad_request().map_or(0, |bad| bad.field_violations.len());
            assert!(named == fields || named > 50, "{named} of {fields}");
        }
    }
}
