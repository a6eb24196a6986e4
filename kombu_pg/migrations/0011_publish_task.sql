-- 0011: publishing in the user's own transaction, from Python and from SQL. pre-deployment, not breaking.

-- In a transaction that is not ours ---------------------------------------------------------------------------------
-- Whatever driver the user has, whatever the encoding of the session: text that is not ASCII comes as JSON in bytes, and the
-- answer is ASCII. Nothing is raised for what the publisher did wrong: that would cost the user the transaction.

-- Queues into which somebody's commit has put messages, and nobody was told: whoever commits is not ours. A round of
-- housekeeping tells. Not logged: after a crash of the server everybody looks anyway.
CREATE UNLOGGED TABLE kombu_pg.unannounced (queue_id bigint NOT NULL) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0
);

CREATE FUNCTION kombu_pg.take_unannounced(p_limit integer) RETURNS bigint[]
LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[];
BEGIN
    -- Most rounds find nothing, and need no id for their transaction then.
    IF NOT EXISTS (SELECT FROM kombu_pg.unannounced) THEN
        RETURN '{}';
    END IF;
    WITH taken AS (
        DELETE FROM kombu_pg.unannounced u
         WHERE u.ctid = ANY (ARRAY(SELECT x.ctid FROM kombu_pg.unannounced x LIMIT p_limit))
        RETURNING u.queue_id
    )
    SELECT coalesce(array_agg(DISTINCT t.queue_id), '{}') INTO v_queues FROM taken t;
    RETURN v_queues;
END $$;

