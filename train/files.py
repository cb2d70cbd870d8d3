"""Small files of a run, written whole or not at all, and what is wrong with the disk that they are written to."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_MAKE_ROOM = "make room there"
_ALLOW = "make it readable and writable, or choose another place"
_ELSEWHERE = "choose another place"
_REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: _MAKE_ROOM,
    errno.EROFS: _ALLOW,
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.ENOTDIR: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
    errno.EISDIR: _ELSEWHERE,
    errno.ELOOP: _ELSEWHERE,
    errno.ENAMETOOLONG: _ELSEWHERE,
    errno.EIO: "look at the disk",
    errno.ESTALE: "look at the file system",
}


class GoneError(Exception):
    """A folder that is written to is no longer there."""


def storage_problem(error: BaseException) -> str | None:
    """What is wrong with the storage by an error of any library, and what to do about it; None if it tells of none.

    Libraries in C++ raise other types than OSError, whose text holds the system's words.
    """
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return f"{os.strerror(error.errno)}; {_REMEDIES[error.errno]}"
    for number, remedy in _REMEDIES.items():
        if os.strerror(number) in str(error):
            return f"{os.strerror(number)}; {remedy}"
    return None


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of the system that name no file name this one: those of a file that is open already."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has a file written beside its place and moves it there: at no moment is there half a file.

    Args:
      path: The file, in a folder that exists.
      write: Writes the file whose path it is given.
    Raises: OSError, which names a file, with the old one as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            write(temporary)
            os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is moved to its place when all is in it: at no moment is there half of it.

    Args:
      path: A folder that is not there yet, or empty; those above it are made.
    Raises: OSError, which names a file. The folder is then removed, as it is after any other error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        with naming(path):
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, as `write_whole` does."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
