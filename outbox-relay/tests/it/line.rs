//! A TCP line that can be cut, as a crash or a network cuts it: without a word in any protocol above.

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

/// A listener that passes each connection on, until it is dropped.
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

    /// What cuts the connections there are; new ones are passed on.
    /// Makes the receiver behind this line break off over its first `count` deliveries, and apply the others.
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
                // Either end may break the connection: that is what a line is for.
                _ = copy_bidirectional(&mut near, &mut far) => {}
                () = cut.notified() => {}
            }
        });
    }
}
