-- 0001: the tables. pre-deployment, not breaking (there is nothing before it).
--
-- The model on one screen
-- =======================
-- A *message* is one wide row, written once. It is published into one queue (a message that is routed to three
-- queues is three rows), and it leaves by one DELETE: ack, reject, expiry, purge or dead-lettering. The row is
-- the fence: whoever deletes it has settled the message, everybody else finds 0 rows.
--
-- Where the message stands is said by narrow rows beside it, and it stands in one place at a time:
--
--     ready      may be claimed now, in the order (band, position)
--     scheduled  not before due_at (eta, countdown, retries)
--     lease      claimed: one row per claimed batch, with the ids; or pushed: one row per message; owned by a consumer
--
-- A narrow row whose message is gone means nothing: claims skip it, sweeps remove it. So an ack is one DELETE from
-- `message`, and nothing on the normal path ever updates a wide row.
--
-- ready.band orders a queue: 0 = suspects (returned three times or more), then for each priority, highest first,
-- three bands: returned (1, 4, ..), due (2, 5, ..: its eta has come), fresh (3, 6, ..). Without x-max-priority a queue
-- has the bands 0 to 3. ready.position orders a band: it is the message id (of suspects, the count of returns comes
-- first). Ids are drawn when the message is published, so positions of fresh bands only grow, and a consumer may keep
-- a low-water mark there; the other bands have none.
--
-- A *consumer* is one consuming process; it lives while its session holds the advisory lock lock_key('alive', id)
-- (or, behind a pooler, while seen_at moves). A *subscription* is one basic.consume of it.
--
-- Locks are taken in the order queue < lease < message (ascending id) < ready. There are no foreign keys and no
-- counters: both would serialise publishers. Queue ids are never reused.
--
-- Functions that pin their plans by switching scans off switch jit off, too: where a plan has to use such a scan all the
-- same, it seems so expensive that the server compiles it, at 200 ms for each call.

