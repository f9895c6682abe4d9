-- 256 orders with items and events in one transaction: what the server could take if nothing but grouping mattered. Ids
-- and names were made before, as the service makes them, outside the server.
-- :bytes is the length of the payload that order-service writes.
\set n :n + 1
\set batch (:n - 1) * :clients + :client_id + 1
WITH given AS MATERIALIZED (
    SELECT * FROM bench_orders WHERE batch = :batch::integer
), inserted_orders AS (
    INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
    SELECT order_id, request_id, customer_id, 'EUR', 5450 FROM given
), inserted_items AS (
    INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
    SELECT order_id, line, sku, 1, price
    FROM given CROSS JOIN LATERAL (VALUES (1, first_sku, 1250), (2, second_sku, 4200)) AS item (line, sku, price)
)
INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
SELECT order_id, 1, event_id, 'orders.v1.OrderCreated', (SELECT convert_to(repeat('x', :bytes::integer), 'UTF8'))
FROM given;
