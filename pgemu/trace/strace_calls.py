"""System calls as strace prints them: their arguments and what they returned.

Sources: strace's src/mem.c, src/kvm.c, src/clone.c, src/memfd_create.c, src/syscall.c (print_syscall_resume()).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from pgemu.trace.events import ADVICE

__all__ = (
    "KVM_REQUESTS",
    "fields_named",
    "fields_of",
    "flags_of",
    "number_of",
    "path_of",
    "request_of",
    "split_arguments",
)

_OPENING, _CLOSING = "([{", ")]}"
_NUMBER = re.compile(r"-?(?:0x[0-9a-fA-F]{1,16}|\d{1,20})")
_DESCRIPTOR = re.compile(r"(-?\d{1,10}|AT_FDCWD)(?:<(.*)>(?:\(deleted\))?)?")
_PATH = re.compile(r"(?<=\d)<(?!<).*?>(?=\(deleted\)|,|$)")
"""What strace -y prints behind a descriptor."""
_PATH_END = re.compile(r">(?=\(deleted\)|,|$)")
_PLAIN = re.compile(r"[\w\s,|.*-]*")
"""Arguments of which none has a comma in it."""
_IOC = re.compile(r"_IOC\([A-Z_|0x]+, (0x[0-9a-f]+|\d+), (0x[0-9a-f]+|\d+), (0x[0-9a-f]+|\d+)\)")
_SHIFTED = re.compile(r"(\d{1,3})<<(\w+)")

_CONSTANTS: Mapping[str, int] = MappingProxyType(
    {
        "NULL": 0,
        "PROT_NONE": 0,
        "PROT_READ": 1,
        "PROT_WRITE": 2,
        "PROT_EXEC": 4,
        "PROT_SEM": 8,
        "PROT_GROWSDOWN": 0x01000000,
        "PROT_GROWSUP": 0x02000000,
        "MAP_FILE": 0,
        "MAP_SHARED": 1,
        "MAP_PRIVATE": 2,
        "MAP_SHARED_VALIDATE": 3,
        "MAP_DROPPABLE": 8,
        "MAP_FIXED": 0x10,
        "MAP_ANONYMOUS": 0x20,
        "MAP_ANON": 0x20,
        "MAP_32BIT": 0x40,
        "MAP_GROWSDOWN": 0x100,
        "MAP_DENYWRITE": 0x800,
        "MAP_EXECUTABLE": 0x1000,
        "MAP_LOCKED": 0x2000,
        "MAP_NORESERVE": 0x4000,
        "MAP_POPULATE": 0x8000,
        "MAP_NONBLOCK": 0x10000,
        "MAP_STACK": 0x20000,
        "MAP_HUGETLB": 0x40000,
        "MAP_SYNC": 0x80000,
        "MAP_FIXED_NOREPLACE": 0x100000,
        "MAP_UNINITIALIZED": 0x4000000,
        "MREMAP_MAYMOVE": 1,
        "MREMAP_FIXED": 2,
        "MREMAP_DONTUNMAP": 4,
        "MCL_CURRENT": 1,
        "MCL_FUTURE": 2,
        "MCL_ONFAULT": 4,
        "MLOCK_ONFAULT": 1,
        "MFD_CLOEXEC": 1,
        "MFD_ALLOW_SEALING": 2,
        "MFD_HUGETLB": 4,
        "MFD_NOEXEC_SEAL": 8,
        "MFD_EXEC": 16,
        "FALLOC_FL_KEEP_SIZE": 1,
        "FALLOC_FL_PUNCH_HOLE": 2,
        "FALLOC_FL_NO_HIDE_STALE": 4,
        "FALLOC_FL_COLLAPSE_RANGE": 8,
        "FALLOC_FL_ZERO_RANGE": 16,
        "FALLOC_FL_INSERT_RANGE": 32,
        "FALLOC_FL_UNSHARE_RANGE": 64,
        "CLONE_VM": 0x100,
        "CLONE_FS": 0x200,
        "CLONE_FILES": 0x400,
        "CLONE_VFORK": 0x4000,
        "CLONE_THREAD": 0x10000,
        "KVM_MEM_LOG_DIRTY_PAGES": 1,
        "KVM_MEM_READONLY": 2,
        "KVM_MEM_GUEST_MEMFD": 4,
        "KVM_MEMORY_ATTRIBUTE_PRIVATE": 8,
        **{f"MADV_{name}": advice for advice, name in ADVICE.items()},
        "MADV_POPULATE_READ": 22,
    }
)
"""Values of x86-64: include/uapi/asm-generic/mman-common.h, mman.h, linux/mman.h, memfd.h, falloc.h, sched.h, kvm.h."""
_SHIFTS = {"MAP_HUGE_SHIFT": 26, "MFD_HUGE_SHIFT": 26}
_HUGE = re.compile(r"M(?:AP|FD)_HUGE_(\d{1,4})([KMG])B")
# What says nothing that is read here: a clone's other flags, and the signal of its end.
_OTHER = re.compile(r"(?:CLONE_|SIG)[A-Z0-9_]+|[A-Z]+_\?\?\?")

KVM_REQUESTS: Mapping[int, str] = MappingProxyType(
    {
        0x01: "KVM_CREATE_VM", 0x41: "KVM_CREATE_VCPU", 0x42: "KVM_GET_DIRTY_LOG", 0x46: "KVM_SET_USER_MEMORY_REGION",
        0x49: "KVM_SET_USER_MEMORY_REGION2", 0x80: "KVM_RUN", 0xD2: "KVM_SET_MEMORY_ATTRIBUTES",
        0xD4: "KVM_CREATE_GUEST_MEMFD", 0xD5: "KVM_PRE_FAULT_MEMORY",
    }
)  # fmt: skip
"""Requests of ioctl() by their numbers, of type 0xae: include/uapi/linux/kvm.h."""
_KVM = 0xAE


def split_arguments(text: str) -> list[str]:
    """Arguments of a call, or members of a structure, without the brackets around them."""
    if _PLAIN.fullmatch(text):
        return [part.strip() for part in text.split(",")] if text else []
    found, depth, start, at = [], 0, 0, 0
    last_path = max((end.start() for end in _PATH_END.finditer(text)), default=0)  # behind it no path ends
    while at < len(text):
        character = text[at]
        if character == '"':
            at = _end_of_string(text, at)
            continue
        if at < last_path and (path := _PATH.match(text, at)):
            at = path.end()
            continue
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
        at += 1
    last = text[start:].strip()
    return [*found, last] if last or found else []


def _end_of_string(text: str, at: int) -> int:
    """Behind a quoted string that begins at a position."""
    at += 1
    while at < len(text) and text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return at + 1


def _without_comments(text: str) -> str:
    """What stands outside of /* and */, without the space in front of them."""
    found, at = [], 0
    while (begin := text.find("/*", at)) >= 0 and (end := text.find("*/", begin + 2)) >= 0:
        found.append(text[at:begin].rstrip())
        at = end + 2
    return "".join(found) + text[at:] if found else text


def number_of(text: str) -> int:
    """A number or an address, as 64 bits. ValueError for anything else."""
    text = _without_comments(text)
    if text == "NULL":
        return 0
    if not _NUMBER.fullmatch(text) or abs(value := int(text, 0 if "x" in text else 10)) >= 1 << 64:
        raise ValueError(f"{text[:40]!r}, expected a number")
    return value % (1 << 64)


def flags_of(text: str) -> int:
    """Constants joined by "|". ValueError for one that is not known."""
    found = 0
    for part in _without_comments(text).split("|"):
        if part in _CONSTANTS:
            found |= _CONSTANTS[part]
        elif huge := _HUGE.fullmatch(part):
            found |= (int(huge[1]).bit_length() - 1 + {"K": 10, "M": 20, "G": 30}[huge[2]]) << 26
        elif (shifted := _SHIFTED.fullmatch(part)) and shifted[2] in _SHIFTS and int(shifted[1]) < 64:
            found |= int(shifted[1]) << _SHIFTS[shifted[2]]
        elif not _OTHER.fullmatch(part):
            found |= number_of(part)
    return found


def path_of(text: str) -> tuple[int, str]:
    """A file descriptor, and its path where strace -y prints that. ValueError for anything else."""
    match = _DESCRIPTOR.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r}, expected a file descriptor")
    number = -1 if match[1] == "AT_FDCWD" else int(match[1])
    return number % (1 << 32), match[2] or ""


def fields_of(text: str) -> dict[str, str]:
    """Members of a structure, `{name=value, ...}`. ValueError for anything else."""
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError(f"{text[:40]!r}, expected a structure")
    return fields_named(split_arguments(text[1:-1]))


def fields_named(parts: list[str]) -> dict[str, str]:
    """Those of some arguments that are `name=value`."""
    pairs = (part.partition("=") for part in parts)
    return {name: value for name, equals, value in pairs if equals and name.isidentifier()}


def request_of(text: str) -> str:
    """The request of an ioctl by its name, also where strace knows only its number."""
    match = _IOC.fullmatch(text)
    if match is None:
        return text[:40]
    kind, number = (int(match[i], 0) for i in (1, 2))
    return KVM_REQUESTS.get(number, text[:40]) if kind == _KVM else text[:40]