CREATE TABLE kombu_pg.installation (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    version integer NOT NULL,
    serves integer NOT NULL,
    epoch text NOT NULL DEFAULT '',
    epoch_since timestamptz NOT NULL DEFAULT '-infinity',
    installed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON COLUMN kombu_pg.installation.serves IS 'the oldest schema version whose code may still run on this schema';
COMMENT ON COLUMN kombu_pg.installation.epoch IS 'postmaster start and timeline that the consumers last re-attached to';

CREATE TABLE kombu_pg.exchange (
    name text PRIMARY KEY,
    type text NOT NULL CHECK (type IN ('direct', 'topic', 'fanout', 'headers')),
    durable boolean NOT NULL DEFAULT true,
    auto_delete boolean NOT NULL DEFAULT false,
    arguments text NOT NULL DEFAULT '{}'
);
INSERT INTO kombu_pg.exchange (name, type) VALUES
    ('amq.direct', 'direct'), ('amq.fanout', 'fanout'), ('amq.headers', 'headers'), ('amq.topic', 'topic');

CREATE TABLE kombu_pg.queue (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    durable boolean NOT NULL,
    exclusive boolean NOT NULL,
    auto_delete boolean NOT NULL,
    owner_id bigint,
    owner_token bigint,
    max_priority smallint CHECK (max_priority BETWEEN 0 AND 255),
    message_ttl bigint CHECK (message_ttl >= 0),
    expires bigint CHECK (expires > 0),
    max_length bigint CHECK (max_length >= 0),
    max_length_bytes bigint CHECK (max_length_bytes >= 0),
    overflow text,
    dead_letter_exchange text,
    dead_letter_routing_key text,
    delivery_limit integer CHECK (delivery_limit >= 0),
    limited boolean GENERATED ALWAYS AS (max_length IS NOT NULL OR max_length_bytes IS NOT NULL) STORED,
    arguments text NOT NULL DEFAULT '{}',
    paused boolean NOT NULL DEFAULT false,
    used_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE kombu_pg.queue IS 'message_ttl and expires in milliseconds; NULL = not declared';
CREATE INDEX queue_expires ON kombu_pg.queue (used_at) WHERE expires IS NOT NULL;
CREATE INDEX queue_owner ON kombu_pg.queue (owner_id) WHERE owner_id IS NOT NULL;

-- What reaches the exchange goes on to a queue, or to another exchange (destination). key is what a publish probes for:
-- '=' || routing_key for an exact match, '~' for "look at the pattern and at the headers" (NULL = anything will do).
-- One index serves all exchange types.
CREATE TABLE kombu_pg.binding (
    exchange text NOT NULL,
    key text NOT NULL,
    queue_id bigint,
    destination text,
    routing_key text NOT NULL,
    pattern text,
    headers jsonb,
    arguments text NOT NULL DEFAULT '{}',
    CHECK (num_nonnulls(queue_id, destination) = 1)
);
CREATE UNIQUE INDEX binding_probe ON kombu_pg.binding
    (exchange, key, coalesce(queue_id, 0), coalesce(destination, ''), routing_key, md5(arguments));
CREATE INDEX binding_destination ON kombu_pg.binding (destination) WHERE destination IS NOT NULL;
CREATE INDEX binding_queue ON kombu_pg.binding (queue_id);

CREATE SEQUENCE kombu_pg.message_id_seq;

CREATE TABLE kombu_pg.message (
    id bigint PRIMARY KEY,
    queue_id bigint NOT NULL,
    enqueued_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    publish_id uuid,
    returns integer NOT NULL DEFAULT 0,
    priority smallint NOT NULL,
    band smallint NOT NULL,
    task text,
    task_id text,
    reply_to text,
    exchange text NOT NULL,
    routing_key text NOT NULL,
    deaths jsonb,
    properties bytea NOT NULL,
    body bytea NOT NULL
) WITH (
    fillfactor = 90,
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);
COMMENT ON COLUMN kombu_pg.message.deaths IS 'the x-death header: through which queues'' dead letters it came, the latest first';
COMMENT ON COLUMN kombu_pg.message.band IS 'the fresh band of ready that its priority means in its queue';
CREATE INDEX message_expires ON kombu_pg.message (expires_at, id) WHERE expires_at IS NOT NULL;

-- bigints first: size fits into what alignment would waste.
CREATE TABLE kombu_pg.ready (
    queue_id bigint NOT NULL,
    position bigint NOT NULL,
    message_id bigint NOT NULL,
    size integer NOT NULL,
    band smallint NOT NULL,
    PRIMARY KEY (queue_id, band, position)
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);

CREATE TABLE kombu_pg.scheduled (
    due_at timestamptz NOT NULL,
    message_id bigint NOT NULL,
    queue_id bigint NOT NULL,
    PRIMARY KEY (queue_id, message_id)
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);
CREATE INDEX scheduled_due ON kombu_pg.scheduled (due_at);
CREATE INDEX scheduled_queue ON kombu_pg.scheduled (queue_id, due_at);

CREATE TABLE kombu_pg.lease (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer_id bigint NOT NULL,
    token bigint NOT NULL,
    claimed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    offer bigint,
    message_ids bigint[] NOT NULL
) WITH (
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);
CREATE INDEX lease_consumer ON kombu_pg.lease (consumer_id);
CREATE INDEX lease_offer ON kombu_pg.lease (offer) WHERE offer IS NOT NULL;
COMMENT ON COLUMN kombu_pg.lease.token IS 'which connection of the process claimed it';
COMMENT ON COLUMN kombu_pg.lease.offer IS 'it was not claimed but pushed, by its publisher, to who had made this offer';

-- Sessions that a publisher may push a message to (see push). Not logged: they end with the server, and a row without its
-- session means nothing.
CREATE UNLOGGED TABLE kombu_pg.session (
    pid integer PRIMARY KEY,
    consumer_id bigint NOT NULL,
    token bigint NOT NULL,
    channel text NOT NULL,
    offer bigint NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
CREATE SEQUENCE kombu_pg.offer_seq;
COMMENT ON COLUMN kombu_pg.session.channel IS 'known to nobody who may not read this: messages come there';

CREATE TABLE kombu_pg.consumer (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hostname text NOT NULL,
    pid integer NOT NULL,
    heartbeat boolean NOT NULL,
    backend_pid integer,
    backend_start timestamptz,
    epoch text NOT NULL,
    grace double precision NOT NULL,
    heartbeat_timeout double precision NOT NULL,
    attached_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lost_at timestamptz
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
COMMENT ON COLUMN kombu_pg.consumer.grace IS 'seconds that it has to come back; it says so itself, as it does how long its heart may pause';
COMMENT ON COLUMN kombu_pg.consumer.heartbeat IS 'true: alive while seen_at moves (behind a pooler); false: alive while its lock is held';

CREATE TABLE kombu_pg.subscription (
    consumer_id bigint NOT NULL,
    token bigint NOT NULL,
    tag text NOT NULL,
    queue_id bigint NOT NULL,
    PRIMARY KEY (queue_id, consumer_id, token, tag)
);
CREATE INDEX subscription_consumer ON kombu_pg.subscription (consumer_id);

-- The whole message, why it ended here, and whether its task's result, link_error and chord have heard of it.
CREATE TABLE kombu_pg.dead_letter (
    id bigint PRIMARY KEY,
    queue_id bigint NOT NULL,
    queue text NOT NULL,
    reason text NOT NULL,
    detail text,
    dead_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    heard_at timestamptz,
    enqueued_at timestamptz NOT NULL,
    returns integer NOT NULL,
    priority smallint NOT NULL,
    task text,
    task_id text,
    reply_to text,
    exchange text NOT NULL,
    routing_key text NOT NULL,
    deaths jsonb,
    properties bytea NOT NULL,
    body bytea NOT NULL
);
CREATE INDEX dead_letter_unheard ON kombu_pg.dead_letter (queue, id) WHERE heard_at IS NULL;
CREATE INDEX dead_letter_age ON kombu_pg.dead_letter (heard_at) WHERE heard_at IS NOT NULL;

CREATE VIEW kombu_pg.queue_status AS
SELECT q.name,
       (SELECT count(*) FROM kombu_pg.ready r WHERE r.queue_id = q.id) AS ready,
       (SELECT count(*) FROM kombu_pg.scheduled s WHERE s.queue_id = q.id) AS scheduled,
       (SELECT count(*) FROM kombu_pg.lease l CROSS JOIN LATERAL unnest(l.message_ids) AS held (id)
          JOIN kombu_pg.message m ON m.id = held.id WHERE m.queue_id = q.id) AS unacked,
       (SELECT count(*) FROM kombu_pg.dead_letter d WHERE d.queue_id = q.id) AS dead,
       (SELECT count(*) FROM kombu_pg.subscription u WHERE u.queue_id = q.id) AS consumers,
       q.paused
  FROM kombu_pg.queue q;

CREATE VIEW kombu_pg.task_message AS
SELECT m.id, q.name AS queue, m.task, m.task_id, m.enqueued_at, s.due_at, m.expires_at, m.priority, m.returns, m.reply_to,
       CASE WHEN s.message_id IS NOT NULL THEN 'scheduled'
            WHEN EXISTS (SELECT FROM kombu_pg.lease l WHERE m.id = ANY (l.message_ids)) THEN 'unacked'
            ELSE 'ready' END AS state
  FROM kombu_pg.message m
  LEFT JOIN kombu_pg.queue q ON q.id = m.queue_id
  LEFT JOIN kombu_pg.scheduled s ON s.queue_id = m.queue_id AND s.message_id = m.id
 WHERE m.task IS NOT NULL;
