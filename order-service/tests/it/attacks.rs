//! Callers that attack the process: each is shed, and the next caller is served meanwhile.
//!
//! Attackers write frames themselves where a client library would be too polite.

mod calls;
mod connections;
mod fairness;
mod frames;
mod victim;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

/// For whatever must happen. It is generous: the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1024 * 1024;

/// Returns once the condition holds.
async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !condition().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, holds).await.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"));
}

/// Attackers that come again whenever they are shed.
struct Attack<T> {
    _attackers: JoinSet<()>,
    shed: Arc<Mutex<Vec<T>>>,
}

impl<T: Clone + Send + 'static> Attack<T> {
    /// Each does this again and again. It tells how the attacker was shed.
    fn begin<F: Future<Output = T> + Send>(
        attackers: usize,
        attack: impl Fn() -> F + Clone + Send + Sync + 'static,
    ) -> Self {
        let shed = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        for _ in 0..attackers {
            let (attack, shed) = (attack.clone(), shed.clone());
            tasks.spawn(async move {
                loop {
                    let how = attack().await;
                    shed.lock().unwrap().push(how);
                }
            });
        }
        Self { _attackers: tasks, shed }
    }

    /// Once attackers have been shed so often, how they were.
    async fn sheds(&self, times: usize) -> Vec<T> {
        let is_shed = async || self.shed.lock().unwrap().len() >= times;
        eventually(&format!("attackers are shed {times} times"), is_shed).await;
        self.shed.lock().unwrap().clone()
    }
}
