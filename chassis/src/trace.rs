//! Traces, for a collector that speaks OTLP. Without one, nothing here costs more than a look at a cell.
//!
//! Spans are made by OpenTelemetry's own interface, not through the spans of `tracing`: those of an event begin before this
//! process has seen it, have an id that others know, and end in another place than they began in.

use std::{
    cell::Cell,
    env, fmt,
    path::Path,
    str::FromStr,
    sync::{OnceLock, mpsc},
    thread,
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context,
    trace::{
        Link, Span as _, SpanContext, SpanId, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState,
        Tracer as _, TracerProvider as _,
    },
};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{
        BatchSpanProcessor, Config, IdGenerator, RandomIdGenerator, SamplingDecision, SamplingResult, SdkTracer,
        SdkTracerProvider, ShouldSample, SpanData,
    },
};
use tokio::{runtime, sync::oneshot, task::spawn_blocking, time::Instant};
use tracing::{info, warn};

use crate::LogLimit;

pub use opentelemetry::{KeyValue, trace::SpanKind};

/// The SDK keeps 128, and drops the others without a word. A batch may have this many events.
const LINKS_MAX: u32 = 1000;
/// A collector that is away is told of once in this time.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);
/// How long the end of a process waits for its last spans to be sent.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

thread_local! {
    /// The id of the next span of this thread, if it is not to be random.
    static NEXT_ID: Cell<Option<SpanId>> = const { Cell::new(None) };
}

/// Sends the spans of this process until it is dropped.
pub(crate) struct Tracing {
    provider: SdkTracerProvider,
    /// Ends the exporter's thread.
    _end: oneshot::Sender<()>,
}

/// Begins to trace if the environment names a collector: OTEL_EXPORTER_OTLP_ENDPOINT, or that of traces alone. The other
/// variables of OpenTelemetry count as well: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG, and those of
/// headers, limits and batches.
pub(crate) fn start() -> Option<Tracing> {
    let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let endpoint = set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or_else(|| set("OTEL_EXPORTER_OTLP_ENDPOINT"))?;
    let is_off = set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
        || set("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
    if is_off {
        return None;
    }
    if let Err(wrong) = check_sampler(set("OTEL_TRACES_SAMPLER").as_deref(), set("OTEL_TRACES_SAMPLER_ARG").as_deref())
    {
        warn!("no traces: {wrong}");
        return None;
    }
    let endpoint = without_credentials(&endpoint);
    let (provider, end) = match start_exporter() {
        Ok(started) => started,
        Err(cause) => {
            warn!(%cause, endpoint, "no traces: the exporter cannot be made");
            return None;
        }
    };
    info!(endpoint, "traces are sent");
    TRACER.get_or_init(|| provider.tracer("chassis"));
    Some(Tracing { provider, _end: end })
}

impl Tracing {
    /// Waits for the last spans to be sent, and not for a collector that is away. On another thread: work that was detached
    /// goes on meanwhile, and signals count.
    pub(crate) async fn end(self) {
        let Self { provider, _end: exporter } = self;
        let ended = spawn_blocking(move || provider.shutdown_with_timeout(FLUSH_LIMIT)).await;
        if let Ok(Err(cause)) = ended {
            warn!(%cause, "the last spans are lost");
        }
        drop(exporter);
    }
}

/// The SDK takes what it does not know for "always". A sampler that does not ask the parent would break each trace in the
/// middle: the spans of an event name one that was not sent.
fn check_sampler(sampler: Option<&str>, argument: Option<&str>) -> Result<(), String> {
    let is_ratio = |text: &str| text.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio));
    match sampler {
        None | Some("parentbased_always_on" | "parentbased_always_off") => Ok(()),
        Some("parentbased_traceidratio") if argument.is_some_and(is_ratio) => Ok(()),
        Some("parentbased_traceidratio") => Err("OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1".into()),
        Some(other) => Err(format!(
            "OTEL_TRACES_SAMPLER is {other:?}, and must be parentbased_always_on, parentbased_always_off or \
             parentbased_traceidratio"
        )),
    }
}

/// For logs: a URL may have a password.
fn without_credentials(endpoint: &str) -> String {
    match endpoint.split_once("://").map(|(scheme, rest)| (scheme, rest.rsplit_once('@'))) {
        Some((scheme, Some((_, host)))) => format!("{scheme}://{host}"),
        _ => endpoint.to_owned(),
    }
}

/// The exporter has a thread and a runtime of its own. On this process's, its shutdown would wait for a task that only the
/// waiting thread could run.
fn start_exporter() -> Result<(SdkTracerProvider, oneshot::Sender<()>), String> {
    let (made, wait_until_made) = mpsc::channel();
    let (end, ended) = oneshot::channel();
    let serve = move || {
        let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(cause) => return drop(made.send(Err(cause.to_string()))),
        };
        let exporter = {
            let _entered = runtime.enter();
            SpanExporter::builder().with_tonic().build()
        };
        let provider = exporter.map(build_provider).map_err(|cause| cause.to_string());
        if made.send(provider).is_ok() {
            // Its other end is dropped with the process's work.
            drop(runtime.block_on(ended));
        }
    };
    thread::Builder::new().name("traces".into()).spawn(serve).map_err(|cause| cause.to_string())?;
    let provider = wait_until_made.recv().map_err(|_| "its thread has ended".to_owned())??;
    Ok((provider, end))
}

