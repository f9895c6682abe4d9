-- bench: fill batches
-- $1 batches of $2 new orders with two SKUs, as the arrays that inventory-service sends with its statements.
WITH arrived AS MATERIALIZED (
    SELECT 1 + number / $2::integer AS batch, bench_uuid_v7() AS event_id, bench_uuid_v7() AS order_id,
        bench_uuid_v7() AS answer_id, floor(random() * 1000)::integer AS drawn
    FROM generate_series(0, $1::integer * $2::integer - 1) AS number
), entries AS MATERIALIZED (
    SELECT batch, order_id, ('SKU-' || lpad((1 + (drawn + apart) % 1000)::text, 4, '0')) COLLATE "C" AS sku
    FROM arrived CROSS JOIN (VALUES (0), (500)) AS item (apart)
)
INSERT INTO bench_batches (batch, event_ids, times, order_ids, statuses, sequences, answer_ids, answer_types, payloads,
    entry_references, entry_kinds, entry_skus, entry_deltas, total_skus, total_deltas)
SELECT *
FROM (
    SELECT batch, array_agg(event_id ORDER BY order_id), array_agg(now()), array_agg(order_id ORDER BY order_id),
        array_agg('RESERVED'::text), array_agg(1), array_agg(answer_id ORDER BY order_id),
        array_agg('inventory.v1.StockReserved'::text),
        array_agg('\x0a24'::bytea || convert_to(order_id::text, 'UTF8') ORDER BY order_id)
    FROM arrived GROUP BY batch
) AS events JOIN (
    SELECT batch, array_agg(order_id ORDER BY order_id, sku), array_agg('RESERVATION'::text),
        array_agg(sku ORDER BY order_id, sku), array_agg(-1::bigint)
    FROM entries GROUP BY batch
) AS ledger USING (batch) JOIN (
    SELECT batch, array_agg(sku ORDER BY sku), array_agg(-orders ORDER BY sku)
    FROM (SELECT batch, sku, count(*) AS orders FROM entries GROUP BY batch, sku) AS wanted
    GROUP BY batch
) AS totals USING (batch);
