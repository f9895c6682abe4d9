//! TCP proxies between the processes, which break what passes through them: cut, reset, swallowed, late, in slices, or
//! held at a point while something is done to a process.

use std::{
    collections::BTreeMap,
    future::pending,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use prost::Message;
use proto::events::v1::{DeliverResponse, Outcome};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    select,
    sync::{oneshot, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::wire::{Mark, Protocol, Reader};
use testkit::processes::free_port;

/// How long a connection that was once swallowed stays open: each holds a session of the database's.
const SWALLOWED_FOR: Duration = Duration::from_secs(20);

/// What becomes of everything that passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weather {
    Clear,
    /// Nothing arrives and nobody is told; connections that were open meanwhile never recover.
    Swallow,
    /// Each piece arrives late, by any time up to this.
    Delay(Duration),
    /// One byte at a time.
    Slice,
}

/// How connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Cut,
    Reset,
}

/// What is done to the piece in which something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// It never arrives.
    Keep,
    /// It never arrives, and the connection is reset.
    Lose,
    /// It arrives before the deed.
    PassBefore,
    /// It arrives after the deed.
    PassAfter,
}

/// Waits for something to pass, and then does something.
pub(super) struct Trap {
    pub(super) at: Box<dyn Fn(&Mark) -> bool + Send>,
    pub(super) hold: Hold,
    pub(super) deed: Box<dyn FnMut() + Send>,
    /// How many times more.
    pub(super) times: u32,
    /// Told when it has been sprung that often.
    pub(super) sprung: Option<oneshot::Sender<()>>,
}

