-- 0005: who is alive, and what becomes of what the dead held. pre-deployment, not breaking.

-- Register a consumer (p_consumer NULL), or come back under the old id. Afterwards this session holds the consumer's
-- lock (unless its life is told by heartbeats). consumer_id NULL: it was away too long and has been reaped.
-- outstanding: consumers that have not come back since the server started; epoch_age: seconds since the first one did.
CREATE FUNCTION kombu_pg.attach(
    p_consumer bigint, p_hostname text, p_pid integer, p_heartbeat boolean,
    p_grace double precision, p_heartbeat_timeout double precision,
    OUT consumer_id bigint, OUT epoch text, OUT outstanding integer, OUT epoch_age double precision
) LANGUAGE plpgsql AS $$
DECLARE
    v_start timestamptz := (SELECT a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) a);
    v_key bigint;
BEGIN
    epoch := kombu_pg.current_epoch();
    UPDATE kombu_pg.installation i SET epoch = attach.epoch, epoch_since = clock_timestamp() WHERE i.epoch <> attach.epoch;
    IF FOUND THEN
        -- A crash may have forgotten the last ids that were drawn: an ack from before it must not hit another message.
        PERFORM setval('kombu_pg.message_id_seq', (SELECT s.last_value FROM kombu_pg.message_id_seq s) + 1000000);
    END IF;
    IF p_consumer IS NULL THEN
        consumer_id := nextval(pg_get_serial_sequence('kombu_pg.consumer', 'id'));
        IF NOT p_heartbeat THEN
            PERFORM pg_advisory_lock(kombu_pg.lock_key('alive', consumer_id));
        END IF;
        INSERT INTO kombu_pg.consumer (id, hostname, pid, heartbeat, backend_pid, backend_start, epoch, grace, heartbeat_timeout)
        OVERRIDING SYSTEM VALUE
        VALUES (consumer_id, p_hostname, p_pid, p_heartbeat, pg_backend_pid(), v_start, epoch, p_grace, p_heartbeat_timeout);
    ELSE
        v_key := kombu_pg.lock_key('alive', p_consumer);
        IF NOT p_heartbeat AND NOT pg_try_advisory_lock(v_key) THEN
            -- The server may not have noticed yet that our old session is gone.
            PERFORM pg_terminate_backend(a.pid)
               FROM kombu_pg.consumer c JOIN pg_stat_activity a ON a.pid = c.backend_pid AND a.backend_start = c.backend_start
              WHERE c.id = p_consumer AND a.pid <> pg_backend_pid();
            PERFORM pg_advisory_lock(v_key);
        END IF;
        UPDATE kombu_pg.consumer c
           SET lost_at = NULL, seen_at = clock_timestamp(), backend_pid = pg_backend_pid(), backend_start = v_start,
               epoch = attach.epoch, heartbeat = p_heartbeat
         WHERE c.id = p_consumer
        RETURNING c.id INTO consumer_id;
        IF consumer_id IS NULL AND NOT p_heartbeat THEN
            PERFORM pg_advisory_unlock(v_key);
        END IF;
    END IF;
    SELECT s.outstanding, s.epoch_age INTO outstanding, epoch_age FROM kombu_pg.returning_consumers() s;
END $$;

-- After a restart a message may be in ready again that somebody still works on (claims do not wait for the flush). Before
-- anybody claims, everybody who was there gets the time to come back and say so.
CREATE FUNCTION kombu_pg.returning_consumers(OUT outstanding integer, OUT epoch_age double precision)
LANGUAGE sql AS $$
    SELECT (SELECT count(*)::integer FROM kombu_pg.consumer c WHERE c.epoch <> kombu_pg.current_epoch()),
           extract(epoch FROM clock_timestamp() - i.epoch_since)::double precision
      FROM kombu_pg.installation i
$$;

