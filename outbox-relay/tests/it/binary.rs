//! The relay as a process of its own.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use testkit::{
    http::{get, sum_metric},
    processes::{Process, free_port},
};
use uuid::Uuid;

use crate::{outbox::Outbox, receiver::Receiver};

/// The process and its log file, which is deleted with it.
pub(crate) struct Binary {
    pub(crate) process: Process,
    pub(crate) ops: SocketAddr,
    log: PathBuf,
}

impl Binary {
    pub(crate) fn start(outbox: &Outbox, receiver: &Receiver, flags: &[&str]) -> Self {
        Self::start_on_route(outbox, &format!("all=http://{}", receiver.address), flags)
    }

    pub(crate) fn start_on_route(outbox: &Outbox, route: &str, flags: &[&str]) -> Self {
        let log = std::env::temp_dir().join(format!("outbox-relay-{}", Uuid::new_v4().simple()));
        let ops = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let database = outbox.relay_url();
        let given = ["serve", "--poll-ms", "50", "--source", "orders"];
        let listen = ops.to_string();
        let peers = ["--database-url", &database, "--route", route, "--ops-listen", &listen];
        let arguments = given.into_iter().chain(peers).chain(flags.iter().copied());
        let program = Path::new(env!("CARGO_BIN_EXE_outbox-relay"));
        let process = Process::spawn("outbox-relay", program, arguments, [("RUST_LOG", "info")], &log).unwrap();
        Self { process, ops, log }
    }

    pub(crate) fn log_file(&self) -> PathBuf {
        self.log.clone()
    }

    /// The number of events with this outcome in its metrics.
    pub(crate) async fn events(&self, outcome: &str) -> u64 {
        let page = self.metrics().await;
        let events = sum_metric(&page, "outbox_relay_events_total", &[("outcome", outcome)]);
        events.unwrap_or_else(|| panic!("no {outcome} in {page}"))
    }

    pub(crate) async fn metrics(&self) -> String {
        let (status, page) = get(self.ops, "/metrics").await.unwrap();
        assert_eq!(status, 200, "{page}");
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
