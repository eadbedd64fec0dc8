"""Headings under which a long list of options stands in --help, and how wide its text may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

__all__ = ("grouped",)


def grouped(groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return settings of a command whose options stand under headings; what a value may be is behind an option's text.

    They are what rich_click.rich_config() sets, which would load more than a run needs.

    :param groups: options by heading, each as the command line has it, in this order
    """
    config: dict[str, Any] = {
        # By whatever name the program is called.
        "option_groups": {"*": [{"name": name, "options": list(options)} for name, options in groups.items()]},
    }
    if find_spec("rich_click.rich_click_theme"):  # from 1.9 on: a column less, for the text
        config["options_table_column_types"] = ["opt_long", "opt_short", "help"]
        config["options_table_help_sections"] = ["help", "metavar", "default"]
    return {"rich_help_config": config}
