//! How long a certificate is valid. Nothing else of it is read here: rustls does that.

use std::{path::Path, time::Duration};

use metrics::{Unit, describe_gauge, gauge};
use rustls::pki_types::{CertificateDer, UnixTime};
use tracing::error;
use x509_cert::{Certificate, der::Decode, time::Time};

const NOT_BEFORE: &str = "tls_certificate_not_before_seconds";
const NOT_AFTER: &str = "tls_certificate_not_after_seconds";

/// From when until when, since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    not_before: Duration,
    not_after: Duration,
}

pub(crate) fn describe() {
    describe_gauge!(NOT_BEFORE, Unit::Seconds, "When the certificate of this process begins to be valid, as Unix time");
    describe_gauge!(NOT_AFTER, Unit::Seconds, "When the certificate of this process ceases to be valid, as Unix time");
}

impl Validity {
    /// That of the first certificate; `None` if it says so in no way that is known.
    pub(crate) fn of(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let certificate = Certificate::from_der(chain.first()?).ok()?;
        let validity = certificate.tbs_certificate().validity();
        let [not_before, not_after] = [validity.not_before, validity.not_after].map(Time::to_unix_duration);
        Some(Self { not_before, not_after })
    }

    pub(crate) fn measure(self) {
        gauge!(NOT_BEFORE).set(self.not_before.as_secs_f64());
        gauge!(NOT_AFTER).set(self.not_after.as_secs_f64());
    }

    /// It is used all the same: whoever verifies it goes by a clock of his own, and the next one may come any second.
    pub(crate) fn report(self, file: &Path, now: UnixTime) {
        if self.not_after.as_secs() < now.as_secs() {
            error!(file = %file.display(), "the certificate has expired, so others refuse it: renew it");
        }
    }
}
