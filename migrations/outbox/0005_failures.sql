-- What a relay learns of an event that fails, whether it is charged an attempt for it or not.
--
-- Relays of the version before name none of these columns, and may run on. They charge attempts as before. Constants as
-- defaults change no row, so this takes a moment once it has the table. It waits for every open transaction on the
-- outbox, and holds up those that begin after it: end long ones first, such as a dump.
ALTER TABLE outbox
    ADD COLUMN failures     integer NOT NULL DEFAULT 0,
    ADD COLUMN attempted_at timestamptz,
    ADD COLUMN charged_at   timestamptz;
COMMENT ON COLUMN outbox.attempts IS 'Failures that were charged to this event, and so count towards death. Outages of the receiver are not charged.';
COMMENT ON COLUMN outbox.failures IS 'Deliveries in which the event failed alone since it was enqueued or requeued, charged or not.';
COMMENT ON COLUMN outbox.attempted_at IS 'When it last failed alone. It is charged again only if the receiver took another event since.';
COMMENT ON COLUMN outbox.charged_at IS 'When it was last charged an attempt.';
COMMENT ON COLUMN outbox.last_error IS 'Why it last failed alone, charged or not, or what it waits for; of a dead row, why it died.';
