//! A certificate for each process and caller of one system, and the policy that says what these may do.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use chassis::TlsFiles;
use testkit::certificates::{Authority, replace};

use crate::system::Service;

/// Who places orders, puts stock in, and looks at points.
pub const CUSTOMERS: &str = "customers";
/// Who operates the relays.
pub const OPERATORS: &str = "operators";
/// By these all processes of one machine are reached.
const ADDRESSES: [&str; 2] = ["localhost", "127.0.0.1"];
const POLICY: &str = "\
# NAME            WHAT IT MAY CALL, AND WHOSE EVENTS IT MAY DELIVER
customers         orders.v1.OrderService/* inventory.v1.InventoryService/* loyalty.v1.LoyaltyService/*
# By which grpcurl knows the messages.
customers         grpc.reflection.v1.ServerReflection/* grpc.reflection.v1alpha.ServerReflection/*
orders-relay      events.v1.EventReceiver/* source=order-service
inventory-relay   events.v1.EventReceiver/* source=inventory-service
operators         relay.v1.RelayAdmin/*
";

/// The directory that holds them.
#[derive(Clone, Debug)]
pub struct Identities(PathBuf);

impl Identities {
    /// Makes them, each signed by this authority.
    ///
    /// # Errors
    /// If a certificate cannot be made, or a file not written.
    pub fn make(directory: &Path, authority: &Authority) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let identities = Self(directory.to_owned());
        replace(&identities.ca_file(), authority.pem())?;
        replace(&identities.policy_file(), POLICY)?;
        identities.renew(authority)?;
        Ok(identities)
    }

    /// Replaces all certificates by new ones.
    ///
    /// # Errors
    /// If one cannot be made, or a file not written.
    pub fn renew(&self, authority: &Authority) -> Result<()> {
        for name in Service::ALL.map(Service::name).into_iter().chain([CUSTOMERS, OPERATORS]) {
            let [host, address] = ADDRESSES;
            replace(&self.own_file(name), &authority.sign(&[host, address, name])?)?;
        }
        Ok(())
    }

    /// The files of the one with this name.
    pub fn files(&self, name: &str) -> TlsFiles {
        TlsFiles { tls_cert_file: Some(self.own_file(name)), tls_key_file: None, tls_ca_file: Some(self.ca_file()) }
    }

    /// What a process needs to be the one with this name, as environment variables.
    ///
    /// # Errors
    /// If the name of a file is not UTF-8.
    pub fn variables(&self, name: &str) -> Result<Vec<(&'static str, String)>> {
        let files = [
            ("TLS_CERT_FILE", self.own_file(name)),
            ("TLS_CA_FILE", self.ca_file()),
            ("POLICY_FILE", self.policy_file()),
        ];
        let text = |path: PathBuf| -> Result<String> {
            Ok(path.to_str().context("the name of a file is not UTF-8")?.to_owned())
        };
        files.into_iter().map(|(name, path)| Ok((name, text(path)?))).collect()
    }

    /// The authorities whom all trust.
    pub fn ca_file(&self) -> PathBuf {
        self.0.join("ca.pem")
    }

    /// What the names may do.
    pub fn policy_file(&self) -> PathBuf {
        self.0.join("policy")
    }

    /// The certificate of the one with this name, and its key.
    pub fn own_file(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.pem"))
    }
}
