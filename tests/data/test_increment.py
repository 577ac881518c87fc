"""Opening an increment: a manifest and a dataset that do not belong together are noticed."""

import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest

from megalrps.data.increment import open_increment
from megalrps.data.indexed import bin_path, blocks_path, idx_path, manifest_path
from megalrps.data.manifest import write_manifest
from megalrps.errors import InputError


@pytest.fixture
def increment(make_increment, tmp_path):
    """An increment of 30 tokens in three documents, copied to a prefix of this test's own."""
    made = make_increment(30)
    for path_of in (bin_path, idx_path, blocks_path, manifest_path):
        shutil.copy(path_of(made.dataset.prefix), path_of(tmp_path / "set"))
    return open_increment(tmp_path / "set", verify=True)


def test_opens_what_was_written(increment):
    assert increment.dataset.tokens.tolist() == list(range(30))
    assert (increment.manifest.tokens, increment.manifest.documents) == (30, 3)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(("field", "value"), [("tokens", 31), ("documents", 2), ("sequences", 4), ("dtype", "int16")])
def test_a_manifest_with_other_counts_is_refused(increment, field, value, verify):
    prefix = increment.dataset.prefix
    write_manifest(prefix, replace(increment.manifest, **{field: value}))
    with pytest.raises(InputError, match=rf"set\.json: says {field} {value}.*preprocess_data\.py again"):
        open_increment(prefix, verify)


def test_a_changed_index_of_valid_structure_is_noticed(increment):
    path = idx_path(increment.dataset.prefix)
    content = bytearray(path.read_bytes())
    struct.pack_into("<q", content, len(content) - 16, 1)  # the third document now starts at sequence 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"set\.idx: changed since .*preprocess_data\.py again"):
        open_increment(increment.dataset.prefix)


@pytest.mark.parametrize("verify", [False, True])
def test_a_changed_token_of_a_small_increment_is_noticed(increment, verify):
    path = bin_path(increment.dataset.prefix)
    content = np.fromfile(path, np.uint16)
    content[7] += 1
    path.write_bytes(content.tobytes())
    with pytest.raises(InputError, match=r"set\.bin: changed since .*preprocess_data\.py again"):
        open_increment(increment.dataset.prefix, verify)


@pytest.mark.parametrize("path_of", [bin_path, idx_path, manifest_path])
def test_a_missing_or_cut_file_is_named(increment, path_of):
    path = path_of(increment.dataset.prefix)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=path.name):
        open_increment(increment.dataset.prefix)
    path.unlink()
    with pytest.raises(InputError, match=rf"{path.name}: no such"):
        open_increment(increment.dataset.prefix)
