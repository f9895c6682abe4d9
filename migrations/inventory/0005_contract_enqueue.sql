-- It is the only way in. A service of the version before can no longer apply events, and says so.
REVOKE INSERT ON outbox FROM inventory_service;
