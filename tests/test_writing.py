"""A writer may be killed before any of its changes, or be refused by the system: the old is there, or the new."""

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from killing import kills

from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.bundle.bundle_files import NUM_TRIES, finish_replacing, has_bundle, read_version, replace_bundle
from treadle.common.errors import BundleError, OptionError
from treadle.common.params import RoutingParams
from treadle.common.writing import (
    HOST,
    append_text,
    check_writable,
    put_all,
    refused,
    workplace,
    write_text,
)
from treadle.lora.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from treadle.routing.fitting import fit
from treadle.routing.router import Router

from conftest import BASE, SAMPLES

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def routers(embedder) -> dict[int, Router]:
    """Routers that differ in how often they re-weigh."""
    return {every: fit(SAMPLES, embedder, RoutingParams(every=every)) for every in (2, 3)}


@pytest.fixture
def save(routers, adapter_folders, tmp_path) -> Save:
    """Write a bundle that re-weighs every so many tokens, with samples or not."""

    def write(every: int, folder: Path = tmp_path / "bundle", **options: object) -> Path:
        texts = {name: SAMPLES[name][:1] for name in SAMPLES} if every == 2 else None
        router = routers[every]
        return save_bundle(folder, base=BASE, adapters=adapter_folders, router=router, samples=texts, **options)

    return write


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    """Do not wait for the disk: a killed process has no use for it."""
    monkeypatch.setattr(os, "fsync", lambda opened: None)


def names(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)) for each in folder.rglob("*")}


# Files


@pytest.mark.parametrize("before", [None, "old"])
def test_a_killed_writer_of_a_file_leaves_the_old_or_the_new(tmp_path, before):
    file, found = tmp_path / "file.json", set()
    if before:
        file.write_text(before)
    for _ in kills(lambda: write_text(file, "new")):
        found.add(file.read_text() if file.exists() else None)
        if before:
            file.write_text(before)
        else:
            file.unlink(missing_ok=True)
    assert found == {before, "new"}
    write_text(file, "again")
    assert os.listdir(tmp_path) == ["file.json"], "what the dead left is gone"
    assert file.read_text() == "again"


def test_a_file_keeps_its_rights_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    file = tmp_path / "there/file"
    write_text(file, "one")
    os.umask(umask := os.umask(0))
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    file.chmod(0o640)
    (tmp_path / "link").symlink_to(file)
    write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert file.read_text() == "two"
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text")
    reader.join(10)
    assert read == ["text"]
    assert pipe.is_fifo()


def test_a_name_like_a_left_over_that_is_alive_or_the_users_stays(tmp_path):
    users = tmp_path / ".treadle-mine.part"
    users.mkdir()
    other = tmp_path / f".treadle-{'0' * 8 if HOST != '0' * 8 else '1' * 8}-abcdefgh.part"
    other.mkdir()  # of another machine, where its writer may live
    with workplace(tmp_path) as place:
        write_text(tmp_path / "file", "text")
        assert place.is_dir()
        assert users.is_dir()
        assert other.is_dir()
    os.utime(other, (0, 0))
    write_text(tmp_path / "file", "text")
    assert names(tmp_path) == {"file", ".treadle-mine.part"}


@pytest.mark.parametrize("path", ["file/trace.json", "folder", "x" * 300, "file/deep/er/trace.json"])
def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for write in (lambda file: write_text(file, "text"), lambda file: append_text(file, "text")):
        with pytest.raises(OptionError) as caught:
            write(tmp_path / path)
        assert "\n" not in str(caught.value)
    if "x" not in path:
        with pytest.raises(OptionError, match=r"is a folder; name a file|is not a folder; name another"):
            check_writable(tmp_path / path)
    assert names(tmp_path) == {"file", "folder"}
    check_writable(tmp_path / "folder/new/trace.json")


def test_an_append_that_is_refused_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "lines"
    append_text(file, "one\n")

    def full(opened: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptionError, match="lines cannot be written: No space left on device; make room"):
        append_text(file, "two\n")
    assert file.read_text() == "one\n"


