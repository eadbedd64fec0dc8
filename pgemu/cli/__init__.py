"""The command line: one file per command, which has the file's name. Importing it loads neither numba nor pyarrow."""

from __future__ import annotations

import copy
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from typing import Any, NoReturn

import rich_click as click

from pgemu.cli._output import escaped_output, say, tolerant
from pgemu.cli._signals import Ending, status_of
from pgemu.errors import InputError

__all__ = ("main",)

_BROKEN_PIPE = 141  # as shells report a command that SIGPIPE ended
_RENAMED = {
    "--convert-order": "--order",
    "--convert-batch": "--batch",
    "--memory": "--guest-memory",
    "--json": "--format json",
}


class _Group(click.RichGroup):
    """The commands are the files of this folder, imported when asked for; one that begins with "_" is none.

    Errors are one line on stderr.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        names = (module.name for module in pkgutil.iter_modules(__path__))
        return sorted(name for name in names if not name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name, None for no such one."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return _with_escapes(getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name))

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command and exit: 0; 1 broken invariants; 2 bad input or options; 130 interrupted, or by its signal."""
        extra["standalone_mode"] = False
        if sys.stdout is None:
            _fail("standard output is closed")
        tolerant(sys.stdout)
        try:
            with Ending() as ending:
                status = super().main(*args, **extra)
                sys.stdout.flush()  # here, where a failure is one line: the interpreter's own comes too late
        except BrokenPipeError:
            _broken_pipe()
        except click.NoSuchOption as error:
            new = _RENAMED.get(error.option_name)
            _fail(f"{error.option_name} is called {new}" if new else error.format_message())
        except click.ClickException as error:
            _fail(error.format_message() + _suggestion(error))
        except InputError as error:
            _fail(str(error))
        except (click.Abort, KeyboardInterrupt) as error:
            number = getattr(error.__context__, "number", signal.SIGINT)  # of what click replaced
            _fail("interrupted", status_of(number))
        except MemoryError:
            _fail("out of memory")
        except OSError as error:
            _discard_output()
            told = error.strerror or str(error)
            # What has neither a file nor the system's words is said by pgemu itself; else it is a write to stdout.
            of_system = error.filename or (error.errno and told == os.strerror(error.errno))
            _fail(f"{error.filename or 'standard output'}: {told}" if of_system else told)
        if ending.number:  # of which the command has told
            sys.exit(status_of(ending.number))
        sys.exit(status if isinstance(status, int) else 0)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Read the arguments, which prints help; as of invoke(), whoever reads it may stop."""
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError:
            _broken_pipe()

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; whoever reads its output may stop reading, quietly."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _broken_pipe()


def _suggestion(error: click.ClickException) -> str:
    """Commands of the group, whichever it is, that are called almost as one that it does not have."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    group = context.command if context else None
    message = error.format_message()
    found = re.match(r"No such command '(.*)'\.$", message)
    if not found or not isinstance(group, click.Group) or not context:
        return ""
    close = get_close_matches(found[1], group.list_commands(context))
    return (
        f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    )  # click's own words, of its newer versions


def _with_escapes(command: click.Command) -> click.Command:
    """A command, or a group of them, that escapes what it prints; not its help, whose colours are escapes."""
    command = copy.copy(command)
    if isinstance(command, click.Group):
        command.commands = {name: _with_escapes(one) for name, one in command.commands.items()}
    elif command.callback is not None:
        command.callback = _escaped(command.callback)
    return command


def _escaped(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A command's function, with what it prints escaped."""

    @wraps(callback)
    def run(*args: Any, **options: Any) -> Any:
        with escaped_output():
            return callback(*args, **options)

    return run


def _broken_pipe() -> NoReturn:
    _discard_output()
    sys.exit(_BROKEN_PIPE)


def _discard_output() -> None:
    """The interpreter flushes stdout once more at its end; let that go nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int = 2) -> NoReturn:
    try:
        say(message)
    except (OSError, ValueError):  # full: the status tells, and the interpreter must not try once more
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(status)


def _print_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from pgemu.version import version

        click.echo(f"pgemu {version()}")
        context.exit()


@click.group(cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print the version."
)
@click.pass_context
def main(context: click.Context) -> None:
    """Run two designs of guest_memfd with HugeTLB, restructured folios and VM_PFNMAP, on the same trace.

    Beside that, try who uses a process's memory on both designs, run named scenarios, name the bits of page-table
    entries, walk or list the page tables in images of physical memory, name the words of struct pages in them, and
    measure this machine to price what is counted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
