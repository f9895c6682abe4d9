//! Says no in a way a caller can act on.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};
use tracing::error;

/// After what time a caller may try again where the database is away or overloaded.
const RETRY_AFTER: Duration = Duration::from_secs(1);

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

    /// INVALID_ARGUMENT, with every bad field in `google.rpc.BadRequest` and in the message.
    pub fn invalid(self, reason: &str, violations: Vec<FieldViolation>) -> Status {
        let fields: Vec<_> = violations.iter().map(|bad| format!("{} {}", bad.field, bad.description)).collect();
        let mut details = self.details(reason);
        details.set_bad_request(violations);
        Status::with_error_details(Code::InvalidArgument, fields.join("; "), details)
    }

    /// What a caller is told of a failure of the database: nothing of its SQL or names, but whether to come again. The
    /// cause is logged here, once.
    pub fn database(self, cause: &sqlx::Error) -> Status {
        error!(%cause, "database work failed");
        if !may_pass(cause) {
            return self.with(Code::Internal, "INTERNAL", "internal error");
        }
        let mut details = self.details("DATABASE_UNAVAILABLE");
        details.set_retry_info(Some(RETRY_AFTER));
        Status::with_error_details(Code::Unavailable, "the database does not answer; try again", details)
    }

    fn details(self, reason: &str) -> ErrorDetails {
        ErrorDetails::with_error_info(reason, self.domain, HashMap::new())
    }
}

/// Whether the same call may work later: connections, resources, operator intervention, and transactions that lost a
/// race pass; a violated constraint or a bad statement does not.
fn may_pass(cause: &sqlx::Error) -> bool {
    match cause {
        sqlx::Error::Database(error) => error
            .code()
            .is_some_and(|code| ["08", "40", "53", "55", "57", "58"].iter().any(|class| code.starts_with(class))),
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => true,
        _ => false,
    }
}
