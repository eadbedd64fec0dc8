"""`pgemu defects`: each mistake of posted code, in words."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pgemu.cli import main
from pgemu.cli._options import _DEFECTS
from pgemu.machine.defects import TEXTS, versions_of

pytestmark = pytest.mark.same_with_checks


def test_each_has_what_it_does_its_versions_and_its_source() -> None:
    lines = CliRunner().invoke(main, ["defects"]).stdout.splitlines()
    assert len(lines) == 3 * len(TEXTS)
    for name, text in TEXTS.items():
        at = lines.index(f"{name} ({versions_of(name)})")
        assert lines[at + 1 : at + 3] == [f"  {text.does}", f"  source: {text.source}"]


def test_the_document_has_the_same() -> None:
    found = json.loads(CliRunner().invoke(main, ["defects", "--json"]).stdout)
    assert found == {
        name: {"does": text.does, "versions": versions_of(name), "source": text.source} for name, text in TEXTS.items()
    }


def test_the_option_takes_them_and_names_the_command() -> None:
    assert sorted(_DEFECTS) == list(TEXTS)
    shown = " ".join(CliRunner().invoke(main, ["compare", "--help"]).stdout.replace("│", " ").split())
    assert "pgemu defects lists them" in shown


def test_nothing_is_compiled() -> None:
    code = (
        "import sys\nfrom pgemu.cli import main\n"
        "try: main(['defects'])\n"
        "except SystemExit: print(*{'numba', 'llvmlite', 'pyarrow'} & set(sys.modules), file=sys.stderr)"
    )
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.strip()
