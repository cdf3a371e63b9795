"""The token cache: what is altered is made again, and where it cannot be kept a message says why."""

import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.seal import SEAL_FILE, damage, seal
from dpo_fast.errors import UserError
from tests.support import malformed
from tests.support.faults import SLOW
from tests.support.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer(bos=True)


@pytest.fixture
def load(tmp_path):
    """load(): the examples of a small file, through a cache in tmp_path/cache."""
    rows = [malformed.sound_row(index) for index in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(cache: Path = tmp_path / "cache"):
        config = DataConfig(train=str(tmp_path / "a.jsonl"), cache_dir=str(cache))
        return load_examples(config, TOKENIZER, split="train")

    return run


def stored(tmp_path) -> Path:
    (folder,) = (each for each in (tmp_path / "cache").iterdir() if each.name[0] != ".")
    return folder


def altered_files(draw: random.Random, folder: Path) -> str:
    """Alters one file of a folder, in one of four ways; says which."""
    file = draw.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    place, way = draw.randrange(len(content)), draw.randrange(4)
    if way == 0:
        content[place] ^= 1 << draw.randrange(8)
    elif way == 1:
        del content[place:]
    elif way == 2:
        content[place : place + 64] = bytes(min(64, len(content) - place))
        if bytes(content) == file.read_bytes():
            content[place] ^= 1
    if way == 3:
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{file.name}: way {way} at {place}"


def survives(load, tmp_path, capsys, count: int, seed: int) -> None:
    right = load().fingerprint
    kept = tmp_path / "kept"
    shutil.copytree(stored(tmp_path), kept)
    for index in range(count):
        what = altered_files(random.Random(seed * 1000 + index), stored(tmp_path))
        capsys.readouterr()
        assert load().fingerprint == right, what
        assert "the stored data is damaged" in capsys.readouterr().err, what
        folder = stored(tmp_path)  # a sound one for the next
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


def test_what_is_altered_is_made_again(load, tmp_path, capsys):
    survives(load, tmp_path, capsys, 12, seed=1)
    capsys.readouterr()
    load()
    assert not capsys.readouterr().err  # what is sound is used


@pytest.mark.slow
@SLOW
def test_alterations_by_the_hundred(load, tmp_path, capsys):
    survives(load, tmp_path, capsys, 300, seed=2)


def test_every_bit_counts(tmp_path):
    (tmp_path / "a").write_bytes(b"some content")
    (tmp_path / "b").write_bytes(b"")
    seal(tmp_path)
    assert damage(tmp_path) is None
    for name in ("a", SEAL_FILE):
        content = (tmp_path / name).read_bytes()
        for place in range(0, 8 * len(content), 3):
            other = bytearray(content)
            other[place // 8] ^= 1 << place % 8
            (tmp_path / name).write_bytes(other)
            fault = damage(tmp_path)
            # White space between the values of the seal says nothing.
            blank = name == SEAL_FILE and content[place // 8 : place // 8 + 1].isspace()
            assert fault or blank, (name, place)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "b").write_bytes(b"x")
    assert damage(tmp_path) == "b is altered"
    (tmp_path / "b").unlink()
    assert "No such file" in damage(tmp_path)


def test_a_cache_of_another_data_set_is_noticed(load, tmp_path, capsys):
    """A whole and sound Arrow file of other rows, or of another shape, in the place of this one's."""
    right = load().fingerprint
    folder = stored(tmp_path)
    (file,) = folder.glob("*.arrow")
    other = DataConfig(train=str(tmp_path / "b.jsonl"), cache_dir=str(tmp_path / "other"))
    (tmp_path / "b.jsonl").write_text(json.dumps(malformed.sound_row(99)) + "\n")
    load_examples(other, TOKENIZER, split="train")
    (theirs,) = (tmp_path / "other").glob("*/*.arrow")
    shutil.copy(theirs, file)
    assert load().fingerprint == right
    assert f"{file.name} is altered" in capsys.readouterr().err


def test_a_full_disk(load, tmp_path):
    """Stood for by a limit on the size of files, which fails in the same calls."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 300, 1000, 3000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(UserError, match="cannot be written: .*data.cache_dir"):
                load()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list((tmp_path / "cache").iterdir())
    assert len(load()) == 30


def test_a_file_in_the_way(load, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cache.* cannot be written: .*data.cache_dir"):
        load()
    (tmp_path / "cache").unlink()
    load()
    folder = stored(tmp_path)
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(UserError, match="cannot be written: .*data.cache_dir"):
        load()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder(load, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: .*Permission.*data.cache_dir"):
        load()
    (tmp_path / "cache").chmod(0o700)
    right = load().fingerprint
    for folder in (stored(tmp_path), tmp_path / "cache"):
        folder.chmod(0o500)
    assert load().fingerprint == right  # what is there is used
    for folder in (tmp_path / "cache", stored(tmp_path)):
        folder.chmod(0o700)


def test_a_folder_that_refuses_to_be_written(load, tmp_path, monkeypatch):
    """As a read-only one does, whoever runs the test."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    load()
    altered_files(random.Random(3), stored(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("dpo_fast.data.dataset.tempfile.mkdtemp", refuse)
        with pytest.raises(UserError, match="cannot be written: .*Delete the folder. Name another"):
            load()
        with pytest.raises(UserError, match="Permission denied.*Name another folder"):
            load(tmp_path / "new")
