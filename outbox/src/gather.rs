//! Gathers small batches of events, so that they share a transaction.
//!
//! Relays that deliver few events at a time, or one, would otherwise pay a transaction for each call. A lone batch waits
//! for no other. Those that arrive while one transaction with small batches runs share the next.
//!
//! Each batch brings one turn, a task of its own. A turn takes the batches that are there when it comes, which may be none
//! or those of other calls. So no batch is left without a turn, and no caller that goes away takes others along.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chassis::{Database, Refuse, may_pass};
use proto::events::v1::{Event, EventResult};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};
use tonic::{Code, Status};

use crate::{apply_batch::apply_batch, handler::Handler, measure};

/// Events that share a transaction, unless one batch has more. A transaction with more costs hardly less for each.
const EVENTS_TOGETHER: usize = 100;
/// A batch with more events than this is worth a transaction of its own beside others.
const SMALL: usize = 16;
/// How long a small batch waits for the turn of small batches. A transaction that waits for no lock and no slow disk is
/// done well before. Then the batch competes with all others.
const PATIENCE: Duration = Duration::from_millis(5);
/// How long a batch waits until it is applied. By default, this wait, the wait for a connection and the work together are
/// shorter than a call may take. A call that is cut off has no answer, and a relay may have to count that against an
/// event.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// The results of a batch, in order, or what its call is refused with.
type Answer = Result<Vec<EventResult>, Status>;

/// Applies batches together.
#[derive(Debug)]
pub(crate) struct Gatherer<H> {
    applier: Arc<Applier<H>>,
    waiting: Waiting,
    /// Batches that change the same rows wait for each other in any case. Waiting for a slot here takes neither a
    /// connection, which other calls may need, nor processor time.
    slots: Arc<Semaphore>,
    /// The turn of small batches. They gather while others wait for it.
    small: Arc<Semaphore>,
}

/// Applies a batch in a transaction.
#[derive(Debug)]
pub(crate) struct Applier<H> {
    pub(crate) database: Database,
    pub(crate) handler: H,
    pub(crate) refuse: Refuse,
    pub(crate) retention: Duration,
}

impl<H: Handler> Gatherer<H> {
    pub(crate) fn new(applier: Arc<Applier<H>>, batches_at_once: u16) -> Arc<Self> {
        let (slots, small) = (Arc::new(Semaphore::new(batches_at_once.into())), Arc::new(Semaphore::new(1)));
        Arc::new(Self { applier, waiting: Waiting::default(), slots, small })
    }

    /// Applies the events, and returns one result for each, in order, after the commit.
    ///
    /// # Errors
    /// The refusal of the call. The events may be applied all the same, as after any error.
    pub(crate) async fn apply(self: &Arc<Self>, events: Vec<Event>) -> Answer {
        let is_small = events.len() <= SMALL;
        let (number, mut answered) = self.waiting.add(events);
        // A caller that goes away leaves no batch behind that nobody waits for.
        let _removed_at_last = Removal { waiting: &self.waiting, number };
        tokio::spawn(self.clone().take_turn(is_small));
        let answer = match timeout(WAIT_MAX, &mut answered).await {
            Ok(answer) => answer,
            Err(_) if self.waiting.remove(number) => {
                return Err(self.applier.refuse.later(Code::Unavailable, "BUSY", "busy with other batches; try again"));
            }
            Err(_) => answered.await,
        };
        // Without an answer, the task that applied the batch has panicked.
        answer.unwrap_or_else(|_| Err(self.applier.refuse.database(&sqlx::Error::WorkerCrashed)))
    }

    /// Waits for a slot, and applies the batches that wait then. A small batch first waits for the turn of small ones.
    async fn take_turn(self: Arc<Self>, is_small: bool) {
        let _small = if is_small { timeout(PATIENCE, acquire(&self.small)).await.ok() } else { None };
        let _slot = acquire(&self.slots).await;
        self.applier.apply_group(self.waiting.take()).await;
    }
}

async fn acquire(semaphore: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    semaphore.clone().acquire_owned().await.expect("the semaphore is never closed")
}

impl<H: Handler> Applier<H> {
    /// Applies the batches in one transaction, and answers each after the commit. If the cause of a failure may lie in one
    /// of them, each is applied in a transaction of its own.
    async fn apply_group(self: &Arc<Self>, group: Vec<Batch>) {
        let (mut events, mut callers) = (Vec::new(), Vec::new());
        for batch in group {
            let begin = events.len();
            events.extend(batch.events);
            callers.push((begin..events.len(), batch.answer));
        }
        if callers.is_empty() {
            return;
        }
        let events = Arc::new(events);
        // A caller that is gone gets no answer.
        match self.apply(&events, 0..events.len()).await {
            Ok(results) => {
                let mut results = results.into_iter();
                for (range, answer) in callers {
                    drop(answer.send(Ok(results.by_ref().take(range.len()).collect())));
                }
            }
            Err(error) if callers.len() > 1 && !may_pass(&error) => {
                for (range, answer) in callers {
                    let results = self.apply(&events, range).await;
                    drop(answer.send(results.map_err(|error| self.refuse.database(&error))));
                }
            }
            Err(error) => {
                let refusal = self.refuse.database(&error);
                for (_, answer) in callers {
                    drop(answer.send(Err(refusal.clone())));
                }
            }
        }
    }

