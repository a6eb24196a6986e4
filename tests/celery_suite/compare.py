"""Name each test whose outcome differs between two runs of the suite: `python compare.py REFERENCE.xml OURS.xml`.

The exit status is 1 if a test that passed in the reference run did anything else, or nothing, in ours.
"""

import collections
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

#: From best to worst. A test with subtests, or whose teardown failed, is written more than once: its worst counts.
RANK = ("passed", "xfailed", "skipped", "failed", "error")
ABSENT = "not run"


def outcomes(report: Path) -> dict[str, str]:
    worst: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        worst[test] = max(worst.get(test, RANK[0]), outcome(case), key=RANK.index)
    return worst


def outcome(case: ElementTree.Element) -> str:
    if case.find("error") is not None:
        return "error"
    if case.find("failure") is not None:
        return "failed"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"


def difference(reference: dict[str, str], ours: dict[str, str]) -> list[tuple[str, str, str]]:
    tests = sorted(reference.keys() | ours.keys())
    pairs = [(test, reference.get(test, ABSENT), ours.get(test, ABSENT)) for test in tests]
    return [(test, there, here) for test, there, here in pairs if there != here]


def main(reference_report: Path, our_report: Path) -> int:
    reference, ours = outcomes(reference_report), outcomes(our_report)
    for label, found in (("reference", reference), ("ours", ours)):
        counts = collections.Counter(found.values())
        print(f"{label:9}", ", ".join(f"{counts[kind]} {kind}" for kind in RANK if counts[kind]))
    differing = difference(reference, ours)
    for test, there, here in differing:
        print(f"{there:>8} -> {here:8} {test}")
    worse = [test for test, there, _ in differing if there == "passed"]
    print(f"{len(worse)} passed in the reference run and not in ours")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
