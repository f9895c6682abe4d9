-- An event that its sender dates ahead is young for longer than others. So its id is kept for longer.
COMMENT ON COLUMN processed_messages.processed_at IS 'Start of the transaction that applied the event, or the event''s own time if that is later. The id is kept from then on for the retention.';
