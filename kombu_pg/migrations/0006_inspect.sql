-- 0006: what an operator asks. pre-deployment, not breaking.
--
-- Nothing here claims a message, locks a row, or counts to the end: a count stops at p_cap + 1, which means "more".
-- Names, tasks and times are columns; headers and bodies are passed on as the bytes they are.

CREATE INDEX dead_letter_queue ON kombu_pg.dead_letter (queue, id);

-- The ids in the oldest leases; message_id NULL: acked already, the rest of its batch is not.
CREATE FUNCTION kombu_pg.held_messages(p_cap integer)
RETURNS TABLE (consumer_id bigint, claimed_at timestamptz, message_id bigint, queue_id bigint, task text)
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
BEGIN
    RETURN QUERY
        SELECT h.consumer_id, h.claimed_at, m.id, m.queue_id, m.task
          FROM (SELECT l.consumer_id, l.claimed_at, held.id
                  FROM (SELECT k.* FROM kombu_pg.lease k ORDER BY k.id) AS l
                 CROSS JOIN LATERAL unnest(l.message_ids) AS held (id)
                 LIMIT p_cap + 1) AS h
          LEFT JOIN kombu_pg.message m ON m.id = h.id;
END $$;

-- One row per queue, and one (id NULL) per name whose queue is gone but whose dead letters are not.
-- unacked_more: only the oldest p_cap claimed messages were looked at. oldest_age: seconds since the publish of the
-- oldest message that could be claimed. next_due: seconds until the earliest eta.
CREATE FUNCTION kombu_pg.inspect_queues(p_cap integer)
RETURNS TABLE (
    id bigint, name text, ready integer, unacked integer, unacked_more boolean, scheduled integer, dead integer,
    oldest_age double precision, next_due double precision, consumers integer, paused boolean,
    durable boolean, exclusive boolean, auto_delete boolean, arguments text
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH RECURSIVE held AS MATERIALIZED (
            SELECT h.queue_id FROM kombu_pg.held_messages(p_cap) AS h
        ), unacked AS MATERIALIZED (
            SELECT h.queue_id, count(*)::integer AS n FROM held h WHERE h.queue_id IS NOT NULL GROUP BY h.queue_id
        ), alive AS MATERIALIZED (
            SELECT c.id FROM kombu_pg.consumer c WHERE kombu_pg.is_alive(c)
        ), listening AS MATERIALIZED (
            SELECT s.queue_id, count(*)::integer AS n
              FROM kombu_pg.subscription s WHERE s.consumer_id IN (SELECT a.id FROM alive a) GROUP BY s.queue_id
        ), dead_name AS (
            -- Names are found by skipping through the index, not by reading it.
            (SELECT d.queue FROM kombu_pg.dead_letter d ORDER BY d.queue LIMIT 1)
            UNION ALL
            SELECT (SELECT d.queue FROM kombu_pg.dead_letter d WHERE d.queue > n.queue ORDER BY d.queue LIMIT 1)
              FROM dead_name n WHERE n.queue IS NOT NULL
        ), known AS (
            SELECT q.id, q.name, q.max_priority, q.paused, q.durable, q.exclusive, q.auto_delete, q.arguments
              FROM kombu_pg.queue q
            UNION ALL
            SELECT NULL, n.queue, NULL, NULL, NULL, NULL, NULL, NULL
              FROM dead_name n
             WHERE n.queue IS NOT NULL AND NOT EXISTS (SELECT FROM kombu_pg.queue q WHERE q.name = n.queue)
        )
        SELECT k.id, k.name,
               -- From the new end: at the old one stand the dead rows that vacuum has not removed yet.
               (SELECT count(*)::integer FROM (
                    SELECT FROM kombu_pg.ready r WHERE r.queue_id = k.id
                     ORDER BY r.band DESC, r.position DESC LIMIT p_cap + 1) AS counted),
               coalesce(u.n, 0),
               (SELECT count(*) > p_cap FROM held),
               (SELECT count(*)::integer FROM (
                    SELECT FROM kombu_pg.scheduled s WHERE s.queue_id = k.id
                     ORDER BY s.due_at DESC LIMIT p_cap + 1) AS counted),
               (SELECT count(*)::integer FROM (
                    SELECT FROM kombu_pg.dead_letter d WHERE d.queue = k.name LIMIT p_cap + 1) AS counted),
               (SELECT extract(epoch FROM clock_timestamp() - min(f.enqueued_at))::double precision
                  FROM generate_series(0, 3 + 3 * coalesce(k.max_priority, 0)) AS b (band)
                 CROSS JOIN LATERAL (
                    SELECT m.enqueued_at FROM kombu_pg.ready r JOIN kombu_pg.message m ON m.id = r.message_id
                     WHERE r.queue_id = k.id AND r.band = b.band::smallint
                     ORDER BY r.position LIMIT 1) AS f),
               (SELECT extract(epoch FROM s.due_at - clock_timestamp())::double precision
                  FROM kombu_pg.scheduled s WHERE s.queue_id = k.id ORDER BY s.due_at LIMIT 1),
               coalesce(l.n, 0), coalesce(k.paused, false),
               k.durable, k.exclusive, k.auto_delete, k.arguments
          FROM known k
          LEFT JOIN unacked u ON u.queue_id = k.id
          LEFT JOIN listening l ON l.queue_id = k.id
         ORDER BY k.name;
END $$;

-- One row per consuming process: what it consumes, how much it holds and for how long, and the longest held of that.
-- Seconds; lost_for NULL: not seen without its lock. held_more: as unacked_more.
CREATE FUNCTION kombu_pg.inspect_consumers(p_cap integer, p_longest integer)
RETURNS TABLE (
    id bigint, hostname text, pid integer, alive boolean, heartbeat boolean,
    attached_for double precision, lost_for double precision, queues text[],
    held integer, held_more boolean, held_for double precision,
    longest_ids bigint[], longest_tasks text[], longest_for double precision[]
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH held AS MATERIALIZED (
            SELECT h.*, extract(epoch FROM clock_timestamp() - h.claimed_at)::double precision AS held_for
              FROM kombu_pg.held_messages(p_cap) AS h
        ), holding AS (
            SELECT h.consumer_id, count(*)::integer AS n, max(h.held_for) AS held_for,
                   array_agg(h.message_id ORDER BY h.claimed_at, h.message_id) AS ids,
                   array_agg(h.task ORDER BY h.claimed_at, h.message_id) AS tasks,
                   array_agg(h.held_for ORDER BY h.claimed_at, h.message_id) AS ages
              FROM held h WHERE h.message_id IS NOT NULL GROUP BY h.consumer_id
        )
        SELECT c.id, c.hostname, c.pid, coalesce(kombu_pg.is_alive(c), false), c.heartbeat,
               extract(epoch FROM clock_timestamp() - c.attached_at)::double precision,
               extract(epoch FROM clock_timestamp() - c.lost_at)::double precision,
               ARRAY(SELECT DISTINCT q.name
                       FROM kombu_pg.subscription s JOIN kombu_pg.queue q ON q.id = s.queue_id
                      WHERE s.consumer_id = c.id ORDER BY q.name),
               coalesce(g.n, 0), (SELECT count(*) > p_cap FROM held), g.held_for,
               coalesce(g.ids[1:p_longest], '{}'), coalesce(g.tasks[1:p_longest], '{}'),
               coalesce(g.ages[1:p_longest], '{}')
          FROM kombu_pg.consumer c LEFT JOIN holding g ON g.consumer_id = c.id
         ORDER BY c.id;
END $$;

-- Who keeps vacuum from removing dead rows: the holder of the oldest transaction or snapshot in this database, or none.
-- everything_seen: this role may look at other roles' sessions.
CREATE FUNCTION kombu_pg.inspect_horizon(
    OUT kind text, OUT pid integer, OUT application text, OUT role text, OUT state text, OUT age double precision,
    OUT transactions bigint, OUT everything_seen boolean
)
LANGUAGE sql AS $$
    SELECT h.kind, h.pid, h.application, h.role, h.state, h.age, h.transactions,
           pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')
      FROM (SELECT) AS always
      LEFT JOIN (
        SELECT 'session' AS kind, a.pid, a.application_name AS application, a.usename::text AS role, a.state,
               extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, a.backend_start))::double precision AS age,
               greatest(age(a.backend_xid), age(a.backend_xmin))::bigint AS transactions
          FROM pg_stat_activity a
         WHERE a.pid <> pg_backend_pid() AND (a.datname = current_database() OR a.datname IS NULL)
           AND a.backend_type <> 'autovacuum worker'
        UNION ALL
        SELECT 'prepared transaction', NULL, p.gid, p.owner::text, 'prepared',
               extract(epoch FROM clock_timestamp() - p.prepared)::double precision, age(p.transaction)::bigint
          FROM pg_prepared_xacts p WHERE p.database = current_database()
        UNION ALL
        SELECT 'replication slot', s.active_pid, s.slot_name::text, NULL,
               CASE WHEN s.active THEN 'active' ELSE 'inactive' END, NULL, age(s.xmin)::bigint
          FROM pg_replication_slots s
      ) AS h ON h.transactions IS NOT NULL
     ORDER BY h.transactions DESC NULLS LAST, h.age DESC NULLS LAST
     LIMIT 1
