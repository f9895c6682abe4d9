//! Claims a port that must be a certain one: waits while another process holds it, and says which process that is.
//!
//! Even a port that nobody listens on may be taken. The system gives outgoing connections ports of their own, and such a port
//! is free again only some time after the connection was closed, on Linux after a minute.

use std::{
    ffi::OsStr,
    fmt::{self, Display, Formatter},
    fs, io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tokio::time::sleep;

const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// The state of a listener in the kernel's table.
const LISTENING: &str = "0A";

/// Listens on a port of 127.0.0.1 as soon as that is possible. Dropping the listener frees the port for the process it is
/// meant for; until then no connection is given it. `purpose` names that process in messages.
///
/// # Errors
/// If the port is still taken after `limit`.
pub async fn claim(port: u16, purpose: &str, limit: Duration) -> Result<TcpListener> {
    let started = Instant::now();
    let mut told = false;
    loop {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                bail!("cannot listen on port {port} for {purpose}: {error}")
            }
            Err(_) if started.elapsed() >= limit => {
                bail!("port {port} for {purpose} is taken by {}", find_holder(port))
            }
            Err(_) if !told => {
                let holder = find_holder(port);
                eprintln!("port {port} for {purpose} is taken by {holder}; waiting up to {:.0} s", limit.as_secs_f64());
                told = true;
            }
            Err(_) => {}
        }
        sleep(RETRY_PAUSE).await;
    }
}

/// The holder of a port.
#[derive(Debug)]
enum Holder {
    Listener(Owner),
    Connection(Owner),
    /// A connection that no process has any more.
    ClosedConnection,
    Unknown,
}

#[derive(Debug)]
enum Owner {
    Process {
        name: String,
        pid: u32,
    },
    /// A process whose files this user may not see.
    User(u32),
}

impl Display for Holder {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listener(owner) => owner.fmt(formatter),
            Self::Connection(owner) => write!(formatter, "a connection of {owner}"),
            Self::ClosedConnection => formatter.write_str("a connection that is closed and expires soon"),
            Self::Unknown => formatter.write_str("an unknown process"),
        }
    }
}

impl Display for Owner {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { name, pid } => write!(formatter, "{name} (pid {pid})"),
            Self::User(uid) => write!(formatter, "a process of the user with id {uid}"),
        }
    }
}

/// Reads only /proc, so it finds nothing on systems without it.
fn find_holder(port: u16) -> Holder {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    match find_socket(&tables, port) {
        None => Holder::Unknown,
        Some(socket) if socket.listens => Holder::Listener(find_owner(&socket)),
        Some(Socket { inode: 0, .. }) => Holder::ClosedConnection,
        Some(socket) => Holder::Connection(find_owner(&socket)),
    }
}

/// The socket that holds the port, by the tables of IPv4 and IPv6. A socket of IPv4 comes first: one of IPv6 may accept no
/// IPv4, which its table does not tell, and then it holds nothing of 127.0.0.1.
fn find_socket(tables: &[impl AsRef<str>; 2], port: u16) -> Option<Socket> {
    // The connections that a listener has accepted have its port too.
    let held = |table: &str| sockets_at(table, port).max_by_key(|socket| (socket.listens, socket.inode));
    tables.iter().find_map(|table| held(table.as_ref()))
}

/// A line of /proc/net/tcp.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    listens: bool,
    uid: u32,
    /// 0 if no process has the socket open.
    inode: u64,
}

/// The sockets that keep others from listening on the port of 127.0.0.1: those at that address, or at all of them.
fn sockets_at(table: &str, port: u16) -> impl Iterator<Item = Socket> {
    let loopback = format!("{:08X}", u32::from_ne_bytes(Ipv4Addr::LOCALHOST.octets()));
    table.lines().filter_map(move |line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, local, _, state, _, _, _, uid, _, inode, ..] = fields[..] else { return None };
        let (address, local_port) = local.split_once(':')?;
        let matches = u16::from_str_radix(local_port, 16) == Ok(port)
            && (address.ends_with(&loopback) || address.bytes().all(|digit| digit == b'0'));
        matches.then_some(Socket { listens: state == LISTENING, uid: uid.parse().ok()?, inode: inode.parse().ok()? })
    })
}

/// Whether a process has the client's end of a connection from `client` to `server`, both of this machine. Without /proc
/// the answer is no.
pub fn connects(pid: u32, client: SocketAddrV4, server: SocketAddrV4) -> bool {
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    inode_of(&table, client, server).is_some_and(|inode| has_open(pid, inode))
}

/// The socket at the client's end of a connection. Several connections may share the client's address, so both ends count.
fn inode_of(table: &str, client: SocketAddrV4, server: SocketAddrV4) -> Option<u64> {
    let end = |end: SocketAddrV4| format!("{:08X}:{:04X}", u32::from_ne_bytes(end.ip().octets()), end.port());
    let (client, server) = (end(client), end(server));
    table.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_it = fields.next()? == client && fields.next()? == server;
        if is_it { fields.nth(6)?.parse().ok().filter(|inode| *inode != 0) } else { None }
    })
}

/// The first process found that has the socket open.
fn find_owner(socket: &Socket) -> Owner {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let owner = { pids }.find(|pid: &u32| has_open(*pid, socket.inode));
    owner.map_or(Owner::User(socket.uid), |pid| Owner::Process { name: name_of(pid), pid })
}

fn has_open(pid: u32, inode: u64) -> bool {
    let file_of_socket = format!("socket:[{inode}]");
    let mut files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.any(|file| fs::read_link(file.path()).is_ok_and(|target| target == Path::new(&file_of_socket)))
}

