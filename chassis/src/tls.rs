//! TLS: who this process is, whom it trusts, and what these may do.
//!
//! The files are read again every second. So a certificate is renewed by replacing its file, and no process restarts: each
//! new connection uses what the files held last. Open connections stay as they are until they reach their age. The newest
//! policy counts for every call.

use std::{
    fmt::Display,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::http::Extensions;
use clap::Args;
use metrics::{counter, describe_counter};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tonic::transport::Uri;
use tracing::warn;

use crate::{
    accept::Peer,
    authorize::NotAllowed,
    policy::{Allowed, Policy},
    reread::{Named, Reread},
    validity::Validity,
};

const RELOADS: &str = "tls_reloads_total";
/// As much as an operator wants to read of the names of a caller who is denied.
const NAMES_CHARS_MAX: usize = 200;
const POLICY_RELOADS: &str = "policy_reloads_total";

/// The files of certificates, in PEM.
#[derive(Args, Clone, Debug, Default)]
pub struct TlsFiles {
    /// File with the certificate of this process, and its chain. A server speaks TLS with it, and a client shows it.
    #[arg(long, env = "TLS_CERT_FILE", value_name = "FILE")]
    pub tls_cert_file: Option<PathBuf>,
    /// File with the key of the certificate [default: the file of the certificate].
    #[arg(long, env = "TLS_KEY_FILE", value_name = "FILE", requires = "tls_cert_file")]
    pub tls_key_file: Option<PathBuf>,
    /// File with the CAs that this process trusts. Whoever it calls has to show a certificate of one of them. So has
    /// whoever calls it, if it has a certificate itself (mutual TLS).
    #[arg(long, env = "TLS_CA_FILE", value_name = "FILE")]
    pub tls_ca_file: Option<PathBuf>,
}

impl TlsFiles {
    /// Whether others have to show a certificate as well.
    pub fn are_mutual(&self) -> bool {
        self.tls_cert_file.is_some() && self.tls_ca_file.is_some()
    }
}

/// How a server speaks, and to whom.
#[derive(Args, Clone, Debug, Default)]
pub struct TlsSettings {
    /// The certificates. They are read again when they change.
    #[command(flatten)]
    pub files: TlsFiles,
    /// File that says what the names in callers' certificates may do: `NAME package.Service/Method… source=NAME…` on each
    /// line. All else is denied. It takes certificates and CAs. Without it, whoever has a certificate may call all methods.
    #[arg(long, env = "POLICY_FILE", value_name = "FILE")]
    pub policy_file: Option<PathBuf>,
    /// Speak without TLS to others than programs of this machine: in a mesh that encrypts, or for trying.
    #[arg(long, env = "ALLOW_PLAINTEXT", default_value_t = false)]
    pub allow_plaintext: bool,
}

/// Why a process cannot speak as its settings say.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be used.
    #[error("cannot use {file}: {why}")]
    File {
        /// Its path.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// Everybody between could read and change what is said.
    #[error(
        "{0} is not on this machine, and nothing encrypts what is said there: give --tls-cert-file and --tls-ca-file, or \
         --allow-plaintext if a mesh encrypts it"
    )]
    Plaintext(SocketAddr),
    /// The same, of what this process would say to another.
    #[error(
        "{0} is not on this machine, and nothing encrypts what is said to it: give it a URL with https, or \
         --allow-plaintext if a mesh encrypts it"
    )]
    PlainUrl(Uri),
    /// There is nobody to trust.
    #[error("{0} needs --tls-ca-file: the CAs by which it is trusted")]
    NoCa(Uri),
    /// Without certificates nobody has a name.
    #[error(
        "--policy-file needs --tls-cert-file and --tls-ca-file: callers are known by the names in their certificates"
    )]
    NoNames,
}

/// The certificates and the policy, as the files have them now. Clones share them.
#[derive(Clone, Debug)]
pub struct Tls {
    certificates: Reread<Configs>,
    policy: Option<Reread<Policy>>,
}

#[derive(Debug, Default)]
struct Configs {
    /// For callers and relays, who have to show a certificate if there are CAs.
    server: Option<Arc<ServerConfig>>,
    /// For operators, some of whom have a token instead, and for probes.
    ops: Option<Arc<ServerConfig>>,
    client: Option<Arc<ClientConfig>>,
    /// A name in the certificate of this process.
    own_name: Option<ServerName<'static>>,
    validity: Option<Validity>,
}

pub(crate) fn describe() {
    describe_counter!(RELOADS, "Changes of the files of certificates by outcome: used, broken (the old ones are kept)");
    describe_counter!(POLICY_RELOADS, "Changes of the policy's file by outcome: used, broken (the old policy is kept)");
    for metric in [RELOADS, POLICY_RELOADS] {
        for outcome in ["used", "broken"] {
            counter!(metric, "outcome" => outcome).increment(0);
        }
    }
}

