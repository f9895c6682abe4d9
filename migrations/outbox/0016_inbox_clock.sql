-- A server's clock may jump ahead, and be set back. The inbox measures the age of events by a clock of its own, which
-- follows the server's slowly. Services of the version before run on beside this, and leave the column as it is.
ALTER TABLE inbox_pruned ADD COLUMN clock timestamptz NOT NULL DEFAULT now();
COMMENT ON TABLE inbox_pruned IS 'How far the inbox has forgotten, and the clock by which it forgets.';
COMMENT ON COLUMN inbox_pruned.until IS 'Events up to this time may be forgotten: they stay refused as stale when the retention is made longer.';
COMMENT ON COLUMN inbox_pruned.clock IS 'The inbox''s clock: at most twice as fast as time passes. Where it is ahead of the server''s, that one counts.';
