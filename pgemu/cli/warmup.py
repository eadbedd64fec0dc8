"""`pgemu warmup`: compile ahead."""

from __future__ import annotations

import os
import time

import rich_click as click

from pgemu.errors import InputError

__all__ = ("warmup",)


@click.command(short_help="Compile kernels now, so that nobody waits for them later.")
@click.option("--all", is_flag=True, help="All kernels, not only those that `pgemu compare` needs.")
@click.option(
    "--installation", is_flag=True, help="Keep the machine code in the installation, for all who use it (to be read)."
)
def warmup(all: bool, installation: bool) -> None:
    """Compile kernels now, so that nobody waits for them later.

    Machine code is kept in PGEMU_CACHE_DIR, NUMBA_CACHE_DIR or the user's cache folder, and is valid until pgemu,
    numba or the processor is another one.
    """
    from pgemu_kernels.engine import machine_code
    from pgemu_kernels.engine.ahead import compile_ahead
    from pgemu_kernels.run.entries import declared

    if all:
        import pgemu_kernels.run.c_entries  # noqa: F401 - declares those that C calls

    begin = time.monotonic()
    if installation:
        os.environ["PGEMU_CACHE_DIR"] = str(machine_code.INSTALLED)
    folder = machine_code.writable()
    if folder is None:
        raise InputError("machine code would be lost: no cache folder can be written (set PGEMU_CACHE_DIR)")
    if installation and folder != machine_code.INSTALLED:
        raise InputError(f"machine code would not be found by others: {machine_code.INSTALLED} cannot be written")
    wanted = [entry for entry in declared if all or entry.needed]
    compiled = compile_ahead(wanted)
    lost = [entry.name for entry in wanted if entry.missing(in_cache=True)]
    if lost:
        raise InputError(f"{', '.join(lost)}: compiled, but not kept in {folder}")
    seconds = time.monotonic() - begin
    print(f"{len(compiled)} of {len(wanted)} entries compiled in {seconds:.1f} s, machine code in {folder}")
