-- 0002: wake-up and publish. pre-deployment, not breaking.

-- Advisory locks ------------------------------------------------------------------------------------------------
-- Keys live in one space per database, which other applications use too: hence a hash over our schema's name.
-- (id::text: the || of text and bigint is only STABLE, and the function would not be inlined but parsed at every call.)
CREATE FUNCTION kombu_pg.lock_key(kind text, id bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT hashtextextended('kombu_pg.' || kind || '/' || id::text, 0) $$;

-- True while the consumer's session holds its lock, or its heart beats. On that session itself the lock can always be
-- had: whoever asks there is alive.
CREATE FUNCTION kombu_pg.is_alive(c kombu_pg.consumer) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    IF c.heartbeat THEN
        RETURN c.seen_at > clock_timestamp() - make_interval(secs => c.heartbeat_timeout);
    END IF;
    RETURN c.backend_pid = pg_backend_pid()
           AND c.backend_start = (SELECT a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) a)
           OR NOT pg_try_advisory_xact_lock_shared(kombu_pg.lock_key('alive', c.id));
END $$;

-- What changes when the server was restarted, when it recovered from the crash of one of its processes (which keeps the
-- time of its start, but resets its statistics), or when a standby took over.
-- (A standby has no epoch: it cannot say where its log ends, and refuses the write that is to follow.)
CREATE FUNCTION kombu_pg.current_epoch() RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT concat_ws('/', pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time(),
                     CASE WHEN NOT pg_is_in_recovery() THEN substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END)
$$;


-- Wake-up -------------------------------------------------------------------------------------------------------
-- An idle consumer holds lock_key('idle', queue) shared. The publisher tries it exclusively: granted = nobody is
-- idle. A refusal may also be another publisher's try, so the holders are read from pg_locks, where only consumers
-- hold ShareLock; two of them are told (one could be stopped), each on its own channel. A consumer with more
-- queues than it has locks holds the overflow key (queue 0), and every such consumer is told.
--
-- Look after the commit of what is told of, in a transaction of its own: a consumer that arms between a look and the
-- commit sees neither message nor notification.

-- The try is given up in the same expression: held until the end of a transaction it would block consumers that arm
-- (while they hold rows), and whoever waits there for the server-wide NOTIFY lock would block them all.
-- In SQL, both: they become part of the expression that asks, which costs no call.
CREATE FUNCTION kombu_pg.is_held(p_key bigint) RETURNS boolean
LANGUAGE sql AS $$ SELECT CASE WHEN pg_try_advisory_lock(p_key) THEN NOT pg_advisory_unlock(p_key) ELSE true END $$;

CREATE FUNCTION kombu_pg.somebody_idle(p_queue bigint) RETURNS boolean
LANGUAGE sql AS $$
    SELECT kombu_pg.is_held(kombu_pg.lock_key('idle', 0)) OR kombu_pg.is_held(kombu_pg.lock_key('idle', p_queue))
$$;

