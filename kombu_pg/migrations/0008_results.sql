-- 0008: results of tasks and groups. pre-deployment, not breaking.
--
-- One row per task, the latest state; SUCCESS is final. What SQL can use stands in columns of its own; the result
-- itself, and what else Celery keeps with it (meta: children, and with result_extended the arguments), is encoded by
-- result_serializer, which content_type names.

CREATE TABLE kombu_pg.result (
    task_id text PRIMARY KEY,
    stored_at timestamptz NOT NULL,
    started_at timestamptz,
    date_done timestamptz,
    expires_at timestamptz,
    retries integer,
    state text NOT NULL,
    name text,
    worker text,
    queue text,
    group_id text,
    parent_id text,
    content_type text NOT NULL,
    result bytea,
    meta bytea,
    traceback text
) WITH (
    fillfactor = 90,
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);
CREATE INDEX result_expires ON kombu_pg.result (expires_at) WHERE expires_at IS NOT NULL;
-- For who looks at the latest. It grows at its end: what it adds to the CPU of store_result (about 120 us) is below the noise.
CREATE INDEX result_stored ON kombu_pg.result (stored_at);

CREATE TABLE kombu_pg.group_result (
    group_id text PRIMARY KEY,
    stored_at timestamptz NOT NULL,
    expires_at timestamptz,
    content_type text NOT NULL,
    result bytea NOT NULL
);
CREATE INDEX group_result_expires ON kombu_pg.group_result (expires_at) WHERE expires_at IS NOT NULL;

-- id, not task_id: the names that Celery's own metadata has.
CREATE VIEW kombu_pg.task_result AS
SELECT r.task_id AS id, r.name, r.state, r.date_done, r.worker, r.queue, r.retries, r.date_done - r.started_at AS runtime,
       r.started_at, r.stored_at, r.expires_at, r.group_id, r.parent_id, r.traceback
  FROM kombu_pg.result r
 WHERE r.expires_at IS NULL OR r.expires_at > clock_timestamp();


-- Who waits -----------------------------------------------------------------------------------------------------
-- A process that waits for results holds shared advisory locks, and listens on a channel for each of them: one for each
-- of its threads that has sent such a task (the sender: what their messages say in reply_to), as long as these are few, the
-- sender '' (of results that nobody is known to have asked for), and for tasks that somebody else sent, and those of further
-- threads, one of 64 that the task's id falls into. Whoever stores a result tries the two locks that concern it, and notifies
-- only where one is held.
--
-- The look is before the commit. So a result may be on its way whose transaction saw nobody wait: it has written, thus it
-- has a transaction id, and it was running when the lock was taken. Whoever waits looks again until every transaction
-- that was running then is over; from there on nothing is missed.

CREATE FUNCTION kombu_pg.sender_key(reply_to text) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT hashtextextended('kombu_pg.sender/' || reply_to, 0) $$;

-- bucket: see bucket(); celery_pg/store/results.py computes the same.
CREATE FUNCTION kombu_pg.stranger_key(bucket integer) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT hashtextextended('kombu_pg.stranger/' || bucket::text, 0) $$;

CREATE FUNCTION kombu_pg.bucket(task_id text) RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT (ascii(right(task_id, 1)) + 31 * ascii(right(task_id, 2))) & 63 $$;

