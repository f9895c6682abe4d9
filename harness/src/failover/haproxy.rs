//! HAProxy before the nodes: connections go to the one that leads.

use std::fmt::Write;

use anyhow::Result;
use testkit::processes::Process;

use super::ground::{Ground, find_program};

/// A node as HAProxy sees it.
#[derive(Debug)]
pub(super) struct Backend {
    pub(super) name: String,
    pub(super) postgres: u16,
    pub(super) check: Check,
}

/// How HAProxy learns whether a node leads.
#[derive(Clone, Copy, Debug)]
pub(super) enum Check {
    /// Patroni's REST interface at this port answers 200 for the leader, as Patroni's documentation recommends.
    Rest(u16),
    /// The node itself answers that it is not in recovery, to [`PROBE`].
    Query,
}

/// The role of the checks by query. It has no password, because HAProxy cannot compute an answer to a challenge.
pub(super) const PROBE: &str = "haproxy";
const QUERY: &str = "SELECT pg_is_in_recovery()";
/// A row of one column with the value `f`, in PostgreSQL's protocol.
const ROW_FALSE: &str = "440000000b00010000000166";

/// Starts HAProxy on `port`.
pub(super) fn start(ground: &Ground, port: u16, backends: &[Backend]) -> Result<Process> {
    let program = find_program("haproxy").unwrap_or_else(|| "haproxy".into());
    let path = ground.write("haproxy.cfg", &configuration(port, backends))?;
    ground.spawn("haproxy", &program, &["-db", "-f", &path.display().to_string()])
}

fn configuration(port: u16, backends: &[Backend]) -> String {
    let mut text = format!(
        "global
  maxconn 2000
defaults
  mode tcp
  timeout connect 2s
  timeout client 1h
  timeout server 1h
  timeout check 300ms
listen leader
  bind 127.0.0.1:{port}
  default-server inter 500ms fastinter 200ms fall 2 rise 1 on-marked-down shutdown-sessions
"
    );
    text += &match backends.first().map(|backend| backend.check) {
        Some(Check::Rest(_)) => "  option httpchk OPTIONS /primary\n  http-check expect status 200\n".to_owned(),
        _ => query_check(),
    };
    for Backend { name, postgres, check } in backends {
        let port = if let Check::Rest(port) = check { *port } else { *postgres };
        let _ = writeln!(text, "  server {name} 127.0.0.1:{postgres} check port {port}");
    }
    text
}

fn query_check() -> String {
    let startup = message("", &[&196_608_u32.to_be_bytes(), startup_parameters().as_bytes()].concat());
    let query = message("Q", format!("{QUERY}\0").as_bytes());
    format!(
        "  option tcp-check
  tcp-check connect
  tcp-check send-binary {startup}
  tcp-check send-binary {query}
  tcp-check expect binary {ROW_FALSE}
"
    )
}

fn startup_parameters() -> String {
    format!("user\0{PROBE}\0database\0postgres\0\0")
}

/// A message of PostgreSQL's protocol, in hexadecimal digits.
fn message(kind: &str, content: &[u8]) -> String {
    let length = u32::try_from(content.len() + 4).unwrap_or(u32::MAX).to_be_bytes();
    let bytes = [kind.as_bytes(), &length, content].concat();
    bytes.iter().fold(String::new(), |mut digits, byte| {
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patronis_nodes_are_asked_at_their_rest_ports() {
        let backend = |name: &str, postgres, rest| Backend { name: name.into(), postgres, check: Check::Rest(rest) };
        let text = configuration(5000, &[backend("n1", 5001, 8001), backend("n2", 5002, 8002)]);
        assert!(text.contains("bind 127.0.0.1:5000\n"), "{text}");
        assert!(text.contains("OPTIONS /primary"), "{text}");
        assert!(text.contains("server n2 127.0.0.1:5002 check port 8002\n"), "{text}");
        assert!(!text.contains("tcp-check"), "{text}");
    }

    #[test]
    fn other_nodes_are_asked_by_a_query() {
        let node = Backend { name: "a".into(), postgres: 5001, check: Check::Query };
        let text = configuration(5000, &[node]);
        assert!(text.contains("server a 127.0.0.1:5001 check port 5001\n"), "{text}");
        assert!(text.contains("send-binary 510000001f53454c45435420"), "{text}");
        assert!(!text.contains("httpchk"), "{text}");
        assert_eq!(message("Q", b"\0"), "510000000500");
    }
}