/// A proxy in front of one server, for one client.
pub(super) struct Link {
    pub(super) name: String,
    protocol: Protocol,
    /// Whether what passes are deliveries of a relay.
    delivers: bool,
    /// Where it listens.
    pub(super) address: SocketAddr,
    server: SocketAddr,
    weather: watch::Sender<Weather>,
    ended: watch::Sender<End>,
    traps: Mutex<BTreeMap<u64, Trap>>,
    next_trap: AtomicU64,
    open: AtomicU64,
    /// Pieces that the weather kept from arriving as they were.
    pub(super) spoilt: AtomicU64,
    /// Events that a receiver answered as duplicates.
    pub(super) duplicates: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

impl Link {
    /// Listens, and carries until the value it returns beside is dropped.
    pub(super) async fn open(
        name: String,
        protocol: Protocol,
        delivers: bool,
        server: SocketAddr,
    ) -> Result<(Arc<Self>, JoinSet<()>)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, free_port()?)).await?;
        let link = Arc::new(Self {
            name,
            protocol,
            delivers,
            address: listener.local_addr()?,
            server,
            weather: watch::Sender::new(Weather::Clear),
            ended: watch::Sender::new(End::Cut),
            traps: Mutex::default(),
            next_trap: AtomicU64::new(0),
            open: AtomicU64::new(0),
            spoilt: AtomicU64::new(0),
            duplicates: AtomicU64::new(0),
        });
        let mut serving = JoinSet::new();
        serving.spawn(link.clone().accept(listener));
        Ok((link, serving))
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut carried = JoinSet::new();
        loop {
            select! {
                accepted = listener.accept() => if let Ok((client, _)) = accepted {
                    carried.spawn(self.clone().carry(client));
                },
                Some(_) = carried.join_next() => {}
            }
        }
    }

    pub(super) fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// Ends all connections, and returns how many there were.
    pub(super) fn end(&self, how: End) -> u64 {
        self.ended.send_replace(how);
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn set_trap(self: &Arc<Self>, trap: Trap) -> TrapGuard {
        let number = self.next_trap.fetch_add(1, Ordering::Relaxed);
        self.traps.lock().unwrap_or_else(PoisonError::into_inner).insert(number, trap);
        TrapGuard { link: self.clone(), number }
    }

    /// Carries one connection to its end.
    async fn carry(self: Arc<Self>, client: TcpStream) {
        let Ok(server) = TcpStream::connect(self.server).await else {
            let _ = client.set_zero_linger();
            return;
        };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        self.open.fetch_add(1, Ordering::Relaxed);
        let mut ended = self.ended.subscribe();
        let reader = Mutex::new(Reader::of(self.protocol));
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let (mut up, mut down) = (Pump { from: from_client, to: to_server }, Pump { from: from_server, to: to_client });
        let how = select! {
            how = self.pump(&mut up, Direction::Up, &reader) => how,
            how = self.pump(&mut down, Direction::Down, &reader) => how,
            _ = ended.changed() => *ended.borrow(),
        };
        self.open.fetch_sub(1, Ordering::Relaxed);
        if how == End::Reset {
            for Pump { from, to } in [up, down] {
                let _ = from.as_ref().set_zero_linger();
                // Dropped, it would first end the connection in order.
                to.forget();
            }
        }
    }

    /// Carries one direction of a connection, until either side or a fault ends it.
    async fn pump(&self, pump: &mut Pump, direction: Direction, reader: &Mutex<Reader>) -> End {
        let mut weather = self.weather.subscribe();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = select! {
                read = pump.from.read(&mut buffer) => read,
                () = swallowing(&mut weather) => return self.swallow(pump).await,
            };
            let Ok(length @ 1..) = read else { return End::Cut };
            let piece = &buffer[..length];
            let marks = {
                let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
                if direction == Direction::Up { reader.up(piece) } else { reader.down(piece) }
            };
            self.count(&marks);
            let hold = self.spring(&marks, false);
            match hold {
                Some(Hold::Keep) => {
                    // Whoever was killed is gone in a moment, and the connection with it.
                    let _ = timeout(SWALLOWED_FOR, pump.drain()).await;
                    return End::Cut;
                }
                Some(Hold::Lose) => return End::Reset,
                Some(Hold::PassBefore | Hold::PassAfter) | None => {}
            }
            let weather_now = *weather.borrow();
            if self.pass(pump, piece, weather_now).await.is_err() {
                return End::Cut;
            }
            self.spring(&marks, true);
        }
    }

    /// Nothing arrives any more, on either side, and nobody is told; not even that the other side has given up.
    async fn swallow(&self, pump: &mut Pump) -> End {
        self.spoilt.fetch_add(1, Ordering::Relaxed);
        let _ = timeout(SWALLOWED_FOR, async {
            pump.drain().await;
            pending::<()>().await;
        })
        .await;
        End::Reset
    }

    async fn pass(&self, pump: &mut Pump, piece: &[u8], weather: Weather) -> io::Result<()> {
        match weather {
            Weather::Delay(most) => {
                self.spoilt.fetch_add(1, Ordering::Relaxed);
                sleep(most.mul_f64(fastrand::f64())).await;
                pump.to.write_all(piece).await
            }
            Weather::Slice => {
                self.spoilt.fetch_add(1, Ordering::Relaxed);
                for byte in piece {
                    pump.to.write_all(&[*byte]).await?;
                    tokio::task::yield_now().await;
                }
                Ok(())
            }
            Weather::Clear | Weather::Swallow => pump.to.write_all(piece).await,
        }
    }

    /// Springs the traps for these marks: those whose deed follows the passing of the piece, or the others.
    fn spring(&self, marks: &[Mark], passed: bool) -> Option<Hold> {
        let mut traps = self.traps.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = None;
        traps.retain(|_, trap| {
            if (trap.hold == Hold::PassBefore) != passed || !marks.iter().any(|mark| (trap.at)(mark)) {
                return true;
            }
            (trap.deed)();
            held = Some(trap.hold);
            trap.times -= 1;
            if trap.times == 0
                && let Some(sprung) = trap.sprung.take()
            {
                let _ = sprung.send(());
            }
            trap.times > 0
        });
        held
    }

    fn count(&self, marks: &[Mark]) {
        for mark in marks {
            if self.delivers
                && let Mark::Reply(message) = mark
                && let Ok(response) = DeliverResponse::decode(message.clone())
            {
                let duplicates =
                    response.results.iter().filter(|result| result.outcome() == Outcome::Duplicate).count();
                self.duplicates.fetch_add(duplicates as u64, Ordering::Relaxed);
            }
        }
    }
}

async fn swallowing(weather: &mut watch::Receiver<Weather>) {
    // What it returns is a lock.
    drop(weather.wait_for(|weather| *weather == Weather::Swallow).await);
}