/// The name of the program it was started from. The kernel's own name for a process is cut short.
fn name_of(pid: u32) -> String {
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let program = command.split('\0').next().and_then(|program| Path::new(program).file_name());
    program.and_then(OsStr::to_str).unwrap_or("a process").to_owned()
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpStream};

    use super::*;
    use crate::processes::free_port;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:C383 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0000000000000000 100 0 0 10 0
   1: 0200007F:C384 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1 0000000000000000 100 0 0 10 0
   2: 0100007F:C385 0100007F:1539 06 00000000:00000000 03:00000A3B 00000000     0        0 0 3 0000000000000000";
    const TABLE_6: &str = "  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:C383 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     7        0 4713 1 0000000000000000 100 0 0 10 0
   1: 00000000000000000000000001000000:C383 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4714 1 0000000000000000 100 0 0 10 0
   2: 0000000000000000FFFF00000100007F:C384 0000000000000000FFFF00000100007F:1539 01 00000000:00000000 00:00000000 00000000     0        0 4715 1 0000000000000000 100 0 0 10 0
   3: 00000000000000000000000000000000:C385 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4716 1 0000000000000000 100 0 0 10 0";

    #[test]
    fn sockets_at_the_port_of_the_address_or_of_all_addresses() {
        let found = |table, port| sockets_at(table, port).collect::<Vec<_>>();
        assert_eq!(found(TABLE, 0xC383), [Socket { listens: true, uid: 1000, inode: 4711 }]);
        assert_eq!(found(TABLE, 0xC384), [], "127.0.0.2 is another address");
        assert_eq!(found(TABLE, 0xC385), [Socket { listens: false, uid: 0, inode: 0 }]);
        assert_eq!(found(TABLE_6, 0xC383), [Socket { listens: true, uid: 7, inode: 4713 }], "not ::1");
        assert_eq!(found(TABLE_6, 0xC384), [Socket { listens: false, uid: 0, inode: 4715 }]);
        assert_eq!(found("", 0xC383), []);
    }

    #[test]
    fn a_socket_of_ipv4_holds_a_port_rather_than_one_of_ipv6() {
        let inode = |port| find_socket(&[TABLE, TABLE_6], port).map(|socket| socket.inode);
        assert_eq!(inode(0xC383), Some(4711));
        assert_eq!(inode(0xC384), Some(4715), "the only one");
        assert_eq!(inode(0xC385), Some(0), "a closed connection, though a socket of IPv6 listens");
        assert_eq!(inode(0xC386), None);
    }

    #[test]
    fn the_clients_end_of_a_connection_is_found_by_both_of_its_ends() {
        const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1539 0100007F:C385 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0000000000000000 20 4 30 10 -1
   1: 0100007F:C385 0100007F:153A 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0000000000000000 20 4 30 10 -1
   2: 0100007F:C385 0100007F:1539 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0000000000000000 20 4 30 10 -1
   3: 0100007F:C386 0100007F:1539 06 00000000:00000000 00:00000000 00000000     0        0 0 1 0000000000000000 20 4 30 10 -1";
        let at = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        assert_eq!(inode_of(TABLE, at(0xC385), at(0x1539)), Some(3));
        assert_eq!(inode_of(TABLE, at(0xC385), at(0x153B)), None);
        assert_eq!(inode_of(TABLE, at(0xC386), at(0x1539)), None, "no process has it any more");
    }

    #[test]
    fn a_process_has_the_connections_that_it_makes() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let _connection = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        let (accepted, _) = listener.accept().expect("the connection");
        let ends = (accepted.peer_addr().expect("an end"), accepted.local_addr().expect("an end"));
        if let (SocketAddr::V4(client), SocketAddr::V4(server)) = ends
            && Path::new("/proc/net/tcp").exists()
        {
            assert!(connects(std::process::id(), client, server));
            assert!(!connects(1, client, server), "of another process");
        }
    }

    #[tokio::test]
    async fn a_port_is_claimed_once_its_listener_is_gone() {
        let port = free_port().expect("a port");
        let listener = claim(port, "this test", Duration::ZERO).await.expect("a free port");
        let (claimed, ()) = tokio::join!(claim(port, "this test", Duration::from_secs(20)), async {
            sleep(2 * RETRY_PAUSE).await;
            drop(listener);
        });
        assert_eq!(claimed.expect("a port that was freed").local_addr().expect("an address").port(), port);
    }

    #[tokio::test]
    async fn a_listener_is_named_with_its_pid() {
        let port = free_port().expect("a port");
        let _listener = claim(port, "this test", Duration::ZERO).await.expect("a free port");
        let message = claim(port, "another", Duration::ZERO).await.expect_err("it is taken").to_string();
        if Path::new("/proc/net/tcp").exists() {
            let me = std::process::id();
            assert!(message.starts_with(&format!("port {port} for another is taken by ")), "{message}");
            assert!(message.ends_with(&format!(" (pid {me})")), "{message}");
        }
    }

    #[tokio::test]
    async fn a_connection_is_named_as_one_until_it_expires() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let connection = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        let (accepted, _) = listener.accept().expect("the connection");
        let port = connection.local_addr().expect("an address").port();
        if Path::new("/proc/net/tcp").exists() {
            let message = claim(port, "a test", Duration::ZERO).await.expect_err("it is taken").to_string();
            let me = std::process::id();
            assert!(message.contains(" is taken by a connection of "), "{message}");
            assert!(message.ends_with(&format!(" (pid {me})")), "{message}");

            // The side that closes first keeps the port for a while, without a process.
            drop(connection);
            drop(accepted);
            let message = claim(port, "a test", Duration::ZERO).await.expect_err("it is still taken").to_string();
            assert!(message.ends_with("a connection that is closed and expires soon"), "{message}");
        }
    }
}
