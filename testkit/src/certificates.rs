//! Certificates for one test, made when they are needed.

use std::{fs, path::Path};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use sqlx::types::time::OffsetDateTime;
use uuid::Uuid;

/// An authority that signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A name of its own: otherwise another authority's certificates would seem to be its own, with a bad signature.
        params.distinguished_name.push(DnType::CommonName, Uuid::new_v4().to_string());
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Its own certificate, which others trust it by.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate with its key, in one text. A name is a URI, an address or a DNS name.
    ///
    /// # Errors
    /// If one is none of these.
    pub fn sign(&self, names: &[&str]) -> Result<String> {
        self.sign_until(names, CertificateParams::default().not_after)
    }

    /// The same until a time.
    ///
    /// # Errors
    /// If a name is none of these.
    pub fn sign_until(&self, names: &[&str], not_after: OffsetDateTime) -> Result<String> {
        let (uris, others): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| name.contains("://"));
        let mut params = CertificateParams::new(others.into_iter().map(str::to_owned).collect::<Vec<_>>())?;
        params.not_after = not_after;
        for uri in uris {
            params.subject_alt_names.push(SanType::URI(uri.try_into()?));
        }
        self.sign_params(&params)
    }

    /// The same for a client of PostgreSQL, which knows it by this common name.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn sign_for_role(&self, role: &str) -> Result<String> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, role);
        self.sign_params(&params)
    }

    fn sign_params(&self, params: &CertificateParams) -> Result<String> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(key.serialize_pem() + &certificate.pem())
    }
}

/// Replaces a file at once: whoever reads it finds the old text or the new one.
///
/// # Errors
/// Those of the file system.
pub fn replace(file: &Path, text: &str) -> Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, text)?;
    Ok(fs::rename(new, file)?)
}
