-- 0007: where a message goes that its queue does not keep. pre-deployment, not breaking.
--
-- By RabbitMQ's rules: a queue's x-dead-letter-exchange gets it, with the death noted in x-death; otherwise it is dropped.
-- Unless it is a task: somebody waits for that. It goes to the table dead_letter, and stays until it was heard of.

-- Move messages into dead_letter; the caller holds them (released from a lease, or withdrawn). p_heard: their tasks' results,
-- errbacks and chords have heard of it already.
CREATE FUNCTION kombu_pg.bury(p_ids bigint[], p_reason text, p_detail text, p_heard boolean) RETURNS void
LANGUAGE sql AS $$
    WITH gone AS (
        DELETE FROM kombu_pg.message m WHERE m.id = ANY (p_ids) RETURNING m.*
    )
    INSERT INTO kombu_pg.dead_letter (id, queue_id, queue, reason, detail, heard_at, enqueued_at, returns, priority, task, task_id,
                                      reply_to, exchange, routing_key, deaths, properties, body)
    SELECT g.id, g.queue_id, coalesce(q.name, ''), p_reason, p_detail,
           CASE WHEN p_heard OR (g.task IS NULL AND p_reason = 'rejected') THEN clock_timestamp() END, g.enqueued_at, g.returns, g.priority, g.task,
           g.task_id, g.reply_to, g.exchange, g.routing_key, g.deaths, g.properties, g.body
      FROM gone g LEFT JOIN kombu_pg.queue q ON q.id = g.queue_id
    ON CONFLICT (id) DO NOTHING
$$;

-- The x-death of a message that now dies in p_queue, the latest first: one entry per queue and reason, which tells of the
-- first time and counts the others. The one with "first" is where all began.
CREATE FUNCTION kombu_pg.add_death(p_deaths jsonb, p_queue text, p_reason text, p_exchange text, p_routing_key text)
RETURNS jsonb
LANGUAGE sql AS $$
    WITH death AS (
        SELECT d.value, d.n, d.value ->> 'queue' = p_queue AND d.value ->> 'reason' = p_reason AS same
          FROM jsonb_array_elements(p_deaths) WITH ORDINALITY AS d (value, n)
    )
    SELECT coalesce(
               (SELECT d.value || jsonb_build_object('count', (d.value ->> 'count')::bigint + 1) FROM death d WHERE d.same),
               jsonb_build_object(
                   'count', 1, 'queue', p_queue, 'reason', p_reason, 'exchange', p_exchange,
                   'routing-keys', jsonb_build_array(p_routing_key),
                   'time', floor(extract(epoch FROM clock_timestamp()))::bigint, 'first', p_deaths IS NULL))
        || coalesce((SELECT jsonb_agg(d.value ORDER BY d.n) FROM death d WHERE NOT d.same), '[]')
$$;

-- Would the message go round for ever? It has died in that queue before, and nobody has rejected it since.
CREATE FUNCTION kombu_pg.is_cycle(p_deaths jsonb, p_queue text) RETURNS boolean
LANGUAGE sql AS $$
    SELECT coalesce(bool_and(d.reason <> 'rejected'), false)
      FROM (SELECT d.value ->> 'reason' AS reason, d.n, min(d.n) FILTER (WHERE d.value ->> 'queue' = p_queue) OVER () AS last
              FROM jsonb_array_elements(p_deaths) WITH ORDINALITY AS d (value, n)) AS d
     WHERE d.n <= d.last
$$;