-- Tell two consumers that are idle on this queue, and all of those that hold the overflow key.
CREATE FUNCTION kombu_pg.wake_idle(p_queue bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_key bigint := kombu_pg.lock_key('idle', p_queue);
    v_class oid := ((v_key >> 32) & 4294967295)::oid;
    v_object oid := (v_key & 4294967295)::oid;
    v_most integer := 2;
BEGIN
    IF pg_notification_queue_usage() > 0.8 THEN
        RAISE WARNING 'kombu_pg: the notification queue is over 80 %% full: consumers are not told, they will poll'
            USING HINT = 'a session that has executed LISTEN is not reading its notifications';
        RETURN;
    END IF;
    LOOP
        PERFORM pg_notify('kombu_pg.' || told.pid, p_queue::text)
           FROM (SELECT l.pid FROM pg_locks l
                  WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.mode = 'ShareLock'
                    AND l.classid = v_class AND l.objid = v_object
                    AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                  ORDER BY random() LIMIT v_most) AS told;
        EXIT WHEN v_most IS NULL OR NOT kombu_pg.is_held(kombu_pg.lock_key('idle', 0));
        v_key := kombu_pg.lock_key('idle', 0);
        v_class := ((v_key >> 32) & 4294967295)::oid;
        v_object := (v_key & 4294967295)::oid;
        v_most := NULL;
    END LOOP;
END $$;

-- The same for those of the queues on which somebody is idle.
CREATE FUNCTION kombu_pg.wake(p_queues bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_queue bigint;
BEGIN
    IF p_queues IS NULL OR p_queues = '{}' THEN
        RETURN;
    END IF;
    FOREACH v_queue IN ARRAY p_queues LOOP
        IF kombu_pg.somebody_idle(v_queue) THEN
            PERFORM kombu_pg.wake_idle(v_queue);
        END IF;
    END LOOP;
END $$;

-- Push ------------------------------------------------------------------------------------------------------------
-- An idle consumer need not be told of a message and then claim it: who publishes may lease it to him at once, and send it along
-- in the notification. A consumer's session says in `session` that it takes messages in this way, one for each offer: the lease
-- with its number is there as long as that message is not settled. Where it could not be pushed, it is in ready, and he is told.
-- Not pushed are messages of queues with priorities or a limit, and what a claim has to look at: whether it is expired or revoked.
--
-- lock_key('push', pid) is held by the session as long as it takes messages. Whoever pushes to it holds lock_key('pushing', pid)
-- until his commit: one at a time, and when the session, after giving up the first lock, has got the second, nothing comes any more.

-- Lease a message, which this transaction has put into ready, to an idle consumer. False: it is still there.
CREATE FUNCTION kombu_pg.push(p_queue bigint, p_id bigint, p_priority integer, p_properties bytea, p_body bytea) RETURNS boolean
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_key bigint := kombu_pg.lock_key('idle', p_queue);
    v_class oid := ((v_key >> 32) & 4294967295)::oid;
    v_object oid := (v_key & 4294967295)::oid;
    v_fits boolean;
    v_session kombu_pg.session;
    v_lease bigint;
BEGIN
    -- A notification has at most 7999 bytes. (A role may have been granted no more than what a publish used to need.)
    IF octet_length(p_properties) + octet_length(p_body) > 5600 OR pg_notification_queue_usage() > 0.8
       OR NOT (has_table_privilege('kombu_pg.session', 'SELECT') AND has_table_privilege('kombu_pg.consumer', 'SELECT')
               AND has_table_privilege('kombu_pg.revoked', 'SELECT') AND has_table_privilege('kombu_pg.lease', 'SELECT')
               AND has_table_privilege('kombu_pg.lease', 'INSERT') AND has_table_privilege('kombu_pg.ready', 'DELETE')) THEN
        RETURN false;
    END IF;
    -- And not past what the same publisher has just sent, which who was told of it has not yet claimed. (Its ids are near:
    -- looking further back would meet what vacuum may not remove.)
    SELECT true INTO v_fits FROM kombu_pg.queue q
     WHERE q.id = p_queue AND NOT q.paused AND q.message_ttl IS NULL AND q.max_priority IS NULL
       AND NOT EXISTS (SELECT FROM kombu_pg.revoked)
       AND NOT EXISTS (SELECT FROM kombu_pg.ready r
                        WHERE r.queue_id = p_queue AND r.band IN (1, 3) AND r.position >= p_id - 200 AND r.position < p_id);
    IF v_fits IS NULL THEN
        RETURN false;
    END IF;
    SELECT s.* INTO v_session
      FROM pg_locks k JOIN kombu_pg.session s ON s.pid = k.pid JOIN kombu_pg.consumer c ON c.id = s.consumer_id
     WHERE k.locktype = 'advisory' AND k.objsubid = 1 AND k.granted AND k.mode = 'ShareLock'
       AND k.classid = v_class AND k.objid = v_object
       AND k.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
       AND NOT EXISTS (SELECT FROM kombu_pg.lease l WHERE l.offer = s.offer)
     ORDER BY random() LIMIT 1;
    IF v_session.pid IS NULL OR NOT pg_try_advisory_xact_lock(kombu_pg.lock_key('pushing', v_session.pid))
       OR NOT kombu_pg.is_held(kombu_pg.lock_key('push', v_session.pid)) THEN
        RETURN false;
    END IF;
    INSERT INTO kombu_pg.lease (consumer_id, token, message_ids, offer)
    SELECT v_session.consumer_id, v_session.token, ARRAY[p_id], v_session.offer
     WHERE NOT EXISTS (SELECT FROM kombu_pg.lease l WHERE l.offer = v_session.offer)
    RETURNING id INTO v_lease;
    IF v_lease IS NULL THEN
        RETURN false;
    END IF;
    DELETE FROM kombu_pg.ready r WHERE r.queue_id = p_queue AND r.band = 3 AND r.position = p_id;
    PERFORM pg_notify(v_session.channel, concat_ws(' ', v_lease, p_id, p_queue, least(greatest(p_priority, 0), 255),
                                                   octet_length(p_properties), encode(p_properties || p_body, 'base64')));
    RETURN true;
END $$;

-- This session takes messages from now on, on a channel that it listens on.
CREATE FUNCTION kombu_pg.offer(p_consumer bigint, p_token bigint, p_channel text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    -- Once: it would have to be given up as often.
    IF NOT EXISTS (SELECT FROM kombu_pg.session s WHERE s.pid = pg_backend_pid() AND s.channel = p_channel) THEN
        PERFORM pg_advisory_lock(kombu_pg.lock_key('push', pg_backend_pid()));
    END IF;
    INSERT INTO kombu_pg.session AS s (pid, consumer_id, token, channel, offer)
    VALUES (pg_backend_pid(), p_consumer, p_token, p_channel, nextval('kombu_pg.offer_seq'))
    ON CONFLICT (pid) DO UPDATE SET consumer_id = p_consumer, token = p_token, channel = p_channel, offer = excluded.offer;
END $$;

-- Under another number: where vacuum is held back, each look whether the lease of an offer is there meets all that ever were.
CREATE FUNCTION kombu_pg.renew_offer() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE kombu_pg.session s SET offer = nextval('kombu_pg.offer_seq') WHERE s.pid = pg_backend_pid();
END $$;

-- It takes no more. Returns what was pushed to it and is not settled: some of that may not have come yet.
CREATE FUNCTION kombu_pg.withdraw_offer(p_consumer bigint, p_token bigint) RETURNS TABLE (lease_id bigint, message_id bigint)
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM kombu_pg.session s WHERE s.pid = pg_backend_pid();
    PERFORM pg_advisory_unlock(kombu_pg.lock_key('push', pg_backend_pid()));
    PERFORM pg_advisory_lock(kombu_pg.lock_key('pushing', pg_backend_pid()));
    PERFORM pg_advisory_unlock(kombu_pg.lock_key('pushing', pg_backend_pid()));
    RETURN QUERY SELECT l.id, unnest(l.message_ids) FROM kombu_pg.lease l
                  WHERE l.consumer_id = p_consumer AND l.token = p_token AND l.offer IS NOT NULL;
END $$;

-- Tell the consumers that keep the clock of a new earliest due time. Not needed when something is due before it:
-- they look again after that. What was due long ago is a sweep's: looking there would walk what vacuum may not remove.
CREATE FUNCTION kombu_pg.wake_clock(p_due timestamptz) RETURNS void
LANGUAGE plpgsql SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    -- A variable: the clock itself is volatile, so no index could be searched for it.
    v_since timestamptz := clock_timestamp() - interval '1 minute';
BEGIN
    IF NOT EXISTS (SELECT FROM kombu_pg.scheduled s WHERE s.due_at >= v_since AND s.due_at < p_due)
       AND pg_notification_queue_usage() <= 0.8 THEN
        PERFORM pg_notify('kombu_pg.clock', extract(epoch FROM p_due)::text);
    END IF;
END $$;


-- Publish -------------------------------------------------------------------------------------------------------
-- The fresh band of a message; its due and returned bands are the two before it.
CREATE FUNCTION kombu_pg.band(p_max_priority smallint, p_priority integer) RETURNS smallint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (3 + 3 * (coalesce(p_max_priority, 0) - least(greatest(p_priority, 0), coalesce(p_max_priority, 0))))::smallint
$$;

-- Does a headers binding ({"match": ..., "headers": {...}}) want a message with these headers? As RabbitMQ: a header that
-- the binding gives no value (null) must only be there; without "-with-x", names that begin with x- do not count.
CREATE FUNCTION kombu_pg.headers_match(p_binding jsonb, p_headers jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN p_binding ->> 'match' LIKE 'any%' THEN coalesce(bool_or(h.fits), false)
                ELSE coalesce(bool_and(h.fits), true) END
      FROM (SELECT p_headers ? e.key AND (e.value = 'null' OR p_headers -> e.key = e.value) AS fits
              FROM jsonb_each(p_binding -> 'headers') AS e
             WHERE p_binding ->> 'match' LIKE '%-with-x' OR NOT e.key LIKE 'x-%') AS h
$$;

-- The queues that get what is published to a (not the default) exchange with this key, each once, through however many
-- exchanges. headers_wanted: a headers exchange is on the way, and p_headers is NULL.
CREATE FUNCTION kombu_pg.route(
    p_exchange text, p_routing_key text, p_headers jsonb,
    OUT queue_ids bigint[], OUT limited boolean, OUT headers_wanted boolean
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_exchanges text[] := ARRAY[p_exchange];
    v_seen text[] := '{}';
    v_words text := CASE WHEN p_routing_key = '' THEN '' ELSE '.' || p_routing_key END;
    v_queues bigint[];
    v_limited boolean;
    v_wanted boolean;
BEGIN
    queue_ids := '{}';
    WHILE v_exchanges <> '{}' LOOP
        v_seen := v_seen || v_exchanges;
        SELECT coalesce(array_agg(DISTINCT q.id) FILTER (WHERE q.id IS NOT NULL), '{}'), coalesce(bool_or(q.limited), false),
               coalesce(bool_or(b.headers IS NOT NULL AND p_headers IS NULL), false),
               coalesce(array_agg(DISTINCT b.destination) FILTER (WHERE b.destination <> ALL (v_seen)), '{}')
          INTO v_queues, v_limited, v_wanted, v_exchanges
          FROM kombu_pg.binding b LEFT JOIN kombu_pg.queue q ON q.id = b.queue_id
         WHERE b.exchange = ANY (v_exchanges) AND b.key IN ('=' || p_routing_key, '~')
           AND (b.pattern IS NULL OR v_words ~ b.pattern)
           AND (b.headers IS NULL OR p_headers IS NULL OR kombu_pg.headers_match(b.headers, p_headers));
        queue_ids := queue_ids || v_queues;
        limited := coalesce(limited, false) OR v_limited;
        headers_wanted := coalesce(headers_wanted, false) OR v_wanted;
    END LOOP;
END $$;

-- The one way into the store: route a message and write a copy into each queue. Runs in the caller's transaction,
-- wakes nobody, raises nothing for what the publisher did wrong: refusal says it.
-- refusal: 'no exchange' | 'no queue' (a task that nobody would get) | 'full: <queue>' | 'headers' (say them in
-- p_headers: a headers exchange must know) | NULL. queue_ids: the queues to wake; '{}' = unroutable.
-- p_publish_id NULL: no retry will ask. (It costs a lock until the transaction ends.)
CREATE FUNCTION kombu_pg.enqueue(
    p_exchange text, p_routing_key text, p_priority integer, p_ttl bigint, p_due timestamptz,
    p_task text, p_task_id text, p_reply_to text, p_properties bytea, p_body bytea,
    p_publish_id uuid, p_retry_age double precision, p_mandatory boolean, p_headers jsonb DEFAULT NULL,
    OUT queue_ids bigint[], OUT refusal text, OUT due timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    v_queue bigint;
BEGIN
    -- A second attempt waits here until the server has ended the first. (Void is not null.)
    IF p_publish_id IS NOT NULL AND pg_advisory_xact_lock(uuid_hash_extended(p_publish_id, 0)) IS NOT NULL
       AND p_retry_age IS NOT NULL THEN
        queue_ids := kombu_pg.find_published(p_publish_id, p_retry_age);
        IF queue_ids <> '{}' THEN
            RETURN;
        END IF;
    END IF;
    IF p_exchange = '' AND p_due IS NULL THEN
        v_queue := kombu_pg.enqueue_plainly(p_routing_key, p_priority, p_ttl, p_task, p_task_id, p_reply_to, p_properties,
                                            p_body, p_publish_id);
        IF v_queue IS NOT NULL THEN
            queue_ids := ARRAY[v_queue];
            RETURN;
        END IF;
    END IF;
    SELECT e.queue_ids, e.refusal, e.due INTO queue_ids, refusal, due
      FROM kombu_pg.enqueue_routed(p_exchange, p_routing_key, p_priority, p_ttl, p_due, p_task, p_task_id, p_reply_to,
                                   p_properties, p_body, p_publish_id, p_mandatory, p_headers) AS e;
END $$;

-- What most publishes are: one message, due at once, into one queue by its name that has no limit. Returns the queue's id;
-- NULL: there is no such queue, nothing was done.
--
-- Written for speed: assignments and IFs instead of PERFORM (they do not start the executor), as few expressions as
-- possible (each is prepared anew in every transaction), one value to return (a record costs 8 us), and no array.
-- (That would make custom plans look cheaper: planned again at every call.)
CREATE FUNCTION kombu_pg.enqueue_plainly(
    p_queue text, p_priority integer, p_ttl bigint, p_task text, p_task_id text, p_reply_to text, p_properties bytea,
    p_body bytea, p_publish_id uuid
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    -- A transaction must have its own id before it draws a message id: low-water marks pass a position only when
    -- every transaction that was running when it was drawn is over, and they know those by their ids.
    v_xid xid8 := pg_current_xact_id();
    v_id bigint;
    v_queue bigint;
    v_band smallint;
BEGIN
    -- A task's own expiry is the worker's to record (REVOKED); only the queue's drops it here.
    INSERT INTO kombu_pg.message (id, queue_id, expires_at, publish_id, priority, band, task, task_id, reply_to,
                                  exchange, routing_key, properties, body)
    SELECT nextval('kombu_pg.message_id_seq'), q.id,
           clock_timestamp() + least(q.message_ttl, CASE WHEN p_task IS NULL THEN p_ttl END) * interval '1 ms',
           p_publish_id, least(greatest(p_priority, 0), 255), kombu_pg.band(q.max_priority, p_priority),
           p_task, p_task_id, p_reply_to, '', p_queue, p_properties, p_body
      FROM kombu_pg.queue q WHERE q.name = p_queue AND NOT q.limited
    RETURNING id, queue_id, band INTO v_id, v_queue, v_band;
    IF FOUND THEN
        INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)
        VALUES (v_queue, v_band, v_id, v_id, octet_length(p_properties) + octet_length(p_body));
    END IF;
    RETURN v_queue;
END $$;

-- The same for what is routed by an exchange, is not yet due, or enters a queue with a limit.
CREATE FUNCTION kombu_pg.enqueue_routed(
    p_exchange text, p_routing_key text, p_priority integer, p_ttl bigint, p_due timestamptz,
    p_task text, p_task_id text, p_reply_to text, p_properties bytea, p_body bytea,
    p_publish_id uuid, p_mandatory boolean, p_headers jsonb,
    OUT queue_ids bigint[], OUT refusal text, OUT due timestamptz
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_xid xid8 := pg_current_xact_id();  -- see enqueue_plainly
    v_routed record;
    v_further boolean;
    v_limited boolean;
    v_full bigint;
    v_copies bigint;
BEGIN
    IF p_exchange = '' THEN
        SELECT ARRAY[q.id], q.limited INTO queue_ids, v_limited FROM kombu_pg.queue q WHERE q.name = p_routing_key;
    ELSE
        SELECT coalesce(array_agg(DISTINCT q.id), '{}'), bool_or(q.limited), bool_or(q.id IS NULL OR b.headers IS NOT NULL)
          INTO queue_ids, v_limited, v_further
          FROM kombu_pg.binding b LEFT JOIN kombu_pg.queue q ON q.id = b.queue_id
         WHERE b.exchange = p_exchange AND b.key IN ('=' || p_routing_key, '~') AND (b.pattern IS NULL
            OR CASE WHEN p_routing_key = '' THEN '' ELSE '.' || p_routing_key END ~ b.pattern);
        -- To other exchanges, or by headers: that takes more than one probe.
        IF v_further THEN
            v_routed := kombu_pg.route(p_exchange, p_routing_key, p_headers);
            queue_ids := v_routed.queue_ids;
            v_limited := v_routed.limited;
            IF v_routed.headers_wanted THEN
                queue_ids := '{}';
                refusal := 'headers';
                RETURN;
            END IF;
        END IF;
    END IF;
    IF v_limited THEN
        v_full := kombu_pg.refuses_more(queue_ids, octet_length(p_body));
        IF v_full IS NOT NULL THEN
            refusal := 'full: ' || (SELECT q.name FROM kombu_pg.queue q WHERE q.id = v_full);
            queue_ids := kombu_pg.dead_letter_refused(
                v_full, p_priority, p_task, p_task_id, p_reply_to, p_exchange, p_routing_key, p_properties, p_body);
            RETURN;
        END IF;
    END IF;
    IF p_due > clock_timestamp() THEN
        due := p_due;
    END IF;
    WITH copy AS (
        INSERT INTO kombu_pg.message (id, queue_id, expires_at, publish_id, priority, band, task, task_id, reply_to,
                                      exchange, routing_key, properties, body)
        SELECT nextval('kombu_pg.message_id_seq'), q.id, coalesce(due, clock_timestamp())
               + least(q.message_ttl, CASE WHEN p_task IS NULL THEN p_ttl END) * interval '1 ms',
               p_publish_id, least(greatest(p_priority, 0), 255), kombu_pg.band(q.max_priority, p_priority),
               p_task, p_task_id, p_reply_to, p_exchange, p_routing_key, p_properties, p_body
          FROM kombu_pg.queue q WHERE q.id = ANY (queue_ids)
        RETURNING id, queue_id, band
    ), later AS (
        INSERT INTO kombu_pg.scheduled (due_at, message_id, queue_id)
        SELECT due, c.id, c.queue_id FROM copy c WHERE due IS NOT NULL
    ), now AS (
        INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)
        SELECT c.queue_id, c.band, c.id, c.id, octet_length(p_properties) + octet_length(p_body) FROM copy c WHERE due IS NULL
    )
    SELECT count(*) INTO v_copies FROM copy;
    IF v_copies > 0 THEN
        IF v_limited THEN
            queue_ids := queue_ids || kombu_pg.drop_heads(queue_ids);
        END IF;
        RETURN;
    END IF;
    queue_ids := '{}';
    IF p_exchange <> '' AND NOT EXISTS (SELECT FROM kombu_pg.exchange e WHERE e.name = p_exchange) THEN
        refusal := 'no exchange';
    ELSIF p_task IS NOT NULL AND NOT p_mandatory AND (p_exchange = '' OR EXISTS (
            SELECT FROM kombu_pg.exchange e WHERE e.name = p_exchange AND e.type = 'direct')) THEN
        refusal := 'no queue';
    END IF;
END $$;

-- The queues that already hold a copy of a publish whose first attempt began p_age seconds ago. There is no index
-- on publish_id: the newest messages are walked backwards until they are older than the attempt.
CREATE FUNCTION kombu_pg.find_published(p_publish_id uuid, p_age double precision) RETURNS bigint[]
LANGUAGE plpgsql SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_since timestamptz := clock_timestamp() - make_interval(secs => p_age + 5);
    v_message record;
    v_found bigint[] := '{}';
BEGIN
    FOR v_message IN SELECT m.queue_id, m.publish_id, m.enqueued_at FROM kombu_pg.message m ORDER BY m.id DESC LOOP
        EXIT WHEN v_message.enqueued_at < v_since;
        IF v_message.publish_id = p_publish_id THEN
            v_found := v_found || v_message.queue_id;
        END IF;
    END LOOP;
    RETURN v_found;
END $$;

-- Publish in a transaction of its own, in one round trip; durable, where p_persistent, when this returns. If it is not pushed
-- (p_push), who is idle is told in a second transaction, which waits for no flush (NOTIFY takes a cluster-wide lock; inside the first it would be
-- held over the flush). Where somebody was idle already before the first commit (on the only queue, and the message has no
-- due time), that waits for no flush either: he is told at once, and a third transaction, of nothing but a record in the
-- log, waits for the flush of all three meanwhile.
-- (A consumer may have a message before its publisher knows that it is durable, as with RabbitMQ. What he commits is
-- behind it in the log.)
-- No SET clause and no SECURITY DEFINER here: with either, COMMIT is an "invalid transaction termination".
--
-- What there is to say is said at level INFO ('refused: ', then as enqueue, or 'no route' where p_mandatory): it always
-- reaches the client, by default not the log, and costs nothing when there is nothing to say. A result row costs every publish
-- 9 us here and in the client, defaults 3 us.
CREATE PROCEDURE kombu_pg.publish(
    p_persistent boolean,
    p_exchange text, p_routing_key text, p_priority integer, p_ttl bigint, p_due timestamptz,
    p_task text, p_task_id text, p_reply_to text, p_properties bytea, p_body bytea,
    p_publish_id uuid, p_retry_age double precision, p_mandatory boolean, p_headers jsonb, p_push boolean
) LANGUAGE plpgsql AS $$
DECLARE
    v_queue bigint;  -- if one queue has got it, and it has no due time
    v_enqueued record;
    v_plain boolean;
    v_idle boolean;
    v_pushed boolean := false;
    v_set text;
    v_done boolean;
    v_flushed pg_lsn;
BEGIN
    IF p_exchange = '' AND p_due IS NULL AND p_retry_age IS NULL
       AND pg_advisory_xact_lock(uuid_hash_extended(p_publish_id, 0)) IS NOT NULL THEN
        v_queue := kombu_pg.enqueue_plainly(p_routing_key, p_priority, p_ttl, p_task, p_task_id, p_reply_to, p_properties,
                                            p_body, p_publish_id);
    END IF;
    v_plain := v_queue IS NOT NULL;
    IF NOT v_plain THEN
        v_enqueued := kombu_pg.enqueue(p_exchange, p_routing_key, p_priority, p_ttl, p_due, p_task, p_task_id, p_reply_to,
                                       p_properties, p_body, p_publish_id, p_retry_age, p_mandatory, p_headers);
        IF v_enqueued.refusal IS NULL AND p_due IS NULL AND cardinality(v_enqueued.queue_ids) = 1 THEN
            v_queue := v_enqueued.queue_ids[1];
        END IF;
    END IF;
    -- Twice: another publisher's try looks like somebody idle, and is over in a moment.
    v_idle := v_queue IS NOT NULL AND kombu_pg.somebody_idle(v_queue) AND kombu_pg.somebody_idle(v_queue);
    -- (Two IFs: in the usual one, nobody is idle.)
    IF v_idle THEN
        IF p_push AND v_plain AND p_ttl IS NULL THEN
            v_pushed := kombu_pg.push(v_queue, currval('kombu_pg.message_id_seq'), p_priority, p_properties, p_body);
        END IF;
    END IF;
    IF (CASE WHEN v_idle OR NOT p_persistent THEN true
             ELSE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') END) THEN
        v_set := set_config('synchronous_commit', CASE WHEN v_idle OR NOT p_persistent THEN 'off' ELSE 'on' END, true);
    END IF;
    COMMIT;
    BEGIN
        IF v_queue IS NULL THEN
            IF v_enqueued.refusal IS NOT NULL OR p_mandatory AND v_enqueued.queue_ids = '{}' THEN
                RAISE INFO 'refused: %', coalesce(v_enqueued.refusal, 'no route');
            END IF;
            v_set := set_config('synchronous_commit', 'off', true);
            IF v_enqueued.due IS NULL THEN
                v_done := kombu_pg.wake(v_enqueued.queue_ids) IS NULL;
            ELSE
                v_done := kombu_pg.wake_clock(v_enqueued.due) IS NULL;
            END IF;
        ELSIF NOT v_pushed AND (v_idle OR kombu_pg.somebody_idle(v_queue)) THEN
            v_set := set_config('synchronous_commit', 'off', true);
            v_done := kombu_pg.wake_idle(v_queue) IS NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        -- The message is in: what went wrong after that must not look like a failed publish.
        RAISE WARNING 'kombu_pg: the message is stored, but idle consumers were not told: %', SQLERRM;
    END;
    -- (A retry may have found the copy of an attempt that did not live to flush it.)
    IF p_persistent AND (v_idle OR p_retry_age IS NOT NULL) THEN
        COMMIT;
        IF current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') THEN
            v_set := set_config('synchronous_commit', 'on', true);
        END IF;
        -- A commit that has written nothing else flushes nothing.
        v_flushed := pg_logical_emit_message(true, 'kombu_pg', ''::text);
    END IF;
END $$;

-- Publish many messages in one transaction: all of them, or, if one is refused, none. done: how many; refusal: of the
-- message with the index done.
CREATE PROCEDURE kombu_pg.publish_batch(
    p_persistent boolean,
    p_exchange text[], p_routing_key text[], p_priority integer[], p_ttl bigint[], p_due timestamptz[],
    p_task text[], p_task_id text[], p_reply_to text[], p_properties bytea[], p_body bytea[],
    p_mandatory boolean[], p_headers jsonb[],
    INOUT done integer DEFAULT NULL, INOUT refusal text DEFAULT NULL
) LANGUAGE plpgsql AS $$
DECLARE
    v_message record;
    v_enqueued record;
    v_queues bigint[] := '{}';
    v_due timestamptz;
BEGIN
    done := 0;
    IF NOT p_persistent THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    ELSIF current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    FOR v_message IN
        SELECT * FROM unnest(p_exchange, p_routing_key, p_priority, p_ttl, p_due, p_task, p_task_id, p_reply_to,
                             p_properties, p_body, p_mandatory, p_headers)
            AS m (exchange, routing_key, priority, ttl, due, task, task_id, reply_to, properties, body, mandatory, headers)
    LOOP
        v_enqueued := kombu_pg.enqueue(
            v_message.exchange, v_message.routing_key, v_message.priority, v_message.ttl, v_message.due, v_message.task,
            v_message.task_id, v_message.reply_to, v_message.properties, v_message.body, NULL, NULL, v_message.mandatory,
            v_message.headers);
        IF v_enqueued.refusal IS NOT NULL OR (v_message.mandatory AND v_enqueued.queue_ids = '{}') THEN
            refusal := coalesce(v_enqueued.refusal, 'no route');
            ROLLBACK;
            RETURN;
        END IF;
        done := done + 1;
        v_queues := ARRAY(SELECT unnest(v_queues) UNION SELECT unnest(v_enqueued.queue_ids));
        v_due := least(v_due, v_enqueued.due);
    END LOOP;
    COMMIT;
    PERFORM set_config('synchronous_commit', 'off', true);
    BEGIN
        PERFORM kombu_pg.wake(v_queues);
        IF v_due IS NOT NULL THEN
            PERFORM kombu_pg.wake_clock(v_due);
        END IF;
    EXCEPTION WHEN OTHERS THEN
        RAISE WARNING 'kombu_pg: the messages are stored, but idle consumers were not told: %', SQLERRM;
    END;
END $$;
