-- 0010: durable revoke. pre-deployment, not breaking.
--
-- Who was revoked is written down when the control message is published, worker or not. A claim looks its tasks up, and flags
-- them: the worker then does what Celery does with a revoked task. No index leads from a task id to its message: one was
-- measured (docs/dead-letters.md), and every publish would pay for it.
--
-- A revoke holds for every message that was in the store when it came (ids up to `upper`), however far its eta; for
-- messages that are published later under that id, for as long as a Celery worker would remember: three hours.

CREATE TABLE kombu_pg.revoked (
    task_id text PRIMARY KEY,
    upper bigint NOT NULL,
    revoked_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
COMMENT ON COLUMN kombu_pg.revoked.upper IS 'the last message id that was drawn before: up to it, the revoke holds however late';

-- The same by what is stamped on a task. stamp is the value as JSON: only a worker can read what a message's headers say.
CREATE TABLE kombu_pg.revoked_stamp (
    header text NOT NULL,
    stamp text NOT NULL,
    upper bigint NOT NULL,
    revoked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (header, stamp)
);

CREATE FUNCTION kombu_pg.revoke(p_task_ids text[]) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO kombu_pg.revoked (task_id, upper)
    SELECT DISTINCT t.id, s.last_value FROM unnest(p_task_ids) AS t (id) CROSS JOIN kombu_pg.message_id_seq s ORDER BY t.id
    ON CONFLICT (task_id) DO UPDATE
       SET upper = greatest(excluded.upper, revoked.upper), revoked_at = excluded.revoked_at
$$;

CREATE FUNCTION kombu_pg.revoke_stamps(p_headers text[], p_stamps text[]) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO kombu_pg.revoked_stamp (header, stamp, upper)
    SELECT DISTINCT t.header, t.stamp, s.last_value
      FROM unnest(p_headers, p_stamps) AS t (header, stamp) CROSS JOIN kombu_pg.message_id_seq s ORDER BY 1, 2
    ON CONFLICT (header, stamp) DO UPDATE
       SET upper = greatest(excluded.upper, revoked_stamp.upper), revoked_at = excluded.revoked_at
$$;

-- Asked by a claim, of the tasks it has taken, where anything is revoked at all. The claim's own settings pin the plan: to set
-- them here, too, cost more than the look.
CREATE FUNCTION kombu_pg.is_revoked(p_task_id text, p_message_id bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM kombu_pg.revoked r
         WHERE r.task_id = p_task_id
           AND (r.upper >= p_message_id OR r.revoked_at > clock_timestamp() - interval '3 hours'));
END $$;

-- What was revoked once stays so under a new message id: that of a copy for a dead-letter exchange.
CREATE FUNCTION kombu_pg.keep_revoked(p_task_id text, p_old_id bigint, p_new_id bigint) RETURNS void
LANGUAGE sql AS $$
    UPDATE kombu_pg.revoked r SET upper = p_new_id WHERE r.task_id = p_task_id AND r.upper >= p_old_id AND r.upper < p_new_id
$$;

-- A revoke is forgotten when every message is gone that was there when it came; not within three hours.
CREATE FUNCTION kombu_pg.forget_revokes(p_limit integer) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    v_recently timestamptz := clock_timestamp() - interval '3 hours';
    v_oldest bigint;
    v_count integer;
    v_stamps integer;
BEGIN
    IF NOT EXISTS (SELECT FROM kombu_pg.revoked) AND NOT EXISTS (SELECT FROM kombu_pg.revoked_stamp) THEN
        RETURN 0;
    END IF;
    v_oldest := (SELECT min(m.id) FROM kombu_pg.message m);
    DELETE FROM kombu_pg.revoked r
     WHERE r.ctid = ANY (ARRAY(
        SELECT x.ctid FROM kombu_pg.revoked x
         WHERE x.revoked_at < v_recently AND (v_oldest IS NULL OR x.upper < v_oldest)
         LIMIT p_limit FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS v_count = ROW_COUNT;
    DELETE FROM kombu_pg.revoked_stamp r WHERE r.revoked_at < v_recently AND (v_oldest IS NULL OR r.upper < v_oldest);
    GET DIAGNOSTICS v_stamps = ROW_COUNT;
    RETURN v_count + v_stamps;
END $$;


-- What waits in these queues, for `inspect scheduled` and `query_task`: the scheduled ones that are due next, then those that
-- would be claimed next, at most p_limit of either. body: NULL if it is larger than p_body_limit.
CREATE FUNCTION kombu_pg.waiting_tasks(p_queues text[], p_ready boolean, p_limit integer, p_body_limit integer)
RETURNS TABLE (id bigint, due_at timestamptz, priority smallint, task text, task_id text, exchange text, routing_key text,
               returns integer, properties bytea, body bytea)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT m.id, s.due_at, m.priority, m.task, m.task_id, m.exchange, m.routing_key, m.returns, m.properties,
               CASE WHEN octet_length(m.body) <= p_body_limit THEN m.body END
          FROM kombu_pg.queue q
         CROSS JOIN LATERAL (
            SELECT x.due_at, x.message_id FROM kombu_pg.scheduled x
             WHERE x.queue_id = q.id ORDER BY x.due_at LIMIT p_limit) AS s
          JOIN kombu_pg.message m ON m.id = s.message_id
         WHERE q.name = ANY (p_queues) AND m.task IS NOT NULL
         ORDER BY s.due_at
         LIMIT p_limit;
    IF p_ready THEN
        RETURN QUERY
            SELECT m.id, NULL::timestamptz, m.priority, m.task, m.task_id, m.exchange, m.routing_key, m.returns,
                   m.properties, CASE WHEN octet_length(m.body) <= p_body_limit THEN m.body END
              FROM kombu_pg.queue q
             CROSS JOIN LATERAL (
                SELECT x.message_id FROM kombu_pg.ready x
                 WHERE x.queue_id = q.id ORDER BY x.band, x.position LIMIT p_limit) AS r
              JOIN kombu_pg.message m ON m.id = r.message_id
             WHERE q.name = ANY (p_queues) AND m.task IS NOT NULL
             LIMIT p_limit;
    END IF;
END $$;
