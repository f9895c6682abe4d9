-- When a customer was erased, by whom and why. Services of the version before run on, but for events that were made of an
-- erased order: they refuse these.
--
-- Only the owner erases: what serves callers has no right to, and none to change the record.
CREATE TABLE points_erasures (
    erasure_id  bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT points_erasures_pkey PRIMARY KEY,
    begun_at    timestamptz NOT NULL DEFAULT now(),
    done_by     text        NOT NULL,
    reason      text        NOT NULL,
    orders      bigint      NOT NULL DEFAULT 0,
    finished_at timestamptz
);
COMMENT ON TABLE points_erasures IS 'Each run of erase-customer. It does not name the customer.';
COMMENT ON COLUMN points_erasures.orders IS 'Orders from whose points the customer was erased.';
COMMENT ON COLUMN points_erasures.finished_at IS 'When nothing of the customer was left. NULL: it was stopped.';
