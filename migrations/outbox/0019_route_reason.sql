-- Why a route is not open, for operators: so far only the log of one relay said it. Relays of the version before leave it as
-- it is.
ALTER TABLE outbox_routes ADD COLUMN reason text NOT NULL DEFAULT '';
COMMENT ON COLUMN outbox_routes.reason IS 'Why the route is not OPEN, in the words of whoever said so; empty if it is.';