fn build_provider(exporter: SpanExporter) -> SdkTracerProvider {
    let named = Resource::builder().build();
    let is_unnamed = named.get(&"service.name".into()).is_none_or(|name| name.as_str().starts_with("unknown_service"));
    let resource = if is_unnamed { Resource::builder().with_service_name(program_name()).build() } else { named };
    let processor = BatchSpanProcessor::builder(Exporter { exporter, warned: LogLimit::default() }).build();
    SdkTracerProvider::builder()
        .with_span_processor(processor)
        .with_sampler(Box::new(OfLinks { otherwise: Config::default().sampler }) as Box<dyn ShouldSample>)
        .with_id_generator(Ids::default())
        .with_max_links_per_span(LINKS_MAX)
        .with_resource(resource)
        .build()
}

fn program_name() -> String {
    let program = env::args().next().unwrap_or_default();
    Path::new(&program).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Says that a collector is away, which the SDK does not.
#[derive(Debug)]
struct Exporter {
    exporter: SpanExporter,
    warned: LogLimit,
}

impl opentelemetry_sdk::trace::SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let exported = self.exporter.export(batch).await;
        if let Err(cause) = &exported
            && self.warned.allows(Instant::now(), WARNING_INTERVAL)
        {
            warn!(%cause, spans, "spans are lost: the collector of traces does not take them");
        }
        exported
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// A batch has no parent, and belongs to the traces of its events. So it is sampled if one of them is.
#[derive(Debug)]
struct OfLinks {
    otherwise: Box<dyn ShouldSample>,
}

impl Clone for OfLinks {
    fn clone(&self) -> Self {
        Self { otherwise: self.otherwise.box_clone() }
    }
}

impl ShouldSample for OfLinks {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let has_parent = parent.is_some_and(|parent| parent.span().span_context().is_valid());
        if has_parent || links.is_empty() {
            return self.otherwise.should_sample(parent, trace_id, name, kind, attributes, links);
        }
        let is_sampled = links.iter().any(|link| link.span_context.is_sampled());
        let decision = if is_sampled { SamplingDecision::RecordAndSample } else { SamplingDecision::Drop };
        SamplingResult { decision, attributes: Vec::new(), trace_state: TraceState::default() }
    }
}

/// Random ids, but for spans whose id others know already.
#[derive(Debug, Default)]
struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        self.0.new_trace_id()
    }

    fn new_span_id(&self) -> SpanId {
        NEXT_ID.take().unwrap_or_else(|| self.0.new_span_id())
    }
}

/// Whether spans are sent.
pub fn is_on() -> bool {
    TRACER.get().is_some()
}

/// The context of a span of this process or another, as it travels in headers, rows and events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace(SpanContext);

impl Trace {
    /// Reads the two headers of W3C's recommendation. The second one is optional, and is left out if it is bad.
    pub fn read(traceparent: &str, tracestate: &str) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        // Later versions may have more parts.
        let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let is_known = version != "ff" && (version != "00" || parts.next().is_none());
        let lengths = [version, trace_id, span_id, flags].map(str::len);
        if !is_known || lengths != [2, 32, 16, 2] || ![version, trace_id, span_id, flags].into_iter().all(is_hex) {
            return None;
        }
        let flags = u8::from_str_radix(flags, 16).ok()?;
        let context = SpanContext::new(
            TraceId::from_hex(trace_id).ok()?,
            SpanId::from_hex(span_id).ok()?,
            TraceFlags::new(flags) & TraceFlags::SAMPLED,
            true,
            TraceState::from_str(tracestate).unwrap_or_default(),
        );
        context.is_valid().then_some(Self(context))
    }

    /// A new one whose spans are not sent.
    pub fn not_sampled() -> Self {
        let ids = RandomIdGenerator::default();
        let (trace_id, span_id) = (ids.new_trace_id(), ids.new_span_id());
        Self(SpanContext::new(trace_id, span_id, TraceFlags::NOT_SAMPLED, true, TraceState::NONE))
    }

    /// Whether its spans are sent.
    pub fn is_sampled(&self) -> bool {
        self.0.is_sampled()
    }

    /// The context of another span of the same trace, whose id follows from the `name`.
    #[must_use]
    pub fn of_span(&self, name: u64) -> Self {
        // Zero is no id.
        let span_id = SpanId::from(name.max(1));
        Self(SpanContext::new(self.0.trace_id(), span_id, self.0.trace_flags(), true, self.0.trace_state().clone()))
    }

    /// The id of the trace that a header belongs to, as logs and collectors show it.
    pub fn id_in(traceparent: &str) -> Option<String> {
        Some(Self::read(traceparent, "")?.0.trace_id().to_string())
    }
}

