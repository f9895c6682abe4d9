-- Events are enqueued through one function, which knows the subscriptions.
GRANT EXECUTE ON FUNCTION outbox_enqueue TO inventory_service;
