-- bench: ids that grow with time, as those of the services. Random ids would be more expensive for an index.
CREATE FUNCTION bench_uuid_v7() RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT encode(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6), 'hex')::uuid
$$;
-- bench: the same at almost no cost, where creating ids would distort the measurement: the transaction id and more
-- digits.
CREATE FUNCTION bench_id(digits text) RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT ((1000000000000000 + txid_current())::text || digits)::uuid
$$;