/// The `traceparent` header.
impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", self.0.trace_id(), self.0.span_id(), self.0.trace_flags().to_u8())
    }
}

/// A span that is about to begin.
pub struct NewSpan<'s> {
    /// What it does, and to what.
    pub name: String,
    /// Its part in a call or a message.
    pub kind: SpanKind,
    /// The span that caused it.
    pub parent: Option<&'s Trace>,
    /// Spans that it belongs to as well.
    pub links: Vec<Trace>,
    /// What is known at its begin.
    pub attributes: Vec<KeyValue>,
}

/// A span of this process, which ends when it is dropped.
pub struct Span(opentelemetry_sdk::trace::Span);

impl NewSpan<'_> {
    /// Begins it now; `None` if spans are not sent.
    pub fn begin(self) -> Option<Span> {
        self.begin_as(None, None)
    }

    /// Begins it at this time, as the span that others know by this context.
    pub fn begin_known(self, known: &Trace, at: SystemTime) -> Option<Span> {
        self.begin_as(Some(known.0.span_id()), Some(at))
    }

    fn begin_as(self, id: Option<SpanId>, at: Option<SystemTime>) -> Option<Span> {
        let tracer = TRACER.get()?;
        let links = self.links.into_iter().map(|trace| Link::new(trace.0, Vec::new(), 0)).collect();
        let mut builder =
            tracer.span_builder(self.name).with_kind(self.kind).with_links(links).with_attributes(self.attributes);
        builder.start_time = at;
        let context = Context::new();
        let context = match self.parent {
            Some(parent) => context.with_remote_span_context(parent.0.clone()),
            None => context,
        };
        NEXT_ID.set(id);
        let span = tracer.build_with_context(builder, &context);
        NEXT_ID.set(None);
        Some(Span(span))
    }
}

impl Span {
    /// Its context, for those that it causes.
    pub fn trace(&self) -> Trace {
        Trace(self.0.span_context().clone())
    }

    /// Adds an attribute.
    pub fn set(&mut self, attribute: KeyValue) {
        self.0.set_attribute(attribute);
    }

    /// Marks it as failed, with the type of its error.
    pub fn fail_as(&mut self, error_type: &'static str) {
        self.set(KeyValue::new("error.type", error_type));
        self.fail(String::new());
    }

    /// Marks it as failed.
    pub fn fail(&mut self, why: String) {
        self.0.set_status(Status::error(why));
    }

    /// Ends it at this time, and not when it is dropped.
    pub fn end_at(mut self, at: SystemTime) {
        self.0.end_with_timestamp(at);
    }
}

#[cfg(test)]
mod tests {
    use super::{Trace, check_sampler, without_credentials};

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_context_survives_the_way_through_a_header() {
        let trace = Trace::read(PARENT, "vendor=1").unwrap();
        assert_eq!((trace.to_string().as_str(), trace.0.trace_state().header().as_str()), (PARENT, "vendor=1"));
        assert!(trace.is_sampled());
        let other = trace.of_span(0x1234);
        assert_eq!(other.to_string(), "00-0af7651916cd43dd8448eb211c80319c-0000000000001234-01");
        assert_eq!(Trace::read(&PARENT.replace("-01", "-00"), "").map(|trace| trace.is_sampled()), Some(false));
        // A later version may say more.
        assert!(Trace::read(&format!("{}-more", PARENT.replacen("00", "01", 1)), "").is_some());
        // A bad second header costs no trace.
        assert_eq!(Trace::read(PARENT, "no list").map(|trace| trace.0.trace_state().header()), Some(String::new()));
    }

    #[test]
    fn what_is_no_context_is_none() {
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-xx",
            "00-zzf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-+1",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "zz-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(Trace::read(bad, ""), None, "{bad}");
        }
    }

    #[test]
    fn a_sampler_that_breaks_traces_or_means_something_else_is_refused() {
        for (sampler, argument) in [
            (None, None),
            (Some("parentbased_always_off"), None),
            (Some("parentbased_traceidratio"), Some("0.01")),
            (Some("parentbased_traceidratio"), Some("1")),
        ] {
            assert_eq!(check_sampler(sampler, argument), Ok(()));
        }
        for (sampler, argument) in [
            ("always_off", None),
            ("traceidratio", Some("0.5")),
            ("paretbased_always_on", None),
            ("parentbased_traceidratio", None),
            ("parentbased_traceidratio", Some("1%")),
            ("parentbased_traceidratio", Some("1.5")),
        ] {
            assert!(check_sampler(Some(sampler), argument).is_err(), "{sampler} {argument:?}");
        }
    }

    #[test]
    fn a_password_of_the_collector_is_not_logged() {
        assert_eq!(without_credentials("http://user:p@ss@collector:4317"), "http://collector:4317");
        assert_eq!(without_credentials("http://collector:4317"), "http://collector:4317");
    }
}
