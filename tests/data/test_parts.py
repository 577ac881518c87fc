"""The input in parts: every document once, in order, wherever the cuts fall."""

import gzip
import itertools
import json
import random
from pathlib import Path

import pytest
import zstandard

from megalrps.data.parts import plan_parts, read_part

COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def contents() -> list[bytes]:
    """Files that break cuts: empty, without a last newline, blank lines, lines longer than parts, marks."""
    chance = random.Random(6)
    lines = [json.dumps({"text": "x" * chance.randrange(40)}).encode() for _ in range(60)]
    long = json.dumps({"text": "y" * 700}).encode()
    return [
        b"",
        b"\n",
        b"\n".join([*lines[:30], b'\xef\xbb\xbf{"text": "marked in the middle"}', *lines[30:]]),
        b"\n".join(lines) + b"\n",
        b"\r\n\n".join([long, *lines[:9], long, long]) + b"\n\n",
        b"\xef\xbb\xbf" + b"\n".join([*lines[:3], b"not json", b"", *lines[3:6]]),
    ]


def read_all(folder: Path, paths: list[Path], part_bytes: int) -> tuple[list[str], list[tuple[int, int]], list[int]]:
    """Texts, places (file, line) of the bad lines, and the number of documents of each part."""
    texts: list[str] = []
    bad: list[tuple[int, int]] = []
    counts: list[int] = []
    before = dict.fromkeys(map(str, paths), 0)
    for number, part in enumerate(plan_parts(paths, folder, part_bytes)):
        assert part.number == number
        counts.append(0)
        for documents in read_part(part, ["text"]):
            texts += documents.texts[0]
            counts[-1] += len(documents.numbers)
            bad += [(paths.index(Path(part.path)), before[part.path] + each.number) for each in documents.bad]
            before[part.path] += documents.lines
    return texts, bad, counts


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_every_document_is_in_one_part_whatever_their_size(tmp_path: Path, suffix: str) -> None:
    paths = []
    for number, content in enumerate(contents()):
        paths.append(tmp_path / f"{number}.jsonl{suffix}")
        paths[-1].write_bytes(COMPRESSIONS[suffix](content))
    whole = read_all(tmp_path, paths, 1 << 30)
    assert len(whole[0]) == 60 + 60 + 12 + 6 and whole[1] == [(2, 31), (5, 4)]
    for part_bytes in (1, 2, 7, 64, 100, 1000):
        found = read_all(tmp_path, paths, part_bytes)
        assert found[:2] == whole[:2], part_bytes
        assert len(found[2]) > len(whole[2])


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_parts_stand_for_all_bytes_of_their_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](b'{"text": "some text"}\n' * 5000))
    parts = list(plan_parts([path], tmp_path, 10_000))
    assert len(parts) > 5
    assert parts[0].stored_start == 0 and parts[-1].stored_stop == path.stat().st_size
    assert all(one.stored_stop == next_one.stored_start for one, next_one in itertools.pairwise(parts))