impl Tls {
    /// Reads the files, and goes on to read them while this is there. The `listeners` must be of this machine alone, unless
    /// they have TLS.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn start(settings: &TlsSettings, listeners: &[SocketAddr]) -> Result<Self, TlsError> {
        if settings.files.tls_cert_file.is_none()
            // With CAs, it was not meant to be without a certificate.
            && (!settings.allow_plaintext || settings.files.tls_ca_file.is_some())
            && let Some(open) = listeners.iter().find(|address| !address.ip().is_loopback())
        {
            return Err(TlsError::Plaintext(*open));
        }
        if settings.files.tls_cert_file.is_some() && settings.files.tls_ca_file.is_none() {
            warn!("callers have to show no certificate: give --tls-ca-file, or keep others away from this process");
        }
        if settings.files.tls_cert_file.is_none() && settings.files.tls_ca_file.is_some() && !listeners.is_empty() {
            warn!("callers are served without TLS: it takes --tls-cert-file, too");
        }
        let policy = settings.policy_file.as_deref();
        if policy.is_some() && !settings.files.are_mutual() {
            return Err(TlsError::NoNames);
        }
        Ok(Self { policy: policy.map(read_policy).transpose()?, ..Self::read(&settings.files)? })
    }

    /// Reads the files, and goes on to read them while this is there: for a process that only calls others.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let files = Files::of(files);
        if !files.any() {
            return Ok(Self { certificates: Reread::constant(Configs::default()), policy: None });
        }
        let named = Named { what: "certificates", files: files.to_string(), metric: RELOADS, in_parts: false };
        let reading = files.clone();
        let certificates = Reread::start(
            named,
            move || reading.read(),
            move |read: &Contents| {
                let configs = read.configure(&files)?;
                if let (Some(validity), Some(file)) = (configs.validity, &files.cert) {
                    validity.report(file, UnixTime::now());
                    validity.measure();
                }
                Ok(configs)
            },
        )?;
        Ok(Self { certificates, policy: None })
    }

    /// Tells the metrics what these were not there to be told when the files were read.
    pub(crate) fn measure(&self) {
        if let Some(validity) = self.certificates.current().validity {
            validity.measure();
        }
    }

    /// Whether a policy says what callers may do.
    pub fn has_policy(&self) -> bool {
        self.policy.is_some()
    }

    /// Whether the caller whose request has these extensions may call the method, by its full name; `None` without a policy.
    pub fn allow(&self, request: &Extensions, method: &str) -> Option<Result<Allowed, NotAllowed>> {
        let policy = self.policy.as_ref()?.current();
        let Some(names) = request.get::<Peer>().and_then(Peer::names) else {
            return Some(Err(NotAllowed::NoCertificate));
        };
        Some(policy.allow(names, method).ok_or_else(|| NotAllowed::Names(cut(&names.join(", ")))))
    }

    /// Refuses what this process could not call, or could not call safely.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn check(&self, settings: &TlsSettings, receiver: &Uri) -> Result<(), TlsError> {
        if receiver.scheme_str() == Some("https") {
            return self.client().map(drop).ok_or_else(|| TlsError::NoCa(receiver.clone()));
        }
        let host = receiver.host().unwrap_or_default().trim_matches(['[', ']']);
        let is_local = host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
        if is_local || settings.allow_plaintext { Ok(()) } else { Err(TlsError::PlainUrl(receiver.clone())) }
    }

    /// A name that this process can be verified by.
    pub(crate) fn own_name(&self) -> Option<ServerName<'static>> {
        self.certificates.current().own_name.clone()
    }

    /// For the next connection of a caller or relay; `None` without a certificate.
    pub fn server(&self) -> Option<Arc<ServerConfig>> {
        self.certificates.current().server.clone()
    }

    /// For the next connection of an operator or a probe.
    pub(crate) fn ops(&self) -> Option<Arc<ServerConfig>> {
        self.certificates.current().ops.clone()
    }

    /// For the next connection to another process; `None` without CAs.
    pub fn client(&self) -> Option<Arc<ClientConfig>> {
        self.certificates.current().client.clone()
    }
}

#[derive(Clone, Debug)]
struct Files {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
}

/// What the files hold.
#[derive(Clone, Default, PartialEq, Eq)]
struct Contents {
    cert: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    ca: Option<Vec<u8>>,
}

impl Files {
    fn of(files: &TlsFiles) -> Self {
        let TlsFiles { tls_cert_file: cert, tls_key_file: key, tls_ca_file: ca } = files.clone();
        Self { key: key.or_else(|| cert.clone()), cert, ca }
    }

    /// The certificate's file, with that of its key.
    fn pair(&self, cert: &Path) -> PathBuf {
        match &self.key {
            Some(key) if key != cert => format!("{} with the key in {}", cert.display(), key.display()).into(),
            _ => cert.to_owned(),
        }
    }

