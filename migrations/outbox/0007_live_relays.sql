-- Each relay shows that it lives by an advisory lock of a session of its own: the lock dies with the session.
ALTER TABLE outbox_routes ADD COLUMN holds_lock boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN outbox_routes.holds_lock IS 'Whether the relay holds its advisory lock. If that lock is free, the relay is dead, and others free its leased rows.';
