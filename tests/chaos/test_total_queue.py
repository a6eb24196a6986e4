import contextlib
import time

import pytest
from chaos.checker import Figures, Ledger, Scene, scene
from chaos.faults import FAULTS, Fault
from conftest import execute

# Every wait below has a deadline of its own, which ends first: what was started is stopped.
pytestmark = pytest.mark.timeout(400)
SHORT = [pytest.param(fault, False, id=fault.__name__) for fault in FAULTS]
FULL = [pytest.param(fault, True, id=f"{fault.__name__}-full", marks=pytest.mark.slow) for fault in FAULTS]


@pytest.mark.parametrize(("kind", "full"), [*SHORT, *FULL])
def test_nothing_is_lost_and_nothing_runs_twice_but_where_it_may(kind, full, site, ledger_url, tmp_path, figures):
    fault = kind()
    place = fault.place(site)

    with scene(place, ledger_url, tmp_path, fault.load) as running:
        recovered_after = suffer(fault, full, running)

        sent = running.sent()
        lost, repeated = running.ledger.missing(sent), running.ledger.repeated()
        assert not running.failures()
        assert all(worker.alive for worker in running.workers)
    found = figure(fault, full, sent, lost, repeated, recovered_after)
    figures.append(found)
    assert not lost
    assert fault.may_duplicate or not repeated


def test_what_did_not_run_is_missing_and_what_ran_twice_is_counted(ledger_url):
    with contextlib.closing(Ledger(ledger_url, links=1)) as ledger:
        for number, link in [(1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 1), (3, 1)]:
            execute(ledger_url, f"INSERT INTO effect (number, link) VALUES ({number}, {link})")

        assert ledger.finished() == {1, 3}
        assert ledger.missing({1, 2, 3, 4}) == [(2, 1), (4, 0), (4, 1)]
        assert ledger.repeated() == [(3, 1, 3)]


def suffer(fault: Fault, full: bool, running: Scene) -> float:
    """Begin the fault and end it. Returns after how many seconds everything that was sent before its end had run."""
    lasts, period = (fault.full_seconds, fault.full_period) if full else (fault.seconds, fault.period)
    over = time.monotonic() + lasts
    fault.begin(running)
    while (left := over - time.monotonic()) > 0:
        time.sleep(min(left, period or left))  # the behaviour under test is that time passes
        if period and time.monotonic() < over:
            fault.begin(running)
    fault.end(running)
    ended = time.monotonic()
    running.wait_for(running.sent(), 90)
    recovered_after = time.monotonic() - ended
    running.stop_publishers()
    running.wait_for(running.sent(), 60)
    return recovered_after


def figure(fault, full, sent, lost, repeated, recovered_after) -> Figures:
    name = fault.name.format(seconds=fault.full_seconds if full else fault.seconds)
    links = fault.load.links
    again = sum(runs - 1 for _number, _link, runs in repeated)
    return Figures(name, len(sent) * (links + 1), len(lost), again, recovered_after)
