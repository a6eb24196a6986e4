import logging
import pickle
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn

from kombu_pg.errors import OptionError
from kombu_pg.options import OPTIONS, Options, from_components, join_password, redact, split_password

LISTEN = quote("postgresql://listener:s3cret2@direct:5433/db", safe="")


@pytest.mark.parametrize(
    "scheme", ["pg", "postgres", "postgresql", "psycopg2", "pg+postgresql", "postgresql+psycopg2", "PG"]
)
def test_every_scheme_becomes_a_libpq_uri(scheme):
    options = Options.parse(f"{scheme}://u:p@h:5433/db?sslmode=require")

    assert options.dsn == "postgresql://u:p@h:5433/db?sslmode=require"


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("u:p%40%2F%3A%25@h/db", {"user": "u", "password": "p@/:%", "host": "h", "dbname": "db"}),
        ("u:p+w@h/db", {"user": "u", "password": "p+w", "host": "h", "dbname": "db"}),
        ("u:a@b@h/db", {"user": "u", "password": "a@b", "host": "h", "dbname": "db"}),
        ("u:a%zz@h/db", {"user": "u", "password": "a%zz", "host": "h", "dbname": "db"}),
        (":p@/db", {"password": "p", "dbname": "db"}),
        (
            "u@h1:5432,h2:5433/db?target_session_attrs=read-write",
            {"user": "u", "host": "h1,h2", "port": "5432,5433", "dbname": "db", "target_session_attrs": "read-write"},
        ),
        ("u@[::1]:5432/db", {"user": "u", "host": "::1", "port": "5432", "dbname": "db"}),
        ("%2Fvar%2Frun/db", {"host": "/var/run", "dbname": "db"}),
        ("/db?host=/var/run&port=5433", {"host": "/var/run", "port": "5433", "dbname": "db"}),
        ("u@h?application_name=a%26b", {"user": "u", "host": "h", "application_name": "a&b"}),
        ("h/d%20b?ssl=true", {"host": "h", "dbname": "d b", "sslmode": "require"}),
        ("", {}),
    ],
)
def test_libpq_reads_what_the_user_wrote(rest, expected):
    assert parse_dsn(Options.parse(f"pg://{rest}").dsn) == expected


def test_our_keys_are_taken_out_of_the_url_and_libpqs_stay():
    options = Options.parse("pg://h/db?schema=jobs&sslmode=require&poll_interval=0&auto_install=no&delivery_limit=3")

    assert options.dsn == "postgresql://h/db?sslmode=require"
    assert (options.schema, options.poll_interval, options.auto_install, options.delivery_limit) == (
        "jobs",
        0,
        False,
        3,
    )


def test_what_is_not_set_has_the_default_of_the_table():
    options = Options.parse("pg://h/db")

    for option in OPTIONS:
        if option.name != "listen_url":
            assert getattr(options, option.name) == option.default
            assert type(getattr(options, option.name)) is type(option.default)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.minimum is not None], ids=lambda o: o.name)
@pytest.mark.parametrize("beyond", [-1, 1])
def test_a_value_out_of_range_is_refused_with_its_unit_and_range(option, beyond):
    value = option.minimum - 1 if beyond < 0 else option.maximum + 1

    with pytest.raises(OptionError, match=rf'"{option.name}" is "{value}", not .*{option.unit} from .* to '):
        Options.parse(f"pg://h/db?{option.name}={value}")


@pytest.mark.parametrize("value", ["Maybe", "", "1e999", "-nan", "5 s", "0x10", "pg_x", "é", "a" * 49, "1a", "a-b"])
@pytest.mark.parametrize("name", [o.name for o in OPTIONS])
def test_an_ill_typed_value_is_refused_by_name(name, value):
    with pytest.raises(OptionError, match=name):
        Options.parse("pg://h/db", {name: value})


