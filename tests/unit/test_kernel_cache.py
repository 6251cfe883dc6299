"""The cache of compiled kernels: private, shared by many processes, indifferent to damage."""

import errno
import fcntl
import logging
import multiprocessing
import os
import pwd
import resource
import shutil
import signal
import stat
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_adams.kernels import cache as cache_module
from megatron_adams.kernels.cache import KernelCache, default_folder

NAME, IMAGE = "mode.arch.key.so", b"\x7fELF, more or less" * 50
FORK = multiprocessing.get_context("fork")  # in the children only files are touched
OTHER_UID = 65534


@pytest.fixture(autouse=True)
def _warn_anew():
    cache_module._warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kernels"


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.fixture
def public_folder():
    """A folder that another user can reach, as tmp_path is not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def image():
    return IMAGE


def must_not_build():
    raise AssertionError("built, though it is in the cache")


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def in_processes(count, target):
    """Run target(index) in forked processes at once; return their results and exit codes."""
    barrier, queue = FORK.Barrier(count), FORK.SimpleQueue()

    def run(index):
        barrier.wait()
        queue.put(target(index))

    processes = [FORK.Process(target=run, args=(i,), daemon=True) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    results = []
    while not queue.empty():
        results.append(queue.get())
    return results, [process.exitcode for process in processes]


def as_someone_without_write_access(folder, target):
    """Return target() of a process that may read `folder` and not write it."""
    is_root = os.geteuid() == 0
    if not is_root:
        folder.chmod(0o555)

    def run(_):
        if is_root:  # permissions do not stop root
            os.setgroups([])
            os.setgid(OTHER_UID)
            os.setuid(OTHER_UID)
        return target()

    results, codes = in_processes(1, run)
    assert codes == [0]
    return results[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MEGATRON_ADAMS_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/megatron-adams"),
        ({"MEGATRON_ADAMS_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/c"},
         "/c/.cache/megatron-adams"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/megatron-adams"),
        ({"HOME": "/c"}, "/c/.cache/megatron-adams"),
        # As where HOME is not set: not at the root, not in the current folder.
        ({"HOME": ""}, "/of/passwd/.cache/megatron-adams"),
        ({"HOME": "relative"}, "/of/passwd/.cache/megatron-adams"),
        ({}, "/of/passwd/.cache/megatron-adams"),
    ],
)  # fmt: skip
def test_folder_is_named_by_the_environment(monkeypatch, environment, expected):
    for name in ("MEGATRON_ADAMS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    entry = SimpleNamespace(pw_dir="/of/passwd")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    assert default_folder() == Path(expected)
    assert KernelCache().folder == Path(expected)


def test_user_without_home_gets_kernels_and_one_warning(monkeypatch, caplog):
    for name in ("MEGATRON_ADAMS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    kernels = KernelCache()
    assert kernels.folder is None
    assert kernels.get(NAME, image) == IMAGE
    assert kernels.get("another.so", image) == IMAGE
    (warning,) = warnings_in(caplog)
    assert warning.message.startswith("kernel cache: this user has no home folder. Every process")
    assert "Set MEGATRON_ADAMS_CACHE_DIR" in warning.message


def test_kernel_is_built_once(folder):
    assert KernelCache(folder).get(NAME, image) == IMAGE
    assert KernelCache(folder).get(NAME, must_not_build) == IMAGE
    assert KernelCache(folder).get("another.so", lambda: b"another") == b"another"
    assert entries(folder) == ["another.so", NAME]


@pytest.mark.parametrize("umask", [0, 0o002, 0o277], indirect=True)
def test_what_is_made_is_private(tmp_path, umask):
    KernelCache(tmp_path / "a" / "b" / "c").get(NAME, image)
    folders = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    assert [mode_of(path) for path in folders] == [0o700] * 3
    assert mode_of(folders[-1] / NAME) == 0o600


@pytest.mark.parametrize("umask", [0, 0o077], indirect=True)
def test_what_is_made_for_others_is_readable_for_them_and_not_writable(tmp_path, umask):
    KernelCache(tmp_path / "a" / "b", for_others=True).get(NAME, image)
    assert [mode_of(tmp_path / "a"), mode_of(tmp_path / "a" / "b")] == [0o755] * 2
    assert mode_of(tmp_path / "a" / "b" / NAME) == 0o644


@pytest.mark.parametrize("umask", [0], indirect=True)
def test_folder_is_never_open_to_others_while_it_is_made(folder, monkeypatch, umask):
    chmod = Path.chmod

    def seen_before_chmod(path, mode):
        assert mode_of(path) == 0o700
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", seen_before_chmod)
    KernelCache(folder).get(NAME, image)
    assert entries(folder) == [NAME]


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:10], id="shorter than a digest"),
        pytest.param(lambda data: data[:-1], id="last byte missing"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:-32], id="digest missing"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(lambda data: flip(data, 0), id="first bit"),
        pytest.param(lambda data: flip(data, 400), id="a bit of the image"),
        pytest.param(lambda data: flip(data, -32), id="a bit of the digest"),
        pytest.param(lambda data: data + b"\0", id="longer"),
    ],
)
def test_damaged_entry_is_logged_and_replaced(folder, caplog, damage):
    kernels = KernelCache(folder)
    kernels.get(NAME, image)
    sound = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(damage(sound))
    assert kernels.find(NAME) is None
    assert kernels.get(NAME, image) == IMAGE
    assert (folder / NAME).read_bytes() == sound
    assert NAME in caplog.text and "damaged" in caplog.text
    assert entries(folder) == [NAME]
    assert kernels.get(NAME, must_not_build) == IMAGE


@pytest.mark.parametrize("is_damaged", [False, True])
def test_of_many_processes_one_builds(folder, tmp_path, is_damaged):
    built = tmp_path / "built"
    built.touch()
    if is_damaged:
        KernelCache(folder).get(NAME, image)
        (folder / NAME).write_bytes(b"damaged")

    def get(index):
        def build():
            with built.open("a") as file:
                file.write(f"{index}\n")
            time.sleep(0.3)
            return IMAGE

        return KernelCache(folder).get(NAME, build)

    results, codes = in_processes(6, get)
    assert codes == [0] * 6
    assert results == [IMAGE] * 6
    assert len(built.read_text().splitlines()) == 1
    assert entries(folder) == [NAME]


def test_different_kernels_are_built_at_the_same_time(folder):
    both_build = FORK.Barrier(2)

    def get(index):
        def build():
            both_build.wait(30)
            return IMAGE

        return KernelCache(folder).get(f"{index}.so", build)

    results, codes = in_processes(2, get)
    assert codes == [0, 0] and results == [IMAGE] * 2


def test_where_locks_do_not_work_all_get_the_kernel(folder, monkeypatch, caplog):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    all_build = FORK.Barrier(4)

    def get(index):
        def build():
            all_build.wait(30)
            return IMAGE

        return KernelCache(folder).get(NAME, build)

    results, codes = in_processes(4, get)
    assert codes == [0] * 4 and results == [IMAGE] * 4
    assert KernelCache(folder).get(NAME, must_not_build) == IMAGE
    assert not [name for name in entries(folder) if name.endswith(".tmp")]
    assert not warnings_in(caplog)


def test_holder_that_hangs_is_not_waited_for_for_ever(folder, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "_LOCK_TIMEOUT_S", 0.1)
    folder.mkdir(mode=0o700)
    with (folder / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert KernelCache(folder).get(NAME, image) == IMAGE
        assert (folder / f"{NAME}.lock").exists()  # its holder's, not ours
    assert "locked" in caplog.text
    assert KernelCache(folder).get(NAME, must_not_build) == IMAGE


@pytest.mark.parametrize("moment", ["while it builds", "while it writes", "before the rename"])
def test_killed_process_leaves_no_damage(folder, monkeypatch, moment):
    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def get(_):
        if moment == "while it writes":
            monkeypatch.setattr(os, "fchmod", die)
        if moment == "before the rename":
            monkeypatch.setattr(os, "replace", die)
        return KernelCache(folder).get(NAME, die if moment == "while it builds" else image)

    results, codes = in_processes(1, get)
    assert codes == [-signal.SIGKILL] and not results
    assert NAME not in entries(folder) and entries(folder)
    assert KernelCache(folder).get(NAME, image) == IMAGE
    assert entries(folder) == [NAME]  # what was left is gone, too


def test_writer_of_another_entry_is_not_disturbed(folder):
    folder.mkdir(mode=0o700)
    (folder / "another.so.0123.tmp").touch()
    KernelCache(folder).get(NAME, image)
    assert (folder / "another.so.0123.tmp").exists()


def test_exception_of_a_build_is_passed_on_and_leaves_nothing(folder):
    def fail():
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        KernelCache(folder).get(NAME, fail)
    assert entries(folder) == []


def test_folder_that_cannot_be_made_gives_kernels_and_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    kernels = KernelCache(tmp_path / "file" / "kernels")
    assert kernels.get(NAME, image) == IMAGE
    assert kernels.get("another.so", image) == IMAGE
    assert kernels.find(NAME) is None
    (warning,) = warnings_in(caplog)
    assert str(kernels.folder) in warning.message and "Not a directory" in warning.message


def test_read_only_folder_is_read_and_what_it_lacks_is_built(public_folder, caplog):
    KernelCache(public_folder, for_others=True).get(NAME, image)

    def get():
        kernels = KernelCache(public_folder)
        images = [kernels.get(NAME, must_not_build), *(kernels.get(n, image) for n in "ab")]
        return images, [record.message for record in warnings_in(caplog)]

    images, warnings = as_someone_without_write_access(public_folder, get)
    assert images == [IMAGE] * 3
    assert len(warnings) == 1 and "Permission denied" in warnings[0]
    assert entries(public_folder) == [NAME]


def test_unwritable_home_gives_kernels_and_one_warning(public_folder, caplog, monkeypatch):
    monkeypatch.delenv("MEGATRON_ADAMS_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(public_folder))

    def get():
        images = [KernelCache().get(name, image) for name in "ab"]
        return images, [record.message for record in warnings_in(caplog)]

    images, warnings = as_someone_without_write_access(public_folder, get)
    assert images == [IMAGE] * 2
    assert len(warnings) == 1 and "Permission denied" in warnings[0]


def test_full_disk_gives_kernels_and_one_warning(folder, caplog):
    """A limit on file sizes stops the write half way, as a full disk does."""

    def get(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        images = [KernelCache(folder).get(name, image) for name in "ab"]
        return images, [record.message for record in warnings_in(caplog)]

    ((images, warnings),), codes = in_processes(1, get)
    assert codes == [0]
    assert images == [IMAGE] * 2
    assert len(warnings) == 1 and "File too large" in warnings[0]
    assert entries(folder) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702, 0o777])
def test_folder_that_others_can_write_is_not_used(folder, caplog, mode):
    KernelCache(folder).get(NAME, lambda: b"planted")
    folder.chmod(mode)
    kernels = KernelCache(folder)
    assert kernels.get(NAME, image) == IMAGE
    assert kernels.get("another.so", image) == IMAGE
    assert kernels.find(NAME) is None
    assert entries(folder) == [NAME]
    (warning,) = warnings_in(caplog)
    for part in (f"mode {mode:04o}", "not writable by group or others", "Set MEGATRON_ADAMS"):
        assert part in warning.message


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o500])
def test_folder_that_others_cannot_write_is_used(folder, mode):
    KernelCache(folder).get(NAME, image)
    folder.chmod(mode)
    assert KernelCache(folder).get(NAME, must_not_build) == IMAGE


def give_away(path, monkeypatch):
    """Make `path` another user's: really as root, who may, else by calling this user another."""
    if os.geteuid() == 0:
        os.chown(path, OTHER_UID, OTHER_UID)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: OTHER_UID)


