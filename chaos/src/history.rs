//! The history of a run: what clients asked for and were told. The file has a line of JSON for each step.

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

/// How a call ended, as its caller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Ok,
    /// Refused for good.
    Fail,
    /// Perhaps executed: no answer, an answer that does not say, or a caller that hung up.
    Unknown,
}

/// What the clients know of all orders.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// By request: the orders in its answers. More than one is a finding.
    pub(super) acknowledged: HashMap<Uuid, Vec<Uuid>>,
    /// Orders whose cancellation was acknowledged.
    pub(super) cancelled: Vec<Uuid>,
    /// Orders whose cancellation was refused. They must have been rejected.
    pub(super) refused: Vec<Uuid>,
    /// Calls whose caller hung up.
    pub(super) hung_up: u64,
    /// The final statuses that watchers saw.
    pub(super) settled: Vec<(Uuid, OrderStatus)>,
    /// Adjustments that were acknowledged, by request.
    pub(super) adjusted: Vec<Uuid>,
    /// Orders of clients that repeat a call until it is answered, and how many of these orders were acknowledged.
    pub(super) asked: u64,
    pub(super) answered: u64,
    /// Orders that only a repeated call was answered with.
    pub(super) recovered: u64,
    /// Calls by how they ended, and by gRPC code.
    pub(super) endings: HashMap<&'static str, u64>,
    pub(super) codes: HashMap<String, u64>,
    /// Answers that are wrong in themselves.
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

    /// Writes one step of a call. `id` is that of its request.
    fn write(&self, client: &str, call: &str, id: Uuid, step: &str, detail: &str) {
        let at = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let line =
            json!({"us": at, "client": client, "call": call, "id": id.to_string(), "step": step, "detail": detail});
        // The file is for people. The checker uses what is in memory, so a failed write changes no result.
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

    /// Writes a step of a fault between those of the clients.
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