    async fn apply(
        self: &Arc<Self>,
        events: &Arc<Vec<Event>>,
        range: Range<usize>,
    ) -> Result<Vec<EventResult>, sqlx::Error> {
        let (applier, events) = (self.clone(), events.clone());
        let applied: Result<Vec<EventResult>, sqlx::Error> = self
            .database
            .write(move |connection| {
                Box::pin(
                    async move { apply_batch(connection, &applier.handler, &events[range], applier.retention).await },
                )
            })
            .await;
        applied.inspect(|results| measure::applied(results))
    }
}

/// A batch of one call.
#[derive(Debug)]
struct Batch {
    number: u64,
    events: Vec<Event>,
    answer: oneshot::Sender<Answer>,
}

/// The batches that wait, in the order in which they came.
#[derive(Debug, Default)]
struct Waiting {
    state: Mutex<WaitingState>,
}

#[derive(Debug, Default)]
struct WaitingState {
    last: u64,
    batches: VecDeque<Batch>,
}

/// Removes a batch when it is dropped, if that still waits.
struct Removal<'w> {
    waiting: &'w Waiting,
    number: u64,
}

impl Drop for Removal<'_> {
    fn drop(&mut self) {
        self.waiting.remove(self.number);
    }
}

impl Waiting {
    /// Adds a batch. Returns its number, and where its answer comes.
    fn add(&self, events: Vec<Event>) -> (u64, oneshot::Receiver<Answer>) {
        let (answer, answered) = oneshot::channel();
        let state = &mut *self.lock();
        state.last += 1;
        state.batches.push_back(Batch { number: state.last, events, answer });
        (state.last, answered)
    }

    /// Takes the oldest batch, and those behind it that are small enough to share its transaction.
    fn take(&self) -> Vec<Batch> {
        let batches = &mut self.lock().batches;
        let (mut group, mut events): (Vec<Batch>, usize) = (Vec::new(), 0);
        while let Some(next) = batches.front() {
            events += next.events.len();
            if !group.is_empty() && events > EVENTS_TOGETHER {
                break;
            }
            group.extend(batches.pop_front());
        }
        group
    }

    /// Removes a batch. Returns false if it does not wait any more.
    fn remove(&self, number: u64) -> bool {
        let batches = &mut self.lock().batches;
        let before = batches.len();
        batches.retain(|batch| batch.number != number);
        batches.len() < before
    }

    /// No code here panics half-way, so the state behind a poisoned lock is sound.
    fn lock(&self) -> MutexGuard<'_, WaitingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proto::events::v1::Event;

    use super::{EVENTS_TOGETHER, Removal, Waiting};

    fn events(count: usize) -> Vec<Event> {
        vec![Event::default(); count]
    }

    fn sizes(waiting: &Waiting) -> Vec<usize> {
        waiting.take().iter().map(|batch| batch.events.len()).collect()
    }

    #[test]
    fn small_batches_are_taken_together_and_a_large_one_alone_in_the_order_in_which_they_came() {
        let waiting = Waiting::default();
        let _answers: Vec<_> = [1, 2, 500, 3, EVENTS_TOGETHER - 3, 1, 0].map(|count| waiting.add(events(count))).into();
        assert_eq!(sizes(&waiting), [1, 2]);
        assert_eq!(sizes(&waiting), [500]);
        assert_eq!(sizes(&waiting), [3, EVENTS_TOGETHER - 3]);
        assert_eq!(sizes(&waiting), [1, 0]);
        assert_eq!(sizes(&waiting), Vec::<usize>::new());
    }

    #[test]
    fn a_batch_whose_caller_is_gone_is_not_taken() {
        let waiting = Waiting::default();
        let [gone, _first, _second] = [500, 1, 2].map(|count| waiting.add(events(count)));
        drop(Removal { waiting: &waiting, number: gone.0 });
        assert_eq!(sizes(&waiting), [1, 2]);
    }

    #[test]
    fn a_batch_can_be_removed_until_it_is_taken() {
        let waiting = Waiting::default();
        let [first, second] = [1, 2].map(|count| waiting.add(events(count)));
        assert!(waiting.remove(first.0));
        assert_eq!(sizes(&waiting), [2]);
        assert!(!waiting.remove(second.0));
    }
}
