"""Does the code keep to what the house has agreed?"""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import kombu_pg
from kombu_pg.options import OPTIONS

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for package in ("kombu_pg", "celery_pg") for path in (ROOT / package).rglob("*.py"))
SQL = re.compile(r"\b(SELECT|INSERT INTO|UPDATE \w+ SET|DELETE FROM|LISTEN|NOTIFY|CREATE \w+|ALTER \w+) ")
MAY_SPEAK_SQL = {"store.py", "schema.py", "database.py"}


def strings(path: Path) -> list[str]:
    """Every string of a module that is not a docstring."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_sql_is_spoken_only_where_the_store_is(path):
    if path.name in MAY_SPEAK_SQL or path.parent.name == "store":
        return

    assert [text for text in strings(path) if SQL.search(text) and "GRANT" not in text] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_module_begins_with_the_question_it_answers(path):
    first_line = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]

    assert first_line.endswith("?") or path.name == "__main__.py", first_line


@pytest.mark.parametrize("name", [name for _, name, _ in pkgutil.iter_modules(kombu_pg.__path__, "kombu_pg.")])
def test_what_a_module_exports_exists_and_is_sorted(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])

    assert sorted(exported) == list(exported)
    assert [entry for entry in exported if not hasattr(module, entry)] == []


def test_every_option_that_is_accepted_is_documented_with_its_default_and_range():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "configure.md").read_text(), re.M)

    assert [(name, expected, meaning) for name, _, expected, meaning in rows] == [
        (option.name, option.expected, option.meaning) for option in OPTIONS
    ]
    for (_, shown, _, _), option in zip(rows, OPTIONS, strict=True):
        default = {True: "true", False: "false", None: "not set"}.get(option.default, option.default)
        assert shown == (f"{default:g}" if isinstance(default, float) else str(default))


def test_every_link_between_the_documents_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_a_document_names_exists():
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = {name for page in (ROOT / "docs").glob("*.md") for name in re.findall(r"`(test_\w+)`", page.read_text())}

    assert named - defined == set()
