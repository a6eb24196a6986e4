-- 0004: exchanges, queues, bindings, subscriptions. pre-deployment, not breaking.
--
-- A refusal comes back as a value, so that a caller's transaction stays usable: 'not found' (404), 'locked' (405),
-- 'in use', 'not empty' or '<argument> is <stored>, not <asked>' (406), 'reserved' (403).

CREATE FUNCTION kombu_pg.differs(p_argument text, p_stored text, p_asked text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_stored IS DISTINCT FROM p_asked
                THEN p_argument || ' is ' || coalesce(p_stored, 'not set') || ', not ' || coalesce(p_asked, 'unset') END
$$;

CREATE FUNCTION kombu_pg.declare_exchange(
    p_name text, p_type text, p_durable boolean, p_auto_delete boolean, p_arguments text, p_passive boolean
) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    v_exchange kombu_pg.exchange;
BEGIN
    IF NOT p_passive AND NOT EXISTS (SELECT FROM kombu_pg.exchange e WHERE e.name = p_name) THEN
        IF p_name LIKE 'amq.%' THEN
            RETURN 'reserved';
        END IF;
        INSERT INTO kombu_pg.exchange (name, type, durable, auto_delete, arguments)
        VALUES (p_name, p_type, p_durable, p_auto_delete, p_arguments)
        ON CONFLICT DO NOTHING;
    END IF;
    SELECT * INTO v_exchange FROM kombu_pg.exchange e WHERE e.name = p_name;
    IF NOT FOUND THEN
        RETURN 'not found';
    ELSIF p_passive THEN
        RETURN NULL;
    END IF;
    RETURN coalesce(
        kombu_pg.differs('type', v_exchange.type, p_type),
        kombu_pg.differs('durable', v_exchange.durable::text, p_durable::text),
        kombu_pg.differs('auto_delete', v_exchange.auto_delete::text, p_auto_delete::text));
END $$;

CREATE FUNCTION kombu_pg.delete_exchange(p_name text, p_if_unused boolean) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    IF p_name LIKE 'amq.%' THEN
        RETURN 'reserved';
    END IF;
    PERFORM FROM kombu_pg.exchange e WHERE e.name = p_name FOR UPDATE;
    IF p_if_unused AND EXISTS (SELECT FROM kombu_pg.binding b WHERE b.exchange = p_name) THEN
        RETURN 'in use';
    END IF;
    DELETE FROM kombu_pg.exchange e WHERE e.name = p_name;
    DELETE FROM kombu_pg.binding b WHERE b.exchange = p_name;
    PERFORM kombu_pg.unbind_from_all(NULL, p_name);
    RETURN NULL;
END $$;

-- An auto-delete exchange goes with its last binding; and what led to it may go with that.
CREATE FUNCTION kombu_pg.drop_unbound(p_exchanges text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_exchange text;
BEGIN
    FOR v_exchange IN
        DELETE FROM kombu_pg.exchange e
         WHERE e.name = ANY (p_exchanges) AND e.auto_delete
           AND NOT EXISTS (SELECT FROM kombu_pg.binding b WHERE b.exchange = e.name)
        RETURNING e.name
    LOOP
        PERFORM kombu_pg.unbind_from_all(NULL, v_exchange);
    END LOOP;
END $$;

-- Nothing leads to the queue, or to the exchange, any more.
CREATE FUNCTION kombu_pg.unbind_from_all(p_queue bigint, p_destination text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_exchanges text[];
BEGIN
    WITH unbound AS (
        DELETE FROM kombu_pg.binding b WHERE b.queue_id = p_queue OR b.destination = p_destination RETURNING b.exchange
    )
    SELECT array_agg(DISTINCT u.exchange) INTO v_exchanges FROM unbound u;
    IF v_exchanges IS NOT NULL THEN
        PERFORM kombu_pg.drop_unbound(v_exchanges);
    END IF;
END $$;

-- Consumers that are registered count here, alive or not: one that was only cut off comes back to its queues, and who
-- reaps one that is dead ends its subscriptions.
CREATE FUNCTION kombu_pg.is_subscribed_to(p_queue bigint) RETURNS boolean
LANGUAGE sql AS $$
    SELECT EXISTS (SELECT FROM kombu_pg.subscription s JOIN kombu_pg.consumer c ON c.id = s.consumer_id
                    WHERE s.queue_id = p_queue)
$$;

CREATE FUNCTION kombu_pg.live_subscriptions(p_queue bigint) RETURNS integer
LANGUAGE sql AS $$
    SELECT count(*)::integer
      FROM kombu_pg.subscription s JOIN kombu_pg.consumer c ON c.id = s.consumer_id
     WHERE s.queue_id = p_queue AND kombu_pg.is_alive(c)
$$;

-- Remove the queue with everything that waits in it (beyond 10,000 messages the sweep does the rest).
CREATE FUNCTION kombu_pg.drop_queue(p_queue bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM kombu_pg.queue q WHERE q.id = p_queue;
    PERFORM kombu_pg.unbind_from_all(p_queue, NULL);
    DELETE FROM kombu_pg.subscription s WHERE s.queue_id = p_queue;
    PERFORM kombu_pg.purge(p_queue, 10000);
    -- Who waits for its messages shall hear that there will be none.
    PERFORM kombu_pg.wake(ARRAY[p_queue]);
END $$;

-- Drop up to p_limit messages that wait in the queue (ready and scheduled, not unacked); returns how many.
CREATE FUNCTION kombu_pg.purge(p_queue bigint, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_ids bigint[];
    v_more bigint[];
BEGIN
    WITH gone AS (
        DELETE FROM kombu_pg.ready r WHERE r.ctid = ANY (ARRAY(
            SELECT x.ctid FROM kombu_pg.ready x WHERE x.queue_id = p_queue
             ORDER BY x.band, x.position LIMIT p_limit FOR UPDATE SKIP LOCKED))
        RETURNING r.message_id
    )
    SELECT coalesce(array_agg(g.message_id), '{}') INTO v_ids FROM gone g;
    WITH gone AS (
        DELETE FROM kombu_pg.scheduled s WHERE s.ctid = ANY (ARRAY(
            SELECT x.ctid FROM kombu_pg.scheduled x WHERE x.queue_id = p_queue
             LIMIT p_limit - cardinality(v_ids) FOR UPDATE SKIP LOCKED))
        RETURNING s.message_id
    )
    SELECT v_ids || coalesce(array_agg(g.message_id), '{}') INTO v_more FROM gone g;
    DELETE FROM kombu_pg.message m WHERE m.id = ANY (v_more);
    RETURN cardinality(v_more);
END $$;

-- May this connection use the queue? An exclusive queue belongs to one connection as long as that lives; what a dead
-- one left behind is dropped, as it would have been at once on a broker that sees connections die.
-- p_live_tokens: the connections that the asking process has open.
CREATE FUNCTION kombu_pg.find_queue(
    p_name text, p_consumer bigint, p_token bigint, p_live_tokens bigint[],
    OUT queue kombu_pg.queue, OUT refusal text
) LANGUAGE plpgsql AS $$
DECLARE
    v_alive boolean;
BEGIN
    SELECT * INTO queue FROM kombu_pg.queue q WHERE q.name = p_name;
    IF queue.id IS NULL THEN
        refusal := 'not found';
    ELSIF queue.owner_id IS NOT NULL AND NOT (queue.owner_id = p_consumer AND queue.owner_token = p_token) THEN
        IF queue.owner_id = p_consumer THEN
            v_alive := queue.owner_token = ANY (p_live_tokens);
        ELSE
            SELECT kombu_pg.is_alive(c) INTO v_alive FROM kombu_pg.consumer c WHERE c.id = queue.owner_id;
        END IF;
        IF v_alive THEN
            refusal := 'locked';
        ELSE
            PERFORM kombu_pg.drop_queue(queue.id);
            queue := NULL;
            refusal := 'not found';
        END IF;
    END IF;
END $$;

-- The queue is in use. False: it has expired while we looked at it, and is gone.
CREATE FUNCTION kombu_pg.touch(p_queue kombu_pg.queue) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    -- At most one write for a quarter of the queue's life: rpc:// declares its queue before every call.
    IF p_queue.expires IS NULL
       OR p_queue.used_at >= clock_timestamp() - make_interval(secs => p_queue.expires / 4000.0) THEN
        RETURN true;
    END IF;
    UPDATE kombu_pg.queue q SET used_at = clock_timestamp() WHERE q.id = p_queue.id;
    RETURN FOUND;
END $$;

CREATE FUNCTION kombu_pg.declare_queue(
    p_name text, p_passive boolean, p_durable boolean, p_exclusive boolean, p_auto_delete boolean,
    p_max_priority integer, p_message_ttl bigint, p_expires bigint, p_max_length bigint, p_max_length_bytes bigint,
    p_overflow text, p_dead_letter_exchange text, p_dead_letter_routing_key text, p_delivery_limit integer, p_arguments text,
    p_consumer bigint, p_token bigint, p_live_tokens bigint[],
    OUT queue_id bigint, OUT message_count bigint, OUT consumer_count integer, OUT refusal text
) LANGUAGE plpgsql AS $$
DECLARE
    v_found record;
    v_queue kombu_pg.queue;
    v_new boolean := false;
BEGIN
    LOOP
        v_found := kombu_pg.find_queue(p_name, p_consumer, p_token, p_live_tokens);
        v_queue := v_found.queue;
        refusal := v_found.refusal;
        EXIT WHEN refusal <> 'not found' OR (refusal IS NULL AND kombu_pg.touch(v_queue));
        refusal := 'not found';
        EXIT WHEN p_passive;
        INSERT INTO kombu_pg.queue (name, durable, exclusive, auto_delete, owner_id, owner_token, max_priority, message_ttl,
                                    expires, max_length, max_length_bytes, overflow, dead_letter_exchange,
                                    dead_letter_routing_key, delivery_limit, arguments)
        VALUES (p_name, p_durable, p_exclusive, p_auto_delete, CASE WHEN p_exclusive THEN p_consumer END,
                CASE WHEN p_exclusive THEN p_token END, p_max_priority, p_message_ttl, p_expires, p_max_length,
                p_max_length_bytes, p_overflow, p_dead_letter_exchange, p_dead_letter_routing_key, p_delivery_limit,
                p_arguments)
        ON CONFLICT (name) DO NOTHING;
        v_new := FOUND;
    END LOOP;
    IF refusal IS NOT NULL THEN
        RETURN;
    END IF;
    queue_id := v_queue.id;
    IF NOT p_passive THEN
        IF p_exclusive <> v_queue.exclusive THEN
            refusal := 'locked';
            RETURN;
        END IF;
        refusal := coalesce(
            kombu_pg.differs('durable', v_queue.durable::text, p_durable::text),
            kombu_pg.differs('auto_delete', v_queue.auto_delete::text, p_auto_delete::text),
            kombu_pg.differs('x-max-priority', v_queue.max_priority::text, p_max_priority::text),
            kombu_pg.differs('x-message-ttl', v_queue.message_ttl::text, p_message_ttl::text),
            kombu_pg.differs('x-expires', v_queue.expires::text, p_expires::text),
            kombu_pg.differs('x-max-length', v_queue.max_length::text, p_max_length::text),
            kombu_pg.differs('x-max-length-bytes', v_queue.max_length_bytes::text, p_max_length_bytes::text),
            kombu_pg.differs('x-overflow', v_queue.overflow, p_overflow),
            kombu_pg.differs('x-dead-letter-exchange', v_queue.dead_letter_exchange, p_dead_letter_exchange),
            kombu_pg.differs('x-dead-letter-routing-key', v_queue.dead_letter_routing_key, p_dead_letter_routing_key),
            kombu_pg.differs('x-delivery-limit', v_queue.delivery_limit::text, p_delivery_limit::text));
        IF refusal IS NOT NULL THEN
            RETURN;
        END IF;
    END IF;
    IF v_new THEN
        message_count := 0;
        consumer_count := 0;
        RETURN;
    END IF;
    -- Counting ten million rows takes a second: only who asks for nothing else (passive) pays that.
    SELECT count(*) INTO message_count FROM (
        SELECT FROM kombu_pg.ready r WHERE r.queue_id = v_queue.id
         LIMIT CASE WHEN p_passive THEN NULL ELSE 10000 END) AS counted;
    consumer_count := kombu_pg.live_subscriptions(v_queue.id);
END $$;

-- What basic.get and queue.purge begin with; counts as use.
CREATE FUNCTION kombu_pg.use_queue(
    p_name text, p_consumer bigint, p_token bigint, p_live_tokens bigint[],
    OUT queue_id bigint, OUT message_count bigint, OUT refusal text
) LANGUAGE plpgsql AS $$
DECLARE
    v_found record;
    v_queue kombu_pg.queue;
BEGIN
    v_found := kombu_pg.find_queue(p_name, p_consumer, p_token, p_live_tokens);
    v_queue := v_found.queue;
    refusal := v_found.refusal;
    IF refusal IS NULL AND NOT kombu_pg.touch(v_queue) THEN
        refusal := 'not found';
    END IF;
    IF refusal IS NULL THEN
        queue_id := v_queue.id;
        SELECT count(*) INTO message_count FROM (
            SELECT FROM kombu_pg.ready r WHERE r.queue_id = v_queue.id LIMIT 10000) AS counted;
    END IF;
END $$;

CREATE FUNCTION kombu_pg.delete_queue(
    p_name text, p_if_unused boolean, p_if_empty boolean,
    p_consumer bigint, p_token bigint, p_live_tokens bigint[],
    OUT message_count bigint, OUT refusal text
) LANGUAGE plpgsql AS $$
DECLARE
    v_found record;
    v_queue kombu_pg.queue;
BEGIN
    message_count := 0;
    PERFORM FROM kombu_pg.queue q WHERE q.name = p_name FOR UPDATE;
    v_found := kombu_pg.find_queue(p_name, p_consumer, p_token, p_live_tokens);
    v_queue := v_found.queue;
    refusal := v_found.refusal;
    IF refusal = 'not found' THEN
        refusal := NULL;  -- as RabbitMQ: deleting what is not there succeeds
        RETURN;
    ELSIF refusal IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT (SELECT count(*) FROM kombu_pg.ready r WHERE r.queue_id = v_queue.id)
         + (SELECT count(*) FROM kombu_pg.scheduled s WHERE s.queue_id = v_queue.id) INTO message_count;
    IF p_if_unused AND kombu_pg.live_subscriptions(v_queue.id) > 0 THEN
        refusal := 'in use';
    ELSIF p_if_empty AND message_count > 0 THEN
        refusal := 'not empty';
    ELSE
        PERFORM kombu_pg.drop_queue(v_queue.id);
    END IF;
END $$;

-- p_pattern: the routing key as a topic pattern (regular expression over '.word.word'), NULL if it has no wildcard.
-- p_headers: what a headers exchange compares, {"match": "all" | "any" | .., "headers": {..}}.
CREATE FUNCTION kombu_pg.bind(
    p_exchange text, p_queue_id bigint, p_destination text, p_routing_key text, p_pattern text, p_headers jsonb, p_arguments text
) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    v_type text;
    v_exact boolean;
BEGIN
    -- Locked: a binding of an exchange that is being deleted would come back with the next one of that name.
    SELECT e.type INTO v_type FROM kombu_pg.exchange e WHERE e.name = p_exchange FOR SHARE;
    IF NOT FOUND THEN
        RETURN 'no exchange';
    END IF;
    v_exact := v_type = 'direct' OR (v_type = 'topic' AND p_pattern IS NULL);
    INSERT INTO kombu_pg.binding (exchange, key, queue_id, destination, routing_key, pattern, headers, arguments)
    VALUES (p_exchange, CASE WHEN v_exact THEN '=' || p_routing_key ELSE '~' END, p_queue_id, p_destination, p_routing_key,
            CASE WHEN v_type = 'topic' THEN p_pattern END, CASE WHEN v_type = 'headers' THEN p_headers END, p_arguments)
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;

CREATE FUNCTION kombu_pg.bind_queue(
    p_queue text, p_exchange text, p_routing_key text, p_pattern text, p_headers jsonb, p_arguments text,
    p_consumer bigint, p_token bigint, p_live_tokens bigint[]
) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    v_found record;
    v_queue kombu_pg.queue;
BEGIN
    v_found := kombu_pg.find_queue(p_queue, p_consumer, p_token, p_live_tokens);
    IF v_found.refusal IS NOT NULL THEN
        RETURN v_found.refusal;
    END IF;
    v_queue := v_found.queue;
    -- Locked: a binding to a queue that is being deleted would swallow messages.
    PERFORM FROM kombu_pg.queue k WHERE k.id = v_queue.id FOR SHARE;
    IF NOT FOUND THEN
        RETURN 'not found';
    END IF;
    RETURN kombu_pg.bind(p_exchange, v_queue.id, NULL, p_routing_key, p_pattern, p_headers, p_arguments);
END $$;

CREATE FUNCTION kombu_pg.bind_exchange(
    p_destination text, p_source text, p_routing_key text, p_pattern text, p_headers jsonb, p_arguments text
) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM kombu_pg.exchange e WHERE e.name = p_destination FOR SHARE;
    IF NOT FOUND THEN
        RETURN 'not found';
    END IF;
    RETURN kombu_pg.bind(p_source, NULL, p_destination, p_routing_key, p_pattern, p_headers, p_arguments);
END $$;

CREATE FUNCTION kombu_pg.unbind_exchange(p_destination text, p_source text, p_routing_key text, p_arguments text)
RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM kombu_pg.binding b
     WHERE b.exchange = p_source AND b.destination = p_destination AND b.routing_key = p_routing_key
       AND b.arguments = p_arguments;
    IF FOUND THEN
        PERFORM kombu_pg.drop_unbound(ARRAY[p_source]);
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION kombu_pg.unbind_queue(
    p_queue text, p_exchange text, p_routing_key text, p_arguments text,
    p_consumer bigint, p_token bigint, p_live_tokens bigint[]
) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    v_found record;
    v_queue kombu_pg.queue;
BEGIN
    v_found := kombu_pg.find_queue(p_queue, p_consumer, p_token, p_live_tokens);
    v_queue := v_found.queue;
    DELETE FROM kombu_pg.binding b
     WHERE b.exchange = p_exchange AND b.routing_key = p_routing_key AND b.arguments = p_arguments
       AND b.queue_id = v_queue.id AND v_found.refusal IS NULL;
    IF FOUND THEN
        PERFORM kombu_pg.drop_unbound(ARRAY[p_exchange]);
    END IF;
    RETURN nullif(v_found.refusal, 'not found');  -- as RabbitMQ: unbinding what is not there succeeds
END $$;

CREATE FUNCTION kombu_pg.subscribe(
    p_queue text, p_tag text, p_consumer bigint, p_token bigint, p_live_tokens bigint[],
    OUT queue_id bigint, OUT refusal text
) LANGUAGE plpgsql AS $$
DECLARE
    v_found record;
    v_queue kombu_pg.queue;
BEGIN
    PERFORM FROM kombu_pg.queue q WHERE q.name = p_queue FOR SHARE;
    v_found := kombu_pg.find_queue(p_queue, p_consumer, p_token, p_live_tokens);
    v_queue := v_found.queue;
    refusal := v_found.refusal;
    IF refusal IS NULL THEN
        queue_id := v_queue.id;
        INSERT INTO kombu_pg.subscription (consumer_id, token, tag, queue_id)
        VALUES (p_consumer, p_token, p_tag, queue_id) ON CONFLICT DO NOTHING;
    END IF;
END $$;

-- The consumer no longer consumes: p_tag NULL = nothing any more over that connection, p_token NULL = at all.
-- Auto-delete queues go with their last subscription; for the others x-expires starts to count.
CREATE FUNCTION kombu_pg.unsubscribe(p_consumer bigint, p_token bigint, p_tag text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_queue record;
BEGIN
    FOR v_queue IN
        -- Queue rows are locked first: of two last consumers that leave at once, the second must see the first gone.
        SELECT q.id, q.auto_delete FROM kombu_pg.queue q
         WHERE q.id IN (SELECT s.queue_id FROM kombu_pg.subscription s
                         WHERE s.consumer_id = p_consumer AND (p_token IS NULL OR s.token = p_token)
                           AND (p_tag IS NULL OR s.tag = p_tag))
         ORDER BY q.id FOR UPDATE
    LOOP
        DELETE FROM kombu_pg.subscription s
         WHERE s.queue_id = v_queue.id AND s.consumer_id = p_consumer AND (p_token IS NULL OR s.token = p_token)
           AND (p_tag IS NULL OR s.tag = p_tag);
        IF v_queue.auto_delete AND NOT kombu_pg.is_subscribed_to(v_queue.id) THEN
            PERFORM kombu_pg.drop_queue(v_queue.id);
        ELSE
            UPDATE kombu_pg.queue q SET used_at = clock_timestamp() WHERE q.id = v_queue.id AND q.expires IS NOT NULL;
        END IF;
    END LOOP;
    DELETE FROM kombu_pg.subscription s
     WHERE s.consumer_id = p_consumer AND (p_token IS NULL OR s.token = p_token) AND (p_tag IS NULL OR s.tag = p_tag);
END $$;
