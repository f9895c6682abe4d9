ALTER TABLE orders
    ADD COLUMN rejection text,
    -- As request_id is for the order: the cancellation a repeated call is compared with is the order itself.
    ADD COLUMN cancel_request_id uuid CONSTRAINT orders_cancel_request_id_key UNIQUE,
    ADD CONSTRAINT orders_rejection_has_reason CHECK ((status = 'REJECTED') = (rejection IS NOT NULL)),
    ADD CONSTRAINT orders_cancel_request_cancels CHECK (cancel_request_id IS NULL OR status = 'CANCELLED');
COMMENT ON COLUMN orders.rejection IS 'Why inventory reserved nothing, item by item.';

GRANT UPDATE ON orders TO order_service;
GRANT SELECT, INSERT, DELETE ON processed_messages TO order_service;
GRANT SELECT, INSERT, UPDATE ON inbox_pruned TO order_service;
