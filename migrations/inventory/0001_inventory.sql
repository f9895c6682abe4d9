CREATE TABLE stock (
    -- Byte order, so that the order of locks is the same in SQL and in Rust.
    sku       text   COLLATE "C" CONSTRAINT stock_pkey PRIMARY KEY,
    available bigint NOT NULL,
    CONSTRAINT stock_available_not_negative CHECK (available >= 0)
);

-- One row per movement: the sum of a SKU's movements is what is available. The key is also a second line of defence
-- behind processed_messages: an order cannot take the same SKU twice, nor a request adjust it twice.
CREATE TABLE stock_ledger (
    reference  uuid        NOT NULL,
    kind       text        NOT NULL,
    sku        text        COLLATE "C" NOT NULL CONSTRAINT stock_ledger_sku_fkey REFERENCES stock,
    delta      bigint      NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT stock_ledger_pkey PRIMARY KEY (reference, kind, sku),
    CONSTRAINT stock_ledger_kind_known CHECK (kind IN ('OPENING', 'ADJUSTMENT', 'RESERVATION')),
    CONSTRAINT stock_ledger_delta_not_zero CHECK (delta <> 0)
);
COMMENT ON COLUMN stock_ledger.reference IS 'What moved the stock: the order, the request of an adjustment, or the seed.';
COMMENT ON COLUMN stock_ledger.delta IS 'Added to what is available; below zero: taken from it.';
-- A request id is used once, whichever SKU it names.
CREATE UNIQUE INDEX stock_ledger_adjusted_once ON stock_ledger (reference) WHERE kind = 'ADJUSTMENT';

CREATE TABLE reservations (
    order_id   uuid        CONSTRAINT reservations_pkey PRIMARY KEY,
    event_id   uuid        NOT NULL,
    status     text        NOT NULL,
    rejection  text,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT reservations_status_known CHECK (status IN ('RESERVED', 'REJECTED')),
    CONSTRAINT reservations_rejection_has_reason CHECK ((status = 'REJECTED') = (rejection IS NOT NULL))
);
COMMENT ON TABLE reservations IS 'What became of each order here: all its items reserved, or none.';
COMMENT ON COLUMN reservations.event_id IS 'The event that had this effect.';
COMMENT ON COLUMN reservations.rejection IS 'Why nothing was reserved, item by item.';

-- A process checks at its start that the schema is one it knows.
GRANT SELECT ON _outbox_migrations, _inventory_migrations TO inventory_service;
GRANT SELECT, INSERT, UPDATE ON stock TO inventory_service;
GRANT SELECT, INSERT ON stock_ledger, reservations, processed_messages TO inventory_service;