-- Whoever is in the database may listen and notify, and may see the keys in pg_locks. What only those know who may read
-- this table, as they may read the results, keeps the channels to them.
CREATE TABLE kombu_pg.result_secret (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    secret uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO kombu_pg.result_secret DEFAULT VALUES;

-- A name of at most 63 bytes, however long the schema's is; the key tells schemas apart. Where somebody has emptied the table,
-- results still arrive.
CREATE FUNCTION kombu_pg.result_channel(key bigint, secret uuid) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT 'celery.result.' || md5(coalesce(secret::text, '') || '/' || key::text) $$;

-- Notify who waits for this result. The payload is the task's id, if it can be one, or else "" (look at everything); for
-- the process that has sent the task the result itself, if it is final and small (see `told` in celery_pg/store/results.py).
-- The locks are tried like is_held() does, in place: each call would cost as much as the try.
CREATE FUNCTION kombu_pg.tell_waiting(
    p_reply_to text, p_task_id text, p_state text, p_done timestamptz, p_content_type text, p_result bytea, p_meta bytea,
    p_traceback text, p_group_id text, p_parent_id text
) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_sender bigint := kombu_pg.sender_key(coalesce(p_reply_to, ''));
    v_stranger bigint := kombu_pg.stranger_key(kombu_pg.bucket(p_task_id));
    v_secret uuid;
    v_task text;
    v_payload text;
BEGIN
    -- A try that another one's try made fail is repeated: two in the same moments are not likely twice.
    IF (CASE WHEN pg_try_advisory_lock(v_sender) THEN pg_advisory_unlock(v_sender) ELSE false END)
       OR (CASE WHEN pg_try_advisory_lock(v_sender) THEN pg_advisory_unlock(v_sender) ELSE false END) THEN
        v_sender := NULL;
    END IF;
    IF (CASE WHEN pg_try_advisory_lock(v_stranger) THEN pg_advisory_unlock(v_stranger) ELSE false END)
       OR (CASE WHEN pg_try_advisory_lock(v_stranger) THEN pg_advisory_unlock(v_stranger) ELSE false END) THEN
        v_stranger := NULL;
    END IF;
    IF v_sender IS NULL AND v_stranger IS NULL THEN
        RETURN;
    END IF;
    IF pg_notification_queue_usage() > 0.8 THEN
        RAISE WARNING 'kombu_pg: the notification queue is over 80 %% full: whoever waits for a result is not told, it will poll'
            USING HINT = 'a session that has executed LISTEN is not reading its notifications';
        RETURN;
    END IF;
    v_task := CASE WHEN octet_length(p_task_id) < 8000 AND NOT starts_with(p_task_id, chr(30)) THEN p_task_id ELSE '' END;
    SELECT s.secret INTO v_secret FROM kombu_pg.result_secret s;
    IF v_sender IS NOT NULL THEN
        -- Only on a channel that is one process's: the others go to processes that do not wait, and may not read.
        IF p_reply_to <> '' AND p_done IS NOT NULL AND p_traceback IS NULL
           AND octet_length(p_result) + coalesce(octet_length(p_meta), 0) < 3000 THEN
            v_payload := chr(30) || json_build_array(
                p_task_id, p_state, (extract(epoch FROM p_done) * 1000000)::bigint, p_content_type, encode(p_result, 'hex'),
                encode(p_meta, 'hex'), p_group_id, p_parent_id)::text;
        END IF;
        PERFORM pg_notify(kombu_pg.result_channel(v_sender, v_secret),
                          CASE WHEN octet_length(v_payload) < 8000 THEN v_payload ELSE v_task END);
    END IF;
    IF v_stranger IS NOT NULL THEN
        PERFORM pg_notify(kombu_pg.result_channel(v_stranger, v_secret), v_task);
    END IF;
END $$;

-- Listen, and return the keys of the locks: first the senders', then the strangers', each in the order given. To be
-- committed before the locks are taken.
CREATE FUNCTION kombu_pg.listen_for_results(p_senders text[], p_buckets integer[]) RETURNS bigint[]
LANGUAGE plpgsql AS $$
DECLARE
    v_keys bigint[] := ARRAY(SELECT kombu_pg.sender_key(s.id) FROM unnest(p_senders) WITH ORDINALITY AS s (id, n) ORDER BY s.n)
                    || ARRAY(SELECT kombu_pg.stranger_key(b.id) FROM unnest(p_buckets) WITH ORDINALITY AS b (id, n) ORDER BY b.n);
    v_key bigint;
    v_secret uuid := (SELECT s.secret FROM kombu_pg.result_secret s);
BEGIN
    FOREACH v_key IN ARRAY v_keys LOOP
        EXECUTE format('LISTEN %I', kombu_pg.result_channel(v_key, v_secret));
    END LOOP;
    RETURN v_keys;
END $$;

-- The counterpart: listen no more. The locks are released before.
CREATE FUNCTION kombu_pg.stop_listening(p_keys bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_key bigint;
    v_secret uuid := (SELECT s.secret FROM kombu_pg.result_secret s);
BEGIN
    FOREACH v_key IN ARRAY p_keys LOOP
        EXECUTE format('UNLISTEN %I', kombu_pg.result_channel(v_key, v_secret));
    END LOOP;
END $$;


-- Results -------------------------------------------------------------------------------------------------------
-- Store a state, and tell who waits for it. False: the task has succeeded before, and nothing was changed.
-- p_ready: the state is a final one. p_expires: seconds, NULL = never. In the caller's transaction.
CREATE FUNCTION kombu_pg.store_result(
    p_task_id text, p_state text, p_ready boolean, p_expires double precision, p_content_type text, p_result bytea,
    p_meta bytea, p_traceback text, p_name text, p_worker text, p_queue text, p_retries integer, p_group_id text,
    p_parent_id text, p_reply_to text
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    INSERT INTO kombu_pg.result AS r (task_id, stored_at, started_at, date_done, expires_at, retries, state, name, worker,
                                      queue, group_id, parent_id, content_type, result, meta, traceback)
    VALUES (p_task_id, v_now, CASE WHEN p_state = 'STARTED' THEN v_now END, CASE WHEN p_ready THEN v_now END,
            v_now + make_interval(secs => p_expires), p_retries, p_state, p_name, p_worker, p_queue, p_group_id, p_parent_id,
            p_content_type, p_result, p_meta, p_traceback)
    ON CONFLICT (task_id) DO UPDATE
       SET stored_at = excluded.stored_at, date_done = excluded.date_done, expires_at = excluded.expires_at,
           started_at = coalesce(excluded.started_at, r.started_at), retries = coalesce(excluded.retries, r.retries),
           state = excluded.state, name = coalesce(excluded.name, r.name), worker = coalesce(excluded.worker, r.worker),
           queue = coalesce(excluded.queue, r.queue), group_id = excluded.group_id, parent_id = excluded.parent_id,
           content_type = excluded.content_type, result = excluded.result, meta = excluded.meta,
           traceback = excluded.traceback
     WHERE r.state <> 'SUCCESS' OR r.expires_at <= v_now;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    RETURN kombu_pg.tell_waiting(p_reply_to, p_task_id, p_state, CASE WHEN p_ready THEN v_now END, p_content_type, p_result, p_meta,
                                 p_traceback, p_group_id, p_parent_id) IS NOT NULL;
END $$;

-- Release the locks with these keys, then read.
CREATE FUNCTION kombu_pg.get_results(p_task_ids text[], p_release bigint[] DEFAULT '{}') RETURNS TABLE (
    task_id text, state text, date_done timestamptz, content_type text, result bytea, meta bytea, traceback text,
    group_id text, parent_id text
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_key bigint;
    v_done boolean;
BEGIN
    FOREACH v_key IN ARRAY p_release LOOP
        v_done := pg_advisory_unlock_shared(v_key);
    END LOOP;
    RETURN QUERY SELECT r.task_id, r.state, r.date_done, r.content_type, r.result, r.meta, r.traceback, r.group_id,
                        r.parent_id
      FROM kombu_pg.result r
     WHERE r.task_id = ANY (p_task_ids) AND (r.expires_at IS NULL OR r.expires_at > clock_timestamp());
END $$;

-- Take the locks, then read. While a transaction runs that may have stored one of these without telling, a last row with
-- nothing but the horizon says so: every such transaction has an id below it. (At read committed: each statement here
-- has a snapshot of its own.)
-- The horizon is the next transaction id that the server will give out, not the snapshot's xmax: that one is the newest
-- *ended* transaction's plus 1, and what runs on a quiet server is at or above it. age() is what tells the next id without
-- taking one (xid_age(): ReadNextTransactionId); it must not be asked before the locks are held, for it answers once per
-- transaction.
CREATE FUNCTION kombu_pg.look_for_results(p_task_ids text[], p_horizon text, p_keys bigint[]) RETURNS TABLE (
    task_id text, state text, date_done timestamptz, content_type text, result bytea, meta bytea, traceback text,
    group_id text, parent_id text, horizon text
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_key bigint;
    v_done boolean;
    v_ended xid8;
    v_horizon xid8 := p_horizon::xid8;
    v_unsettled boolean;
BEGIN
    FOREACH v_key IN ARRAY p_keys LOOP
        v_done := pg_advisory_lock_shared(v_key) IS NULL;
    END LOOP;
    IF p_keys <> '{}' THEN
        v_ended := pg_snapshot_xmax(pg_current_snapshot());
        v_horizon := (v_ended::text::bigint + age(v_ended::xid))::text::xid8;
    END IF;
    -- Before the rows are read: what is over now is seen below.
    v_unsettled := pg_snapshot_xmin(pg_current_snapshot()) < v_horizon;
    RETURN QUERY SELECT r.task_id, r.state, r.date_done, r.content_type, r.result, r.meta, r.traceback, r.group_id,
                        r.parent_id, NULL::text
      FROM kombu_pg.result r
     WHERE r.task_id = ANY (p_task_ids) AND (r.expires_at IS NULL OR r.expires_at > clock_timestamp());
    IF v_unsettled THEN
        RETURN QUERY SELECT NULL::text, NULL::text, NULL::timestamptz, NULL::text, NULL::bytea, NULL::bytea, NULL::text,
                            NULL::text, NULL::text, v_horizon::text;
    END IF;
END $$;

CREATE FUNCTION kombu_pg.save_group(p_group_id text, p_expires double precision, p_content_type text, p_result bytea)
RETURNS void LANGUAGE sql AS $$
    INSERT INTO kombu_pg.group_result (group_id, stored_at, expires_at, content_type, result)
    VALUES (p_group_id, clock_timestamp(), clock_timestamp() + make_interval(secs => p_expires), p_content_type, p_result)
    ON CONFLICT (group_id) DO UPDATE SET stored_at = excluded.stored_at, expires_at = excluded.expires_at,
                                         content_type = excluded.content_type, result = excluded.result
$$;

-- Delete up to p_limit results, and as many groups, that have expired; returns how many.
CREATE FUNCTION kombu_pg.expire_results(p_limit integer) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    -- A variable: the clock itself is volatile, so no index could be searched for it.
    v_now timestamptz := clock_timestamp();
    v_count integer;
    v_groups integer;
BEGIN
    DELETE FROM kombu_pg.result r WHERE r.ctid = ANY (ARRAY(
        SELECT x.ctid FROM kombu_pg.result x WHERE x.expires_at <= v_now
         ORDER BY x.expires_at LIMIT p_limit FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS v_count = ROW_COUNT;
    DELETE FROM kombu_pg.group_result g WHERE g.ctid = ANY (ARRAY(
        SELECT x.ctid FROM kombu_pg.group_result x WHERE x.expires_at <= v_now
         ORDER BY x.expires_at LIMIT p_limit FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS v_groups = ROW_COUNT;
    RETURN v_count + v_groups;
END $$;
