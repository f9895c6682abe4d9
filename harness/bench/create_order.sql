-- The rows of one CreateOrder the plain way: a transaction an order, a statement a table.
-- :bytes is the length of the payload that order-service writes.
\set customer random(0, 999)
\set first random(1, 500)
\set second random(501, 1000)
BEGIN;
INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
VALUES (bench_uuid_v7(), gen_random_uuid(), 'bench-' || :customer::text, 'EUR', 5450)
RETURNING order_id \gset
INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
VALUES (:order_id::uuid, 1, 'SKU-' || lpad(:first::text, 4, '0'), 1, 1250),
    (:order_id::uuid, 2, 'SKU-' || lpad(:second::text, 4, '0'), 1, 4200);
INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
VALUES (:order_id::uuid, 1, bench_uuid_v7(), 'orders.v1.OrderCreated', convert_to(repeat('x', :bytes::integer), 'UTF8'));
COMMIT;
