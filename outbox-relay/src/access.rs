//! Who may operate: whom the policy allows it by the name in his certificate, or who has a token of a file. There each has a
//! role and a name.
//!
//! The file holds the SHA-256 of each token. A token has 244 random bits, so nobody finds it by its hash, and a slow hash
//! would gain nothing. The file is read again for every call. It is short, and calls are rare. So a token that is taken out of
//! it is refused at once.

use std::{collections::HashMap, fs, io, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use chassis::{LogLimit, NotAllowed, Tls, peer_has_certificate};
use http::{Extensions, HeaderMap, header::AUTHORIZATION};
use proto::relay::v1::relay_admin_server::SERVICE_NAME;
use sha2::{Digest, Sha256};
use tokio::{
    sync::Mutex,
    task::spawn_blocking,
    time::{Instant, timeout},
};
use tracing::error;
use uuid::Uuid;

use crate::operate::{NAME_CHARS, check_text};

/// The methods of RelayAdmin that change nothing. Viewers may call these.
const READING: [&str; 8] = [
    "GetStatus",
    "ListDeadEvents",
    "GetDeadEvent",
    "GetJourney",
    "Diagnose",
    "GroupDeadEvents",
    "GetBlastRadius",
    "ListDeeds",
];

/// How long reading the file may take.
const READ_LIMIT: Duration = Duration::from_secs(2);
/// Time between two lines of the log about a file that cannot be used.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The methods that change something.
const ACTING: [&str; 7] = [
    "RequeueDeadEvents",
    "DiscardDeadEvents",
    "DiscardDeadEvent",
    "RestoreDiscardedEvent",
    "Pause",
    "Resume",
    "UndoDeed",
];

/// Whether RelayAdmin has a method of this name.
pub(crate) fn is_method(name: &str) -> bool {
    READING.contains(&name) || ACTING.contains(&name)
}

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Look at everything.
    Viewer,
    /// Do deeds, too.
    Operator,
}

impl Role {
    /// Its name in the file of tokens.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
        }
    }
}

impl FromStr for Role {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let roles = [Self::Viewer, Self::Operator];
        roles.into_iter().find(|role| role.word() == text).ok_or("the role must be viewer or operator")
    }
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) name: String,
    pub(crate) role: Role,
}

/// Why a call is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    #[error("this needs a token: send it as `authorization: Bearer TOKEN`")]
    NoToken,
    #[error("this needs a certificate of one of the relay's CAs")]
    NoCertificate,
    #[error(transparent)]
    NotAllowed(#[from] NotAllowed),
    #[error("the token is not known here")]
    UnknownToken,
    #[error("{} may look, and not act: this needs a token of an operator", if .0.is_empty() { "who has no token" } else { .0 })]
    Viewer(String),
    #[error("only programs on the relay's machine are answered without a token: start the relay with --token-file")]
    NotLocal,
    /// The log says why: a stranger must not learn what the file holds.
    #[error("the token file cannot be used; the relay's log says why")]
    Broken,
}

/// How callers of RelayAdmin are known.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    pub(crate) tokens: Option<TokenFile>,
    pub(crate) tls: Tls,
    /// Whether others have to show certificates. Operators have to do so as well, unless they have tokens.
    pub(crate) is_mutual: bool,
}

impl Admission {
    /// A caller by gRPC, if he may call this method. `None` may call it, and says his name in the request.
    pub(crate) async fn admit(
        &self,
        headers: &HeaderMap,
        connection: &Extensions,
        method: &str,
    ) -> Result<Option<Caller>, Denied> {
        if let Some(known) = self.admit_by_certificate(connection, method) {
            return known.map(Some);
        }
        match &self.tokens {
            Some(tokens) => tokens.admit(headers, method).await.map(Some),
            None if self.is_mutual && !peer_has_certificate(connection) => Err(Denied::NoCertificate),
            None => Ok(None),
        }
    }

    /// A caller who has shown a certificate, as the policy says. `None` if there is no policy, or he has shown none.
    pub(crate) fn admit_by_certificate(&self, connection: &Extensions, method: &str) -> Option<Result<Caller, Denied>> {
        let allow = |method: &str| self.tls.allow(connection, &format!("{SERVICE_NAME}/{method}"));
        match allow(method)? {
            Ok(allowed) => {
                let acts = ACTING.iter().any(|method| allow(method).is_some_and(|allowed| allowed.is_ok()));
                let name = allowed.name.to_string();
                Some(Ok(Caller { name, role: if acts { Role::Operator } else { Role::Viewer } }))
            }
            Err(NotAllowed::NoCertificate) => None,
            Err(why @ NotAllowed::Names(_)) => Some(Err(why.into())),
        }
    }
}

