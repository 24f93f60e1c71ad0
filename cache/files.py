"""Durable file operations: a published file is complete, on disk, and never overwritten.

Every change to the file system goes through `Disk`, where tests simulate a full disk, a failing fsync, a kill or a
power loss. Every read goes through `Files.read` and `Files.map`, which do not follow links. Independent of the files'
contents.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

import xxhash

from dpoeng.cache.errors import CacheError
from dpoeng.cache.records import damaged

TMP = "tmp"
QUARANTINE = "quarantine"
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class Disk:
    """The operations that change the file system, one method each."""

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        """Opens a new file for writing; it must not exist."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]

    def fsync(self, descriptor: int) -> None:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Gives `source` a second name. Atomic, and fails where `target` exists."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic; replaces `target`."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def touch(self, path: Path) -> None:
        """Sets the time of the last change to now."""
        os.utime(path)

    def sync_dir(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Files:
    """Files below one root. Names are relative and built by the cache itself, never read from a file."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self.root = root
        self.disk = disk
        self._durable_dirs: set[Path] = set()

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """All bytes. Raises FileNotFoundError; CacheError if it is a link, a device or a directory."""
        descriptor = self._open(name)
        with self._explained(name), os.fdopen(descriptor, "rb") as file:
            return file.read()

    def map(self, name: str, size: int, *, copy_on_write: bool = False) -> mmap.mmap:
        """Maps a file of exactly `size` bytes for reading. Raises like `read`, and CacheError if the size differs.

        `copy_on_write` makes the map writable: changed pages are private to this process and never reach the file.
        """
        descriptor = self.open(name, size)
        try:
            if copy_on_write:
                return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            return mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def open(self, name: str, size: int) -> int:
        """A descriptor of a file of exactly `size` bytes, for reading. Raises as `map`."""
        descriptor = self._open(name)
        found = os.fstat(descriptor).st_size
        if found != size:
            os.close(descriptor)
            raise damaged(str(self.root / name), f"{size} bytes", f"{found} bytes")
        return descriptor

    def _open(self, name: str) -> int:
        """Opens a regular file, following no symbolic link below the root."""
        *folders, last = Path(name).parts
        with self._explained(name), contextlib.ExitStack() as stack:
            folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            # Relative to the folder opened before, so that no part of the path can become a link in between.
            for part in folders:
                folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                stack.callback(os.close, folder)
            # O_NONBLOCK, because opening a pipe would otherwise wait for a writer.
            descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.ELOOP, "not a regular file")
            return descriptor

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names in a folder that end in `suffix`, sorted, without the suffix. A missing folder counts as empty."""
        try:
            with self._explained(folder):
                names = [path.name for path in (self.root / folder).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))

    # -- writing ------------------------------------------------------------------------------------------------------

    def publish(self, name: str, data: bytes | memoryview) -> bool:
        """Publishes `data` under `name`, whole and durable, unless that file exists.

        Returns:
            True if this call created the file; False if it exists (it is durable then, too; its content is not read).
        """
        target = self.root / name
        with self._explained(name):
            self._durable_dir(target.parent)
            if not os.path.lexists(target):
                # Write and sync first, then link: the name appears with all its bytes, or not at all. A link fails if
                # the name is taken, while a rename would replace a file that others may have mapped.
                with self._temporary(target.name, data) as temporary:
                    if self._link(temporary, target):
                        return True
            # Another writer may have died after its link and before it synced the folder.
            self.disk.sync_dir(target.parent)
        return False

    def replace(self, name: str, data: bytes | memoryview) -> None:
        """Replaces `name` by `data`, atomically and durably."""
        target = self.root / name
        with self._explained(name):
            self._durable_dir(target.parent)
            with self._temporary(target.name, data) as temporary:
                self.disk.rename(temporary, target)
                self.disk.sync_dir(target.parent)

    def set_aside(self, name: str) -> Path | None:
        """Moves a damaged file to quarantine. Returns None if it is gone already or the cache is read-only.

        Nothing is synced: a power loss can only bring the file back, and it would be found damaged again.
        """
        flat = name.replace("/", "-")
        folder = self.root / QUARANTINE
        try:
            self._durable_dir(folder)
            target = next(path for k in range(1, 1 << 20) if not (path := folder / f"{flat}.{k}").exists())
            self.disk.rename(self.root / name, target)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return None
            raise disk_error(error, self.root / name) from error
        return target

    def touch(self, name: str) -> None:
        """Sets a file's modification time to now, if the cache is writable."""
        with contextlib.suppress(OSError):
            self.disk.touch(self.root / name)

    def remove(self, name: str) -> None:
        """Removes a file. Raises FileNotFoundError."""
        with self._explained(name):
            self.disk.unlink(self.root / name)

    @contextlib.contextmanager
    def _temporary(self, name: str, data: bytes | memoryview) -> Iterator[Path]:
        """A new synced file in tmp/ with `data`; removed on exit. Its lock tells `gc` that the writer is alive."""
        folder = self.root / TMP
        self._durable_dir(folder)
        path = folder / f"{name}.{os.getpid()}.{secrets.token_hex(4)}"
        descriptor = self.disk.create(path)
        try:
            lock(descriptor)  # without locks in the file system, gc decides by age alone
            self.disk.write(descriptor, data)
            # Never retry a failed fsync: the kernel may have dropped the dirty pages, and the retry would succeed.
            self.disk.fsync(descriptor)
            yield path
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                self.disk.unlink(path)

    def _link(self, temporary: Path, target: Path) -> bool:
        try:
            self.disk.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if os.path.lexists(target):
                return False
            # Another writer may come first in between. Objects are named by their hash, so it wrote the same bytes.
            self.disk.rename(temporary, target)
        try:
            self.disk.sync_dir(target.parent)
        except OSError:
            # The name may not stay visible if it is not known to be durable: a later run would trust it.
            with contextlib.suppress(OSError):
                self.disk.unlink(target)
            raise
        return True

    def _durable_dir(self, path: Path) -> None:
        """Creates a folder, and syncs each directory entry from the root down that this object has not synced yet."""
        if path in self._durable_dirs or path == self.root:
            return
        self._durable_dir(path.parent)
        with contextlib.suppress(FileExistsError):
            self.disk.mkdir(path)
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise OSError(errno.ELOOP, "not a directory")
        self.disk.sync_dir(path.parent)
        self._durable_dirs.add(path)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise disk_error(error, self.root / name) from error


