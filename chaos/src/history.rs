//! What clients have asked for and been told: a line of JSON per step, in the order in which the steps were seen.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Context, Result};
use proto::orders::v1::OrderStatus;
use serde_json::json;
use uuid::Uuid;

/// How a call has ended, as far as its caller can know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Ok,
    /// Refused for good.
    Fail,
    /// No answer, an answer that leaves it open, or a caller that did not wait for it.
    Unknown,
}

/// What clients know, of all orders.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// By the request that has placed it: the orders it was answered with. More than one is a finding.
    pub(super) acknowledged: HashMap<Uuid, Vec<Uuid>>,
    /// Orders whose cancellation was acknowledged.
    pub(super) cancelled: Vec<Uuid>,
    /// Orders whose cancellation was refused, as only that of a rejected one may be.
    pub(super) refused: Vec<Uuid>,
    /// Calls that their caller did not wait for.
    pub(super) hung_up: u64,
    /// What watchers were shown as final.
    pub(super) settled: Vec<(Uuid, OrderStatus)>,
    /// Adjustments that were acknowledged, by request.
    pub(super) adjusted: Vec<Uuid>,
    /// Orders that were asked for by calls that are repeated if need be, and how many of those calls were answered.
    pub(super) asked: u64,
    pub(super) answered: u64,
    /// Orders that were acknowledged only to a call that was repeated.
    pub(super) recovered: u64,
    /// Calls by how they have ended, and by gRPC code.
    pub(super) endings: HashMap<&'static str, u64>,
    pub(super) codes: HashMap<String, u64>,
    /// Answers that are wrong by themselves.
    pub(super) violations: Vec<String>,
}

#[derive(Debug)]
pub(super) struct History {
    began: Instant,
    file: Mutex<BufWriter<File>>,
    known: Mutex<Known>,
}

impl History {
    pub(super) fn write_to(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        Ok(Self { began: Instant::now(), file: Mutex::new(BufWriter::new(file)), known: Mutex::default() })
    }

    /// One step of one call. `call` is what was called, `id` its request's, `detail` what there is to say.
    fn write(&self, client: &str, call: &str, id: Uuid, step: &str, detail: &str) {
        let at = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let line =
            json!({"us": at, "client": client, "call": call, "id": id.to_string(), "step": step, "detail": detail});
        // A history that cannot be written is missed when somebody looks for it; the checker goes by what is in memory.
        let _ = writeln!(self.file.lock().unwrap_or_else(PoisonError::into_inner), "{line}");
    }

    pub(super) fn invoke(&self, client: &str, call: &'static str, id: Uuid) {
        self.write(client, call, id, "invoke", "");
    }

    pub(super) fn end(&self, client: &str, call: &'static str, id: Uuid, ending: Ending, detail: &str) {
        let step = match ending {
            Ending::Ok => "ok",
            Ending::Fail => "fail",
            Ending::Unknown => "unknown",
        };
        *self.known().endings.entry(step).or_default() += 1;
        self.write(client, call, id, step, detail);
    }

    /// What a fault does, beside what clients see.
    pub(super) fn fault(&self, what: &str, step: &str) {
        self.write("nemesis", what, Uuid::nil(), step, "");
    }

    pub(super) fn violation(&self, what: String) {
        self.known().violations.push(what);
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn flush(&self) -> Result<()> {
        Ok(self.file.lock().unwrap_or_else(PoisonError::into_inner).flush()?)
    }
}
