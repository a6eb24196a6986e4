-- 0009: chords. pre-deployment, not breaking.
--
-- A *chord* is known by its group's id; its *parts* are what the tasks of its header returned. Parts are numbered 1, 2, ..
-- as they come: the highest number is the count. So nothing is updated while a chord runs, and it counts as fast under a
-- snapshot that stays open. An advisory lock for the length of a transaction serialises what changes a chord; transactions
-- that only count a part commit without waiting for the flush, so the lock is held for microseconds.
--
-- The part that completes a chord is not counted alone: `count_part` says 'last' and changes nothing, and the caller
-- counts it again in the transaction in which it finishes the chord and publishes the body.
--
-- Plans are made when the tables may be empty, and are kept: hence no sequential scans in functions that read the parts.

CREATE TABLE kombu_pg.chord (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text COLLATE "C" NOT NULL UNIQUE,
    size integer,
    added integer NOT NULL DEFAULT 0,
    done_at timestamptz,
    time_to_live interval,
    expires_at timestamptz NOT NULL,
    structure bytea
) WITH (
    fillfactor = 80,
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);
COMMENT ON COLUMN kombu_pg.chord.size IS 'NULL: not yet known, its header is still being published';
COMMENT ON COLUMN kombu_pg.chord.added IS 'how many parts its own parts have added to it';
COMMENT ON COLUMN kombu_pg.chord.done_at IS 'its body was published, or has failed; kept a while for parts that come again';
COMMENT ON COLUMN kombu_pg.chord.structure IS 'the encoded GroupResult of a header with groups in it; NULL: its results are a plain list';
CREATE INDEX chord_expires ON kombu_pg.chord (expires_at);

CREATE TABLE kombu_pg.chord_part (
    chord_key bigint NOT NULL,
    number integer NOT NULL,
    position integer,
    counted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    task_id text COLLATE "C" NOT NULL,
    state text NOT NULL,
    result bytea NOT NULL,
    PRIMARY KEY (chord_key, number)
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);
COMMENT ON COLUMN kombu_pg.chord_part.position IS 'its place in the header; NULL: not known';
COMMENT ON COLUMN kombu_pg.chord_part.result IS 'a copy of its own: results may be ignored, forgotten, or expire sooner';
CREATE INDEX chord_part_task ON kombu_pg.chord_part (chord_key, task_id);

-- From here to its end the transaction is the only one that changes this chord.
CREATE FUNCTION kombu_pg.lock_chord(p_chord text) RETURNS void
LANGUAGE sql AS $$ SELECT pg_advisory_xact_lock(hashtextextended('kombu_pg.chord/' || p_chord, 0)) $$;

-- Done chords are kept for a day at most: a part that comes again after that finds a chord without a size, which never
-- completes. (Seconds; NULL = results never expire.)
CREATE FUNCTION kombu_pg.chord_expiry(p_done boolean, p_time_to_live interval) RETURNS timestamptz
LANGUAGE sql VOLATILE AS $$
    SELECT clock_timestamp() + CASE WHEN p_done THEN least(p_time_to_live, '1 day') ELSE coalesce(p_time_to_live, '100 years') END
$$;

-- The chord's row, made if need be; the caller holds its lock.
CREATE FUNCTION kombu_pg.open_chord(p_chord text, p_time_to_live double precision) RETURNS bigint
LANGUAGE sql AS $$
    INSERT INTO kombu_pg.chord AS c (id, time_to_live, expires_at)
    VALUES (p_chord, make_interval(secs => p_time_to_live), kombu_pg.chord_expiry(false, make_interval(secs => p_time_to_live)))
    ON CONFLICT (id) DO UPDATE SET time_to_live = excluded.time_to_live
    RETURNING c.key
$$;

-- Count a part, once. -> 'counted' | 'known' (it was before, or the chord is done) | 'last': with it the chord is complete,
-- and nothing was changed. p_complete: then it is counted all the same, for the caller finishes the chord in this transaction.
-- Otherwise the transaction must hold nothing that has to be flushed.
CREATE FUNCTION kombu_pg.count_part(
    p_chord text, p_task_id text, p_position integer, p_state text, p_result bytea,
    p_time_to_live double precision, p_complete boolean
) RETURNS text LANGUAGE plpgsql SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_locked boolean := kombu_pg.lock_chord(p_chord) IS NULL;
    v_set text;
    v_key bigint;
    v_size integer;
    v_done boolean;
    v_count integer;
    v_known boolean;
BEGIN
    IF NOT p_complete THEN
        v_set := set_config('synchronous_commit', 'off', true);
    END IF;
    -- A statement of its own: it must see what was committed while this one waited for the lock.
    SELECT c.key, c.size + c.added, c.done_at IS NOT NULL,
           coalesce((SELECT p.number FROM kombu_pg.chord_part p WHERE p.chord_key = c.key ORDER BY p.number DESC LIMIT 1), 0),
           EXISTS (SELECT FROM kombu_pg.chord_part p WHERE p.chord_key = c.key AND p.task_id = p_task_id
                      AND coalesce(p.position = p_position, true))
      INTO v_key, v_size, v_done, v_count, v_known
      FROM kombu_pg.chord c WHERE c.id = p_chord;
    IF v_done THEN
        RETURN 'known';
    END IF;
    IF v_key IS NULL THEN
        v_key := kombu_pg.open_chord(p_chord, p_time_to_live);
        v_count := 0;
    END IF;
    IF NOT p_complete AND v_count + (NOT coalesce(v_known, false))::integer >= v_size THEN
        RETURN 'last';
    END IF;
    IF v_known THEN
        RETURN 'known';
    END IF;
    INSERT INTO kombu_pg.chord_part (chord_key, number, position, task_id, state, result)
    VALUES (v_key, v_count + 1, p_position, p_task_id, p_state, p_result);
    RETURN 'counted';
