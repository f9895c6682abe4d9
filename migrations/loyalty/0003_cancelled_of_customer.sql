-- no-transaction
-- For erasing a customer. The points that count have an index of their own, and those of cancelled orders are few.
CREATE INDEX CONCURRENTLY points_cancelled_of_customer ON points (customer_id) WHERE cancelled_by IS NOT NULL;