def test_folder_of_another_user_is_not_used(folder, caplog, monkeypatch):
    KernelCache(folder).get(NAME, lambda: b"planted")
    give_away(folder, monkeypatch)
    assert KernelCache(folder).find(NAME) is None
    (warning,) = warnings_in(caplog)
    assert KernelCache(folder).get(NAME, image) == IMAGE
    assert len(warnings_in(caplog)) == 1
    assert f"owned by uid {folder.stat().st_uid}" in warning.message


def test_folder_of_root_is_used(folder, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder of root's")
    KernelCache(folder).get(NAME, image)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER_UID)
    assert KernelCache(folder).get(NAME, must_not_build) == IMAGE


def test_entry_that_others_can_write_is_replaced(folder, caplog):
    kernels = KernelCache(folder)
    kernels.get(NAME, lambda: b"planted")
    (folder / NAME).chmod(0o622)
    assert kernels.find(NAME) is None
    assert kernels.get(NAME, image) == IMAGE
    assert mode_of(folder / NAME) == 0o600
    assert "0622" in caplog.text
    assert kernels.get(NAME, must_not_build) == IMAGE


def test_folder_exchanged_during_the_build_is_not_written(folder, tmp_path):
    """What was checked is what is used: all goes through one descriptor."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def exchange():
        folder.rename(tmp_path / "original")
        folder.symlink_to(elsewhere)
        return IMAGE

    assert KernelCache(folder).get(NAME, exchange) == IMAGE
    assert entries(elsewhere) == []
    assert entries(tmp_path / "original") == [NAME]


def test_find_returns_a_sound_entry_of_the_pattern(folder):
    kernels = KernelCache(folder)
    assert kernels.find("*") is None
    for name in ("mode.arch.key.1.so", "mode.arch.key.2.so", "mode.arch.other.1.so"):
        kernels.get(name, name.encode)
    (folder / "mode.arch.key.1.so").write_bytes(b"damaged")
    assert kernels.find("mode.arch.key.*.so") == b"mode.arch.key.2.so"
    assert kernels.find("mode.other.*") is None
