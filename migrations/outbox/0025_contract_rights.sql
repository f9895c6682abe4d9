-- A subscription is told its age limit and ended, and keeps its name and pattern. The command `subscribe` of the version
-- before fails after this, and makes nothing: its lock on the table needs the right to change every column.
REVOKE UPDATE ON outbox_subscriptions FROM outbox_relay;
GRANT UPDATE (max_age_seconds, ended_at, ended_by, reason) ON outbox_subscriptions TO outbox_relay;