/// Takes the trap away again.
pub(super) struct TrapGuard {
    link: Arc<Link>,
    number: u64,
}

impl Drop for TrapGuard {
    fn drop(&mut self) {
        self.link.traps.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

struct Pump {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
}

impl Pump {
    /// Reads to the end, for nobody.
    async fn drain(&mut self) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(1..) = self.from.read(&mut buffer).await {}
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        net::{Ipv4Addr, SocketAddr},
        sync::Arc,
        time::Duration,
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        sync::mpsc,
        task::JoinSet,
        time::timeout,
    };

    use super::{End, Hold, Link, Trap, Weather};
    use crate::wire::{Mark, Protocol};

    const QUERY: &[u8] = b"\0\0\0\x08\0\x03\0\0Q\0\0\0\x0aBEGIN\0";
    /// Longer than anything here takes, and shorter than a swallowed connection lasts.
    const SILENCE: Duration = Duration::from_millis(300);

    struct Proxied {
        link: Arc<Link>,
        client: TcpStream,
        _serving: JoinSet<()>,
    }

    /// A link to a server that answers every byte with the same.
    async fn proxied() -> Proxied {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let server: SocketAddr = listener.local_addr().expect("its address");
        let (link, mut serving) =
            Link::open("test".into(), Protocol::Postgres, false, server).await.expect("another port");
        serving.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.into_split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        let client = TcpStream::connect(link.address).await.expect("the proxy listens");
        Proxied { link, client, _serving: serving }
    }

    impl Proxied {
        async fn echoes(&mut self) -> bool {
            self.client.write_all(QUERY).await.expect("an open connection");
            let mut answer = vec![0; QUERY.len()];
            let read = timeout(SILENCE, self.client.read_exact(&mut answer)).await;
            matches!(read, Ok(Ok(_))) && answer == QUERY
        }

        async fn end(&mut self) -> Result<usize, ErrorKind> {
            let read = timeout(SILENCE, self.client.read(&mut [0; 1])).await.expect("an end in time");
            read.map_err(|error| error.kind())
        }
    }

    #[tokio::test]
    async fn what_passes_arrives_whole_also_in_slices_and_late() {
        let mut proxied = proxied().await;
        for weather in [Weather::Clear, Weather::Slice, Weather::Delay(Duration::from_millis(50))] {
            proxied.link.set(weather);
            assert!(proxied.echoes().await, "{weather:?}");
        }
    }

    #[tokio::test]
    async fn connections_are_cut_in_order_or_reset() {
        let (mut cut, mut reset) = (proxied().await, proxied().await);
        for (proxied, how) in [(&mut cut, End::Cut), (&mut reset, End::Reset)] {
            assert!(proxied.echoes().await);
            assert_eq!(proxied.link.end(how), 1);
        }
        assert_eq!(cut.end().await, Ok(0));
        assert_eq!(reset.end().await, Err(ErrorKind::ConnectionReset));
    }

    #[tokio::test]
    async fn a_half_open_connection_stays_so_and_a_new_one_is_well() {
        let mut proxied = proxied().await;
        assert!(proxied.echoes().await);
        proxied.link.set(Weather::Swallow);
        assert!(!proxied.echoes().await);
        proxied.link.set(Weather::Clear);
        assert!(!proxied.echoes().await, "it never recovers");
        proxied.client = TcpStream::connect(proxied.link.address).await.expect("the proxy listens");
        assert!(proxied.echoes().await);
    }

    #[tokio::test]
    async fn a_trap_springs_where_it_is_set_and_as_often_as_it_is() {
        for (hold, arrives) in [(Hold::Keep, false), (Hold::PassBefore, true), (Hold::PassAfter, true)] {
            let mut proxied = proxied().await;
            let (deed, mut deeds) = mpsc::unbounded_channel();
            let _guard = proxied.link.set_trap(Trap {
                at: Box::new(|mark| *mark == Mark::Statement("BEGIN".into())),
                hold,
                deed: Box::new(move || _ = deed.send(())),
                times: 1,
                sprung: None,
            });
            assert_eq!(proxied.echoes().await, arrives, "{hold:?}");
            assert_eq!(deeds.recv().await, Some(()));
            assert_eq!(deeds.recv().await, None, "the trap is gone");
        }
    }
}
