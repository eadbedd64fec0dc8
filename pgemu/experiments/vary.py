"""Combinations of options, as `pgemu compare --vary like=rfc2,dec2025 --vary page-size=2M,1G` names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from pgemu.errors import InputError

if TYPE_CHECKING:
    import click

__all__ = ("MOST", "combinations")

MOST = 64  # combinations of one sweep


def combinations(
    texts: Iterable[str], options: Mapping[str, click.Parameter]
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Return for every combination its values as they were written, and as options.

    :param texts: OPTION=A,B each
    :param options: those that may vary, by name
    :raises InputError: no such option, no value, a value that the option refuses, an option twice, or too many
    """
    axes: dict[str, list[tuple[str, Any]]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        key = name.strip().replace("-", "_")
        known = ", ".join(sorted(one.replace("_", "-") for one in options))
        if key not in options:
            raise InputError(f"--vary {text}: expected OPTION=A,B with one of {known}")
        if key in axes:
            raise InputError(f"--vary {text}: {name} varies already")
        axes[key] = [(value, _value(options[key], value, text)) for value in values.split(",")]
    count = 1
    for axis in axes.values():
        count *= len(axis)
    if count > MOST:
        raise InputError(f"--vary: {count} combinations, expected at most {MOST}")
    for chosen in product(*axes.values()):
        labels = {name.replace("_", "-"): value for name, (value, _) in zip(axes, chosen, strict=True)}
        yield labels, {str(options[name].name): value for name, (_, value) in zip(axes, chosen, strict=True)}


def _value(option: click.Parameter, value: str, text: str) -> Any:
    from click import BadParameter

    if not value:
        raise InputError(f"--vary {text}: expected a value behind each comma")
    try:
        converted = option.type.convert(value, option, None)
    except BadParameter as error:
        raise InputError(f"--vary {text}: {error.message}") from None
    return (converted,) if option.multiple else converted
