"""A folder of compiled kernels, shared by a user's processes or by the users of an image.

Called by compile.py, the commands and the doctor; imports only the standard library.

What is read here is executed. So a folder or an entry is used only if this user or root owns it and
nobody else can write to it. The check and everything after it go through one open descriptor of the
folder, so that the folder cannot be exchanged in between. An entry is a kernel followed by its
SHA-256. It is written under another name and then renamed. A killed process therefore leaves no
half of an entry, and where locks do not work (on some NFS), two processes that build the same entry
do no harm.
"""

import errno
import fcntl
import hashlib
import logging
import os
import pwd
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "MEGATRON_ADAMS_CACHE_DIR"
# Far longer than a compiler takes. A lock stays held if its holder was stopped, or forked while it
# compiled.
_LOCK_TIMEOUT_S = 60.0
_LOCK_POLL_S = 0.01
_DIGEST_BYTES = 32
# What `why_not_writable` tries to write: about a kernel.
_TRIAL_BYTES = 2**16


def default_folder() -> Path | None:
    """Return $MEGATRON_ADAMS_CACHE_DIR, else megatron-adams in $XDG_CACHE_HOME or ~/.cache.

    Return None if this user has no home folder, as under `docker run --user 12345`.
    """
    if folder := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(folder)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification: a relative path is ignored
        home = _home()
        if home is None:
            return None
        base = home / ".cache"
    return base / "megatron-adams"


def _home() -> Path | None:
    """Return this user's home folder, or None. Path.home() would be / if HOME is empty."""
    home = Path(os.environ.get("HOME", ""))
    if home.is_absolute():
        return home
    try:
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None
    return home if home.is_absolute() else None


