-- What inventory-service writes for a batch of 100 orders of two SKUs, by the same statements on the same tables, without
-- the service: no gRPC, no decoding, no decision.
\set n :n + 1
\set batch :client_id * 100000 + :n
BEGIN;
WITH recorded AS (
    INSERT INTO processed_messages (message_id)
    SELECT event_id FROM bench_events WHERE batch = :batch::integer ORDER BY event_id
    ON CONFLICT DO NOTHING
    RETURNING message_id
)
SELECT count(*) FROM recorded;
SELECT sku, available FROM stock
WHERE sku = ANY (ARRAY (
    SELECT unnest(ARRAY[first_sku, second_sku]) FROM bench_events WHERE batch = :batch::integer))
ORDER BY sku FOR NO KEY UPDATE;
INSERT INTO reservations (order_id, event_id, status)
SELECT order_id, event_id, 'RESERVED' FROM bench_events WHERE batch = :batch::integer ORDER BY order_id
ON CONFLICT DO NOTHING;
INSERT INTO stock_ledger (reference, kind, sku, delta)
SELECT order_id, 'RESERVATION', unnest(ARRAY[first_sku, second_sku]), -1 FROM bench_events WHERE batch = :batch::integer;
UPDATE stock SET available = available + moved.delta
FROM (
    SELECT sku, -count(*) AS delta
    FROM bench_events CROSS JOIN unnest(ARRAY[first_sku, second_sku]) AS sku
    WHERE batch = :batch::integer
    GROUP BY sku
) AS moved
WHERE stock.sku = moved.sku;
INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
SELECT order_id, 1, answer_id, 'inventory.v1.StockReserved', '\x0a24' || convert_to(order_id::text, 'UTF8')
FROM bench_events WHERE batch = :batch::integer;
COMMIT;