-- The headers by which a headers exchange may choose among dead letters.
CREATE FUNCTION kombu_pg.dead_letter_headers(p_properties bytea, p_deaths jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_text text := convert_from(p_properties, 'UTF8');
    v_headers jsonb;
    v_first jsonb := jsonb_path_query_first(p_deaths, '$[*] ? (@.first == true)');
BEGIN
    BEGIN
        v_headers := v_text::jsonb -> 'h';
    EXCEPTION WHEN data_exception THEN
        -- What jsonb cannot hold (NUL, surrogates, NaN) shall not hide the other headers.
        v_text := regexp_replace(v_text, '\\u(0000|d[89a-f]..)', '\\ufffd', 'gi');
        v_headers := regexp_replace(v_text, '(?<=[:,[])(NaN|-?Infinity)(?=[],}])', 'null', 'g')::jsonb -> 'h';
    END;
    RETURN v_headers || jsonb_build_object('x-first-death-queue', v_first -> 'queue',
        'x-first-death-reason', v_first -> 'reason', 'x-first-death-exchange', v_first -> 'exchange');
END $$;

-- Let these messages die: the caller holds them. p_reason: rejected, expired, maxlen, delivery_limit, or why a worker cannot run
-- it (for x-death that is rejected). p_detail: what a consumer says; who takes the trouble to say why wants the message kept,
-- task or not. p_heard: see bury.
-- Returns the queues to wake after the commit.
CREATE FUNCTION kombu_pg.dead_letter(p_ids bigint[], p_reason text, p_detail text, p_heard boolean DEFAULT false) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_message record;
    v_queues bigint[] := '{}';
    v_buried bigint[] := '{}';
    v_copied bigint[];
BEGIN
    FOR v_message IN
        SELECT m.id, m.task, q.dead_letter_exchange FROM kombu_pg.message m LEFT JOIN kombu_pg.queue q ON q.id = m.queue_id
         WHERE m.id = ANY (p_ids) ORDER BY m.id FOR UPDATE OF m
    LOOP
        v_copied := '{}';
        IF v_message.dead_letter_exchange IS NOT NULL THEN
            v_copied := kombu_pg.copy_dead_letter(
                v_message.id, CASE WHEN p_reason IN ('expired', 'maxlen', 'delivery_limit') THEN p_reason ELSE 'rejected' END);
            v_queues := v_queues || v_copied;
        END IF;
        IF v_copied = '{}' AND (v_message.task IS NOT NULL OR p_detail IS NOT NULL) THEN
            v_buried := v_buried || v_message.id;
        END IF;
    END LOOP;
    IF v_buried <> '{}' THEN
        PERFORM kombu_pg.bury(v_buried, p_reason, p_detail, p_heard);
    END IF;
    DELETE FROM kombu_pg.message m WHERE m.id = ANY (p_ids);
    RETURN v_queues;
END $$;

-- Publish a copy to the dead-letter exchange of the message's queue; returns the queues that got one. The copy does not
-- expire by the message's own time to live again, and its returns count from 0.
CREATE FUNCTION kombu_pg.copy_dead_letter(p_id bigint, p_reason text) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_message kombu_pg.message;
    v_queue kombu_pg.queue;
    v_key text;
    v_deaths jsonb;
    v_routed record;
    v_targets bigint[];
BEGIN
    SELECT m.* INTO v_message FROM kombu_pg.message m WHERE m.id = p_id;
    SELECT q.* INTO v_queue FROM kombu_pg.queue q WHERE q.id = v_message.queue_id;
    v_key := coalesce(v_queue.dead_letter_routing_key, v_message.routing_key);
    v_deaths := kombu_pg.add_death(v_message.deaths, v_queue.name, p_reason, v_message.exchange, v_message.routing_key);
    IF v_queue.dead_letter_exchange = '' THEN
        v_targets := ARRAY(SELECT q.id FROM kombu_pg.queue q WHERE q.name = v_key);
    ELSE
        v_routed := kombu_pg.route(v_queue.dead_letter_exchange, v_key, NULL);
        IF v_routed.headers_wanted THEN
            v_routed := kombu_pg.route(
                v_queue.dead_letter_exchange, v_key, kombu_pg.dead_letter_headers(v_message.properties, v_deaths));
        END IF;
        v_targets := v_routed.queue_ids;
    END IF;
    v_targets := ARRAY(SELECT q.id FROM kombu_pg.queue q
                        WHERE q.id = ANY (v_targets) AND NOT (p_reason <> 'rejected' AND kombu_pg.is_cycle(v_deaths, q.name)));
    WITH copy AS (
        INSERT INTO kombu_pg.message (id, queue_id, expires_at, priority, band, task, task_id, reply_to, exchange,
                                      routing_key, deaths, properties, body)
        SELECT nextval('kombu_pg.message_id_seq'), q.id,
               clock_timestamp() + make_interval(secs => q.message_ttl / 1000.0),
               v_message.priority, kombu_pg.band(q.max_priority, v_message.priority), v_message.task, v_message.task_id,
               v_message.reply_to, v_queue.dead_letter_exchange, v_key, v_deaths, v_message.properties, v_message.body
          FROM kombu_pg.queue q WHERE q.id = ANY (v_targets)
        RETURNING id, queue_id, band
    )
    INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)
    SELECT c.queue_id, c.band, c.id, c.id, octet_length(v_message.properties) + octet_length(v_message.body) FROM copy c;
    IF v_message.task_id IS NOT NULL AND EXISTS (SELECT FROM kombu_pg.revoked) THEN
        PERFORM kombu_pg.keep_revoked(v_message.task_id, p_id, s.last_value) FROM kombu_pg.message_id_seq s;
    END IF;
    RETURN v_targets || kombu_pg.drop_heads(v_targets);