    fn any(&self) -> bool {
        self.cert.is_some() || self.ca.is_some()
    }

    fn read(&self) -> Result<Contents, TlsError> {
        let read = |path: &PathBuf| fs::read(path).map_err(|cause| at(path, &cause));
        let optional = |path: &Option<PathBuf>| path.as_ref().map(read).transpose();
        Ok(Contents { cert: optional(&self.cert)?, key: optional(&self.key)?, ca: optional(&self.ca)? })
    }
}

impl std::fmt::Display for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths = [&self.cert, &self.key, &self.ca].into_iter().flatten();
        f.write_str(&paths.map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))
    }
}

impl Contents {
    fn configure(&self, files: &Files) -> Result<Configs, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let identity = match (&self.cert, &self.key, &files.cert, &files.key) {
            (Some(cert), Some(key), Some(cert_file), Some(key_file)) => {
                let key =
                    PrivateKeyDer::from_pem_slice(key).map_err(|_| at(key_file, &"it holds no private key in PEM"))?;
                Some((certificates(cert, cert_file)?, key, cert_file))
            }
            _ => None,
        };
        let roots = match (&self.ca, &files.ca) {
            (Some(ca), Some(file)) => Some((roots(certificates(ca, file)?, file)?, file)),
            _ => None,
        };
        let server = |required: bool, protocols: &[&[u8]]| {
            let Some((chain, key, file)) = &identity else { return Ok(None) };
            let builder = ServerConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .map_err(|why| at(file, &why))?;
            let builder = match &roots {
                Some((roots, file)) => builder.with_client_cert_verifier(verifier(roots, required, &provider, file)?),
                None => builder.with_no_client_auth(),
            };
            let configured = builder.with_single_cert(chain.clone(), key.clone_key());
            let mut config = configured.map_err(|why| at(&files.pair(file), &why))?;
            config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            // A session that is resumed shows its certificate no more, even if that has expired meanwhile.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Ok(Some(Arc::new(config)))
        };
        let client = || {
            let Some((roots, file)) = &roots else { return Ok(None) };
            let builder = ClientConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .map_err(|why| at(file, &why))?
                .with_root_certificates(Arc::clone(roots));
            let mut config = match &identity {
                Some((chain, key, file)) => {
                    builder.with_client_auth_cert(chain.clone(), key.clone_key()).map_err(|why| at(file, &why))?
                }
                None => builder.with_no_client_auth(),
            };
            config.alpn_protocols = vec![b"h2".to_vec()];
            config.resumption = Resumption::disabled();
            Ok(Some(Arc::new(config)))
        };
        Ok(Configs {
            server: server(true, &[b"h2"])?,
            ops: server(false, &[b"h2", b"http/1.1"])?,
            client: client()?,
            own_name: identity.as_ref().and_then(|(chain, ..)| name_in(chain)),
            validity: identity.as_ref().and_then(|(chain, ..)| Validity::of(chain)),
        })
    }
}

/// Whoever signs a certificate decides how long its names are.
fn cut(names: &str) -> String {
    // Nor which lines of a log it breaks.
    names.escape_debug().take(NAMES_CHARS_MAX).collect()
}

fn read_policy(file: &Path) -> Result<Reread<Policy>, TlsError> {
    let (read, made) = (file.to_owned(), file.to_owned());
    Reread::start(
        Named { what: "policy", files: file.display().to_string(), metric: POLICY_RELOADS, in_parts: true },
        move || fs::read_to_string(&read).map_err(|cause| at(&read, &cause)),
        move |text: &String| Policy::parse(text).map_err(|faults| at(&made, &faults.join("; "))),
    )
}

fn name_in(chain: &[CertificateDer<'static>]) -> Option<ServerName<'static>> {
    let own = webpki::EndEntityCert::try_from(chain.first()?).ok()?;
    own.valid_dns_names().find_map(|name| ServerName::try_from(name.to_owned()).ok())
}

fn certificates(pem: &[u8], file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certificates = read.map_err(|why| at(file, &why))?;
    if certificates.is_empty() { Err(at(file, &"it holds no certificate in PEM")) } else { Ok(certificates) }
}

fn roots(certificates: Vec<CertificateDer<'static>>, file: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate).map_err(|why| at(file, &why))?;
    }
    Ok(Arc::new(roots))
}

fn verifier(
    roots: &Arc<RootCertStore>,
    required: bool,
    provider: &Arc<CryptoProvider>,
    file: &Path,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, TlsError> {
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider));
    let builder = if required { builder } else { builder.allow_unauthenticated() };
    builder.build().map_err(|why| at(file, &why))
}

fn at(file: &Path, why: &dyn Display) -> TlsError {
    TlsError::File { file: file.display().to_string(), why: why.to_string() }
}