@pytest.mark.parametrize(("name", "value"), [("delivery_limit", True), ("poll_interval", False), ("auto_install", 1)])
def test_a_boolean_is_not_a_number(name, value):
    with pytest.raises(OptionError, match=name):
        Options.parse("pg://h/db", {name: value})


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("YES", True), ("on", True), ("false", False), ("0", False)]
)
def test_booleans_are_written_in_every_usual_way(text, value):
    assert Options.parse(f"pg://h/db?auto_install={text}").auto_install is value


def test_the_message_for_a_wrong_value_reads_as_a_sentence():
    with pytest.raises(OptionError) as caught:
        Options.parse("pg://h/db?reconnect_grace=soon")

    assert str(caught.value) == 'option "reconnect_grace" is "soon", not a number of seconds from 0 to 3,600'


def test_a_misspelt_query_key_is_refused_with_the_right_name():
    with pytest.raises(OptionError) as caught:
        Options.parse("pg://h/db?reconect_grace=3")

    assert str(caught.value) == 'unknown option "reconect_grace": did you mean "reconnect_grace"?'


def test_a_misspelt_libpq_keyword_is_refused_with_the_right_name():
    with pytest.raises(OptionError, match=r'unknown option "ssl_mode": did you mean "sslmode"\?'):
        Options.parse("pg://h/db?ssl_mode=require")


def test_a_misspelt_transport_option_is_refused_with_the_right_name():
    with pytest.raises(
        OptionError, match=r'unknown transport option "reconect_grace": did you mean "reconnect_grace"\?'
    ):
        Options.parse("pg://h/db", {"reconect_grace": 3})


def test_a_libpq_parameter_among_the_transport_options_is_sent_to_the_url():
    with pytest.raises(OptionError, match='"sslmode" is a libpq parameter: put it into the URL'):
        Options.parse("pg://h/db", {"sslmode": "require"})


def test_the_url_wins_over_the_transport_options():
    options = Options.parse("pg://h/db?poll_interval=1", {"poll_interval": 2, "delivery_limit": 7})

    assert (options.poll_interval, options.delivery_limit) == (1.0, 7)


def test_the_connect_timeout_of_the_url_wins_over_kombus():
    assert Options.parse("pg://h/db", connect_timeout=4).connect_timeout == 4.0
    assert Options.parse("pg://h/db", {"connect_timeout": 3}, connect_timeout=4).connect_timeout == 3.0
    options = Options.parse("pg://h/db?connect_timeout=2", {"connect_timeout": 3}, connect_timeout=4)
    assert options.connect_timeout == 2.0
    assert parse_dsn(options.dsn)["connect_timeout"] == "2"


def test_a_retry_policy_among_the_transport_options_is_ignored_silently(caplog):
    caplog.set_level(logging.DEBUG)

    Options.parse("pg://h/db", {"max_retries": 3, "interval_start": 0, "errback": print, "retry_errors": None})

    assert caplog.records == []


def test_options_of_other_transports_are_ignored_in_one_line(caplog):
    caplog.set_level(logging.DEBUG)

    Options.parse("pg://h/db", {"visibility_timeout": 3600, "confirm_publish": True, "fanout_prefix": True})

    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "ignoring options of other transports: confirm_publish, fanout_prefix, visibility_timeout")
    ]


def test_a_heartbeat_timeout_that_one_late_heartbeat_breaks_is_refused():
    with pytest.raises(OptionError, match="less than twice"):
        Options.parse("pg://h/db?heartbeat_interval=10&heartbeat_timeout=15")


def test_an_unknown_scheme_is_refused():
    with pytest.raises(OptionError, match='unknown URL scheme "redis"'):
        Options.parse("redis://h/0")


@pytest.mark.parametrize("scheme", ["pg+embedded", "embedded", "postgresql+embedded"])
def test_an_embedded_url_names_a_directory(scheme):
    options = Options.parse(f"{scheme}:///var/lib/my%20app/?application_name=a&schema=s")

    assert (options.embedded, options.schema) == ("/var/lib/my app", "s")
    on_server = parse_dsn(options.dsn_on("postgresql://postgres@/postgres?host=%2Ftmp%2Fx&port=5432"))
    assert on_server["host"] == "/tmp/x"
    assert on_server["application_name"] == "a"


