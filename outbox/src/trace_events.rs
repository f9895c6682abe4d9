//! A span for each delivered event whose trace is sampled, from its arrival until it is answered.

use chassis::{
    code_name,
    trace::{self, KeyValue, NewSpan, Span, SpanKind, Trace},
};
use proto::events::v1::{Event, EventResult, Outcome};
use tonic::{Status, metadata::MetadataMap};
use uuid::Uuid;

/// A sender decides how long a type is. A span waits in memory for a collector that may be away.
const TYPE_CHARS_MAX: usize = 200;

/// The spans of a batch, by the place of their events.
pub(crate) struct Processing(Vec<(usize, Span)>);

impl Processing {
    /// Begins them. The events carry them on, so what an event causes belongs to its span. An event that no service could
    /// read has none.
    pub(crate) fn begin(events: &mut [Event], metadata: &MetadataMap) -> Self {
        if !trace::is_on() {
            return Self(Vec::new());
        }
        let header = metadata.get("traceparent").and_then(|value| value.to_str().ok());
        let call = header.and_then(|header| Trace::read(header, "")).filter(Trace::is_sampled);
        let spans = events.iter_mut().enumerate().filter_map(|(place, event)| {
            let span = begin(event, call.as_ref())?;
            event.traceparent = span.trace().to_string();
            Some((place, span))
        });
        Self(spans.collect())
    }

    pub(crate) fn end(mut self, answer: &Result<Vec<EventResult>, Status>) {
        for (place, mut span) in self.0.drain(..) {
            match answer {
                Ok(results) => tell(&mut span, results.get(place)),
                Err(status) => span.fail_as(code_name(status.code())),
            }
        }
    }
}

/// The call was given up, and its work may be done all the same.
impl Drop for Processing {
    fn drop(&mut self) {
        for (_, span) in &mut self.0 {
            span.fail_as("CANCELLED");
        }
    }
}

fn begin(event: &Event, call: Option<&Trace>) -> Option<Span> {
    let caused_by = Trace::read(&event.traceparent, &event.tracestate).filter(Trace::is_sampled)?;
    let (id, subject) = (Uuid::try_parse(&event.id).ok()?, Uuid::try_parse(&event.subject).ok()?);
    let event_type: String = event.r#type.chars().take(TYPE_CHARS_MAX).collect();
    let attributes = vec![
        KeyValue::new("messaging.system.name", "outbox"),
        KeyValue::new("messaging.operation.name", "process"),
        KeyValue::new("messaging.operation.type", "process"),
        KeyValue::new("messaging.message.id", id.to_string()),
        KeyValue::new("outbox.subject", subject.to_string()),
        KeyValue::new("outbox.sequence", event.sequence),
    ];
    let new = NewSpan {
        name: format!("process {event_type}"),
        kind: SpanKind::Consumer,
        parent: Some(&caused_by),
        links: call.into_iter().cloned().collect(),
        attributes,
    };
    new.begin()
}

fn tell(span: &mut Span, result: Option<&EventResult>) {
    let Some(result) = result else { return };
    let outcome = result.outcome().as_str_name().trim_start_matches("OUTCOME_");
    span.set(KeyValue::new("outbox.outcome", outcome));
    if !matches!(result.outcome(), Outcome::Applied | Outcome::Duplicate) {
        span.set(KeyValue::new("error.type", result.reason.clone()));
        span.fail(result.detail.clone());
    }
}