def lock(descriptor: int) -> bool | None:
    """Locks an open file. True if this process has the lock, False if another has it, None if locks are unsupported.

    The system releases the lock when the descriptor is closed or the process ends, however it ends.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's bytes in hex, read in blocks. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block succeeds, that file replaces `path` atomically.

    If the block fails, `path` is unchanged. For files that a user names and for logs: unlike `Files`, nothing is synced
    and no lock keeps other writers away.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def disk_error(error: OSError, path: Path) -> CacheError:
    """Explains what the operating system refused."""
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return CacheError(
                "the disk is full",
                code="cache-disk-full",
                where=str(path),
                found=reason,
                remedy="free some space and run the same command again: committed work is reused",
                exit_status=5,
            )
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return CacheError(
                "cannot write to the cache",
                code="cache-read-only",
                where=str(path),
                found=reason,
                remedy="make the folder writable, or choose another with --cache",
                exit_status=5,
            )
        case errno.ELOOP | errno.ENOTDIR | errno.EISDIR | errno.ENXIO:
            return CacheError(
                "the cache contains something other than plain files and folders",
                code="cache-not-plain",
                where=str(path),
                expected="no symbolic links, devices or pipes below the cache folder",
                found=reason,
                remedy="remove it, or move the whole cache and name its real folder",
            )
        case errno.EMFILE | errno.ENFILE:
            return CacheError(
                "too many open files",
                code="cache-too-many-files",
                where=str(path),
                found=reason,
                remedy="raise the limit (`ulimit -n 4096`) and run the same command again",
                exit_status=5,
            )
    return CacheError(
        "the disk reported an error",
        code="cache-disk-error",
        where=str(path),
        found=reason,
        remedy="check the disk, then run the same command again: committed work is reused",
        exit_status=5,
    )
