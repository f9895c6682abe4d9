//! What each customer holds of something that all customers share.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// How many places each customer holds. Clones share them.
///
/// Only customers that hold one cost memory, so strangers cannot make it grow beyond the number of places.
#[derive(Clone, Debug)]
pub(crate) struct Shares {
    held: Arc<Mutex<HashMap<Arc<str>, u32>>>,
    max: u32,
}

/// A place that a customer holds until this is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    customer_id: Arc<str>,
    of: Shares,
}

impl Shares {
    /// A customer may hold so many places.
    pub(crate) fn of(max: u32) -> Self {
        Self { held: Arc::default(), max }
    }

    /// Another place for the customer; `None` if it holds as many as it may.
    pub(crate) fn take(&self, customer_id: &str) -> Option<Share> {
        let mut held = self.lock();
        let known = held.get_key_value(customer_id).map(|(known, places)| (Arc::clone(known), *places));
        let (customer_id, places) = known.unwrap_or_else(|| (customer_id.into(), 0));
        if places >= self.max {
            return None;
        }
        held.insert(Arc::clone(&customer_id), places + 1);
        Some(Share { customer_id, of: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, u32>> {
        // No code panics while it holds the lock.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.of.lock();
        match held.get_mut(&self.customer_id) {
            Some(places) if *places > 1 => *places -= 1,
            _ => drop(held.remove(&self.customer_id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_customer_holds_no_more_places_than_it_may_and_others_have_theirs() {
        let shares = Shares::of(2);
        let (one, _other) = (shares.take("ann").unwrap(), shares.take("ann").unwrap());
        assert!(shares.take("ann").is_none());
        assert!(shares.take("bob").is_some());
        drop(one);
        assert!(shares.take("ann").is_some());
    }

    #[test]
    fn nothing_is_kept_of_a_customer_that_holds_no_place() {
        let shares = Shares::of(2);
        let places: Vec<_> = ["ann", "bob", "ann"].map(|customer_id| shares.take(customer_id).unwrap()).into();
        assert_eq!(shares.lock().len(), 2);
        drop(places);
        assert!(shares.lock().is_empty());
    }
}
