//! The relay under test, run in this process.

use std::{net::SocketAddr, time::Duration};

use chassis::RunError;
use clap::Parser;
use outbox_relay::Settings;
use tokio::{
    net::TcpListener,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{outbox::Outbox, wait::AMPLE};

#[derive(Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
}

/// A running relay. Shuts down when it is dropped.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), RunError>>,
}

impl Relay {
    /// These flags override the defaults of the tests. The default poll is short, since most tests insert without
    /// notifying. The default batches are so small that several workers share a few hundred events.
    pub(crate) async fn start(outbox: &Outbox, receiver: SocketAddr, flags: &[&str]) -> Self {
        Self::start_on(&outbox.relay_url(), receiver, flags).await
    }

    pub(crate) async fn start_on(database_url: &str, receiver: SocketAddr, flags: &[&str]) -> Self {
        Self::start_with_routes(database_url, &[&format!("all=http://{receiver}")], flags).await
    }

    pub(crate) async fn start_with_routes(database_url: &str, routes: &[&str], flags: &[&str]) -> Self {
        let given = ["relay", "--source", "orders", "--database-url", database_url];
        let given = given.into_iter().chain(["--poll-ms", "50", "--workers", "5", "--batch", "100"]);
        let routes = routes.iter().flat_map(|route| ["--route", *route]);
        let arguments = given.chain(routes).chain(flags.iter().copied());
        let settings = Cli::try_parse_from(arguments).unwrap().settings;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(outbox_relay::run([listener], settings, shutdown.clone()));
        Self { address, shutdown, task }
    }

    /// Before that, operators are told to try again.
    pub(crate) async fn serves(&self) {
        let asking = async {
            while chassis::healthcheck(self.address, &chassis::TlsFiles::default()).await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(AMPLE, asking).await.expect("the relay serves");
    }

    pub(crate) fn shut_down(&self) {
        self.shutdown.cancel();
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until it ends by itself.
    pub(crate) async fn end(mut self) -> Result<(), RunError> {
        timeout(AMPLE, &mut self.task).await.expect("the relay ends").unwrap()
    }

    /// Shuts it down, and waits until it has ended.
    pub(crate) async fn stop(self) {
        self.shut_down();
        self.end().await.unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shut_down();
    }
}