/// The callers, by the SHA-256 of their tokens.
#[derive(Debug, PartialEq, Eq)]
struct Callers(HashMap<[u8; 32], Caller>);

/// A file of tokens.
#[derive(Clone, Debug)]
pub struct TokenFile {
    path: PathBuf,
    /// Held while it is read.
    reading: Arc<Mutex<()>>,
}

/// Why a file of tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// The file cannot be read.
    #[error("cannot read {file}: {cause}")]
    Read {
        /// The file's name.
        file: String,
        /// The system's error.
        cause: io::Error,
    },
    /// Lines of it are wrong.
    #[error("{file}: {}; `outbox-relay token ROLE NAME` makes a line", .faults.join("; "))]
    Parse {
        /// The file's name.
        file: String,
        /// What is wrong, with the number of each line.
        faults: Vec<String>,
    },
}

impl FromStr for TokenFile {
    type Err = TokenFileError;

    /// The file with this name, if it can be used now.
    fn from_str(file: &str) -> Result<Self, TokenFileError> {
        let file = Self { path: file.into(), reading: Arc::default() };
        file.read()?;
        Ok(file)
    }
}

impl TokenFile {
    fn read(&self) -> Result<Callers, TokenFileError> {
        let file = || self.path.display().to_string();
        let text = fs::read_to_string(&self.path).map_err(|cause| TokenFileError::Read { file: file(), cause })?;
        parse(&text).map_err(|faults| TokenFileError::Parse { file: file(), faults })
    }

    /// Who calls with these headers, if he may call this method.
    pub(crate) async fn admit(&self, headers: &HeaderMap, method: &str) -> Result<Caller, Denied> {
        // First, so that callers without a token cost nothing.
        let token = bearer_of(headers)?;
        let caller = self.look_up().await?.admit(token)?;
        check_role(&caller, method)?;
        Ok(caller)
    }

    /// Reads the file on a thread of its own: it may be on a network, and hang. One such thread is enough. Each further call
    /// waits for it, and gives up in time.
    async fn look_up(&self) -> Result<Callers, Denied> {
        static SAID: LogLimit = LogLimit::new();
        let file = self.clone();
        let read = async {
            let reading = Arc::clone(&file.reading).lock_owned().await;
            let read = spawn_blocking(move || {
                // Held until the read has ended, though nobody may wait for it any more.
                let _reading = reading;
                file.read()
            });
            read.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
        };
        let read = timeout(READ_LIMIT, read).await.unwrap_or_else(|_| Err("it cannot be read in time".to_owned()));
        read.map_err(|cause| {
            if SAID.allows(Instant::now(), LOG_INTERVAL) {
                error!(cause, "the token file cannot be used, so no operator is let in");
            }
            Denied::Broken
        })
    }
}

impl Callers {
    fn admit(&self, token: &str) -> Result<Caller, Denied> {
        self.0.get(&hash(token)).cloned().ok_or(Denied::UnknownToken)
    }
}

/// Viewers may call what changes nothing.
pub(crate) fn check_role(caller: &Caller, method: &str) -> Result<(), Denied> {
    let may = caller.role == Role::Operator || READING.contains(&method);
    if may { Ok(()) } else { Err(Denied::Viewer(caller.name.clone())) }
}

fn bearer_of(headers: &HeaderMap) -> Result<&str, Denied> {
    let token = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(bearer);
    token.ok_or(Denied::NoToken)
}

/// The name of the scheme may be in any case.
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// A new token, and the line for it in the file.
pub(crate) fn make_token(role: Role, name: &str) -> (String, String) {
    // Apart from its hash at first sight.
    let token = format!("outbox_{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    let digits: String = hash(&token).iter().map(|byte| format!("{byte:02x}")).collect();
    (token, format!("{} {digits} {name}", role.word()))
}

/// Reads `ROLE SHA256 NAME` on each line. Empty lines and those that begin with # are left out. A file without tokens
/// admits nobody.
fn parse(text: &str) -> Result<Callers, Vec<String>> {
    let (mut callers, mut faults) = (HashMap::new(), Vec::new());
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match parse_line(line) {
            Ok((hash, _)) if callers.contains_key(&hash) => {
                faults.push(format!("line {number}: the token is there already"));
            }
            Ok((hash, caller)) => _ = callers.insert(hash, caller),
            Err(fault) => faults.push(format!("line {number}: {fault}")),
        }
    }
    if faults.is_empty() { Ok(Callers(callers)) } else { Err(faults) }
}

