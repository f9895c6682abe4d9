-- What it takes to send inventory's answers again. Processes of the version before run on: their answers have ids that
-- nobody can derive, and this column says so.
--
-- A constant as default changes no row, so this takes a moment once it has the table.
ALTER TABLE reservations ADD COLUMN derived_ids smallint NOT NULL DEFAULT 0;
COMMENT ON COLUMN reservations.derived_ids IS 'Which of its answers have derived ids: 1 for the first + 2 for the release. Others cannot be sent again.';

GRANT SELECT ON outbox, outbox_discarded, outbox_subscriptions TO inventory_service;
GRANT EXECUTE ON FUNCTION outbox_resend TO inventory_service;