@pytest.mark.parametrize("url", ["pg+embedded://host/dir", "pg+embedded://", "pg+embedded:///", "pg+embedded://u@/d"])
def test_an_embedded_url_without_a_directory_of_its_own_is_refused(url):
    with pytest.raises(OptionError, match="pg\\+embedded:///absolute"):
        Options.parse(url)


def test_a_listen_url_takes_user_password_and_database_from_the_url():
    options = Options.parse("pg://u:p@pooler:6432/db?listen_url=pg://direct:5432")

    assert options.dsn == "postgresql://u:p@pooler:6432/db"
    assert options.listen_dsn == "postgresql://u:p@direct:5432/db"


def test_a_listen_url_with_its_own_user_takes_no_password_of_another():
    options = Options.parse(f"pg://u:p@pooler/db?listen_url={LISTEN}")

    assert options.listen_dsn == "postgresql://listener:s3cret2@direct:5433/db"


def test_a_password_where_celery_would_show_it_is_refused():
    with pytest.raises(OptionError, match="put listen_url into the URL") as refused:
        Options.parse("pg://u:p@pooler/db", {"listen_url": "pg://u:s3cret@direct:5432"})

    assert "s3cret" not in str(refused.value)
    Options.parse("pg://u:p@pooler/db", {"listen_url": "pg://direct:5432"})


def test_our_options_inside_a_listen_url_are_refused():
    inner = quote("pg://direct/db?schema=x", safe="")

    with pytest.raises(OptionError, match='"schema" stands inside "listen_url"'):
        Options.parse(f"pg://pooler/db?listen_url={inner}")


def test_equal_settings_are_one_key():
    url = "pg://u:p@h/db?poll_interval=2"

    assert {Options.parse(url): 1}[Options.parse(url)] == 1
    assert Options.parse(url) != Options.parse("pg://u:q@h/db?poll_interval=2")
    assert pickle.loads(pickle.dumps(Options.parse(url))) == Options.parse(url)


SECRET_URLS = [
    "pg://u:s3cret@h/db",
    "pg://u:s3cret@h1:1,h2:2/db?sslmode=require",
    "pg://:s3cret@[::1]:5432/db",
    "postgresql+psycopg2://u:s3cret@h/db",
    "psycopg2://u:s3cret@h",
    "//u:s3cret@h/db?schema=x",
    "pg://u@h/db?password=s3cret",
    "pg://u@h/db?sslmode=require&pass%77ord=s3cret&schema=x",
    "pg://u:s3cret@h/db?sslpassword=s3cret2&sslkey=/k",
    f"pg://u:s3cret@h/db?listen_url={LISTEN}",
    f"pg://h/db?listen_url={LISTEN}&schema=x",
    "pg://h/db?listen_url=pg://l:s3cret@direct/db",
]


@pytest.mark.parametrize(
    "url",
    [
        *SECRET_URLS,
        ";".join(SECRET_URLS),
        "pg://u:s3cret@h/db;u:s3cret@h2/db",
        "pg://h/db?schema=x;u:s3cret@h2/db",
        "pg://u:s3cret/x@h/db",
        "pg://u:x/s3cret@h/db",
        "pg://u:x?s3cret@h/db",
        "pg://u:x;s3cret@h/db",
        "pg://u:a@b/s3cret@h/db",
        "host=h user=u password=s3cret dbname=db",
        "host=h password = 's3cret s3cret' dbname=db",
    ],
)
def test_a_redacted_url_shows_no_password(url):
    shown = redact(url)

    assert "s3cret" not in shown
    assert "**" in shown


@pytest.mark.parametrize(
    "url",
    [
        "pg://",
        "pg://u@h/db",
        "pg://h:5432/db?sslmode=require",
        "pg://u@h1:5432,h2:5433/db?target_session_attrs=any",
        "pg://[::1]:5432/db",
        "pg://h/db?application_name=a%40b",
        "pg://h/db?application_name=a@b",
        "pg+embedded:///var/lib/app",
        "pg://h/db?listen_url=pg%3A%2F%2Fdirect%3A5432",
        "localhost",
        "",
    ],
)
def test_a_url_without_password_is_shown_as_it_is(url):
    assert redact(url) == url


