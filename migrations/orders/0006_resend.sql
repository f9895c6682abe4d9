-- What it takes to send an order's events again. Processes of the version before run on: their orders and cancellations
-- have events with ids that nobody can derive, and say so by these columns.
--
-- Constants as defaults change no row, so this takes a moment once it has the table.
ALTER TABLE orders
    ADD COLUMN derived_ids  smallint NOT NULL DEFAULT 0,
    ADD COLUMN cancelled_at timestamptz;
COMMENT ON COLUMN orders.derived_ids IS 'Which of its events have derived ids: 1 for its creation + 2 for its cancellation. Others cannot be sent again.';
COMMENT ON COLUMN orders.cancelled_at IS 'Start of the transaction that cancelled it. NULL also if that was a version without this column.';

GRANT SELECT ON outbox, outbox_discarded, outbox_subscriptions TO order_service;
GRANT EXECUTE ON FUNCTION outbox_resend TO order_service;
