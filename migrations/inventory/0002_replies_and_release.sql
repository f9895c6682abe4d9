ALTER TABLE stock_ledger
    DROP CONSTRAINT stock_ledger_kind_known,
    ADD CONSTRAINT stock_ledger_kind_known CHECK (kind IN ('OPENING', 'ADJUSTMENT', 'RESERVATION', 'RELEASE'));

ALTER TABLE reservations
    ADD COLUMN cancelled_by uuid,
    ADD COLUMN cancelled_at timestamptz,
    DROP CONSTRAINT reservations_status_known,
    ADD CONSTRAINT reservations_status_known CHECK (status IN ('RESERVED', 'REJECTED', 'RELEASED')),
    ADD CONSTRAINT reservations_cancelled_by_at CHECK ((cancelled_by IS NULL) = (cancelled_at IS NULL)),
    ADD CONSTRAINT reservations_released_by_cancellation CHECK (status <> 'RELEASED' OR cancelled_by IS NOT NULL),
    -- An order that was cancelled before anything was known of it here.
    ALTER COLUMN event_id DROP NOT NULL,
    ADD CONSTRAINT reservations_of_some_event CHECK (event_id IS NOT NULL OR cancelled_by IS NOT NULL);
COMMENT ON COLUMN reservations.event_id IS 'The event that asked for stock; NULL: none had come when the order was cancelled.';
COMMENT ON COLUMN reservations.cancelled_by IS 'The event that cancelled the order.';

GRANT UPDATE ON reservations TO inventory_service;
GRANT DELETE ON processed_messages TO inventory_service;
GRANT INSERT ON outbox TO inventory_service;
GRANT SELECT, INSERT, UPDATE ON inbox_pruned TO inventory_service;
