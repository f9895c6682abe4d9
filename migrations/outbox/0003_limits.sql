-- gRPC servers refuse messages of more than 4 MiB unless they are told otherwise, so a larger event could not be delivered;
-- and a relay holds a lease of hundreds in memory. It is refused where something can still be done about it: in the
-- transaction that would commit it.
ALTER TABLE outbox ADD CONSTRAINT outbox_payload_deliverable CHECK (octet_length(payload) <= 1024 * 1024);
