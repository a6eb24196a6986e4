-- 0003: settle and claim. pre-deployment, not breaking.

-- Settling ------------------------------------------------------------------------------------------------------
-- Suspects with the fewest returns first: they are claimed one at a time, and the guilty one must not be first for ever.
CREATE FUNCTION kombu_pg.suspect_position(p_returns integer, p_id bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT (least(p_returns, 32767)::bigint << 48) | p_id $$;

-- Where in ready a message can stand follows from its row: four probes of the primary key find it.
CREATE FUNCTION kombu_pg.places(p_id bigint, p_band smallint, p_returns integer) RETURNS TABLE (band smallint, "position" bigint)
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    VALUES (0::smallint, kombu_pg.suspect_position(p_returns, p_id)), ((p_band - 2)::smallint, p_id), ((p_band - 1)::smallint, p_id), (p_band, p_id)
$$;

-- Take messages out of ready and scheduled; returns the ids that stood there.
CREATE FUNCTION kombu_pg.withdraw(p_ids bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    v_ready bigint[];
    v_scheduled bigint[];
BEGIN
    WITH gone AS (
        DELETE FROM kombu_pg.ready r WHERE r.ctid = ANY (ARRAY(
            SELECT x.ctid
              FROM kombu_pg.message m
             CROSS JOIN LATERAL kombu_pg.places(m.id, m.band, m.returns) AS place
              JOIN kombu_pg.ready x
                ON x.queue_id = m.queue_id AND x.band = place.band AND x.position = place.position
             WHERE m.id = ANY (p_ids)
               FOR UPDATE OF x))
        RETURNING r.message_id
    )
    SELECT coalesce(array_agg(g.message_id), '{}') INTO v_ready FROM gone g;
    WITH gone AS (
        DELETE FROM kombu_pg.scheduled s USING kombu_pg.message m
         WHERE m.id = ANY (p_ids) AND NOT m.id = ANY (v_ready) AND s.queue_id = m.queue_id AND s.message_id = m.id
        RETURNING s.message_id
    )
    SELECT coalesce(array_agg(g.message_id), '{}') INTO v_scheduled FROM gone g;
    RETURN v_ready || v_scheduled;
END $$;

-- Messages that are in no lease any more have been somewhere and came back, which happens at most delivery-limit times;
-- then they are dead letters. Returns the queues to wake after the commit.
CREATE FUNCTION kombu_pg.count_return(p_ids bigint[], p_delivery_limit integer) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_dead bigint[];
BEGIN
    WITH counted AS (
        UPDATE kombu_pg.message m SET returns = m.returns + 1
         WHERE m.id IN (SELECT k.id FROM kombu_pg.message k WHERE k.id = ANY (p_ids) ORDER BY k.id FOR UPDATE)
        RETURNING m.id, m.queue_id, m.returns
    )
    SELECT array_agg(c.id) INTO v_dead
      FROM counted c LEFT JOIN kombu_pg.queue q ON q.id = c.queue_id
     WHERE c.returns > coalesce(q.delivery_limit, p_delivery_limit);
    RETURN CASE WHEN v_dead IS NULL THEN '{}' ELSE kombu_pg.dead_letter(v_dead, 'delivery_limit', NULL) END;
END $$;

-- Put messages that are in no lease any more back into ready, counted or not; returns the queues to wake after the commit.
CREATE FUNCTION kombu_pg.put_back(p_ids bigint[], p_counted boolean, p_delivery_limit integer) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_woken bigint[] := '{}';
    v_queues bigint[];
BEGIN
    IF p_ids IS NULL OR cardinality(p_ids) = 0 THEN
        RETURN '{}';
    END IF;
    IF p_counted THEN
        v_woken := kombu_pg.count_return(p_ids, p_delivery_limit);
    END IF;
    WITH back AS (
        INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)
        SELECT m.queue_id,
               CASE WHEN m.returns >= 3 THEN 0 ELSE m.band - 2 END,
               CASE WHEN m.returns >= 3 THEN kombu_pg.suspect_position(m.returns, m.id) ELSE m.id END,
               m.id, octet_length(m.properties) + octet_length(m.body)
          FROM kombu_pg.message m
         WHERE m.id = ANY (p_ids)
         ORDER BY m.id
        ON CONFLICT DO NOTHING
        RETURNING queue_id
    )
    SELECT coalesce(array_agg(DISTINCT b.queue_id), '{}') INTO v_queues FROM back b;
    RETURN v_queues || v_woken || kombu_pg.drop_heads(v_queues);
END $$;

-- Take ids out of the consumer's leases; returns those that were in one. A second call finds nothing, so a
-- statement whose answer was lost may be sent again.
CREATE FUNCTION kombu_pg.release(p_consumer bigint, p_ids bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_lease record;
    v_left bigint[];
    v_released bigint[] := '{}';
BEGIN
    FOR v_lease IN
        SELECT l.id, l.message_ids FROM kombu_pg.lease l
         WHERE l.consumer_id = p_consumer AND l.message_ids && p_ids ORDER BY l.id FOR UPDATE
    LOOP
        v_released := v_released || ARRAY(
            SELECT unnest(v_lease.message_ids) INTERSECT SELECT unnest(p_ids));
        v_left := ARRAY(SELECT held.id FROM unnest(v_lease.message_ids) WITH ORDINALITY AS held (id, n)
                         WHERE NOT held.id = ANY (p_ids) ORDER BY held.n);
        IF cardinality(v_left) = 0 THEN
            DELETE FROM kombu_pg.lease l WHERE l.id = v_lease.id;
        ELSE
            UPDATE kombu_pg.lease l SET message_ids = v_left WHERE l.id = v_lease.id;
        END IF;
    END LOOP;
    RETURN v_released;
END $$;

-- acked: gone. requeued: back, counted. given_back: back, not counted. rejected, expired: see dead_letter. recorded: rejected by
-- who has recorded the end of the task, so nobody else need hear of it. leases: batches of which nothing is left.
-- Acks need no lease: whoever ran the task may say so, however late; the row is the fence.
-- Returns the queues to wake after the commit.
CREATE FUNCTION kombu_pg.settle(
    p_consumer bigint, p_acked bigint[], p_requeued bigint[], p_given_back bigint[], p_rejected bigint[],
    p_expired bigint[], p_recorded bigint[], p_leases bigint[], p_delivery_limit integer
) RETURNS bigint[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_queues bigint[] := '{}';
BEGIN
    IF cardinality(p_acked) > 0 THEN
        DELETE FROM kombu_pg.message m WHERE m.id = ANY (p_acked);
    END IF;
    IF cardinality(p_requeued) > 0 THEN
        v_queues := kombu_pg.put_back(kombu_pg.release(p_consumer, p_requeued), true, p_delivery_limit);
    END IF;
    IF cardinality(p_given_back) > 0 THEN
        v_queues := v_queues
            || kombu_pg.put_back(kombu_pg.release(p_consumer, p_given_back), false, p_delivery_limit);
    END IF;
    IF cardinality(p_rejected) > 0 THEN
        v_queues := v_queues || kombu_pg.dead_letter(kombu_pg.release(p_consumer, p_rejected), 'rejected', NULL);
    END IF;
    IF cardinality(p_expired) > 0 THEN
        v_queues := v_queues || kombu_pg.dead_letter(kombu_pg.release(p_consumer, p_expired), 'expired', NULL);
    END IF;
    IF cardinality(p_recorded) > 0 THEN
        v_queues := v_queues || kombu_pg.dead_letter(kombu_pg.release(p_consumer, p_recorded), 'rejected', NULL, true);
    END IF;
    -- Last: what goes back is looked for in its lease.
    IF cardinality(p_leases) > 0 THEN
        DELETE FROM kombu_pg.lease l WHERE l.id = ANY (p_leases) AND l.consumer_id = p_consumer;
    END IF;
    RETURN v_queues;
END $$;

-- Settle in a transaction of its own, then tell who is idle.
CREATE PROCEDURE kombu_pg.settle_and_wake(
    p_consumer bigint, p_acked bigint[], p_requeued bigint[], p_given_back bigint[], p_rejected bigint[],
    p_expired bigint[], p_recorded bigint[], p_leases bigint[], p_delivery_limit integer
) LANGUAGE plpgsql AS $$
DECLARE
    v_queues bigint[];
BEGIN
    v_queues := kombu_pg.settle(p_consumer, p_acked, p_requeued, p_given_back, p_rejected, p_expired, p_recorded, p_leases, p_delivery_limit);
    COMMIT;
    PERFORM kombu_pg.wake(v_queues);
END $$;


-- Of messages that were just taken out of ready, the first ones that make p_bytes (at least one) are kept; the others are
-- back in their places. Returns how many are kept.
CREATE FUNCTION kombu_pg.put_surplus_back(p_ids bigint[], p_bands smallint[], p_bytes bigint) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_surplus integer;
BEGIN
    WITH measured AS (
        SELECT t.id, t.band, m.queue_id, m.returns, octet_length(m.properties) + octet_length(m.body) AS size,
               sum(coalesce(octet_length(m.properties) + octet_length(m.body), 0)) OVER (ORDER BY t.n ROWS UNBOUNDED PRECEDING)
               - coalesce(octet_length(m.properties) + octet_length(m.body), 0) AS before
          FROM unnest(p_ids, p_bands) WITH ORDINALITY AS t (id, band, n) LEFT JOIN kombu_pg.message m ON m.id = t.id
    ), back AS (
        INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)
        SELECT s.queue_id, s.band, CASE WHEN s.band = 0 THEN kombu_pg.suspect_position(s.returns, s.id) ELSE s.id END, s.id, s.size
          FROM measured s WHERE s.before >= p_bytes AND s.queue_id IS NOT NULL
    )
    SELECT count(*) INTO v_surplus FROM measured s WHERE s.before >= p_bytes;
    RETURN cardinality(p_ids) - v_surplus;
END $$;


-- Claim ---------------------------------------------------------------------------------------------------------
-- Take up to p_limit messages out of the queues, in the order given, at most p_limits[i] of queue i, and lease them
-- to the consumer, together at most p_bytes (but at least one message). Whatever the consumer has to settle goes first.
--
-- Arming: where p_gate, every queue that was emptied has the consumer's idle lock when this returns, taken *before* the
-- last look (a publisher looks after its commit, so one of the two sees the other; p_keys[i] names the lock); every queue that was not emptied
-- has it released, since a consumer without room must not be told of messages.
--
-- Rows: one per message (expired ones flagged: not to be delivered, to be settled as expired; revoked ones: not to be run), then one summary row with
-- message_id NULL: lease_id, armed[] (per queue; NULL = the queue is gone) and, if p_advance,
-- firsts[] (first visible fresh position of each queue), upper, xid and xmin, from which the client moves its marks;
-- NULL where no mark could move.
-- armed NULL: the consumer itself is gone (it was reaped): nothing was claimed.
CREATE FUNCTION kombu_pg.claim(
    p_consumer bigint, p_token bigint, p_queues bigint[], p_keys bigint[], p_limits integer[], p_limit integer, p_bytes bigint,
    p_suspects integer, p_gate boolean, p_armed boolean[], p_marks bigint[], p_advance boolean
) RETURNS TABLE (
    message_id bigint, queue_id bigint, redelivered boolean, returns integer, priority smallint, expired boolean,
    exchange text, routing_key text, properties bytea, body bytea, deaths jsonb,
    lease_id bigint, armed boolean[], firsts bigint[], upper bigint, xid bigint, xmin bigint, revoked boolean
)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_material = off SET jit = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_upper bigint;
    v_queue record;
    v_ids bigint[] := '{}';
    v_bands smallint[] := '{}';
    v_more_ids bigint[];
    v_more_bands smallint[];
    v_bytes bigint;
    v_left integer := p_limit;
    v_bytes_left bigint := p_bytes;
    v_suspects integer := p_suspects;
    v_suspects_taken integer;
    v_want integer;
    v_got integer;
    v_armed boolean[] := p_armed;
    v_firsts bigint[] := '{}';
    v_xmin bigint;
    v_more bigint[] := '{}';
    v_key bigint;
    v_lease bigint;
    v_pass integer;
BEGIN
    IF p_advance THEN
        -- xmin is asked before anything is looked for: what commits between the two looks must count as running.
        SELECT s.last_value, pg_snapshot_xmin(pg_current_snapshot())::text::bigint INTO v_upper, v_xmin
          FROM kombu_pg.message_id_seq s;
        -- An idle store gives out no transaction ids.
        p_advance := v_upper >= ANY (p_marks);
    END IF;
    IF NOT EXISTS (SELECT FROM kombu_pg.consumer c WHERE c.id = p_consumer) THEN
        RETURN QUERY SELECT NULL::bigint, NULL::bigint, NULL::boolean, NULL::integer, NULL::smallint, NULL::boolean, NULL::text,
            NULL::text, NULL::bytea, NULL::bytea, NULL::jsonb, NULL::bigint, NULL::boolean[], NULL::bigint[], NULL::bigint, NULL::bigint, NULL::bigint,
            NULL::boolean;
        RETURN;
    END IF;
    FOR i IN 1 .. cardinality(p_queues) LOOP
        SELECT q.id, q.paused, q.max_priority INTO v_queue FROM kombu_pg.queue q WHERE q.id = p_queues[i];
        v_key := kombu_pg.lock_key('idle', p_keys[i]);
        IF NOT FOUND THEN
            IF p_armed[i] THEN
                PERFORM pg_advisory_unlock_shared(v_key);
            END IF;
            v_armed[i] := NULL;
            IF p_advance THEN
                v_firsts := v_firsts || NULL::bigint;
            END IF;
            CONTINUE;
        END IF;
        v_want := least(p_limits[i], v_left);
        -- The first pass claims; a second one, after arming, closes the gap between "empty" and "armed".
        FOR v_pass IN 1 .. 2 LOOP
            v_got := 0;
            IF v_want > 0 AND v_bytes_left > 0 AND NOT v_queue.paused THEN
                WITH taken AS (
                    DELETE FROM kombu_pg.ready d
                     WHERE d.ctid = ANY (ARRAY(
                        SELECT c.row_id
                          FROM generate_series(0, 3 + 3 * coalesce(v_queue.max_priority, 0)) AS b (band)
                         CROSS JOIN LATERAL (
                            SELECT x.ctid AS row_id FROM kombu_pg.ready x
                             WHERE x.queue_id = v_queue.id AND x.band = b.band::smallint
                               AND x.position >= CASE WHEN b.band > 0 AND b.band % 3 = 0 THEN p_marks[i] ELSE 0 END
                             ORDER BY x.position
                             LIMIT CASE WHEN b.band = 0 THEN v_suspects ELSE v_want END
                               FOR UPDATE OF x SKIP LOCKED) AS c
                         LIMIT v_want))
                    RETURNING d.message_id, d.band, d.position, d.size
                )
                SELECT coalesce(array_agg(t.message_id), '{}'), coalesce(array_agg(t.band), '{}'), count(*),
                       coalesce(sum(t.size), 0), count(*) FILTER (WHERE t.band = 0)
                  INTO v_more_ids, v_more_bands, v_got, v_bytes, v_suspects_taken
                  FROM (SELECT k.* FROM taken k ORDER BY k.band, k.position) AS t;
                IF v_bytes > v_bytes_left AND v_got > 1 THEN
                    v_got := kombu_pg.put_surplus_back(v_more_ids, v_more_bands, v_bytes_left);
                    v_more_ids := v_more_ids[:v_got];
                    v_more_bands := v_more_bands[:v_got];
                END IF;
                v_ids := v_ids || v_more_ids;
                v_bands := v_bands || v_more_bands;
                v_left := v_left - v_got;
                v_want := v_want - v_got;
                v_bytes_left := v_bytes_left - v_bytes;
                v_suspects := v_suspects - v_suspects_taken;
            END IF;
            IF NOT p_gate THEN
                EXIT;
            ELSIF v_want <= 0 OR v_bytes_left <= 0 THEN
                IF v_armed[i] THEN
                    PERFORM pg_advisory_unlock_shared(v_key);
                    v_armed[i] := false;
                END IF;
                -- A burst tells the same two consumers again and again, and we may have been both: whoever leaves
                -- something behind, be it that he locked it and it was too large, passes the word on.
                IF kombu_pg.somebody_idle(v_queue.id) AND EXISTS (
                    SELECT FROM generate_series(1, 3 + 3 * coalesce(v_queue.max_priority, 0)) AS b (band)
                     CROSS JOIN LATERAL (
                        SELECT FROM kombu_pg.ready x
                         WHERE x.queue_id = v_queue.id AND x.band = b.band::smallint
                           AND x.position >= CASE WHEN b.band % 3 = 0 THEN p_marks[i] ELSE 0 END
                         ORDER BY x.position LIMIT 1) AS f
                ) THEN
                    v_more := v_more || v_queue.id;
                END IF;
                EXIT;
            ELSIF v_armed[i] THEN
                EXIT;
            END IF;
            PERFORM pg_advisory_lock_shared(v_key);
            v_armed[i] := true;
            -- Whoever has resumed the queue meanwhile may have looked for the idle before we were.
            IF v_queue.paused THEN
                v_queue.paused := coalesce((SELECT q.paused FROM kombu_pg.queue q WHERE q.id = v_queue.id), true);
            END IF;
        END LOOP;
        IF p_advance THEN
            v_firsts := v_firsts || (
                SELECT min(f.position)
                  FROM generate_series(3, 3 + 3 * coalesce(v_queue.max_priority, 0), 3) AS b (band)
                 CROSS JOIN LATERAL (
                    SELECT x.position FROM kombu_pg.ready x
                     WHERE x.queue_id = v_queue.id AND x.band = b.band::smallint AND x.position >= p_marks[i]
                     ORDER BY x.position LIMIT 1) AS f);
        END IF;
    END LOOP;
    IF cardinality(v_ids) > 0 THEN
        v_lease := nextval('kombu_pg.lease_id_seq');
        RETURN QUERY
            WITH leased AS (
                INSERT INTO kombu_pg.lease (id, consumer_id, token, message_ids) OVERRIDING SYSTEM VALUE
                VALUES (v_lease, p_consumer, p_token, v_ids)
            )
            SELECT m.id, m.queue_id, t.band = 0 OR t.band % 3 = 1 OR m.returns > 0, m.returns, m.priority,
                   coalesce(m.expires_at <= clock_timestamp(), false),
                   m.exchange, m.routing_key, m.properties, m.body, m.deaths,
                   NULL::bigint, NULL::boolean[], NULL::bigint[], NULL::bigint, NULL::bigint, NULL::bigint,
                   EXISTS (SELECT FROM kombu_pg.revoked) AND m.task_id IS NOT NULL AND kombu_pg.is_revoked(m.task_id, m.id)
              FROM unnest(v_ids, v_bands) WITH ORDINALITY AS t (id, band, n)
              JOIN kombu_pg.message m ON m.id = t.id
             ORDER BY t.n;
        IF NOT FOUND THEN
            -- Acked late, while they waited to be run again: nobody will ever settle this lease.
            DELETE FROM kombu_pg.lease l WHERE l.id = v_lease;
        END IF;
    END IF;
    IF v_more <> '{}' THEN
        PERFORM kombu_pg.wake(v_more);
    END IF;
    -- Assigned, not selected: that does not start the executor.
    lease_id := v_lease;
    armed := v_armed;
    upper := v_upper;
    xmin := v_xmin;
    IF p_advance THEN
        firsts := v_firsts;
        xid := pg_current_xact_id()::text::bigint;
    END IF;
    RETURN NEXT;
END $$;