END $$;


-- x-max-length, x-max-length-bytes: only publishers to queues that declare one come here. What is counted is what is
-- ready; publishers that come at once do not see each other's messages, so a queue may exceed its limit by their number.

-- The queue among these that is full and refuses a body of p_size bytes (x-overflow = reject-publish), or NULL.
CREATE FUNCTION kombu_pg.refuses_more(p_queues bigint[], p_size integer) RETURNS bigint
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_queue kombu_pg.queue;
    v_excess record;
BEGIN
    FOR v_queue IN
        SELECT q.* FROM kombu_pg.queue q
         WHERE q.id = ANY (p_queues) AND q.limited AND q.overflow LIKE 'reject-publish%' ORDER BY q.id
    LOOP
        v_excess := kombu_pg.excess(v_queue);
        IF v_excess.messages + 1 > 0 OR v_excess.bytes + p_size > 0 THEN
            RETURN v_queue.id;
        END IF;
    END LOOP;
    RETURN NULL;
END $$;

-- What was refused dies at once, where the queue says so (x-overflow = reject-publish-dlx); returns the queues to wake.
CREATE FUNCTION kombu_pg.dead_letter_refused(
    p_queue bigint, p_priority integer, p_task text, p_task_id text, p_reply_to text, p_exchange text, p_routing_key text,
    p_properties bytea, p_body bytea
) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_id bigint;
    v_woken bigint[];
BEGIN
    INSERT INTO kombu_pg.message (id, queue_id, priority, band, task, task_id, reply_to, exchange, routing_key, properties, body)
    SELECT nextval('kombu_pg.message_id_seq'), q.id, least(greatest(p_priority, 0), 255), 0, p_task, p_task_id, p_reply_to,
           p_exchange, p_routing_key, p_properties, p_body
      FROM kombu_pg.queue q
     WHERE q.id = p_queue AND q.overflow = 'reject-publish-dlx' AND q.dead_letter_exchange IS NOT NULL
    RETURNING id INTO v_id;
    IF v_id IS NULL THEN
        RETURN '{}';
    END IF;
    v_woken := kombu_pg.copy_dead_letter(v_id, 'maxlen');
    DELETE FROM kombu_pg.message m WHERE m.id = v_id;
    RETURN v_woken;
END $$;

-- By how many messages, and bytes of bodies, the queue is over its limits; negative: so much room is left; NULL: no limit.
CREATE FUNCTION kombu_pg.excess(p_queue kombu_pg.queue, OUT messages bigint, OUT bytes bigint)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
BEGIN
    IF (p_queue).max_length IS NOT NULL THEN
        SELECT count(*) - (p_queue).max_length INTO messages
          FROM (SELECT FROM kombu_pg.ready r WHERE r.queue_id = (p_queue).id LIMIT (p_queue).max_length + 1000) AS waiting;
    END IF;
    IF (p_queue).max_length_bytes IS NOT NULL THEN
        SELECT coalesce(sum(octet_length(m.body)), 0) - (p_queue).max_length_bytes INTO bytes
          FROM kombu_pg.ready r JOIN kombu_pg.message m ON m.id = r.message_id WHERE r.queue_id = (p_queue).id;
    END IF;
END $$;

