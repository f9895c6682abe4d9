-- It is the only way in. A service of the version before can no longer place orders, and says so.
REVOKE INSERT ON outbox FROM order_service;
