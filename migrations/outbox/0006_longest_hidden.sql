-- How long each relay hides rows at most, so that rows which a wrong clock has hidden can be told from these. Relays of an
-- earlier version do not tell, so for them it is the longest that any setting allows: a back-off of a day.
ALTER TABLE outbox_routes ADD COLUMN hidden_seconds_max integer NOT NULL DEFAULT 86400;
COMMENT ON COLUMN outbox_routes.hidden_seconds_max IS 'Longest time for which this relay hides a row, by a lease or a back-off. A row hidden for far longer was hidden by a wrong clock.';
