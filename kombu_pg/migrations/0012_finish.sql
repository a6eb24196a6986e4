-- 0012: the end of a message in somebody's transaction. pre-deployment, not breaking.

-- The message has ended with this transaction: acknowledged, or (p_reject) a dead letter whose task has been recorded as
-- failed. Returns the queues to wake after the commit. The row is the fence: where it is gone, somebody else has
-- finished the message, and whatever this transaction did for it must not be (SQLSTATE KP001).
-- Not a check of the lease: two that work on one message would both find it theirs, or neither.
CREATE FUNCTION kombu_pg.finish(p_id bigint, p_reject boolean) RETURNS bigint[]
LANGUAGE plpgsql AS $$
DECLARE
    v_set text;
BEGIN
    -- Whatever the transaction is: a message that was finished in it has been finished for good.
    IF current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') THEN
        v_set := set_config('synchronous_commit', 'on', true);
    END IF;
    IF p_reject THEN
        PERFORM FROM kombu_pg.message m WHERE m.id = p_id FOR UPDATE;
        IF FOUND THEN
            RETURN kombu_pg.dead_letter(ARRAY[p_id], 'rejected', NULL, true);
        END IF;
    ELSE
        DELETE FROM kombu_pg.message m WHERE m.id = p_id;
        IF FOUND THEN
            RETURN '{}';
        END IF;
    END IF;
    RAISE EXCEPTION 'message % is finished already', p_id USING ERRCODE = 'KP001';
END $$;
