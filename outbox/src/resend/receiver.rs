//! The part of `resend` that asks the receiver.

use std::time::Duration;

use chassis::{Tls, explain};
use proto::events::v1::{DescribeRequest, RecallRequest, event_receiver_client::EventReceiverClient};
use tonic::{
    Code, Request, Status,
    codec::CompressionEncoding,
    transport::{Channel, Endpoint, Uri},
};
use uuid::Uuid;

use super::ResendError;
use crate::{EventId, recall::RECALL_MAX};

const CONNECT_LIMIT: Duration = Duration::from_secs(2);
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// The receiver that has lost events.
#[derive(Debug)]
pub(super) struct Receiver {
    url: Uri,
    client: EventReceiverClient<Channel>,
}

impl Receiver {
    /// Connects at the first call.
    pub(super) fn connect_lazily(url: Uri, tls: &Tls) -> Self {
        let endpoint = Endpoint::from(url.clone()).connect_timeout(CONNECT_LIMIT).timeout(CALL_LIMIT);
        let client = EventReceiverClient::new(chassis::connect_lazily(&endpoint, tls))
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Deflate);
        Self { url, client }
    }

    /// How old an event may be when it is delivered: six sevenths of what the receiver remembers, as for relays. Clocks
    /// differ, and the delivery takes time.
    pub(super) async fn max_age(&mut self) -> Result<Duration, ResendError> {
        let described = self.client.describe(Request::new(DescribeRequest {})).await;
        let described = described.map_err(|status| self.failed("Describe", &status))?.into_inner();
        let retention = described.retention.and_then(|retention| Duration::try_from(retention).ok());
        let retention = retention.ok_or_else(|| self.refused("does not say how long it remembers events".into()))?;
        Ok(retention / 7 * 6)
    }

    /// The events of these that the receiver has applied.
    pub(super) async fn recall(&mut self, event_ids: &[EventId]) -> Result<Vec<EventId>, ResendError> {
        let mut applied = Vec::new();
        // At least one call, so that a receiver without Recall is found.
        let none: [&[EventId]; 1] = [&[]];
        let pieces: Vec<&[EventId]> =
            if event_ids.is_empty() { none.to_vec() } else { event_ids.chunks(RECALL_MAX).collect() };
        for piece in pieces {
            let request = RecallRequest { event_ids: piece.iter().map(EventId::to_string).collect() };
            let recalled = self.client.recall(Request::new(request)).await;
            let events = recalled.map_err(|status| self.failed("Recall", &status))?.into_inner().events;
            let answers_each = events.len() == piece.len()
                && events.iter().zip(piece).all(|(event, id)| Uuid::try_parse(&event.event_id) == Ok(id.uuid()));
            if !answers_each {
                return Err(self.refused("does not answer Recall for each event, in the order of the request".into()));
            }
            let known = events.iter().zip(piece).filter(|(event, _)| event.apply_time.is_some());
            applied.extend(known.map(|(_, id)| *id));
        }
        Ok(applied)
    }

    fn failed(&self, method: &str, status: &Status) -> ResendError {
        self.refused(match (method, status.code()) {
            ("Recall", Code::Unimplemented) => {
                "does not implement events.v1.EventReceiver.Recall, so nobody knows which events it has lost: name orders \
                 with --orders, and send all their events with --without-recall; it drops those that it has"
                    .to_owned()
            }
            _ => format!("fails at {method}: {}", explain(status)),
        })
    }

    fn refused(&self, why: String) -> ResendError {
        ResendError::Receiver { receiver: self.url.clone(), why }
    }
}
