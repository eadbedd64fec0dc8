"""Memory calls of processes, random, with what they do to memory page by page; and strace's text of them.

It knows nothing of the reader: what each page of each process shows after all calls is the oracle.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ("FORMS", "Scene", "play")

PAGE = 4096
BASE = 0x7F00_0000_0000
_PROT = ("PROT_NONE", "PROT_READ", "PROT_WRITE", "PROT_READ|PROT_WRITE", "PROT_EXEC", "PROT_READ|PROT_EXEC")
_RIGHTS = {
    "PROT_NONE": 0,
    "PROT_READ": 1,
    "PROT_WRITE": 2,
    "PROT_READ|PROT_WRITE": 3,
    "PROT_EXEC": 4,
    "PROT_READ|PROT_EXEC": 5,
}


@dataclass
class Process:
    """Rights of each page that is mapped, the break, and its threads by their numbers."""

    pages: dict[int, int] = field(default_factory=dict)
    heap: int = 0
    threads: list[int] = field(default_factory=list)


@dataclass
class Scene:
    """Lines (thread, text of the call, its result) and the processes that are there at the end."""

    lines: list[tuple[int, str, str]] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)


def _range(chance: random.Random) -> tuple[int, int]:
    start = chance.randrange(40)
    return BASE // PAGE + start, chance.randint(1, 8)


def play(seed: int, count: int) -> Scene:
    """Random calls, some of them failing."""
    chance = random.Random(seed)
    first = Process(threads=[100], heap=0x5000 + chance.randrange(64))
    scene = Scene([(100, "brk(NULL)", hex(first.heap * PAGE))], [first])
    for number in range(count):
        process = chance.choice(scene.processes)
        thread = chance.choice(process.threads)
        what: Callable[..., None] = chance.choice(
            (_mmap, _mmap, _munmap, _mprotect, _mremap, _brk, _advice, _made, _failed)
        )
        what(scene, chance, process, thread, 200 + number)
        if len(scene.processes) > 1 and chance.random() < 0.05:
            _exit(scene, chance)
    return scene


def _mmap(scene: Scene, chance: random.Random, process: Process, thread: int, _: int) -> None:
    start, pages = _range(chance)
    fixed = any(page in process.pages for page in range(start, start + pages)) or chance.random() < 0.3
    prot = chance.choice(_PROT)
    length = pages * PAGE - chance.choice((0, 0, 1, 100, PAGE - 1))
    flags = "MAP_PRIVATE" + "|MAP_FIXED" * fixed + "|MAP_ANONYMOUS"
    address = hex(start * PAGE) if fixed else chance.choice(("NULL", hex(start * PAGE)))
    scene.lines.append((thread, f"mmap({address}, {length}, {prot}, {flags}, -1, 0)", hex(start * PAGE)))
    process.pages |= dict.fromkeys(range(start, start + pages), _RIGHTS[prot])


def _munmap(scene: Scene, chance: random.Random, process: Process, thread: int, _: int) -> None:
    start, pages = _range(chance)
    scene.lines.append((thread, f"munmap({start * PAGE:#x}, {pages * PAGE - chance.choice((0, 5))})", "0"))
    process.pages = {page: rights for page, rights in process.pages.items() if not start <= page < start + pages}


def _mapped(chance: random.Random, process: Process) -> tuple[int, int] | None:
    """A run of mapped pages."""
    if not process.pages:
        return None
    start = end = chance.choice(sorted(process.pages))
    while end in process.pages and end - start < 6:
        end += 1
    return start, chance.randint(1, end - start)


def _mprotect(scene: Scene, chance: random.Random, process: Process, thread: int, _: int) -> None:
    if found := _mapped(chance, process):
        start, pages = found
        prot = chance.choice(_PROT)
        scene.lines.append((thread, f"mprotect({start * PAGE:#x}, {pages * PAGE}, {prot})", "0"))
        process.pages |= dict.fromkeys(range(start, start + pages), _RIGHTS[prot])


def _advice(scene: Scene, chance: random.Random, process: Process, thread: int, _: int) -> None:
    if found := _mapped(chance, process):
        advice = chance.choice(("MADV_DONTNEED", "MADV_WILLNEED", "MADV_HUGEPAGE", "MADV_FREE", "0x65 /* MADV_??? */"))
        scene.lines.append((thread, f"madvise({found[0] * PAGE:#x}, {found[1] * PAGE}, {advice})", "0"))


def _mremap(scene: Scene, chance: random.Random, process: Process, thread: int, _: int) -> None:
    """Of one page, or of what was mapped just now: of several mappings it would be -EFAULT."""
    if not (found := _mapped(chance, process)):
        return
    start, pages = found[0], 1
    if chance.random() < 0.5:
        _mmap(scene, chance, process, thread, _)
        address, length = scene.lines[-1][2], scene.lines[-1][1].split(", ")[1]
        start, pages = int(address, 16) // PAGE, -(-int(length) // PAGE)
    rights = process.pages[start]
    target = BASE // PAGE + 100 + chance.randrange(20)
    wanted = chance.randint(1, 6)
    call = (
        f"mremap({start * PAGE:#x}, {pages * PAGE}, {wanted * PAGE}, MREMAP_MAYMOVE|MREMAP_FIXED, {target * PAGE:#x})"
    )
    scene.lines.append((thread, call, hex(target * PAGE)))
    if start < target + wanted and target < start + pages:
        scene.lines.pop()
        return
    for page in range(start, start + pages):
        del process.pages[page]
    process.pages |= dict.fromkeys(range(target, target + wanted), rights)


def _brk(scene: Scene, chance: random.Random, process: Process, thread: int, _: int) -> None:
    new = max(process.heap + chance.randint(-2, 4), 0x5000)
    scene.lines.append((thread, f"brk({new * PAGE:#x})", hex(new * PAGE)))
    process.pages |= dict.fromkeys(range(process.heap, new), 3)
    process.pages = {page: rights for page, rights in process.pages.items() if not new <= page < process.heap}
    process.heap = new


def _made(scene: Scene, chance: random.Random, process: Process, thread: int, number: int) -> None:
    """A thread, or a child."""
    if chance.random() < 0.6:
        flags = "CLONE_VM|CLONE_FS|CLONE_FILES|CLONE_SIGHAND|CLONE_THREAD|CLONE_SYSVSEM"
        scene.lines.append((thread, f"clone3({{flags={flags}, exit_signal=0, stack=0x7f0, tls=0}}, 88)", str(number)))
        process.threads.append(number)
    elif len(scene.processes) < 6:
        call = "clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|SIGCHLD, child_tidptr=0x7f10)"
        scene.lines.append((thread, call, str(number)))
        scene.lines.append((number, "mlock(0, 0)", "0"))  # so that it is in the text
        scene.processes.append(Process(dict(process.pages), process.heap, [number]))


def _exit(scene: Scene, chance: random.Random) -> None:
    process = chance.choice(scene.processes[1:])
    scene.lines.append((process.threads[0], "exit_group(0)", "?"))
    scene.lines += [(thread, "+++ exited with 0 +++", "") for thread in process.threads]
    scene.processes.remove(process)


def _failed(scene: Scene, chance: random.Random, process: Process, thread: int, _: int) -> None:
    call = chance.choice(
        (
            "munmap(0x7f0000000001, 4096)",
            "mprotect(0x1000, 4096, PROT_READ)",
            "mmap(NULL, 0, PROT_READ, MAP_PRIVATE, -1, 0)",
        )
    )
    scene.lines.append((thread, call, "-1 EINVAL (Invalid argument)"))


def _plain(lines: list[tuple[int, str, str]], front: Callable[[int, int], str]) -> str:
    return "".join(
        f"{front(at, thread)}{call}{f' = {result}' if result else ''}\n"
        for at, (thread, call, result) in enumerate(lines)
    )


def _interleaved(lines: list[tuple[int, str, str]]) -> str:
    """Each call in two parts, a signal between them."""
    text = ""
    for at, (thread, call, result) in enumerate(lines):
        front = f"{thread} {1700000000 + at}.000001 "
        if not result or at % 3:
            text += f"{front}{call}{f'      = {result}' if result else ''}\n"
            continue
        name, _, rest = call.partition("(")
        first, comma, last = rest[:-1].partition(", ")
        text += f"{front}{name}({first}{comma} <unfinished ...>\n"
        text += f"{front}--- SIGCHLD {{si_signo=SIGCHLD, si_code=CLD_EXITED}} ---\n" if at % 2 else ""
        text += f"{front}<... {name} resumed>{last if comma else ''}) = {result} <0.000012>\n"
    return text


FORMS: dict[str, Callable[[list[tuple[int, str, str]]], str]] = {
    "-f": lambda lines: _plain(lines, lambda at, thread: f"{thread}  "),
    "-f, [pid N]": lambda lines: _plain(lines, lambda at, thread: f"[pid {thread:5}] "),
    "-f -ttt": lambda lines: _plain(lines, lambda at, thread: f"{thread} {1700000000 + at}.123456 "),
    "-f -tt": lambda lines: _plain(lines, lambda at, thread: f"{thread:<6}23:59:{59 if at > 59 else at:02}.{at:06} "),
    "-f -t": lambda lines: _plain(lines, lambda at, thread: f"{thread} 10:00:00 "),
    "-f -r": lambda lines: _plain(lines, lambda at, thread: f"{thread}      0.000{at % 7}00 "),
    "-f -ttt -T": _interleaved,
}
"""Text of lines in each form."""
