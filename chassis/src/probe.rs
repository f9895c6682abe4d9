//! Asks whether the database can be written to.

use std::time::Duration;

use sqlx::{PgConnection, Row};
use tokio::time::{Instant, timeout_at};

use crate::{sessions::Sessions, standby::Standby};

/// Asks over a session of its own.
///
/// If no session is free, the database is not down. If a load balancer took the one for the other, it would make an
/// outage of an overload.
pub(crate) struct Probe {
    sessions: Sessions,
    standby: Standby,
    limit: Duration,
    session: Option<PgConnection>,
}

impl Probe {
    pub(crate) fn new(sessions: Sessions, standby: Standby) -> Self {
        let limit = sessions.url.connect_limit();
        Self { sessions, standby, limit, session: None }
    }

    /// Whether a transaction that writes can commit. The error says why not.
    pub(crate) async fn can_write(&mut self) -> Result<(), String> {
        let until = Instant::now() + self.limit;
        if let Some(why) = self.standby.why_not() {
            return Err(why.into());
        }
        if let Some(session) = self.session.take() {
            if self.write(session, until).await.is_ok() {
                return Ok(());
            }
            // The others were opened no later, at the same server.
            self.sessions.renew();
        }
        // A session may be broken, or able to read only, when a new one can write.
        let opened = timeout_at(until, self.sessions.url.connect()).await;
        let session = opened.map_err(|_| self.no_answer())?.map_err(|cause| cause.to_string())?;
        self.write(session, until).await
    }

    /// Keeps the session if it has written.
    async fn write(&mut self, mut session: PgConnection, until: Instant) -> Result<(), String> {
        match timeout_at(until, write(&mut session)).await {
            Ok(Ok(true)) => {
                self.session = Some(session);
                Ok(())
            }
            Ok(Ok(false)) => Err("the server can only read".into()),
            Ok(Err(cause)) => Err(cause.to_string()),
            Err(_) => {
                // Perhaps its commit waits. There is never more than one such probe.
                self.standby.keep(session);
                Err(self.no_answer())
            }
        }
    }

    fn no_answer(&self) -> String {
        format!("no answer within {:?}", self.limit)
    }
}

/// Writes to the log only, and waits for whatever a commit waits for. False if the session can only read.
async fn write(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let write = "-- chassis: check that it can write
        SELECT CASE current_setting('transaction_read_only') WHEN 'off'
            THEN pg_logical_emit_message(true, 'outbox.health', '') IS NOT NULL ELSE false END";
    sqlx::raw_sql(write).fetch_one(connection).await?.try_get(0)
}