def test_only_the_systems_refusals_are_reworded(tmp_path):
    class RustError(Exception):
        """As safetensors and tokenizers raise it."""

    with pytest.raises(OptionError, match="here cannot be written: No space left on device"), refused(Path("here")):
        raise RustError("I/O error: No space left on device (os error 28)")
    for error in (ZeroDivisionError("os error"), BundleError("cannot be read (os error 2)"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, refused(Path("here")):
            raise error
        assert caught.value is error


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), workplace(tmp_path / "a/b") as place:  # noqa: PT012 what is inside matters
        (place / "half").mkdir()
        raise ZeroDivisionError
    assert names(tmp_path) == set()


def test_what_says_that_all_is_there_comes_last(tmp_path):
    def write() -> None:
        with workplace(tmp_path / "made") as place:
            for name in ("z", "last", "a"):
                (place / "in").mkdir(exist_ok=True)
                (place / "in" / name).write_text(name)
            put_all(place / "in", tmp_path / "made", "last")

    for _ in kills(write):
        if (tmp_path / "made/last").exists():
            assert {"a", "z", "last"} <= names(tmp_path / "made")
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
    assert names(tmp_path / "made") == {"a", "z", "last"}


# Bundles


def version(adapters: str, *others: str) -> Callable[[Path], None]:
    """Return what writes a bundle of adapters called by these letters: files that say which version they are of."""

    def write(folder: Path) -> None:
        for name in adapters:
            (folder / "adapters" / name).mkdir(parents=True)
            (folder / "adapters" / name / "factors").write_text(adapters)
        for name in ("centroids.safetensors", *others):
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(adapters)
        document = {"adapters": [{"name": name} for name in adapters], "others": others}
        (folder / "bundle.json").write_text(json.dumps(document))

    return write


def read_texts(folder: Path) -> str:
    """Return the adapters of such a bundle, once it is sure that all of its files are of one version."""
    document = json.loads((folder / "bundle.json").read_text())
    letters = "".join(entry["name"] for entry in document["adapters"])
    files = [*(f"adapters/{name}/factors" for name in letters), "centroids.safetensors", *document["others"]]
    assert {(folder / name).read_text() for name in files} == {letters}, "parts of both"
    for name in ("samples.json", "embedder"):
        assert (folder / name).exists() == any(each.startswith(name) for each in document["others"])
    return letters


OLD, FRESH = version("ab", "samples.json"), version("bc", "embedder/model")


def test_a_killed_overwrite_leaves_the_old_bundle_or_the_new_and_can_be_repeated(tmp_path):
    folder, found = tmp_path / "bundle", []
    replace_bundle(folder, OLD, overwrite=False)
    (folder / "README.md").write_text("mine")
    (folder / "adapters/notes").mkdir()
    shutil.copytree(folder, tmp_path / "old")
    for count in kills(lambda: replace_bundle(folder, FRESH, overwrite=True)):
        found.append(read_version(folder, read_texts))
        (finish_replacing if count % 2 else lambda folder: replace_bundle(folder, FRESH, overwrite=True))(folder)
        assert read_texts(folder) == (found[-1] if count % 2 else "bc"), "in its place"
        assert (folder / "README.md").read_text() == "mine"
        assert (folder / "adapters/notes").is_dir()
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
    assert sorted(found) == found, "once the new one is there it stays"
    assert set(found) == {"ab", "bc"}
    assert read_texts(folder) == "bc"
    fresh = {"adapters/c", "adapters/c/factors", "embedder", "embedder/model"}
    gone = {"adapters/a", "adapters/a/factors", "samples.json"}
    assert names(folder) == names(tmp_path / "old") - gone | fresh, "nothing hidden is left"


def test_a_killed_first_writer_leaves_no_bundle_or_all_of_it(tmp_path):
    folder, found = tmp_path / "bundle", []
    for _ in kills(lambda: replace_bundle(folder, FRESH, overwrite=False)):
        found.append(has_bundle(folder) and read_version(folder, read_texts))
        if not found[-1]:
            replace_bundle(folder, OLD, overwrite=False)
            assert read_texts(folder) == "ab"
        else:
            with pytest.raises(BundleError, match="holds a bundle already"):
                replace_bundle(folder, OLD, overwrite=False)
            assert read_texts(folder) == "bc", "it was put in its place"
        shutil.rmtree(folder)
    assert found == sorted(found, key=bool)
    assert set(found) == {False, "bc"}


def test_a_file_system_without_links_and_locks_gets_copies(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    replace_bundle(tmp_path / "bundle", OLD, overwrite=False)
    replace_bundle(tmp_path / "bundle", FRESH, overwrite=True)
    assert read_texts(tmp_path / "bundle") == "bc"


def test_a_reader_that_writers_disturb_makes_them_wait(tmp_path):
    folder, read = tmp_path / "bundle", []
    replace_bundle(folder, OLD, overwrite=False)

    def disturbed(where: Path) -> str:
        read.append(where)
        if len(read) <= NUM_TRIES:  # the last reading holds a lock
            replace_bundle(folder, OLD, overwrite=True)
        return read_texts(where)

    assert read_version(folder, disturbed) == "ab"
    assert len(read) == NUM_TRIES + 1


def test_a_killed_fit_leaves_a_bundle_that_is_read_and_fitted_again_from_its_own_adapters(tmp_path, save, run):
    folder = save(2)
    shutil.copytree(folder / "embedder", tmp_path / "embedder")
    options = ["fit", "--base", BASE, "--embedder", tmp_path / "embedder", "-o", folder, "--overwrite", "--every", 3]
    for name, each in SAMPLES.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(each))
        options += [f"--adapter={name}={folder / 'adapters' / name}", f"--samples={name}={tmp_path / name}.txt"]
    shutil.copytree(folder, tmp_path / "old")
    is_between = False
    files = [folder / "adapters" / name / file for name in SAMPLES for file in (CONFIG_FILE, WEIGHTS_FILE)]
    for count in kills(lambda: save(3, overwrite=True), every=3):
        is_first = not is_between and not all(file.exists() for file in files)
        if is_first or count % 5 == 0:
            bundle = read_bundle(folder)
            assert bool(bundle.samples) == (bundle.router.params.every == 2), "parts of both"
        if is_first:
            is_between = True
            code, _, err = run(*options)
            assert code == 0, err
            assert read_bundle(folder).router.params.every == 3
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
    assert is_between, "no adapter was ever on its way"


def test_readers_beside_a_writer_see_one_version(save):
    folder, is_over, wrong = save(2), threading.Event(), []

    def read() -> None:
        while not is_over.is_set():
            try:
                bundle = read_bundle(folder)
                if bool(bundle.samples) != (bundle.router.params.every == 2):
                    wrong.append("parts of both")
            except Exception as error:
                wrong.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(6):
        save(3 - turn % 2, overwrite=True)
    is_over.set()
    for reader in readers:
        reader.join(60)
    assert wrong == []


def test_files_of_somebody_else_are_neither_replaced_nor_removed(tmp_path, save):
    (tmp_path / "bundle/adapters/math").mkdir(parents=True)
    (tmp_path / "bundle/adapters/math/losses.jsonl").write_text("mine")
    (tmp_path / "bundle/samples.json").write_text("mine")
    (tmp_path / "bundle.part").mkdir()
    before = names(tmp_path)
    with pytest.raises(BundleError, match=r"holds samples.json, adapters/math, which belongs to no bundle"):
        save(2)
    assert names(tmp_path) == before
    shutil.rmtree(tmp_path / "bundle")
    save(3)
    (tmp_path / "bundle/samples.json").write_text("{}")  # a bundle's own name
    save(2, overwrite=True)
    (tmp_path / "bundle/bundle.json").write_text("{")  # damaged: told to, it is replaced
    save(3, overwrite=True)
    assert read_bundle(tmp_path / "bundle").router.params.every == 3
    assert (tmp_path / "bundle.part").is_dir()


def test_a_hostile_bundle_names_nothing_outside_that_an_overwrite_removes(tmp_path, save):
    folder = save(3)
    (tmp_path / "mine").mkdir()
    text = (folder / "bundle.json").read_text()
    (folder / "bundle.json").write_text(text.replace('"math"', '"../../mine"').replace("adapters/math", "../mine"))
    (folder / "adapters/math").rename(tmp_path / "aside")
    save(2, overwrite=True)
    assert (tmp_path / "mine").is_dir()
    assert read_bundle(folder).samples


# A full disk


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> None:
    """Leave so many bytes of a file system."""
    found = os.statvfs(folder)
    (folder / "filling").write_bytes(b"x" * max(0, found.f_bavail * found.f_frsize - leave))


def test_a_full_disk_ends_in_one_line_and_the_old_bundle_is_whole(small, save):
    folder = save(2, small / "bundle")
    before = names(folder)
    refusals = 0
    for leave in range(0, 120_000, 12_288):
        fill(small, leave)
        with suppress(OptionError):
            save(3, folder, overwrite=True)
            break
        refusals += 1
        assert read_bundle(folder).samples
        assert names(folder) == before
    (small / "filling").unlink()
    assert 1 <= refusals < 10
    assert not read_bundle(folder).samples
    save(2, folder, overwrite=True)
    assert read_bundle(folder).samples
    fill(small, 4096)
    with pytest.raises(OptionError, match="No space left on device"):
        save(2, small / "other")
    assert not (small / "other").exists()