fn parse_line(line: &str) -> Result<([u8; 32], Caller), String> {
    let mut parts = line.splitn(3, char::is_whitespace);
    let role = parts.next().unwrap_or_default().parse::<Role>()?;
    let digits = parts.next().unwrap_or_default();
    let hash = parse_hash(digits).ok_or("the second word must be the SHA-256 of a token: 64 hexadecimal digits")?;
    let name = check_text(parts.next().unwrap_or_default(), NAME_CHARS).map_err(|rule| format!("the name {rule}"))?;
    Ok((hash, Caller { name, role }))
}

fn parse_hash(digits: &str) -> Option<[u8; 32]> {
    if digits.len() != 64 || !digits.is_ascii() {
        return None;
    }
    let mut hash = [0; 32];
    for (place, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * place..2 * place + 2], 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};

    use super::{Caller, Denied, Role, bearer_of, check_role, make_token, parse};

    fn headers(value: &str) -> HeaderMap {
        [(AUTHORIZATION, HeaderValue::from_str(value).unwrap())].into_iter().collect()
    }

    #[test]
    fn a_token_admits_its_caller_to_what_his_role_may_do() {
        let (ann, line_of_ann) = make_token(Role::Operator, "Ann B.");
        let (bob, line_of_bob) = make_token(Role::Viewer, "bob");
        let callers = parse(&format!("# tokens\n\n{line_of_ann}\n  {line_of_bob}\n")).unwrap();
        let admit = |value: &str, method| {
            let caller = callers.admit(bearer_of(&headers(value))?)?;
            check_role(&caller, method)?;
            Ok(caller)
        };
        let is_ann = Ok(Caller { name: "Ann B.".into(), role: Role::Operator });
        assert_eq!(admit(&format!("Bearer {ann}"), "Pause"), is_ann);
        assert_eq!(admit(&format!("bearer {ann}"), "GetStatus"), is_ann);
        assert_eq!(admit(&format!("Bearer {bob}"), "GetStatus").unwrap().name, "bob");
        assert_eq!(admit(&format!("Bearer {bob}"), "Pause"), Err(Denied::Viewer("bob".into())));
        assert_eq!(admit(&format!("Bearer {bob}"), "Unknown"), Err(Denied::Viewer("bob".into())));
        assert_eq!(admit(&format!("Bearer {bob}x"), "GetStatus"), Err(Denied::UnknownToken));
        for none in ["", "Bearer", &format!("Basic {ann}"), &ann] {
            assert_eq!(admit(none, "GetStatus"), Err(Denied::NoToken), "{none}");
        }
        assert_eq!(bearer_of(&HeaderMap::new()), Err(Denied::NoToken));
        assert_ne!(ann, make_token(Role::Operator, "Ann B.").0);
    }

    #[test]
    fn each_bad_line_of_a_file_is_named() {
        let (_, line) = make_token(Role::Viewer, "bob");
        let hash = line.split(' ').nth(1).unwrap();
        let text = format!(
            "{line}\nroot {hash} ann\nviewer é{} ann\nviewer 12 ann\nviewer\noperator {hash}\n{line}\noperator {hash} a\u{7}b\n",
            &hash[2..]
        );
        let digits = "the second word must be the SHA-256 of a token: 64 hexadecimal digits";
        let name = "the name must be 1 to 200 characters, none of them control characters";
        let faults = [
            "line 2: the role must be viewer or operator".to_owned(),
            format!("line 3: {digits}"),
            format!("line 4: {digits}"),
            format!("line 5: {digits}"),
            format!("line 6: {name}"),
            "line 7: the token is there already".to_owned(),
            format!("line 8: {name}"),
        ];
        assert_eq!(parse(&text).unwrap_err(), faults);
        assert_eq!(parse("").unwrap().0.len(), 0);
    }
}
