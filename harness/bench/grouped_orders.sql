-- 256 orders with items and events in one transaction: what the server could take if nothing but grouping mattered.
-- :bytes is the length of the payload that order-service writes.
WITH placed AS MATERIALIZED (
    SELECT bench_uuid_v7() AS order_id, number FROM generate_series(1, 256) AS number
), inserted_orders AS (
    INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
    SELECT order_id, gen_random_uuid(), 'bench-' || number, 'EUR', 5450 FROM placed
), inserted_items AS (
    INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
    SELECT order_id, line, 'SKU-' || lpad((number + 500 * (line - 1))::text, 4, '0'), 1, price
    FROM placed CROSS JOIN (VALUES (1, 1250), (2, 4200)) AS item (line, price)
)
INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
SELECT order_id, 1, bench_uuid_v7(), 'orders.v1.OrderCreated', convert_to(repeat('x', :bytes::integer), 'UTF8') FROM placed;
