//! Refuses calls while as many others as may wait for their answers.
//!
//! A service that is asked for more than it can do is no faster for having more calls at once: each only waits longer. So
//! what is too much is refused before anything is done for it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    BoxError, Router,
    body::{Body, Bytes},
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use clap::Args;
use futures_util::StreamExt as _;
use http_body::{Body as HttpBody, Frame, SizeHint};
use metrics::{counter, describe_counter};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::{Refuse, authorize::EXEMPT};

const SHED: &str = "calls_shed_total";
/// Who sends a message for longer is refused without having been read.
const READ_LIMIT: Duration = Duration::from_secs(1);
const REFUSE: Refuse = Refuse { domain: "listener" };

/// How many calls may wait.
#[derive(Args, Clone, Debug)]
pub struct CallSettings {
    /// Maximum number of callers' calls that wait for an answer. Further ones are refused with a hint to retry, before anything
    /// is done for them. A call waits once all of it has arrived. Health checks are never refused.
    // A service of some thousand orders a second that takes 50 ms for each has some hundred at a time (Little's law).
    #[arg(long, env = "CALLS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    pub calls: u32,
}

/// The calls that wait for their answers.
#[derive(Debug)]
struct Waiting {
    calls: AtomicUsize,
    calls_max: usize,
}

pub(crate) fn describe() {
    describe_counter!(SHED, "Calls that were refused since too many others waited for an answer");
}

/// Lets at most so many calls of the routes wait.
pub(crate) fn shed(routes: Router, settings: &CallSettings) -> Router {
    counter!(SHED).increment(0);
    let waiting = Waiting { calls: AtomicUsize::new(0), calls_max: settings.calls as usize };
    routes.layer(from_fn_with_state(Arc::new(waiting), answer))
}

async fn answer(State(waiting): State<Arc<Waiting>>, request: Request, next: Next) -> Response {
    if request.uri().path().strip_prefix('/').is_some_and(|method| method.starts_with(EXEMPT)) {
        return next.run(request).await;
    }
    let place = Arc::new(Place { waiting, is_taken: AtomicBool::new(false) });
    if !place.is_free() {
        return refuse(request.into_body()).await;
    }
    let asking = request.map(|body| Body::new(Asking { body, place: place.clone() }));
    let answer = next.run(asking).await;
    // One who is being answered, such as a watcher, waits no longer.
    drop(place);
    answer
}

/// What the caller sends is read nevertheless. Otherwise HTTP/2 resets the call, the rest of it breaks a rule, and a caller
/// who meets that often loses the connection.
async fn refuse(asked: Body) -> Response {
    let mut parts = asked.into_data_stream();
    let reading = async { while let Some(Ok(_)) = parts.next().await {} };
    drop(timeout(READ_LIMIT, reading).await);
    too_many().into_http()
}

fn too_many() -> Status {
    counter!(SHED).increment(1);
    REFUSE.later(Code::ResourceExhausted, "TOO_MANY_CALLS", "too many calls wait for an answer; try again")
}

/// What a caller asks. Once all of it is there, the call waits for its answer.
///
/// A call that waited from its beginning would keep others out for as long as its caller sends nothing. A few connections
/// with such calls would take all places.
#[derive(Debug)]
struct Asking {
    body: Body,
    place: Arc<Place>,
}

impl HttpBody for Asking {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // Whoever reads stops at trailers, if there are any.
        let is_last = frame.as_ref().is_none_or(|frame| frame.as_ref().is_ok_and(Frame::is_trailers));
        Poll::Ready(if is_last && !self.place.take() {
            Some(Err(too_many().into()))
        } else {
            frame.map(|frame| frame.map_err(BoxError::from))
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Where a call can wait.
#[derive(Debug)]
struct Place {
    waiting: Arc<Waiting>,
    is_taken: AtomicBool,
}

impl Place {
    fn is_free(&self) -> bool {
        self.waiting.calls.load(Relaxed) < self.waiting.calls_max
    }

    /// Takes it until this is dropped, unless it is free no longer. Whoever has it may take it again.
    fn take(&self) -> bool {
        if self.is_taken.load(Relaxed) {
            return true;
        }
        let is_free = self.waiting.calls.fetch_add(1, Relaxed) < self.waiting.calls_max;
        if is_free {
            self.is_taken.store(true, Relaxed);
        } else {
            self.waiting.calls.fetch_sub(1, Relaxed);
        }
        is_free
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if *self.is_taken.get_mut() {
            self.waiting.calls.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_once_and_free_again_once_it_is_dropped() {
        let waiting = Arc::new(Waiting { calls: AtomicUsize::new(0), calls_max: 2 });
        let place = || Place { waiting: waiting.clone(), is_taken: AtomicBool::new(false) };
        let (one, other, late) = (place(), place(), place());
        assert!(one.take() && one.take() && late.is_free());
        assert!(other.take() && other.take());
        assert!(!late.is_free() && !late.take());
        drop(one);
        assert!(late.is_free() && late.take());
        drop((other, late));
        assert_eq!(waiting.calls.load(Relaxed), 0);
    }
}
