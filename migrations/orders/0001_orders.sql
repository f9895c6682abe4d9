CREATE TABLE orders (
    order_id      uuid        CONSTRAINT orders_pkey PRIMARY KEY,
    -- The caller's key for repeating a call. The order itself is what a repetition is compared with and answered from,
    -- so there is no second record that could disagree with it.
    request_id    uuid        CONSTRAINT orders_request_id_key UNIQUE,
    customer_id   text        COLLATE "C" NOT NULL,
    status        text        NOT NULL DEFAULT 'PENDING',
    currency_code text        NOT NULL,
    total_minor   bigint      NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT orders_status_known CHECK (status IN ('PENDING', 'CONFIRMED', 'REJECTED', 'CANCELLED')),
    CONSTRAINT orders_total_not_negative CHECK (total_minor >= 0)
);
-- Ids are UUID v7, so this is newest first within a customer, and pages continue at an id.
CREATE INDEX orders_by_customer ON orders (customer_id, order_id DESC);

CREATE TABLE order_items (
    order_id         uuid    NOT NULL CONSTRAINT order_items_order_id_fkey REFERENCES orders,
    line             integer NOT NULL,
    sku              text    COLLATE "C" NOT NULL,
    quantity         integer NOT NULL,
    unit_price_minor bigint  NOT NULL,
    CONSTRAINT order_items_pkey PRIMARY KEY (order_id, line),
    CONSTRAINT order_items_quantity_positive CHECK (quantity > 0),
    CONSTRAINT order_items_price_not_negative CHECK (unit_price_minor >= 0)
);

-- A process checks at its start that the schema is one it knows.
GRANT SELECT ON _outbox_migrations, _orders_migrations TO order_service;
GRANT SELECT ON _outbox_migrations TO outbox_relay;
GRANT SELECT, INSERT ON orders, order_items TO order_service;
GRANT INSERT ON outbox TO order_service;
GRANT SELECT, UPDATE, DELETE ON outbox TO outbox_relay;