END $$;

-- Say how many parts the chord has. A chord that is done begins anew: its header is published again. -> false: all its
-- parts have come, and nothing was changed, unless p_complete: the caller finishes the chord in this transaction.
CREATE FUNCTION kombu_pg.size_chord(
    p_chord text, p_size integer, p_time_to_live double precision, p_complete boolean
) RETURNS boolean LANGUAGE plpgsql SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_locked boolean := kombu_pg.lock_chord(p_chord) IS NULL;
    v_key bigint := kombu_pg.open_chord(p_chord, p_time_to_live);
BEGIN
    IF NOT p_complete AND EXISTS (
        SELECT FROM kombu_pg.chord c JOIN kombu_pg.chord_part p ON p.chord_key = c.key
         WHERE c.key = v_key AND p.number >= p_size + c.added)
    THEN
        RETURN false;
    END IF;
    UPDATE kombu_pg.chord c
       SET size = p_size, done_at = NULL, added = CASE WHEN c.done_at IS NULL THEN c.added ELSE 0 END,
           expires_at = kombu_pg.chord_expiry(false, c.time_to_live)
     WHERE c.key = v_key;
    RETURN true;
END $$;

-- One of its parts has added another one to the chord, and will return after this.
CREATE FUNCTION kombu_pg.grow_chord(p_chord text, p_time_to_live double precision) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_locked boolean := kombu_pg.lock_chord(p_chord) IS NULL;
    v_key bigint := kombu_pg.open_chord(p_chord, p_time_to_live);
BEGIN
    UPDATE kombu_pg.chord c SET added = c.added + 1 WHERE c.key = v_key AND c.done_at IS NULL;
END $$;

-- Keep how the results of the header are nested, before any of its tasks is published.
CREATE FUNCTION kombu_pg.shape_chord(p_chord text, p_structure bytea, p_time_to_live double precision) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_locked boolean := kombu_pg.lock_chord(p_chord) IS NULL;
    v_key bigint := kombu_pg.open_chord(p_chord, p_time_to_live);
BEGIN
    UPDATE kombu_pg.chord c SET structure = p_structure WHERE c.key = v_key;
END $$;

-- If all parts have come, the chord is done, and they are handed out, once, in the header's order. (Parts that do not
-- know their place come last, as they came.) structure is in the first row only.
CREATE FUNCTION kombu_pg.finish_chord(p_chord text)
RETURNS TABLE (task_id text, state text, result bytea, structure bytea) LANGUAGE plpgsql SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_locked boolean := kombu_pg.lock_chord(p_chord) IS NULL;
    v_key bigint;
    v_structure bytea;
BEGIN
    UPDATE kombu_pg.chord c
       SET done_at = clock_timestamp(), expires_at = kombu_pg.chord_expiry(true, c.time_to_live)
     WHERE c.id = p_chord AND c.done_at IS NULL
       AND EXISTS (SELECT FROM kombu_pg.chord_part p WHERE p.chord_key = c.key AND p.number >= c.size + c.added)
    RETURNING c.key, c.structure INTO v_key, v_structure;
    RETURN QUERY
    WITH gone AS (
        DELETE FROM kombu_pg.chord_part p WHERE p.chord_key = v_key
        RETURNING p.number, p.position, p.task_id, p.state, p.result
    )
    SELECT g.task_id, g.state, g.result,
           CASE WHEN row_number() OVER (ORDER BY g.position, g.number) = 1 THEN v_structure END
      FROM gone g ORDER BY g.position, g.number;
END $$;

-- Remove up to p_limit chords that have expired, with their parts. One that still runs expires after its latest part.
-- Never more than 200, for each of them is locked until the end. -> p_limit: there may be more; fewer: that was all.
CREATE FUNCTION kombu_pg.sweep_chords(p_limit integer) RETURNS integer
LANGUAGE plpgsql SET jit = off SET enable_seqscan = off AS $$
DECLARE
    v_chord record;
    -- A variable: the clock itself is volatile, so no index could be searched for it.
    v_now timestamptz := clock_timestamp();
    v_latest timestamptz;
    v_looked_at integer := 0;
BEGIN
    FOR v_chord IN
        SELECT c.key, c.id, c.time_to_live FROM kombu_pg.chord c WHERE c.expires_at < v_now
         ORDER BY c.expires_at LIMIT least(p_limit, 200) FOR UPDATE SKIP LOCKED
    LOOP
        v_looked_at := v_looked_at + 1;
        -- Somebody counts a part just now, which must not be left without its chord.
        CONTINUE WHEN NOT pg_try_advisory_xact_lock(hashtextextended('kombu_pg.chord/' || v_chord.id, 0));
        SELECT p.counted_at + v_chord.time_to_live INTO v_latest FROM kombu_pg.chord_part p
         WHERE p.chord_key = v_chord.key ORDER BY p.number DESC LIMIT 1;
        IF v_latest > v_now THEN
            UPDATE kombu_pg.chord c SET expires_at = v_latest WHERE c.key = v_chord.key;
        ELSE
            DELETE FROM kombu_pg.chord_part p WHERE p.chord_key = v_chord.key;
            DELETE FROM kombu_pg.chord c WHERE c.key = v_chord.key;
        END IF;
    END LOOP;
    RETURN CASE WHEN v_looked_at >= 200 THEN p_limit ELSE v_looked_at END;
END $$;
