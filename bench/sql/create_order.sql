-- The rows of one CreateOrder in the plain way: one transaction per order, one statement per table.
-- :bytes is the payload length of the events of order-service.
\set customer random(0, 999)
\set first random(1, 500)
\set second random(501, 1000)
\set order random(1000000000000000, 9999999999999999)
\set event random(1000000000000000, 9999999999999999)
\set request random(1000000000000000, 9999999999999999)
BEGIN;
INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
VALUES (bench_id(:order), (:request::text || :event::text)::uuid, 'bench-' || :customer::text, 'EUR', 5450);
INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
VALUES (bench_id(:order), 1, 'SKU-' || lpad(:first::text, 4, '0'), 1, 1250),
    (bench_id(:order), 2, 'SKU-' || lpad(:second::text, 4, '0'), 1, 4200);
INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
VALUES (bench_id(:order), 1, bench_id(:event), 'orders.v1.OrderCreated', convert_to(repeat('x', :bytes::integer), 'UTF8'));
COMMIT;