$$;

-- The messages that would be claimed next, then those that wait for their time. Bodies are cut off after p_bytes,
-- properties (they are one text, and useless in part) left out where they are longer than a megabyte.
CREATE FUNCTION kombu_pg.inspect_messages(p_queue bigint, p_limit integer, p_bytes integer)
RETURNS TABLE (
    id bigint, returns integer, priority smallint, age double precision, due_in double precision,
    expires_in double precision, task text, task_id text, reply_to text, exchange text, routing_key text,
    properties bytea, size bigint, body bytea
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH next AS MATERIALIZED (
            SELECT w.message_id, w.due_at, w.nth
              FROM ((SELECT r.message_id, NULL::timestamptz AS due_at,
                            row_number() OVER (ORDER BY r.band, r.position) AS nth
                       FROM kombu_pg.ready r JOIN kombu_pg.message m ON m.id = r.message_id
                      WHERE r.queue_id = p_queue ORDER BY r.band, r.position LIMIT p_limit)
                    UNION ALL
                    (SELECT s.message_id, s.due_at, 2147483647 + row_number() OVER (ORDER BY s.due_at, s.message_id)
                       FROM kombu_pg.scheduled s JOIN kombu_pg.message m ON m.id = s.message_id
                      WHERE s.queue_id = p_queue ORDER BY s.due_at, s.message_id LIMIT p_limit)) AS w
             ORDER BY w.nth LIMIT p_limit
        )
        SELECT m.id, m.returns, m.priority,
               extract(epoch FROM clock_timestamp() - m.enqueued_at)::double precision,
               extract(epoch FROM n.due_at - clock_timestamp())::double precision,
               extract(epoch FROM m.expires_at - clock_timestamp())::double precision,
               m.task, m.task_id, m.reply_to, m.exchange, m.routing_key,
               CASE WHEN octet_length(m.properties) <= 1048576 THEN m.properties ELSE '' END,
               octet_length(m.properties)::bigint + octet_length(m.body), substring(m.body FROM 1 FOR p_bytes)
          FROM next n JOIN kombu_pg.message m ON m.id = n.message_id
         ORDER BY n.nth;
END $$;

-- From here on no claim takes anything from the queue, or claims do again; what is held already is not touched.
-- Who waited in vain is told after the commit (see wake).
CREATE PROCEDURE kombu_pg.pause_and_wake(p_queue bigint, p_paused boolean, INOUT changed boolean DEFAULT NULL)
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE kombu_pg.queue q SET paused = p_paused WHERE q.id = p_queue AND q.paused <> p_paused;
    changed := FOUND;
    COMMIT;
    IF NOT p_paused THEN
        PERFORM kombu_pg.wake(ARRAY[p_queue]);
    END IF;
END $$;
