"""What the operating system refuses, in one sentence: the call, the file, the reason and the remedy."""

from __future__ import annotations

import errno
import os

from dpo_fast.wording import clipped

FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = "make room, or name another place"
DESCRIPTORS = "raise the number of files that may be open (ulimit -n), or lower data.workers"
MEMORY = (
    "it needs more memory than the machine gives it: lower data.workers or the batch, or add memory"
)
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EROFS: "the file system is mounted for reading alone: name another place",
    errno.EACCES: "look at who may read and write it, or name another place",
    errno.EPERM: "look at who may change it, or name another place",
    errno.ENOTDIR: "a file stands where a folder is expected: move it, or name another place",
    errno.EISDIR: "a folder stands where a file is expected: move it, or name another place",
    errno.ENOENT: "it was moved, removed or never there",
    errno.EEXIST: "something else has this name: move it, or name another place",
    errno.ENOTEMPTY: "something else has this name: move it, or name another place",
    errno.ELOOP: "its links go round in a circle",
    errno.ENAMETOOLONG: "shorten the path",
    errno.EIO: "the disk, or the network that it is reached by, fails",
    errno.ESTALE: "the network storage has lost it: look at the mount, and start again",
    errno.EFBIG: "the file system, or ulimit -f, allows no file of this size",
    errno.EMFILE: DESCRIPTORS,
    errno.ENFILE: DESCRIPTORS,
    errno.ENOMEM: MEMORY,
    errno.EAGAIN: "the system starts no more processes or threads (ulimit -u)",
}
TOO_MANY = ("Too many open files", "EMFILE")  # in errors of libraries: gloo, torch, Rust
NAMELESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of calls that have no file


def explained(error: BaseException) -> str | None:
    """The sentence for an error of the system, or of a library that names one as its cause.

    None for one that tells of no file and of no limit: it may as well be ours.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and (sentence := _sentence(error)):
            return sentence
        if isinstance(error, Exception) and any(words in str(error) for words in TOO_MANY):
            return f"{os.strerror(errno.EMFILE)}; {DESCRIPTORS}"
        error = error.__cause__
    return None


def _sentence(error: OSError) -> str | None:
    number, name = error.errno, error.filename
    if number not in REMEDIES or isinstance(error, BlockingIOError) and name is None:
        return None
    if name is None and number not in (*NAMELESS, *FULL):
        return None
    reason = error.strerror or os.strerror(number)
    if number in FULL:
        place = " to standard output" if name is None else f": {_shown(name)}"
        return f"cannot write{place}: {reason}" + ("" if name is None else f"; {REMEDIES[number]}")
    place = "" if name is None else f"{_shown(name)}: "
    both = "" if error.filename2 is None else f" (to become {_shown(error.filename2)})"
    return f"{place}{reason}{both}; {REMEDIES[number]}"


def _shown(name: object) -> str:
    return clipped(os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name))