-- Let the oldest messages (of the lowest priority first) die where there are too many; returns the queues to wake.
-- One of those that come at once makes up for all that is too much, the others each for one message: they do not see what he
-- drops, and together would drop too many.
CREATE FUNCTION kombu_pg.drop_heads(p_queues bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_queue kombu_pg.queue;
    v_excess record;
    v_messages bigint;
    v_bytes bigint;
    v_alone boolean;
    v_head bigint;
    v_heads bigint[];
    v_woken bigint[] := '{}';
BEGIN
    FOR v_queue IN
        SELECT q.* FROM kombu_pg.queue q
         WHERE q.id = ANY (p_queues) AND q.limited AND coalesce(q.overflow, 'drop-head') = 'drop-head' ORDER BY q.id
    LOOP
        v_alone := pg_try_advisory_xact_lock(kombu_pg.lock_key('drop', v_queue.id));
        v_excess := kombu_pg.excess(v_queue);
        v_messages := v_excess.messages;
        v_bytes := v_excess.bytes;
        v_heads := '{}';
        WHILE v_messages > 0 OR v_bytes > 0 LOOP
            DELETE FROM kombu_pg.ready r WHERE r.ctid = (
                SELECT h.row_id
                  FROM (SELECT b.band FROM generate_series(0, 3 + 3 * coalesce(v_queue.max_priority, 0)) AS b (band)
                         ORDER BY (greatest(b.band, 1) + 2) / 3 DESC, b.band) AS b
                 CROSS JOIN LATERAL (
                    SELECT x.ctid AS row_id FROM kombu_pg.ready x
                     WHERE x.queue_id = v_queue.id AND x.band = b.band::smallint
                     ORDER BY x.position LIMIT 1 FOR UPDATE SKIP LOCKED) AS h
                 LIMIT 1)
            RETURNING r.message_id INTO v_head;
            EXIT WHEN NOT FOUND;
            v_heads := v_heads || v_head;
            EXIT WHEN NOT v_alone;
            v_messages := v_messages - 1;
            v_bytes := v_bytes - coalesce((SELECT octet_length(m.body) FROM kombu_pg.message m WHERE m.id = v_head), 0);
        END LOOP;
        IF v_heads <> '{}' THEN
            v_woken := v_woken || kombu_pg.dead_letter(v_heads, 'maxlen', NULL);
        END IF;
    END LOOP;
    RETURN v_woken;
END $$;


-- What a plain consumer may say besides ack and reject ----------------------------------------------------------

-- Back into the queue, counted, but not before p_due.
CREATE FUNCTION kombu_pg.requeue_later(p_consumer bigint, p_id bigint, p_due timestamptz, p_delivery_limit integer)
RETURNS bigint[]
LANGUAGE plpgsql SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_released bigint[] := kombu_pg.release(p_consumer, ARRAY[p_id]);
    v_queues bigint[] := '{}';
BEGIN
    IF v_released <> '{}' THEN
        v_queues := kombu_pg.count_return(v_released, p_delivery_limit);
        INSERT INTO kombu_pg.scheduled (due_at, message_id, queue_id)
        SELECT p_due, m.id, m.queue_id FROM kombu_pg.message m WHERE m.id = ANY (v_released);
    END IF;
    RETURN v_queues;
END $$;

CREATE PROCEDURE kombu_pg.requeue_later_and_wake(
    p_consumer bigint, p_id bigint, p_delay double precision, p_delivery_limit integer
) LANGUAGE plpgsql AS $$
DECLARE
    -- One reading of the clock: by a later one, the message itself would be due before the time that is told.
    v_due timestamptz := clock_timestamp() + make_interval(secs => greatest(p_delay, 0));
    v_queues bigint[] := kombu_pg.requeue_later(p_consumer, p_id, v_due, p_delivery_limit);
BEGIN
    COMMIT;
    PERFORM kombu_pg.wake_clock(v_due);
    PERFORM kombu_pg.wake(v_queues);
END $$;

-- To the dead letters, with the consumer's own words.
CREATE PROCEDURE kombu_pg.dead_letter_and_wake(p_consumer bigint, p_id bigint, p_reason text, p_detail text)
LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[] := kombu_pg.dead_letter(kombu_pg.release(p_consumer, ARRAY[p_id]), p_reason, p_detail);
BEGIN
    COMMIT;
    PERFORM kombu_pg.wake(v_queues);
END $$;


-- Hearing, and what an operator does ----------------------------------------------------------------------------

CREATE VIEW kombu_pg.task_dead_letter AS
SELECT d.id, d.queue, d.task, d.task_id, d.reason, d.detail, d.enqueued_at, d.dead_at, d.heard_at, d.returns,
       octet_length(d.body) AS size
  FROM kombu_pg.dead_letter d
 WHERE d.task IS NOT NULL;

ALTER TABLE kombu_pg.dead_letter SET (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 10000
);

-- Those of the queues that have dead letters nobody has heard of.
CREATE FUNCTION kombu_pg.unheard_queues(p_queues text[]) RETURNS text[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
BEGIN
    RETURN ARRAY(
        SELECT u.queue FROM unnest(p_queues) AS u (queue)
         WHERE EXISTS (SELECT FROM kombu_pg.dead_letter d WHERE d.queue = u.queue AND d.heard_at IS NULL));
END $$;

-- Lock one that nobody has heard of, for the transaction in which its task's result, link_error and chord hear: of this
-- queue, and after p_after, so that one that cannot be heard now does not keep the others waiting.
CREATE FUNCTION kombu_pg.next_unheard(p_queue text, p_after bigint) RETURNS SETOF kombu_pg.dead_letter
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
BEGIN
    RETURN QUERY
        SELECT d.* FROM kombu_pg.dead_letter d
         WHERE d.queue = p_queue AND d.heard_at IS NULL AND d.id > p_after
         ORDER BY d.id LIMIT 1 FOR UPDATE SKIP LOCKED;
END $$;

-- p_detail: what is to be added, e.g. whom it could not be told.
CREATE FUNCTION kombu_pg.heard(p_id bigint, p_detail text) RETURNS void
LANGUAGE sql AS $$
    UPDATE kombu_pg.dead_letter d SET heard_at = clock_timestamp(), detail = nullif(concat_ws('; ', d.detail, p_detail), '')
     WHERE d.id = p_id AND d.heard_at IS NULL
$$;

-- Up to p_limit ids that match (NULL = any), and are greater than p_after.
CREATE FUNCTION kombu_pg.find_dead_letters(
    p_ids bigint[], p_queue text, p_reason text, p_task text, p_task_id text, p_after bigint, p_limit integer
) RETURNS bigint[]
LANGUAGE sql AS $$
    SELECT coalesce(array_agg(f.id), '{}')
      FROM (SELECT d.id FROM kombu_pg.dead_letter d
             WHERE d.id > p_after AND (p_ids IS NULL OR d.id = ANY (p_ids)) AND (p_queue IS NULL OR d.queue = p_queue)
               AND (p_reason IS NULL OR d.reason = p_reason) AND (p_task IS NULL OR d.task = p_task)
               AND (p_task_id IS NULL OR d.task_id = p_task_id)
             ORDER BY d.id LIMIT p_limit) AS f
$$;

-- Messages again: in p_queue, or in the queue they died in; not those whose queue is gone. They have not come back yet.
-- queues: to wake after the commit.
CREATE FUNCTION kombu_pg.redrive(p_ids bigint[], p_queue text, OUT redriven integer, OUT queues bigint[])
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off AS $$
BEGIN
    -- The DELETE gives the transaction its id before a message id is drawn: low-water marks count on that.
    WITH back AS (
        DELETE FROM kombu_pg.dead_letter d USING kombu_pg.queue q
         WHERE d.id = ANY (p_ids) AND q.name = coalesce(p_queue, d.queue)
        RETURNING d.*, q.id AS target, q.message_ttl, kombu_pg.band(q.max_priority, d.priority) AS target_band
    ), entered AS (
        INSERT INTO kombu_pg.message (id, queue_id, expires_at, priority, band, task, task_id, reply_to, exchange,
                                      routing_key, deaths, properties, body)
        SELECT nextval('kombu_pg.message_id_seq'), b.target,
               clock_timestamp() + make_interval(secs => b.message_ttl / 1000.0), b.priority, b.target_band, b.task, b.task_id,
               b.reply_to, CASE WHEN p_queue IS NULL THEN b.exchange ELSE '' END, coalesce(p_queue, b.routing_key), b.deaths,
               b.properties, b.body
          FROM (SELECT * FROM back ORDER BY back.id) AS b
        RETURNING id, queue_id, band, octet_length(properties) + octet_length(body) AS size
    ), placed AS (
        INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)
        SELECT e.queue_id, e.band, e.id, e.id, e.size FROM entered e
        RETURNING queue_id
    )
    SELECT count(*), coalesce(array_agg(DISTINCT p.queue_id), '{}') INTO redriven, queues FROM placed p;
    queues := queues || kombu_pg.drop_heads(queues);
END $$;

CREATE PROCEDURE kombu_pg.redrive_and_wake(p_ids bigint[], p_queue text, INOUT redriven integer DEFAULT NULL)
LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[];
BEGIN
    SELECT r.redriven, r.queues INTO redriven, v_queues FROM kombu_pg.redrive(p_ids, p_queue) AS r;
    COMMIT;
    PERFORM kombu_pg.wake(v_queues);
END $$;

-- Drop what was heard of longer ago than this; returns how many. What nobody has heard of stays: somebody still waits for it.
CREATE FUNCTION kombu_pg.forget_dead_letters(p_retention double precision, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    v_since timestamptz := clock_timestamp() - make_interval(secs => p_retention);
    v_count integer;
BEGIN
    DELETE FROM kombu_pg.dead_letter d WHERE d.ctid = ANY (ARRAY(
        SELECT x.ctid FROM kombu_pg.dead_letter x
         WHERE x.heard_at < v_since ORDER BY x.heard_at LIMIT p_limit FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END $$;
