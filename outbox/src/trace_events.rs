//! A span for each delivered event whose trace is sampled, from its arrival until it is answered.

use chassis::trace::{self, KeyValue, NewSpan, Span, SpanKind, Trace};
use proto::events::v1::{Event, EventResult, Outcome};
use tonic::metadata::MetadataMap;

/// The spans of a batch, by the place of their events. If the call is given up, they end with it.
pub(crate) struct Processing(Vec<(usize, Span)>);

impl Processing {
    /// Begins them. The events carry them on, so what an event causes belongs to its span.
    pub(crate) fn begin(events: &mut [Event], metadata: &MetadataMap) -> Self {
        if !trace::is_on() {
            return Self(Vec::new());
        }
        let header = metadata.get("traceparent").and_then(|value| value.to_str().ok());
        let call = header.and_then(|header| Trace::read(header, ""));
        let spans = events.iter_mut().enumerate().filter_map(|(place, event)| {
            let caused_by = Trace::read(&event.traceparent, &event.tracestate).filter(Trace::is_sampled)?;
            let attributes = vec![
                KeyValue::new("messaging.system.name", "outbox"),
                KeyValue::new("messaging.operation.name", "process"),
                KeyValue::new("messaging.operation.type", "process"),
                KeyValue::new("messaging.message.id", event.id.clone()),
                KeyValue::new("outbox.subject", event.subject.clone()),
                KeyValue::new("outbox.sequence", event.sequence),
            ];
            let new = NewSpan {
                name: format!("process {}", event.r#type),
                kind: SpanKind::Consumer,
                parent: Some(&caused_by),
                links: call.iter().cloned().collect(),
                attributes,
            };
            let span = new.begin()?;
            event.traceparent = span.trace().to_string();
            Some((place, span))
        });
        Self(spans.collect())
    }

    pub(crate) fn end(self, results: &[EventResult]) {
        for (place, mut span) in self.0 {
            let Some(result) = results.get(place) else { continue };
            let outcome = result.outcome().as_str_name().trim_start_matches("OUTCOME_");
            span.set(KeyValue::new("outbox.outcome", outcome));
            if !matches!(result.outcome(), Outcome::Applied | Outcome::Duplicate) {
                span.set(KeyValue::new("error.type", result.reason.clone()));
                span.fail(result.detail.clone());
            }
        }
    }
}
