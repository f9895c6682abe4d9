-- The statements that inventory-service executes for a batch of new orders, and nothing else. Keep each the same as in
-- the file that is named. A batch without cancellations locks no reservations. The parameters of the service are read
-- from a prepared row: a look-up here replaces a transfer there. Constants would not do, since PostgreSQL would plan
-- for their values.
\set n :n + 1
\set batch (:n - 1) * :clients + :client_id + 1
BEGIN;
-- outbox/src/accept.rs
WITH given AS MATERIALIZED (
    SELECT event_ids, times FROM bench_batches WHERE batch = :batch::integer
), arrived AS (
    SELECT id, max(time) AS time, max(time) > coalesce(
        (SELECT greatest(
            least(clock, now()) - make_interval(secs => 604800),
            CASE WHEN until <= now() THEN until + make_interval(secs => 3600) END)
        FROM inbox_pruned),
        now() - make_interval(secs => 604800)) AS young
    FROM given CROSS JOIN unnest(event_ids, times) AS event (id, time)
    GROUP BY id
), recorded AS (
    INSERT INTO processed_messages (message_id, processed_at)
    SELECT id, greatest(time, now()) FROM arrived WHERE young ORDER BY id
    ON CONFLICT DO NOTHING
    RETURNING message_id
)
SELECT id, id IN (SELECT message_id FROM recorded) AS fresh,
    NOT young AND (SELECT true FROM processed_messages WHERE message_id = id) IS NULL AS stale
FROM arrived;
-- inventory-service/src/lock_batch.rs
SELECT stock.sku, stock.available
FROM unnest((SELECT total_skus FROM bench_batches WHERE batch = :batch::integer)) AS wanted (sku)
JOIN stock ON stock.sku = wanted.sku
ORDER BY stock.sku
FOR NO KEY UPDATE OF stock;
-- inventory-service/src/write_batch.rs
WITH given AS MATERIALIZED (
    SELECT * FROM bench_batches WHERE batch = :batch::integer
), inserted AS (
    INSERT INTO reservations (order_id, event_id, status, rejection, cancelled_by, cancelled_at, derived_ids)
    SELECT order_id, event_id, status, rejection, cancelled_by, CASE WHEN cancelled_by IS NOT NULL THEN now() END,
        CASE WHEN cancelled_by IS NULL THEN 1 ELSE 3 END
    FROM given CROSS JOIN unnest(order_ids, event_ids, statuses, no_texts, no_ids)
        AS new (order_id, event_id, status, rejection, cancelled_by)
    ORDER BY order_id
    ON CONFLICT DO NOTHING
    RETURNING order_id
), cancelled AS (
    UPDATE reservations
    SET status = (SELECT no_texts[array_position(no_ids, order_id)] FROM given),
        cancelled_by = (SELECT no_ids[array_position(no_ids, order_id)] FROM given),
        cancelled_at = now(),
        derived_ids = derived_ids | 2
    WHERE ctid = ANY (ARRAY (
        SELECT (SELECT found.ctid FROM reservations AS found WHERE found.order_id = cancelled.order_id)
        FROM given CROSS JOIN unnest(no_ids) AS cancelled (order_id)))
    RETURNING order_id
), decided AS (
    SELECT order_id FROM inserted UNION ALL SELECT order_id FROM cancelled
), ledger AS (
    INSERT INTO stock_ledger (reference, kind, sku, delta)
    SELECT entry.*
    FROM given CROSS JOIN unnest(entry_references, entry_kinds, entry_skus, entry_deltas)
        AS entry (reference, kind, sku, delta)
    JOIN decided ON decided.order_id = entry.reference
), moved AS (
    UPDATE stock SET available = available + moved.delta
    FROM given CROSS JOIN unnest(total_skus, total_deltas) AS moved (sku, delta)
    WHERE stock.sku = moved.sku
)
SELECT ARRAY (SELECT order_id FROM inserted), (
    SELECT outbox_enqueue(array_agg(aggregate_id), array_agg(sequence), array_agg(event_id), array_agg(event_type),
        array_agg(payload), array_agg(traceparent), array_agg(tracestate))
    FROM given CROSS JOIN unnest(order_ids, sequences, answer_ids, answer_types, payloads, no_texts, no_texts)
        AS answer (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
    JOIN decided ON decided.order_id = answer.aggregate_id);
COMMIT;
