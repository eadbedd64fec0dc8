"""Errors that system calls return: include/uapi/asm-generic/errno-base.h and errno.h."""

from __future__ import annotations

EPERM = 1
ENOENT = 2
EINTR = 4
EIO = 5
ENXIO = 6
EBADF = 9
EAGAIN = 11
ENOMEM = 12
EACCES = 13
EFAULT = 14
EBUSY = 16
EEXIST = 17
ENODEV = 19
EINVAL = 22
ENOTTY = 25
ENOSPC = 28
ERANGE = 34
EOVERFLOW = 75
EBADFD = 77
EOPNOTSUPP = 95
EADDRINUSE = 98
EHWPOISON = 133
