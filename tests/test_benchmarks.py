"""Do the benchmarks run, and does a run have the shape that the report reads?"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARGUMENTS = ["--length", "smoke", "--only", "publish,transaction,cpu", "--peers", "pg,bare,bare-rows"]
WITH_RESULTS = ["--length", "smoke", "--only", "chord200,atomic", "--peers", "pg,pg-plain"]


@pytest.fixture(scope="module")
def results(tmp_path_factory, server_url):
    file = tmp_path_factory.mktemp("benchmarks") / "results.json"
    ran = run(*ARGUMENTS, "--pg", server_url, "--json", file)
    assert ran.returncode == 0, ran.stderr
    return json.loads(file.read_text())


@pytest.fixture
def rounds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.rounds")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_run_says_on_what_it_was_measured(results):
    assert {"cores", "cpu", "kernel", "memory_gb", "load_before", "flush"} <= results["machine"].keys()
    assert results["machine"]["flush"]["median_us"] > 0
    assert {"python", "celery", "kombu", "psycopg2-binary"} <= results["versions"].keys()
    assert results["peers"]["pg"]["server"]["fsync"] in ("on", "off")


def test_every_peer_has_a_median_within_its_rounds(results):
    figures = [figure for row in results["rows"].values() for figure in row["figures"].values()]

    assert [row["failed"] for row in results["rows"].values()] == [{}, {}, {}]
    for peer in (peer for figure in figures for peer in figure["peers"].values()):
        assert 0 < peer["min"] <= peer["median"] <= peer["max"]
        assert len(peer["rounds"]) == 2


def test_ours_is_compared_with_each_peer_of_the_same_round(results):
    peers = results["rows"]["publish"]["figures"]["rate"]["peers"]
    ours, bare = peers["pg"]["rounds"], peers["bare"]["rounds"]

    assert peers["bare"]["ours_to_this"]["rounds"] == pytest.approx(
        [mine / theirs for mine, theirs in zip(ours, bare, strict=True)], rel=0.01
    )


def test_a_target_whose_peer_is_missing_is_neither_met_nor_missed(results):
    bare, rabbitmq = results["rows"]["publish"]["figures"]["rate"]["targets"]

    assert (bare["peers"], type(bare["ratio"]), type(bare["met"])) == (["bare-rows"], float, bool)
    assert (rabbitmq["peers"], rabbitmq["ratio"], rabbitmq["met"]) == (["rabbitmq"], None, None)


@pytest.mark.parametrize(("more_is_better", "ratio", "met"), [(True, 0.75, False), (False, 1.5, True)])
def test_the_best_of_several_peers_is_the_best_of_each_round(rounds, more_is_better, ratio, met):
    peers = {"pg": [30.0, 60.0], "rabbitmq": [40.0, 40.0], "redis": [20.0, 80.0]}
    peers = {name: rounds.summary(values) for name, values in peers.items()}

    judged = rounds.judged(rounds.Target(1.6, ("rabbitmq", "redis")), more_is_better, peers)

    assert (judged["ratio"], judged["met"]) == (ratio, met)


def test_rows_with_results_are_measured_with_a_real_worker(server_url, tmp_path):
    ran = run(*WITH_RESULTS, "--pg", server_url, "--json", tmp_path / "results.json")

    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {name: row["figures"]["rate"]["peers"].keys() for name, row in rows.items()} == {
        "chord200": {"pg"},
        "atomic": {"pg", "pg-plain"},
    }


def test_every_row_that_keeps_results_is_measured_with_flushed_results_too(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    peers = importlib.import_module("benchmarks.peers")

    rows = {peer.name: peer.rows for peer in peers._on_postgres("postgresql://nobody@127.0.0.1:1/none")}

    assert rows["pg-flushed"] == {"get", "group500", "chord200", "worker-results", "atomic", "atomic-write"}


def test_the_report_has_a_table_for_each_row(results, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are drawn where the extra bench is installed")
    (tmp_path / "results.json").write_text(json.dumps(results))

    ran = run("--render", tmp_path / "results.json", "--report", tmp_path / "performance.md")

    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "performance.md").read_text()
    assert all(f"## {row['title']}" in page for row in results["rows"].values())
    assert "| rabbitmq | ≥ 1.70 |  | not measured |" in page
    assert (tmp_path / "performance" / "publish.svg").stat().st_size > 0


def test_another_machine_is_refused():
    ran = run("--redis", "redis://elsewhere.example/0")

    assert ran.returncode == 2
    assert "only the loopback is measured" in ran.stderr
