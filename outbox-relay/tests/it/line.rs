//! A TCP line that can be cut as by a crash or a network failure: without a message in any protocol above.

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, sync::DropGuard};

use crate::{
    receiver::{Receiver, Reply},
    wait::AMPLE,
};

/// A proxy for TCP connections, until it is dropped.
pub(crate) struct Line {
    pub(crate) address: SocketAddr,
    cut: Arc<Notify>,
    calls: watch::Receiver<usize>,
    _stop: DropGuard,
}

impl Line {
    pub(crate) async fn to(host: &str, port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let (count, calls) = watch::channel(0);
        let passing = pass_on(listener, (host.to_owned(), port), cut.clone(), count);
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(passing).await });
        Self { address, cut, calls, _stop: stop.drop_guard() }
    }

    /// Cuts the line during the first `count` deliveries. The receiver behind it applies the others.
    pub(crate) fn break_over_the_first(&self, count: usize, receiver: &Receiver) {
        let cut = self.cutter();
        let mut deliveries = 0;
        receiver.follow(move |events| {
            deliveries += 1;
            if deliveries <= count {
                cut();
                return Reply::never();
            }
            Reply::apply(events)
        });
    }

    /// A function that cuts the open connections. New ones are accepted again.
    pub(crate) fn cutter(&self) -> impl Fn() + Send + use<> {
        let cut = self.cut.clone();
        move || cut.notify_waiters()
    }

    pub(crate) async fn wait_for_calls(&mut self, count: usize) {
        let waited = timeout(AMPLE, self.calls.wait_for(|calls| *calls >= count)).await;
        assert!(waited.is_ok(), "not called {count} times within {AMPLE:?}");
    }
}

async fn pass_on(listener: TcpListener, target: (String, u16), cut: Arc<Notify>, count: watch::Sender<usize>) {
    loop {
        let (mut near, _) = listener.accept().await.unwrap();
        let (cut, target) = (cut.clone(), target.clone());
        count.send_modify(|calls| *calls += 1);
        tokio::spawn(async move {
            let mut far = TcpStream::connect(target).await.unwrap();
            tokio::select! {
                // Either end may break the connection, so errors are expected.
                _ = copy_bidirectional(&mut near, &mut far) => {}
                () = cut.notified() => {}
            }
        });
    }
}
