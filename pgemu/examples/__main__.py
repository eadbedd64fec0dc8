"""`python -m pgemu.examples [NAME]`: list the examples, or run one."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def examples() -> dict[str, str]:
    """The first sentence of each example's documentation, by name; nothing is imported."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if not path.name.startswith("_"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = text.partition("\n\n")[0].replace("\n", " ")
    return found


def main(arguments: list[str]) -> int:
    """List, or run one; 2 for a name that is none."""
    known = examples()
    if not arguments:
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {text}" for name, text in known.items()))
        print(f"\npython -m pgemu.examples NAME runs one; the sources are in {FOLDER}")
        return 0
    name = arguments[0]
    if name not in known:
        print(f"no example {name!r}: expected one of {', '.join(known)}", file=sys.stderr)
        return 2
    sys.argv = [str(FOLDER / f"{name}.py"), *arguments[1:]]
    runpy.run_module(f"pgemu.examples.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
