import subprocess
import sys

import pytest

SCHEMES = ["pg", "postgresql", "postgres"]
FORMS = [
    ("pg://u@h/db", "pg", None),
    ("postgres://u@h/db", "postgres", None),
    ("postgresql://u@h/db", "postgresql", None),
    ("postgresql+psycopg2://u@h/db", "postgresql", "postgresql"),
    ("pg+embedded:///var/lib/app", "pg", "pg"),
]


def run(program: str) -> str:
    """Return what the program prints in a fresh interpreter where warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", program]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("url", "transport", "prefix"), FORMS)
def test_a_celery_app_resolves_our_urls_without_importing_us(url, transport, prefix):
    answer = run(
        "import celery\n"
        f"connection = celery.Celery(broker={url!r}).connection_for_write()\n"
        "from kombu.transport import TRANSPORT_ALIASES\n"
        "print(connection.transport_cls, TRANSPORT_ALIASES[connection.transport_cls], connection.uri_prefix)"
    )

    assert answer == f"{transport} kombu_pg.transport:Transport {prefix}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bare_kombu_resolves_our_urls_after_import_kombu_pg(scheme):
    answer = run(f"import kombu_pg\nfrom kombu import Connection\nprint(Connection('{scheme}://u@h/db').transport_cls)")

    assert answer == scheme


def test_a_kombu_queue_is_enough_to_load_the_aliases():
    answer = run(
        "from kombu import Queue\nfrom kombu.transport import TRANSPORT_ALIASES\nprint(TRANSPORT_ALIASES['pg'])"
    )

    assert answer == "kombu_pg.transport:Transport"


def test_importing_us_loads_neither_driver_nor_celery():
    answer = run("import sys, kombu_pg\nprint([m for m in ('psycopg2', 'sqlalchemy', 'celery') if m in sys.modules])")

    assert answer == "[]"


def test_an_alias_that_somebody_registered_before_us_stays_theirs():
    answer = run(
        "from kombu.transport import TRANSPORT_ALIASES as aliases\n"
        "aliases['pg'] = 'theirs:Transport'\n"
        "import kombu_pg\n"
        "print(aliases['pg'], aliases['postgresql'])"
    )

    assert answer == "theirs:Transport kombu_pg.transport:Transport"


def test_a_kombu_without_aliases_can_still_be_imported():
    answer = run(
        "import kombu.transport\ndel kombu.transport.TRANSPORT_ALIASES\nimport kombu.serialization\nprint('alive')"
    )

    assert answer == "alive"


def test_our_serializer_neither_encodes_nor_decodes():
    answer = run(
        "from kombu import serialization as s\n"
        "for call in (lambda: s.dumps('x', 'kombu-pg'), lambda: s.loads(b'x', 'application/x-kombu-pg', 'binary')):\n"
        "    try:\n"
        "        call()\n"
        "    except Exception as exc:\n"
        "        print(type(exc).__name__)"
    )

    assert answer.split() == ["SerializerNotInstalled", "DecodeError"]


def test_every_public_error_says_whether_a_retry_helps():
    import kombu_pg

    assert kombu_pg.__all__ == sorted(kombu_pg.__all__)
    assert issubclass(kombu_pg.OptionError, ValueError)
    assert not issubclass(kombu_pg.Rejected, kombu_pg.Unavailable)
    assert not issubclass(kombu_pg.SchemaError, kombu_pg.Unavailable)
