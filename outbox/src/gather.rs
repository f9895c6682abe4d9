//! Gathers small batches of events that wait for a slot, so that they share the next transaction.
//!
//! Relays that deliver few events at a time, or one, would otherwise pay a transaction for each call. No timer makes a
//! batch wait for company: only batches that have to wait anyway are put together.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use proto::events::v1::{Event, EventResult};
use tokio::sync::oneshot;
use tonic::Status;

/// Events that share a transaction, unless one batch has more. A transaction with more costs hardly less for each.
const EVENTS_TOGETHER: usize = 100;

/// The results of a batch, in order, or what its call is refused with.
pub(crate) type Answer = Result<Vec<EventResult>, Status>;

/// A batch of one call.
#[derive(Debug)]
pub(crate) struct Batch {
    number: u64,
    pub(crate) events: Vec<Event>,
    pub(crate) answer: oneshot::Sender<Answer>,
}

/// The batches that wait, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    batches: Mutex<(u64, VecDeque<Batch>)>,
}

impl Waiting {
    /// Adds a batch. Returns its number, and where its answer comes.
    pub(crate) fn add(&self, events: Vec<Event>) -> (u64, oneshot::Receiver<Answer>) {
        let (answer, answered) = oneshot::channel();
        let (last, batches) = &mut *self.lock();
        *last += 1;
        batches.push_back(Batch { number: *last, events, answer });
        (*last, answered)
    }

    /// Takes the oldest batch, and those behind it that are small enough to share its transaction. Callers that are gone
    /// are left out.
    pub(crate) fn take(&self) -> Vec<Batch> {
        let (_, batches) = &mut *self.lock();
        let (mut group, mut events): (Vec<Batch>, usize) = (Vec::new(), 0);
        while let Some(next) = batches.front() {
            if !next.answer.is_closed() {
                events += next.events.len();
                if !group.is_empty() && events > EVENTS_TOGETHER {
                    break;
                }
            }
            group.extend(batches.pop_front().filter(|batch| !batch.answer.is_closed()));
        }
        group
    }

    /// Removes a batch that has waited too long. Returns false if it is being applied.
    pub(crate) fn remove(&self, number: u64) -> bool {
        let (_, batches) = &mut *self.lock();
        let before = batches.len();
        batches.retain(|batch| batch.number != number);
        batches.len() < before
    }

    /// No code here panics half-way, so the state behind a poisoned lock is sound.
    fn lock(&self) -> MutexGuard<'_, (u64, VecDeque<Batch>)> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proto::events::v1::Event;

    use super::{EVENTS_TOGETHER, Waiting};

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
        let [gone, first, second] = [500, 1, 2].map(|count| waiting.add(events(count)));
        drop(gone);
        assert_eq!(sizes(&waiting), [1, 2]);
        drop((first, second));
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