-- Agree with a consumer that came back about what it holds. Leases of connections it no longer has (tokens up to
-- p_last_token, the last one given out when the consumer looked, that are not in p_tokens): what no live message refers
-- to (not in p_held) is given back, uncounted; the rest stays leased.
-- p_reassert: the server may have forgotten claims; what is held and stands in ready is taken out again.
-- p_end: those connections are not coming back under another token: their subscriptions and exclusive queues end, too.
-- queues: to wake after the commit, here and below.
CREATE FUNCTION kombu_pg.reconcile(
    p_consumer bigint, p_last_token bigint, p_tokens bigint[], p_held bigint[], p_reassert boolean, p_end boolean,
    OUT given_back integer, OUT queues bigint[]
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_back bigint[];
    v_lost bigint[];
    v_token bigint;
BEGIN
    IF p_end THEN
        FOR v_token IN
            SELECT s.token FROM kombu_pg.subscription s
             WHERE s.consumer_id = p_consumer AND s.token <= p_last_token AND NOT s.token = ANY (p_tokens)
             UNION
            SELECT q.owner_token FROM kombu_pg.queue q
             WHERE q.owner_id = p_consumer AND q.owner_token <= p_last_token AND NOT q.owner_token = ANY (p_tokens)
        LOOP
            PERFORM kombu_pg.end_connection(p_consumer, v_token);
        END LOOP;
    END IF;
    -- The server may not have noticed yet that such a session is gone: nothing more is to be pushed to it.
    DELETE FROM kombu_pg.session s
     WHERE s.consumer_id = p_consumer AND s.token <= p_last_token AND NOT s.token = ANY (p_tokens);
    v_back := ARRAY(
        SELECT held.id FROM kombu_pg.lease l CROSS JOIN LATERAL unnest(l.message_ids) AS held (id)
         WHERE l.consumer_id = p_consumer AND l.token <= p_last_token AND NOT l.token = ANY (p_tokens)
           AND NOT held.id = ANY (p_held));
    given_back := 0;
    IF cardinality(v_back) > 0 THEN
        SELECT count(*) INTO given_back FROM kombu_pg.message m WHERE m.id = ANY (v_back);
        queues := kombu_pg.put_back(kombu_pg.release(p_consumer, v_back), false, NULL);
    END IF;
    IF p_reassert AND cardinality(p_held) > 0 THEN
        -- Twice: a claim that was just under way may have put some of it back (see put_surplus_back), where the first does not look.
        v_lost := kombu_pg.withdraw(p_held);
        v_lost := v_lost || kombu_pg.withdraw(p_held);
        IF cardinality(v_lost) > 0 THEN
            INSERT INTO kombu_pg.lease (consumer_id, token, message_ids) VALUES (p_consumer, 0, v_lost);
        END IF;
    END IF;
END $$;

-- A connection of the consumer is over (p_token NULL: all of them): its exclusive queues go, its subscriptions end.
CREATE FUNCTION kombu_pg.end_connection(p_consumer bigint, p_token bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_queue bigint;
BEGIN
    FOR v_queue IN
        SELECT q.id FROM kombu_pg.queue q
         WHERE q.owner_id = p_consumer AND (p_token IS NULL OR q.owner_token = p_token) ORDER BY q.id FOR UPDATE
    LOOP
        PERFORM kombu_pg.drop_queue(v_queue);
    END LOOP;
    PERFORM kombu_pg.unsubscribe(p_consumer, p_token, NULL);
END $$;

-- It is closed in order: what it holds is given back, too, uncounted.
CREATE FUNCTION kombu_pg.close_connection(p_consumer bigint, p_token bigint) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_held bigint[];
BEGIN
    PERFORM kombu_pg.end_connection(p_consumer, p_token);
    v_held := ARRAY(SELECT held.id FROM kombu_pg.lease l CROSS JOIN LATERAL unnest(l.message_ids) AS held (id)
                     WHERE l.consumer_id = p_consumer AND (p_token IS NULL OR l.token = p_token));
    IF v_held = '{}' THEN
        RETURN v_held;
    END IF;
    RETURN kombu_pg.put_back(kombu_pg.release(p_consumer, v_held), false, NULL);
END $$;

-- Take over from consumers that are gone: seen without their lock (or heartbeat) twice, at least its grace apart.
-- What they held is returned, counted. After a restart of the server everybody has p_restart_grace to come back.
CREATE FUNCTION kombu_pg.reap(
    p_self bigint, p_restart_grace double precision, p_delivery_limit integer
) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_consumer kombu_pg.consumer;
    v_lease record;
    v_queues bigint[] := '{}';
BEGIN
    FOR v_consumer IN SELECT c.* FROM kombu_pg.consumer c WHERE c.id <> p_self ORDER BY c.id LOOP
        IF kombu_pg.is_alive(v_consumer) THEN
            IF v_consumer.lost_at IS NOT NULL AND NOT v_consumer.heartbeat THEN
                UPDATE kombu_pg.consumer c SET lost_at = NULL WHERE c.id = v_consumer.id;
            END IF;
        ELSIF v_consumer.lost_at IS NULL THEN
            UPDATE kombu_pg.consumer c SET lost_at = clock_timestamp() WHERE c.id = v_consumer.id;
        ELSIF v_consumer.lost_at < clock_timestamp() - make_interval(secs => v_consumer.grace)
              AND (v_consumer.epoch = kombu_pg.current_epoch() OR EXISTS (
                    SELECT FROM kombu_pg.installation i
                     WHERE i.epoch_since < clock_timestamp() - make_interval(secs => p_restart_grace))) THEN
            -- Fenced by the lock that is_alive has got, which others may get, too: to the commit it cannot come back under this id; after
            -- it, it finds no row.
            DELETE FROM kombu_pg.consumer c WHERE c.id = v_consumer.id AND c.lost_at = v_consumer.lost_at;
            IF FOUND THEN
                v_queues := v_queues || kombu_pg.abandon(v_consumer.id, p_delivery_limit);
            END IF;
        END IF;
    END LOOP;
    -- A claim that was under way while its consumer was reaped.
    FOR v_lease IN
        SELECT DISTINCT l.consumer_id FROM kombu_pg.lease l
         WHERE NOT EXISTS (SELECT FROM kombu_pg.consumer c WHERE c.id = l.consumer_id)
    LOOP
        v_queues := v_queues || kombu_pg.abandon(v_lease.consumer_id, p_delivery_limit);
    END LOOP;
    RETURN v_queues;
END $$;

-- End what a dead consumer left: its exclusive queues, its subscriptions, its leases. What it consumed is to be looked
-- into, too: it may have been told of a message, or died in a claim whose rows the others skipped.
CREATE FUNCTION kombu_pg.abandon(p_consumer bigint, p_delivery_limit integer) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_held bigint[];
    v_queues bigint[] := ARRAY(SELECT s.queue_id FROM kombu_pg.subscription s WHERE s.consumer_id = p_consumer);
BEGIN
    v_held := ARRAY(SELECT held.id FROM kombu_pg.lease l CROSS JOIN LATERAL unnest(l.message_ids) AS held (id)
                     WHERE l.consumer_id = p_consumer);
    v_held := kombu_pg.release(p_consumer, v_held);
    PERFORM kombu_pg.end_connection(p_consumer, NULL);
    RETURN v_queues || kombu_pg.put_back(v_held, true, p_delivery_limit);
END $$;

-- Make ready what is due, oldest first; promoted: how many. Rows due long before p_since are left to a sweep, so that
-- the usual call does not walk what vacuum has not yet removed.
CREATE FUNCTION kombu_pg.promote(p_since timestamptz, p_limit integer, OUT promoted integer, OUT queues bigint[])
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    -- A variable, here and below: the clock itself is volatile, so no index could be searched for it.
    v_now timestamptz := clock_timestamp();
BEGIN
    WITH due AS (
        DELETE FROM kombu_pg.scheduled s WHERE s.ctid = ANY (ARRAY(
            SELECT x.ctid FROM kombu_pg.scheduled x
             WHERE x.due_at >= p_since AND x.due_at <= v_now
             ORDER BY x.due_at LIMIT p_limit FOR UPDATE SKIP LOCKED))
        RETURNING s.message_id
    ), entered AS (
        INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)
        SELECT m.queue_id, m.band - 1, m.id, m.id, octet_length(m.properties) + octet_length(m.body)
          FROM due d JOIN kombu_pg.message m ON m.id = d.message_id
        ON CONFLICT DO NOTHING
        RETURNING queue_id
    )
    SELECT (SELECT count(*) FROM due), array_agg(DISTINCT e.queue_id) INTO promoted, queues FROM entered e;
    IF queues IS NOT NULL THEN
        queues := queues || kombu_pg.drop_heads(queues);
    END IF;
END $$;

-- Queues whose x-expires has run out: nobody consumes, got or declared for that long. As in RabbitMQ, it begins anew when the
-- server does: nobody could use them while it was away.
CREATE FUNCTION kombu_pg.expire_queues() RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    v_epoch_since timestamptz := (SELECT i.epoch_since FROM kombu_pg.installation i);
    v_queue bigint;
    v_count integer := 0;
BEGIN
    FOR v_queue IN
        SELECT q.id FROM kombu_pg.queue q
         WHERE q.expires IS NOT NULL
           AND greatest(q.used_at, v_epoch_since) < clock_timestamp() - make_interval(secs => q.expires / 1000.0)
         ORDER BY q.id LIMIT 100 FOR UPDATE SKIP LOCKED
    LOOP
        IF kombu_pg.is_subscribed_to(v_queue) THEN
            UPDATE kombu_pg.queue q SET used_at = clock_timestamp() WHERE q.id = v_queue;
        ELSE
            PERFORM kombu_pg.drop_queue(v_queue);
            v_count := v_count + 1;
        END IF;
    END LOOP;
    RETURN v_count;
END $$;

-- Messages whose time to live is over and that nobody holds, oldest first; expired: how many. p_since: see promote.
-- Those that are held are passed by, however many they are: they are their consumers' until they come back.
CREATE FUNCTION kombu_pg.expire_messages(p_since timestamptz, p_limit integer, OUT expired integer, OUT queues bigint[])
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_seen_at timestamptz := p_since;
    v_seen bigint := 0;
    v_ids bigint[];
BEGIN
    expired := 0;
    queues := '{}';
    LOOP
        SELECT array_agg(x.id), max(x.expires_at), (array_agg(x.id ORDER BY x.expires_at DESC, x.id DESC))[1]
          INTO v_ids, v_seen_at, v_seen
          FROM (SELECT m.expires_at, m.id FROM kombu_pg.message m
                 WHERE m.expires_at <= v_now AND (m.expires_at, m.id) > (v_seen_at, v_seen)
                 ORDER BY m.expires_at, m.id LIMIT p_limit) AS x;
        EXIT WHEN v_ids IS NULL;
        -- Nor does it wait for what somebody's open transaction is about to drop (x-max-length): it may stay open.
        v_ids := kombu_pg.withdraw(ARRAY(
            SELECT m.id FROM kombu_pg.message m
             WHERE m.id = ANY (v_ids)
               AND (EXISTS (SELECT FROM kombu_pg.places(m.id, m.band, m.returns) AS place
                              JOIN kombu_pg.ready x
                                ON x.queue_id = m.queue_id AND x.band = place.band AND x.position = place.position)
                    -- (OFFSET 0: a probe for each, and no hash of the whole table.)
                    OR EXISTS (SELECT FROM kombu_pg.scheduled s WHERE s.queue_id = m.queue_id AND s.message_id = m.id OFFSET 0))
             ORDER BY m.id
               FOR UPDATE OF m SKIP LOCKED));
        queues := queues || kombu_pg.dead_letter(v_ids, 'expired', NULL);
        expired := expired + cardinality(v_ids);
        EXIT WHEN expired >= p_limit;
    END LOOP;
END $$;

-- What stands in ready or scheduled under a queue that is gone: published while it was being deleted, or too many to
-- be deleted with it. The ids of queues are found by skipping through the index, not by reading it.
CREATE FUNCTION kombu_pg.sweep_orphans(p_limit integer) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_queue bigint;
    v_count integer := 0;
BEGIN
    FOR v_queue IN
        WITH RECURSIVE waiting AS (
            (SELECT r.queue_id FROM kombu_pg.ready r ORDER BY r.queue_id LIMIT 1)
            UNION ALL
            SELECT (SELECT r.queue_id FROM kombu_pg.ready r WHERE r.queue_id > w.queue_id ORDER BY r.queue_id LIMIT 1)
              FROM waiting w WHERE w.queue_id IS NOT NULL
        ), later AS (
            (SELECT s.queue_id FROM kombu_pg.scheduled s ORDER BY s.queue_id LIMIT 1)
            UNION ALL
            SELECT (SELECT s.queue_id FROM kombu_pg.scheduled s WHERE s.queue_id > w.queue_id ORDER BY s.queue_id LIMIT 1)
              FROM later w WHERE w.queue_id IS NOT NULL
        )
        SELECT w.queue_id FROM (SELECT * FROM waiting UNION SELECT * FROM later) AS w
         WHERE w.queue_id IS NOT NULL AND NOT EXISTS (SELECT FROM kombu_pg.queue q WHERE q.id = w.queue_id)
    LOOP
        v_count := v_count + kombu_pg.purge(v_queue, p_limit);
    END LOOP;
    RETURN v_count;
END $$;

-- One round of housekeeping, by whichever consumer comes first; the others find the lock taken and only learn the time.
-- rank: how many live consumers are older than this one.
-- known false: this consumer has been reaped. more: the sweep came upon more than it does at a time.
-- next_reap: seconds until the grace of the next consumer is over.
CREATE FUNCTION kombu_pg.upkeep(
    p_consumer bigint, p_restart_grace double precision, p_delivery_limit integer, p_sweep boolean,
    OUT consumers integer, OUT rank integer, OUT known boolean, OUT more boolean, OUT next_reap double precision,
    OUT queues bigint[]
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_since timestamptz := CASE WHEN p_sweep THEN '-infinity' ELSE clock_timestamp() - interval '1 minute' END;
    v_expired record;
BEGIN
    more := false;
    UPDATE kombu_pg.consumer c SET seen_at = clock_timestamp(), lost_at = NULL WHERE c.id = p_consumer AND c.heartbeat;
    IF pg_try_advisory_xact_lock(kombu_pg.lock_key('upkeep', 0)) THEN
        SELECT p_sweep AND p.promoted = 500, p.queues INTO more, queues FROM kombu_pg.promote(v_since, 500) AS p;
        queues := queues || kombu_pg.take_unannounced(10000)
            || kombu_pg.reap(p_consumer, p_restart_grace, p_delivery_limit);
        -- (Rounds are at most five seconds apart. Acked messages leave more behind here than promoted ones do there.)
        v_expired := kombu_pg.expire_messages(
            CASE WHEN p_sweep THEN '-infinity' ELSE clock_timestamp() - interval '10 seconds' END, 1000);
        queues := queues || v_expired.queues;
        more := more OR v_expired.expired >= 1000;
        IF p_sweep THEN
            PERFORM kombu_pg.expire_queues();
            PERFORM kombu_pg.sweep_orphans(10000);
            PERFORM kombu_pg.sweep_chords(100);
            DELETE FROM kombu_pg.session s WHERE NOT EXISTS (SELECT FROM pg_stat_get_activity(s.pid));
            more := kombu_pg.expire_results(2000) >= 2000 OR more;
        END IF;
    END IF;
    SELECT count(*), count(*) FILTER (WHERE c.id < p_consumer), coalesce(bool_or(c.id = p_consumer), false)
      INTO consumers, rank, known
      FROM kombu_pg.consumer c WHERE c.lost_at IS NULL OR c.id = p_consumer;
    next_reap := (SELECT min(extract(epoch FROM c.lost_at - clock_timestamp()) + c.grace) FROM kombu_pg.consumer c);
END $$;

-- Seconds until the next eta, NULL if none is stored. Asked after the promotion has committed: see wake_clock.
CREATE FUNCTION kombu_pg.next_due() RETURNS double precision
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_since timestamptz := clock_timestamp() - interval '1 minute';
BEGIN
    RETURN (SELECT extract(epoch FROM s.due_at - clock_timestamp())
              FROM kombu_pg.scheduled s WHERE s.due_at >= v_since ORDER BY s.due_at LIMIT 1);
END $$;


-- In transactions of their own --------------------------------------------------------------------------------------
-- What makes messages ready commits first, and looks for the idle after that (see wake).

CREATE PROCEDURE kombu_pg.reconcile_and_wake(
    p_consumer bigint, p_last_token bigint, p_tokens bigint[], p_held bigint[], p_reassert boolean, p_end boolean,
    INOUT given_back integer DEFAULT NULL
) LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[];
BEGIN
    SELECT r.given_back, r.queues INTO given_back, v_queues
      FROM kombu_pg.reconcile(p_consumer, p_last_token, p_tokens, p_held, p_reassert, p_end) AS r;
    COMMIT;
    PERFORM kombu_pg.wake(v_queues);
END $$;

CREATE PROCEDURE kombu_pg.close_connection_and_wake(p_consumer bigint, p_token bigint) LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[] := kombu_pg.close_connection(p_consumer, p_token);
BEGIN
    COMMIT;
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM kombu_pg.wake(v_queues);
END $$;

-- The process ends in order.
CREATE PROCEDURE kombu_pg.detach(p_consumer bigint) LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[] := kombu_pg.close_connection(p_consumer, NULL);
BEGIN
    DELETE FROM kombu_pg.consumer c WHERE c.id = p_consumer;
    COMMIT;
    PERFORM pg_advisory_unlock_all();
    PERFORM kombu_pg.wake(v_queues);
END $$;

CREATE PROCEDURE kombu_pg.promote_and_wake(p_limit integer, INOUT promoted integer DEFAULT NULL)
LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[];
BEGIN
    SELECT p.promoted, p.queues INTO promoted, v_queues
      FROM kombu_pg.promote(clock_timestamp() - interval '1 minute', p_limit) AS p;
    COMMIT;
    PERFORM kombu_pg.wake(v_queues);
END $$;

CREATE PROCEDURE kombu_pg.upkeep_and_wake(
    p_consumer bigint, p_restart_grace double precision, p_delivery_limit integer, p_sweep boolean,
    INOUT consumers integer DEFAULT NULL, INOUT rank integer DEFAULT NULL, INOUT known boolean DEFAULT NULL,
    INOUT more boolean DEFAULT NULL, INOUT next_reap double precision DEFAULT NULL
) LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[];
BEGIN
    SELECT u.consumers, u.rank, u.known, u.more, u.next_reap, u.queues
      INTO consumers, rank, known, more, next_reap, v_queues
      FROM kombu_pg.upkeep(p_consumer, p_restart_grace, p_delivery_limit, p_sweep) AS u;
    COMMIT;
    PERFORM kombu_pg.wake(v_queues);
END $$;
