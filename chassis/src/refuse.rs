//! Says no in a way a caller can act on.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};
use tracing::error;

/// After what time a caller may try again where the database is away or overloaded.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Bad fields that the message names; the details name the others.
const FIELDS_IN_MESSAGE: usize = 10;
/// Bytes of bad fields in the details.
const DETAILS_BYTES_MAX: usize = 6 * 1024;
/// What an entry takes besides its text, at most.
const ENTRY_BYTES: usize = 10;

/// Makes a service's refusals: each carries `google.rpc.ErrorInfo` with a constant reason and this service as its domain.
#[derive(Clone, Copy, Debug)]
pub struct Refuse {
    /// The service, as `ErrorInfo.domain`.
    pub domain: &'static str,
}

impl Refuse {
    /// A refusal that no repetition mends.
    pub fn with(self, code: Code, reason: &str, message: impl Into<String>) -> Status {
        Status::with_error_details(code, message, self.details(reason))
    }

    /// INVALID_ARGUMENT, with the bad fields in `google.rpc.BadRequest` and the first of them in the message.
    ///
    /// All of this travels in headers, of which clients take 16 KiB at most and make a broken connection of more. So from
    /// 6 KiB on, the fields that are left are counted in a last entry instead of named.
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

    /// What a caller is told of a failure of the database: nothing of its SQL or names, but whether to come again. The
    /// cause is logged here, once.
    pub fn database(self, cause: &sqlx::Error) -> Status {
        error!(%cause, "database work failed");
        self.database_logged(cause)
    }

    /// The same, of a cause that is logged already.
    pub fn database_logged(self, cause: &sqlx::Error) -> Status {
        if !may_pass(cause) {
            return self.with(Code::Internal, "INTERNAL", "internal error");
        }
        self.later(Code::Unavailable, "DATABASE_UNAVAILABLE", "the database does not answer; try again")
    }

    /// A refusal that passes, with the hint when to come again.
    pub fn later(self, code: Code, reason: &str, message: impl Into<String>) -> Status {
        let mut details = self.details(reason);
        details.set_retry_info(Some(RETRY_AFTER));
        Status::with_error_details(code, message, details)
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

/// Whether the same call may work later. Only what the call brought with it can be its fault: its data (class 22), the
/// constraints it violates (23) or the triggers that turn it down (P0). Anything else a database says, a read-only standby,
/// a missing right, a changed password, is for an operator to mend, and a relay must not hold it against an event.
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
    fn a_refusal_of_any_number_of_fields_fits_into_the_headers_a_client_takes() {
        for fields in [1, 7, 300, 100_000] {
            let violation = FieldViolation::new("items[99].unit_price_minor", "must be from 0 to 9223372036854775807");
            let refused = Refuse { domain: "order-service" }.invalid("INVALID_ORDER", vec![violation; fields]);
            // Details travel in base64, 4 bytes for 3.
            assert!(refused.message().len() + refused.details().len() * 4 / 3 < 12 * 1024);
            let named = refused.get_error_details().bad_request().map_or(0, |bad| bad.field_violations.len());
            assert!(named == fields || named > 50, "{named} of {fields}");
        }
    }
}