-- enqueue, for such a transaction; "unannounced": nobody will run wake after the commit. Above READ COMMITTED its snapshot may be older than a queue that was declared since,
-- and what it reads may cost the user a serialization failure: refusal is 'resolve' then, and the publisher asks
-- `resolve` in a transaction of its own and comes back with "queues", for which nothing is read here.
-- Answers the queues' ids ('1,2'), or x and the hexadecimal digits of JSON.
CREATE FUNCTION kombu_pg.enqueue_borrowed(
    p_unannounced boolean, p_exchange text, p_routing_key text, p_priority integer, p_ttl bigint, p_due timestamptz,
    p_task text, p_task_id text, p_reply_to text, p_properties bytea, p_body bytea, p_mandatory boolean, p_headers jsonb
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    v_queue bigint;
    v_enqueued record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RETURN kombu_pg.answer('{}', 'resolve', NULL);
    END IF;
    IF p_exchange = '' AND p_due IS NULL THEN
        v_queue := kombu_pg.enqueue_plainly(p_routing_key, p_priority, p_ttl, p_task, p_task_id, p_reply_to, p_properties, p_body, NULL);
        IF v_queue IS NOT NULL THEN
            IF p_unannounced THEN
                INSERT INTO kombu_pg.unannounced VALUES (v_queue);
            END IF;
            RETURN v_queue::text;
        END IF;
    END IF;
    v_enqueued := kombu_pg.enqueue(p_exchange, p_routing_key, p_priority, p_ttl, p_due, p_task, p_task_id, p_reply_to,
                                   p_properties, p_body, NULL, NULL, p_mandatory, p_headers);
    IF v_enqueued.refusal IS NOT NULL OR v_enqueued.due IS NOT NULL THEN
        -- (What is not yet due, the rounds find by themselves.)
        RETURN kombu_pg.answer(v_enqueued.queue_ids, v_enqueued.refusal, v_enqueued.due);
    ELSIF p_unannounced THEN
        INSERT INTO kombu_pg.unannounced SELECT unnest(v_enqueued.queue_ids);
    END IF;
    RETURN array_to_string(v_enqueued.queue_ids, ',');
END $$;

CREATE FUNCTION kombu_pg.answer(p_queue_ids bigint[], p_refusal text, p_due timestamptz) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT 'x' || encode(convert_to(json_build_object(
        'queue_ids', p_queue_ids, 'refusal', p_refusal, 'due', extract(epoch FROM p_due))::text, 'UTF8'), 'hex')
$$;

-- The same for what is not ASCII, and for what has been resolved.
CREATE FUNCTION kombu_pg.enqueue_encoded(p_message bytea, p_properties bytea, p_body bytea) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m jsonb := convert_from(p_message, 'UTF8')::jsonb;
    v_enqueued record;
BEGIN
    IF NOT m ? 'queues' THEN
        RETURN kombu_pg.enqueue_borrowed(
            (m ->> 'unannounced')::boolean, m ->> 'exchange', m ->> 'routing_key', (m ->> 'priority')::integer,
            (m ->> 'ttl')::bigint, (m ->> 'due')::timestamptz, m ->> 'task', m ->> 'task_id', m ->> 'reply_to',
            p_properties, p_body, (m ->> 'mandatory')::boolean, (m ->> 'headers')::jsonb);
    END IF;
    v_enqueued := kombu_pg.enqueue_resolved(m, p_properties, p_body);
    IF (m ->> 'unannounced')::boolean AND v_enqueued.due IS NULL THEN
        INSERT INTO kombu_pg.unannounced SELECT unnest(v_enqueued.queue_ids);
    END IF;
    RETURN kombu_pg.answer(v_enqueued.queue_ids, NULL, v_enqueued.due);
END $$;

-- Which queues get the message, for enqueue_resolved: [[id, fresh band, milliseconds to live or null], ...]; refusals as
-- in enqueue. A queue with a limit is compared with what is committed, and where it is over its limit, the next publish
-- at READ COMMITTED drops its heads: deleting what others delete, too, would be a serialization failure.
CREATE FUNCTION kombu_pg.resolve(
    p_exchange text, p_routing_key text, p_priority integer, p_ttl bigint, p_task text, p_size integer,
    p_mandatory boolean, p_headers jsonb, OUT queues jsonb, OUT refusal text
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_ids bigint[];
    v_routed record;
    v_full bigint;
BEGIN
    queues := '[]';
    IF p_exchange = '' THEN
        v_ids := ARRAY(SELECT q.id FROM kombu_pg.queue q WHERE q.name = p_routing_key);
    ELSE
        v_routed := kombu_pg.route(p_exchange, p_routing_key, p_headers);
        v_ids := v_routed.queue_ids;
        IF v_routed.headers_wanted THEN
            refusal := 'headers';
            RETURN;
        END IF;
    END IF;
    v_full := kombu_pg.refuses_more(v_ids, p_size);
    IF v_full IS NOT NULL THEN
        refusal := 'full: ' || (SELECT q.name FROM kombu_pg.queue q WHERE q.id = v_full);
    ELSIF v_ids <> '{}' THEN
        SELECT coalesce(jsonb_agg(jsonb_build_array(
                   q.id, kombu_pg.band(q.max_priority, p_priority),
                   least(q.message_ttl, CASE WHEN p_task IS NULL THEN p_ttl END))), '[]')
          INTO queues FROM kombu_pg.queue q WHERE q.id = ANY (v_ids);
    ELSIF p_exchange <> '' AND NOT EXISTS (SELECT FROM kombu_pg.exchange e WHERE e.name = p_exchange) THEN
        refusal := 'no exchange';
    ELSIF p_task IS NOT NULL AND NOT p_mandatory AND (p_exchange = '' OR EXISTS (
            SELECT FROM kombu_pg.exchange e WHERE e.name = p_exchange AND e.type = 'direct')) THEN
        refusal := 'no queue';
    END IF;
END $$;

-- One copy for each of the message's "queues", which is all it needs to know of them. One that was deleted meanwhile
-- takes its copy along, as it does when it is deleted after the publish: the sweep removes what has no queue.
CREATE FUNCTION kombu_pg.enqueue_resolved(
    m jsonb, p_properties bytea, p_body bytea, OUT queue_ids bigint[], OUT refusal text, OUT due timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    -- Before the message id is drawn: see enqueue.
    v_xid xid8 := pg_current_xact_id();
    v_queue jsonb;
    v_id bigint;
BEGIN
    due := CASE WHEN (m ->> 'due')::timestamptz > clock_timestamp() THEN (m ->> 'due')::timestamptz END;
    FOR v_queue IN SELECT q.value FROM jsonb_array_elements(m -> 'queues') AS q LOOP
        INSERT INTO kombu_pg.message (id, queue_id, expires_at, priority, band, task, task_id, reply_to, exchange,
                                      routing_key, properties, body)
        VALUES (nextval('kombu_pg.message_id_seq'), (v_queue ->> 0)::bigint,
                coalesce(due, clock_timestamp()) + (v_queue ->> 2)::bigint * interval '1 ms',
                least(greatest((m ->> 'priority')::integer, 0), 255), (v_queue ->> 1)::smallint,
                m ->> 'task', m ->> 'task_id', m ->> 'reply_to', m ->> 'exchange', m ->> 'routing_key',
                p_properties, p_body)
        RETURNING id INTO v_id;
        IF due IS NULL THEN
            INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)
            VALUES ((v_queue ->> 0)::bigint, (v_queue ->> 1)::smallint, v_id, v_id,
                    octet_length(p_properties) + octet_length(p_body));
        ELSE
            INSERT INTO kombu_pg.scheduled (due_at, message_id, queue_id)
            VALUES (due, v_id, (v_queue ->> 0)::bigint);
        END IF;
        queue_ids := queue_ids || (v_queue ->> 0)::bigint;
    END LOOP;
END $$;


-- From SQL ----------------------------------------------------------------------------------------------------------
-- What Celery shows of a value in Python's words, three levels deep. For people only (argsrepr, kwargsrepr).
CREATE FUNCTION kombu_pg.python_repr(p_value jsonb, p_levels integer) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    CASE jsonb_typeof(p_value)
        WHEN 'array' THEN
            IF p_levels = 0 THEN
                RETURN '[...]';
            END IF;
            RETURN '[' || coalesce((SELECT string_agg(kombu_pg.python_repr(e.value, p_levels - 1), ', ' ORDER BY e.n)
                                      FROM jsonb_array_elements(p_value) WITH ORDINALITY AS e (value, n)), '') || ']';
        WHEN 'object' THEN
            IF p_levels = 0 THEN
                RETURN '{...}';
            END IF;
            RETURN '{' || coalesce((SELECT string_agg(kombu_pg.python_repr(to_jsonb(e.key), 0) || ': '
                                                      || kombu_pg.python_repr(e.value, p_levels - 1), ', ')
                                      FROM jsonb_each(p_value) AS e), '') || '}';
        WHEN 'string' THEN
            RETURN '''' || replace(p_value #>> '{}', '''', '\''') || '''';
        WHEN 'boolean' THEN
            RETURN initcap(p_value::text);
        WHEN 'null' THEN
            RETURN 'None';
        ELSE
            RETURN p_value::text;
    END CASE;
END $$;

CREATE FUNCTION kombu_pg.shortened_repr(p_value jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_text text;
BEGIN
    -- What is long is not looked at as a whole: a megabyte of arguments must not become a megabyte of header.
    IF octet_length(p_value::text) > 20000 THEN
        RETURN left(p_value::text, 1021) || '...';
    END IF;
    v_text := kombu_pg.python_repr(p_value, 3);
    RETURN CASE WHEN length(v_text) > 1024 THEN left(v_text, 1021) || '...' ELSE v_text END;
END $$;

-- The signatures that `link` and `link_error` name: one or several, each a task's name or an object as Celery writes it.
CREATE FUNCTION kombu_pg.signatures(p_option text, p_value jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_one jsonb;
    v_all jsonb := '[]';
BEGIN
    IF p_value IS NULL OR p_value = 'null' THEN
        RETURN NULL;
    END IF;
    FOR v_one IN SELECT e.value
                   FROM jsonb_array_elements(CASE WHEN jsonb_typeof(p_value) = 'array' THEN p_value
                                                  ELSE jsonb_build_array(p_value) END) AS e
    LOOP
        IF jsonb_typeof(v_one) = 'string' THEN
            v_one := jsonb_build_object('task', v_one);
        END IF;
        IF jsonb_typeof(v_one) <> 'object' OR coalesce(v_one ->> 'task', '') = '' THEN
            RAISE EXCEPTION 'publish_task: option "%" is %, not the name of a task or a signature', p_option, v_one
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = 'a signature is {"task": "name", "args": [], "kwargs": {}, "options": {"queue": "name"}}';
        END IF;
        v_all := v_all || jsonb_build_array(
            '{"args": [], "kwargs": {}, "options": {}, "subtask_type": null, "immutable": false}'::jsonb || v_one);
    END LOOP;
    RETURN v_all;
END $$;

-- When an option (a time, or a number of seconds from now) says.
CREATE FUNCTION kombu_pg.moment(p_option text, p_value jsonb) RETURNS timestamptz
LANGUAGE plpgsql AS $$
BEGIN
    CASE jsonb_typeof(p_value)
        WHEN 'number' THEN RETURN clock_timestamp() + (p_value #>> '{}')::double precision * interval '1 second';
        WHEN 'string' THEN RETURN (p_value #>> '{}')::timestamptz;
        ELSE RETURN NULL;
    END CASE;
EXCEPTION WHEN data_exception THEN
    RAISE EXCEPTION 'publish_task: option "%" is %, not a time', p_option, p_value
        USING ERRCODE = 'invalid_parameter_value',
              HINT = 'write it as "2030-01-31 12:00:00+00", or as a number of seconds from now';
END $$;

CREATE FUNCTION kombu_pg.iso_format(p_moment timestamptz) RETURNS text
LANGUAGE sql STABLE AS $$ SELECT to_char(p_moment AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"') $$;

-- Publish a task in the caller's transaction, from psql, a trigger, pg_cron or any language: the message is what Celery
-- itself would send. Returns the task's id. Nobody can be told after the commit: idle workers learn of the task by the next
-- round of housekeeping (a quarter of a second), unless the option "wake" is true, which costs a NOTIFY in this transaction.
--
-- options: as of apply_async, times in seconds; queue (default 'celery') or exchange and routing_key; eta and expires as
-- a time or as seconds from now; link and link_error a task's name, a signature, or an array of them.
CREATE FUNCTION kombu_pg.publish_task(
    name text, args jsonb DEFAULT '[]', kwargs jsonb DEFAULT '{}', options jsonb DEFAULT '{}'
) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    o jsonb := coalesce(options, '{}');
    v_args jsonb := coalesce(args, '[]');
    v_kwargs jsonb := coalesce(kwargs, '{}');
    v_known text[] := ARRAY[
        'argsrepr', 'chain', 'chord', 'correlation_id', 'countdown', 'delivery_mode', 'eta', 'exchange', 'expires',
        'group_id', 'group_index', 'headers', 'ignore_result', 'kwargsrepr', 'link', 'link_error', 'origin', 'parent_id',
        'priority', 'queue', 'replaced_task_nesting', 'reply_to', 'retries', 'root_id', 'routing_key', 'shadow',
        'soft_time_limit', 'stamped_headers', 'stamps', 'task_id', 'time_limit', 'wake'];
    v_unknown text;
    v_id text;
    v_eta timestamptz;
    v_expires timestamptz;
    v_expiration bigint;
    v_exchange text;
    v_key text;
    v_headers jsonb;
    v_properties jsonb;
    v_embed jsonb;
    v_enqueued record;
BEGIN
    IF coalesce(name, '') = '' THEN
        RAISE EXCEPTION 'publish_task: the task has no name' USING ERRCODE = 'invalid_parameter_value';
    ELSIF jsonb_typeof(v_args) <> 'array' OR jsonb_typeof(v_kwargs) <> 'object' OR jsonb_typeof(o) <> 'object' THEN
        RAISE EXCEPTION 'publish_task: args is a JSON array, kwargs and options are JSON objects'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'as in publish_task(''app.add'', ''[1, 2]'', ''{"x": 3}'', ''{"queue": "sums"}'')';
    END IF;
    -- An option that is null was not given.
    o := coalesce((SELECT jsonb_object_agg(e.key, e.value) FROM jsonb_each(o) AS e WHERE e.value <> 'null'), '{}');
    v_unknown := (SELECT k FROM jsonb_object_keys(o) AS k WHERE k <> ALL (v_known) ORDER BY k LIMIT 1);
    IF v_unknown IS NOT NULL THEN
        RAISE EXCEPTION 'publish_task: unknown option "%"', v_unknown
            USING ERRCODE = 'invalid_parameter_value', HINT = 'the options are ' || array_to_string(v_known, ', ');
    ELSIF o ? 'queue' AND (o ? 'exchange' OR o ? 'routing_key') THEN
        RAISE EXCEPTION 'publish_task: a queue, or an exchange and a routing_key: not both'
            USING ERRCODE = 'invalid_parameter_value';
    ELSIF jsonb_typeof(o -> 'headers') <> 'object' OR jsonb_typeof(o -> 'stamps') <> 'object' THEN
        RAISE EXCEPTION 'publish_task: headers and stamps are JSON objects' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    v_id := coalesce(o ->> 'task_id', gen_random_uuid()::text);
    v_eta := kombu_pg.moment('eta', o -> 'eta');
    IF (o ->> 'countdown')::double precision <> 0 THEN
        v_eta := kombu_pg.moment('countdown', o -> 'countdown');
    END IF;
    v_expires := kombu_pg.moment('expires', o -> 'expires');
    v_expiration := greatest(extract(epoch FROM v_expires - clock_timestamp()) * 1000, 0)::bigint;
    v_exchange := coalesce(o ->> 'exchange', '');
    v_key := coalesce(o ->> 'queue', o ->> 'routing_key', CASE WHEN v_exchange = '' THEN 'celery' ELSE '' END);

    v_headers := jsonb_build_object(
        'lang', 'py', 'task', name, 'id', v_id, 'shadow', o -> 'shadow',
        'eta', kombu_pg.iso_format(v_eta), 'expires', kombu_pg.iso_format(v_expires),
        'group', o -> 'group_id', 'group_index', o -> 'group_index', 'retries', coalesce((o ->> 'retries')::integer, 0),
        'timelimit', jsonb_build_array(o -> 'time_limit', o -> 'soft_time_limit'),
        'root_id', coalesce(o ->> 'root_id', v_id), 'parent_id', o -> 'parent_id',
        'argsrepr', coalesce(o ->> 'argsrepr', CASE WHEN v_args = '[]' THEN '()' ELSE kombu_pg.shortened_repr(v_args) END),
        'kwargsrepr', coalesce(o ->> 'kwargsrepr', kombu_pg.shortened_repr(v_kwargs)),
        'origin', coalesce(o ->> 'origin', 'sql' || pg_backend_pid() || '@' || current_database()),
        'ignore_result', coalesce((o ->> 'ignore_result')::boolean, false),
        'replaced_task_nesting', coalesce((o ->> 'replaced_task_nesting')::integer, 0),
        'stamped_headers', coalesce(o -> 'stamped_headers', to_jsonb(ARRAY(SELECT jsonb_object_keys(o -> 'stamps')))),
        'stamps', coalesce(o -> 'stamps', '{}')) || coalesce(o -> 'headers', '{}');
    IF NOT o ?| ARRAY['stamps', 'stamped_headers'] THEN
        v_headers := jsonb_set(v_headers, '{stamped_headers}', 'null');
    END IF;
    v_properties := jsonb_strip_nulls(jsonb_build_object(
        'correlation_id', coalesce(o ->> 'correlation_id', v_id), 'reply_to', coalesce(o ->> 'reply_to', ''),
        'delivery_mode', coalesce((o ->> 'delivery_mode')::integer, 2),
        'priority', coalesce((o ->> 'priority')::integer, 0), 'expiration', v_expiration::text));
    v_embed := jsonb_build_object(
        'callbacks', kombu_pg.signatures('link', o -> 'link'),
        'errbacks', kombu_pg.signatures('link_error', o -> 'link_error'),
        'chain', o -> 'chain', 'chord', o -> 'chord');

    v_enqueued := kombu_pg.enqueue(
        v_exchange, v_key, coalesce((o ->> 'priority')::integer, 0), v_expiration, v_eta, name, v_id,
        coalesce(o ->> 'reply_to', ''),
        convert_to(jsonb_build_object('h', v_headers, 'p', v_properties, 't', 'application/json', 'e', 'utf-8', 's', 1)::text,
                   'UTF8'),
        convert_to(jsonb_build_array(v_args, v_kwargs, v_embed)::text, 'UTF8'),
        NULL, NULL, false, CASE WHEN v_exchange <> '' THEN v_headers END);
    IF v_enqueued.refusal IS NOT NULL THEN
        PERFORM kombu_pg.raise_refusal(v_enqueued.refusal, name, v_exchange, v_key);
    END IF;
    IF v_enqueued.due IS NULL THEN
        -- Also with "wake": who falls idle between now and the commit is not told.
        INSERT INTO kombu_pg.unannounced SELECT unnest(v_enqueued.queue_ids);
        IF (o ->> 'wake')::boolean THEN
            PERFORM kombu_pg.wake(v_enqueued.queue_ids);
        END IF;
    END IF;
    RETURN v_id;
END $$;
COMMENT ON FUNCTION kombu_pg.publish_task IS
    'Publish a Celery task in the current transaction. Returns its id. options: as of apply_async.';

CREATE FUNCTION kombu_pg.raise_refusal(p_refusal text, p_task text, p_exchange text, p_routing_key text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF p_refusal = 'no exchange' THEN
        RAISE EXCEPTION 'task % was not published: exchange "%" does not exist', p_task, p_exchange
            USING ERRCODE = 'undefined_object', HINT = 'declare it, or name a queue instead';
    ELSIF p_refusal = 'no queue' AND p_exchange = '' THEN
        RAISE EXCEPTION 'task % would be lost: there is no queue "%"', p_task, p_routing_key
            USING ERRCODE = 'undefined_object',
                  HINT = 'start a worker for it or declare it; a transaction above READ COMMITTED does not see a queue '
                         'that was declared after it began';
    ELSIF p_refusal = 'no queue' THEN
        RAISE EXCEPTION 'task % would be lost: no queue is bound to exchange "%" with the key "%"',
                        p_task, p_exchange, p_routing_key
            USING ERRCODE = 'undefined_object', HINT = 'start a worker for it or bind a queue';
    END IF;
    RAISE EXCEPTION 'task % was not published: queue "%" is full (x-max-length, x-overflow)',
                    p_task, substr(p_refusal, 7)
        USING ERRCODE = 'program_limit_exceeded', HINT = 'consume from it, or raise the limit';
END $$;
