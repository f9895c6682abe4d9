-- A plain name for the attempts that no longer count. Relays name this column in their statements, so replace every relay
-- by its new version after this migration. Until then an older relay still leases events and deletes handled ones, but
-- cannot settle one that failed. Such an event is delivered again when its lease expires, so none is lost.
ALTER TABLE outbox RENAME COLUMN pardoned TO attempts_before_requeue;
COMMENT ON COLUMN outbox.attempts_before_requeue IS 'Attempts at the time of the last requeue. They stay on record, and do not count towards death.';
