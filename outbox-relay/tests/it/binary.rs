//! The relay as a process of its own.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use testkit::processes::{Process, free_port};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use uuid::Uuid;

use crate::{outbox::Outbox, receiver::Receiver};

/// The process and its log file, which is deleted with it.
pub(crate) struct Binary {
    pub(crate) process: Process,
    metrics: SocketAddr,
    log: PathBuf,
}

impl Binary {
    pub(crate) fn start(outbox: &Outbox, receiver: &Receiver, flags: &[&str]) -> Self {
        Self::start_on_route(outbox, &format!("all=http://{}", receiver.address), flags)
    }

    pub(crate) fn start_on_route(outbox: &Outbox, route: &str, flags: &[&str]) -> Self {
        let log = std::env::temp_dir().join(format!("outbox-relay-{}", Uuid::new_v4().simple()));
        let metrics = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let database = outbox.relay_url();
        let given = ["serve", "--listen", "127.0.0.1:0", "--poll-ms", "50", "--source", "orders"];
        let listen = metrics.to_string();
        let peers = ["--database-url", &database, "--route", route, "--metrics-listen", &listen];
        let arguments = given.into_iter().chain(peers).chain(flags.iter().copied());
        let program = Path::new(env!("CARGO_BIN_EXE_outbox-relay"));
        let process = Process::spawn("outbox-relay", program, arguments, [("RUST_LOG", "info")], &log).unwrap();
        Self { process, metrics, log }
    }

    pub(crate) fn log_file(&self) -> PathBuf {
        self.log.clone()
    }

    /// The number of events with this outcome in its metrics.
    pub(crate) async fn events(&self, outcome: &str) -> u64 {
        let page = self.metrics().await;
        let line = page.lines().find(|line| {
            line.starts_with("outbox_relay_events_total{") && line.contains(&format!("outcome=\"{outcome}\""))
        });
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {outcome} in {page}"))
    }

    pub(crate) async fn metrics(&self) -> String {
        let mut connection = TcpStream::connect(self.metrics).await.unwrap();
        connection.write_all(b"GET /metrics HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut page = String::new();
        connection.read_to_string(&mut page).await.unwrap();
        page
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the relay's log:\n{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}