class KernelCache:
    """Compiled kernels by name. A kernel is returned even if something is wrong with the folder.

    Args:
        folder: None for `default_folder()`. A missing folder is made with its parents, mode 0700.
        for_others: let all users read what is written, and the folder if it is made here. For
            container images.
    """

    def __init__(self, folder: Path | None = None, *, for_others: bool = False) -> None:
        self.folder = folder or default_folder()
        self._folder_mode = 0o755 if for_others else 0o700
        self._entry_mode = 0o644 if for_others else 0o600

    def get(self, name: str, build: Callable[[], bytes]) -> bytes:
        """Return the entry `name`. If there is no sound one, build it and keep it.

        If several processes ask for it at once, one builds it and the others wait. If the folder
        cannot be used (untrusted, read-only, full), one warning says why, and each process builds
        its own kernel.

        Args:
            name: the entry's file name; it must say all that the kernel depends on.
            build: returns the kernel. What it raises is passed on; it must not raise an OSError.
        """
        image = None
        try:
            with self._open_folder() as folder:
                image = _read(folder, name)
                if image is None:
                    with _lock(folder, name) as is_alone:
                        # The process that held the lock before may have built it.
                        image = _read(folder, name)
                        if image is None:
                            if is_alone:
                                _remove_leftovers(folder, name)
                            image = build()
                            self._write(folder, name, image)
        except OSError as exc:
            self._warn(exc)
        return build() if image is None else image

    def find(self, pattern: str) -> bytes | None:
        """Return a sound entry whose name matches the shell pattern, or None."""
        try:
            with self._open_folder() as folder:
                for name in sorted(os.listdir(folder)):
                    if fnmatchcase(name, pattern):
                        image = _read(folder, name)
                        if image is not None:
                            return image
        except OSError as exc:
            self._warn(exc)
        return None

    def has(self, pattern: str) -> bool:
        """Whether a sound entry matches the shell pattern; makes no folder, and warns of none."""
        with suppress(OSError), self._open_folder(makes=False) as folder:
            return any(
                _read(folder, name) is not None
                for name in os.listdir(folder)
                if fnmatchcase(name, pattern)
            )
        return False

    def why_not_trusted(self) -> str | None:
        """Why nothing is read from the folder, None where it is, or where there is none yet."""
        try:
            with self._open_folder(makes=False):
                return None
        except FileNotFoundError:
            return None
        except OSError as exc:
            return exc.strerror

    def why_not_writable(self) -> str | None:
        """Why nothing can be kept in the folder, None where it can; leaves nothing there.

        A file is written, and taken away: a full disk, a quota, and a server that maps root to
        nobody do not show in the folder's mode.
        """
        if self.folder is None:
            return "this user has no home folder"
        try:
            with self._open_folder(makes=False) as folder:
                self._try_to_write(folder)
        except FileNotFoundError:
            parent = next(path for path in self.folder.parents if path.exists())
            if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
                return f"it is not there, and {parent} cannot be written"
        except OSError as exc:
            return exc.strerror
        return None

    @staticmethod
    def _try_to_write(folder: int) -> None:
        name = f"doctor.{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            with open(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
                file.write(bytes(_TRIAL_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)

    def _warn(self, exc: OSError) -> None:
        name = "" if self.folder is None else f" {self.folder}"
        _warn_once(
            f"kernel cache{name}: {exc.strerror}. Every process compiles what it cannot "
            f"find there for itself. Set {ENVIRONMENT_VARIABLE} to a folder that you own, that "
            "nobody else can write, and that has room"
        )

    @contextmanager
    def _open_folder(self, *, makes: bool = True) -> Iterator[int]:
        """Yield a descriptor of the folder. If it is missing and `makes` is set, make it.

        Raises:
            OSError: it cannot be made or opened, or others can write to it.
        """
        if self.folder is None:
            raise FileNotFoundError(errno.ENOENT, "this user has no home folder")
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        for path in reversed(missing) if makes else ():
            with suppress(FileExistsError):
                path.mkdir(self._folder_mode)
                path.chmod(self._folder_mode)  # restores what the umask took away
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if problem := _distrust(os.fstat(folder)):
                raise PermissionError(errno.EPERM, problem)
            yield folder
        finally:
            os.close(folder)

    def _write(self, folder: int, name: str, image: bytes) -> None:
        temporary = f"{name}.{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            with open(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as file:
                file.write(image + hashlib.sha256(image).digest())
                os.fchmod(file.fileno(), self._entry_mode)
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


def _read(folder: int, name: str) -> bytes | None:
    """Return the kernel in an entry, or None if there is no sound one; log why it is not."""
    try:
        descriptor = os.open(name, os.O_RDONLY, dir_fd=folder)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        problem = _distrust(os.fstat(descriptor))
        data = file.read()
    image, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not problem and hashlib.sha256(image).digest() != digest:
        problem = f"{len(data)} bytes that do not have the SHA-256 at their end: damaged"
    if problem:
        logger.warning("kernel cache entry %s: %s; not used", name, problem)
        return None
    return image


def _distrust(status: os.stat_result) -> str | None:
    """Return why a file or folder with this status must not be trusted, or None."""
    if status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return (
        f"owned by uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}: must be owned "
        f"by this user ({os.geteuid()}) or root, and not writable by group or others (chmod go-w)"
    )


@contextmanager
def _lock(folder: int, name: str) -> Iterator[bool]:
    """Hold an entry's lock. Yields whether it is held: locks may not work here."""
    path = f"{name}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)
    is_held = False
    try:
        is_held = _flock(descriptor, name)
        yield is_held
    finally:
        if is_held:
            # Processes that wait for the removed file, and later ones that make a new file, look
            # for the entry before they build.
            with suppress(FileNotFoundError):
                os.unlink(path, dir_fd=folder)
        os.close(descriptor)


def _flock(descriptor: int, name: str) -> bool:
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                logger.warning(
                    "kernel cache entry %s: locked for %.0f s; not waiting for it any longer",
                    name,
                    _LOCK_TIMEOUT_S,
                )
                return False
            time.sleep(_LOCK_POLL_S)
        except OSError:  # no locks on this file system
            return False


def _remove_leftovers(folder: int, name: str) -> None:
    """Remove what killed writers of an entry left behind. The caller holds its lock."""
    for leftover in os.listdir(folder):
        if fnmatchcase(leftover, f"{name}.*.tmp"):
            with suppress(FileNotFoundError):
                os.unlink(leftover, dir_fd=folder)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