def test_a_redacted_url_keeps_everything_else():
    assert redact("pg://u:p@h1:1,h2:2/db?schema=x&password=q", "***") == "pg://u:***@h1:1,h2:2/db?schema=x&password=***"
    assert redact("pg://u:p@h1/a;pg://u:p@h2/b") == "pg://u:**@h1/a;pg://u:**@h2/b"
    assert redact("pg://u:p@h/db", None) == "pg://u:@h/db"


@given(st.text())
def test_redact_never_raises(text):
    redact(text)


def test_redact_survives_whatever_it_is_given():
    assert redact(None) == "None"
    assert "s3cret" not in redact("pg://u:s3cret@h?a=" * 10_000)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_any_password_reaches_libpq_and_nothing_else(password):
    url = f"pg://u:{quote(password, safe='')}@h/db"

    options = Options.parse(url)

    assert parse_dsn(options.dsn)["password"] == password
    assert split_password(url) == ("pg://u@h/db", password)
    assert redact(url) == "pg://u:**@h/db"


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_split_password_leaves_nothing_behind_and_joins_to_the_same_options(url):
    bare, password = split_password(url)

    assert "s3cret" not in bare
    assert Options.parse(bare, password=password) == Options.parse(url)
    assert Options.parse(join_password(bare, password)) == Options.parse(url)


@pytest.mark.parametrize("url", ["localhost", "pg://u@h/db?a=b", "pg://h1,h2", "//h/db", "", "pg:///db?host=/x"])
def test_a_url_without_password_splits_into_itself(url):
    assert split_password(url) == (url, None)


def test_a_password_of_the_url_wins_over_a_separate_one():
    assert Options.parse("pg://u:p@h/db", password="q").dsn == "postgresql://u:p@h/db"
    assert Options.parse("pg://u@h/db", password="q/").dsn == "postgresql://u:q%2F@h/db"


def test_no_password_is_in_the_repr():
    options = Options.parse(f"pg://u:s3cret@h/db?listen_url={LISTEN}&sslpassword=s3cret")

    assert "s3cret" not in repr(options)
    assert "s3cret" not in str(options)


@pytest.mark.parametrize(
    "url",
    [
        "pg://u:s3cret/x@h/db",
        "pg://u:123/s3cret@h/db",
        "pg://u:s3cret@h/db?reconect_grace=1",
        "pg://u:s3cret@h/db?poll_interval=x",
        "pg://u:s3cret%00@h/db",
        "pg://u@h/db?password=x&s3cret",
        "pq://u:s3cret@h/db",
        "pg://u:s3cret@h:x/db",
        "pg+embedded://u:s3cret@/d",
        "pg://h/db?listen_url=u:s3cret@h",
        "pg://h/db?listen_url=redis://u:s3cret@h",
        f"pg://h/db?listen_url={quote('pg://u:s3cret@h:x/db', safe='')}",
    ],
)
def test_no_password_is_in_an_error(url):
    with pytest.raises(OptionError) as caught:
        Options.parse(url)

    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        (("h", 5433, "u", "p@/", "db"), "postgresql://u:p%40%2F@h:5433/db"),
        (("h", None, None, None, "/"), "postgresql://h/"),
        ((None, None, None, None, None), "postgresql:///"),
        (("::1", 5432, "u", None, "db"), "postgresql://u@[::1]:5432/db"),
        (("/var/run", None, "u", None, "d b"), "postgresql://u@%2Fvar%2Frun/d%20b"),
        (("pg://u@h/db?schema=x", 1, None, "p", "/"), "pg://u:p@h/db?schema=x"),
        (("//u@h/db?schema=x", None, None, "p", "/"), "//u:p@h/db?schema=x"),
    ],
)
def test_what_kombu_took_apart_is_put_together(components, expected):
    url = from_components(*components)

    assert url == expected
    Options.parse(url)


def test_every_option_says_what_it_means_and_expects():
    for option in OPTIONS:
        assert option.meaning
        assert option.expected
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
