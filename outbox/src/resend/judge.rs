//! Judges what became of an event that was sent once. No I/O.

use std::collections::HashSet;

use sqlx::types::time::OffsetDateTime;

use super::{SentEvent, outbox::Kept};
use crate::EventId;

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The receiver has it no more, and nothing else would bring it.
    Lost,
    /// The receiver has it.
    Applied,
    /// It is in the outbox, perhaps dead.
    Waiting,
    /// An operator has given it up.
    Discarded,
    /// It was enqueued before the subscription was made, so it was never for its receiver.
    Earlier,
    /// A version without derived ids has enqueued it. Under another id it would be applied again.
    UnknownId,
    /// The receiver may have applied and forgotten it.
    TooOld,
}

/// What is known about the events of a piece.
pub(super) struct Evidence<'e> {
    /// The events that the receiver has applied.
    pub(super) applied: &'e HashSet<EventId>,
    pub(super) kept: &'e Kept,
    pub(super) subscribed_at: OffsetDateTime,
    /// Of an event that was enqueued before this time, the receiver may have forgotten the id.
    pub(super) oldest: OffsetDateTime,
}

/// What waits is known by its position, so also if its id is not. Without its id, nothing else can be said of an event.
/// With it, the receiver's word counts however old the event is, but only if it says that it has it.
pub(super) fn judge(sent: &SentEvent, evidence: &Evidence<'_>) -> Verdict {
    let Evidence { applied, kept, subscribed_at, oldest } = evidence;
    let SentEvent { event, at, has_derived_id } = sent;
    if kept.waiting.contains(&(event.aggregate_id, event.sequence)) {
        Verdict::Waiting
    } else if at < subscribed_at {
        Verdict::Earlier
    } else if !has_derived_id {
        Verdict::UnknownId
    } else if kept.discarded.contains(&event.id) {
        Verdict::Discarded
    } else if applied.contains(&event.id) {
        Verdict::Applied
    } else if at < oldest {
        Verdict::TooOld
    } else {
        Verdict::Lost
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::orders::v1::OrderCancelled;
    use uuid::Uuid;

    use super::*;
    use crate::{NewEvent, TraceContext};

    const HOUR: Duration = Duration::from_secs(3600);
    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn sent(hours_ago: u32) -> SentEvent {
        let event = NewEvent::of(Uuid::now_v7(), 2, &OrderCancelled::default(), &TraceContext::default());
        SentEvent { event, at: NOW - HOUR * hours_ago, has_derived_id: true }
    }

    /// The subscription was made ten hours ago, and the receiver remembers five.
    fn judge_with(sent: &SentEvent, change: impl FnOnce(&mut HashSet<EventId>, &mut Kept)) -> Verdict {
        let (mut applied, mut kept) = (HashSet::new(), Kept::none(NOW));
        change(&mut applied, &mut kept);
        let (subscribed_at, oldest) = (NOW - HOUR * 10, NOW - HOUR * 5);
        judge(sent, &Evidence { applied: &applied, kept: &kept, subscribed_at, oldest })
    }

    #[test]
    fn an_event_is_lost_only_if_it_is_known_nowhere_and_young() {
        let event = sent(4);
        assert_eq!(judge_with(&event, |_, _| {}), Verdict::Lost);
        assert_eq!(judge_with(&sent(6), |_, _| {}), Verdict::TooOld);
        assert_eq!(judge_with(&sent(11), |_, _| {}), Verdict::Earlier);
        assert_eq!(
            judge_with(&event, |applied, _| {
                applied.insert(event.event.id);
            }),
            Verdict::Applied
        );
        assert_eq!(
            judge_with(&event, |_, kept| {
                kept.discarded.insert(event.event.id);
            }),
            Verdict::Discarded
        );
        let position = (event.event.aggregate_id, event.event.sequence);
        assert_eq!(
            judge_with(&event, |_, kept| {
                kept.waiting.insert(position);
            }),
            Verdict::Waiting
        );
        let other = (event.event.aggregate_id, 1);
        assert_eq!(
            judge_with(&event, |_, kept| {
                kept.waiting.insert(other);
            }),
            Verdict::Lost
        );
    }

    #[test]
    fn what_the_receiver_has_is_applied_however_old_it_is() {
        let event = sent(6);
        assert_eq!(
            judge_with(&event, |applied, _| {
                applied.insert(event.event.id);
            }),
            Verdict::Applied
        );
    }

    #[test]
    fn an_event_whose_id_is_not_known_is_never_lost() {
        let event = SentEvent { has_derived_id: false, ..sent(4) };
        assert_eq!(judge_with(&event, |_, _| {}), Verdict::UnknownId);
        assert_eq!(
            judge_with(&event, |applied, _| {
                applied.insert(event.event.id);
            }),
            Verdict::UnknownId
        );
        let position = (event.event.aggregate_id, event.event.sequence);
        assert_eq!(
            judge_with(&event, |_, kept| {
                kept.waiting.insert(position);
            }),
            Verdict::Waiting
        );
    }
}
