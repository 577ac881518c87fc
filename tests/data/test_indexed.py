"""The indexed dataset: Megatron's bytes both ways, and no damaged file opens."""

import itertools
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalrps.data.indexed import IndexedDataset, IndexedDatasetWriter, token_dtype
from megalrps.errors import InputError

# Three documents in uint16: one sequence; none; two sequences.
GOLDEN_BIN = struct.pack("<7H", 1, 2, 3, 4, 5, 6, 65499)
GOLDEN_IDX = b"".join(
    (
        b"MMIDIDX\x00\x00",
        struct.pack("<Q", 1),  # version
        struct.pack("<B", 8),  # uint16
        struct.pack("<Q", 3),  # sequences
        struct.pack("<Q", 4),  # documents + 1
        struct.pack("<3i", 3, 1, 3),  # lengths
        struct.pack("<3q", 0, 6, 8),  # byte offsets
        struct.pack("<4q", 0, 1, 1, 3),  # documents
    )
)


def write_golden(prefix):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([])
        writer.add_document(np.array([4, 5, 6, 65499], np.int64), sequence_lengths=[1, 3])


def place(prefix, index=GOLDEN_IDX, content=GOLDEN_BIN):
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(content)
    return prefix


def replaced(offset, layout, *values):
    """The golden index with some bytes changed."""
    changed = bytearray(GOLDEN_IDX)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "uint16"), (65499, "uint16"), (65500, "int32"), (250_000, "int32")]
)
def test_token_type_changes_at_65500(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_writes_the_golden_bytes(tmp_path):
    write_golden(tmp_path / "set")
    assert (tmp_path / "set.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "set.bin").read_bytes() == GOLDEN_BIN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.blocks", "set.idx"]


def test_reads_the_golden_bytes(tmp_path):
    dataset = IndexedDataset(place(tmp_path / "set"))
    assert dataset.tokens.tolist() == [1, 2, 3, 4, 5, 6, 65499]
    assert [dataset[i].tolist() for i in range(-1, len(dataset))] == [[5, 6, 65499], [1, 2, 3], [4], [5, 6, 65499]]
    assert dataset.document_indices.tolist() == [0, 1, 1, 3]
    assert (len(dataset), dataset.document_count, dataset.dtype) == (3, 3, np.uint16)
    with pytest.raises(IndexError):
        dataset[3]
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens[0] = 9


def test_int32_is_code_4_with_offsets_of_4_bytes(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", token_dtype(65500)) as writer:
        writer.add_document([65499, 7])
        writer.add_document([8])
    assert (tmp_path / "set.bin").read_bytes() == struct.pack("<3i", 65499, 7, 8)
    assert (tmp_path / "set.idx").read_bytes()[17:] == struct.pack("<BQQ2i2q3q", 4, 2, 3, 2, 1, 0, 8, 0, 1, 2)


def test_a_dataset_without_documents_opens(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.int32):
        pass
    dataset = IndexedDataset(tmp_path / "set")
    assert (len(dataset), dataset.document_count, dataset.tokens.size) == (0, 0, 0)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "int64", "uint16"]),
    documents=st.lists(st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=3), max_size=8),
)
def test_what_was_written_is_read(tmp_path, dtype, documents):
    with IndexedDatasetWriter(tmp_path / "set", dtype, overwrite=True) as writer:
        for document in documents:
            writer.add_document([token for part in document for token in part], [len(part) for part in document])
    dataset = IndexedDataset(tmp_path / "set")
    bounds = dataset.document_indices.tolist()
    read = [[dataset[i].tolist() for i in range(a, b)] for a, b in itertools.pairwise(bounds)]
    assert read == documents


REFUSED = {
    "empty": (b"", "magic"),
    "cut in the header": (GOLDEN_IDX[:33], "magic"),
    "magic": (replaced(2, "<B", 0), "magic"),
    "version": (replaced(9, "<Q", 2), "version 2"),
    "code 0": (replaced(17, "<B", 0), "unknown token type"),
    "code 6": (replaced(17, "<B", 6), "floating-point"),
    "code 7": (replaced(17, "<B", 7), "floating-point"),
    "code of another width": (replaced(17, "<B", 4), "running sum"),
    "sequence count": (replaced(18, "<Q", 4), "header says"),
    "huge sequence count": (replaced(18, "<Q", 2**64 - 1), "header says"),
    "huge document count": (replaced(26, "<Q", 2**61 + 4), "header says"),
    "cut": (GOLDEN_IDX[:-1], "header says"),
    "one byte more": (GOLDEN_IDX + b"\x00", "header says"),
    "multimodal": (GOLDEN_IDX + b"\x00" * 3, "multimodal"),
    "negative length": (replaced(34, "<3i", 3, -1, 5), "negative"),
    "shifted length": (replaced(34, "<3i", 4, 0, 3), "running sum"),
    "last length": (replaced(34, "<3i", 3, 1, 2), "set.bin"),
    "huge last length": (replaced(34, "<3i", 3, 1, 2**31 - 1), "set.bin"),
    "first pointer": (replaced(46, "<q", 2), "running sum"),
    "swapped pointers": (replaced(46, "<3q", 0, 8, 6), "running sum"),
    "first document": (replaced(70, "<q", 1), "documents"),
    "last document": (replaced(94, "<q", 2), "documents"),
    "document order": (replaced(78, "<2q", 2, 1), "documents"),
    "document beyond": (replaced(78, "<2q", 1, 9), "documents"),
    "no document array": (struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 0, 0), "header says"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_index_is_refused_with_its_name_and_the_mend(tmp_path, case):
    index, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as caught:
        IndexedDataset(place(tmp_path / "set", index))
    assert str(tmp_path / "set.") in str(caught.value)
    assert ";" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", GOLDEN_BIN[:-1], GOLDEN_BIN[:-2], GOLDEN_BIN + b"\x00\x00"])
def test_tokens_of_another_size_are_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"set\.bin.*cut short"):
        IndexedDataset(place(tmp_path / "set", content=content))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_missing_file_is_named(tmp_path, suffix):
    place(tmp_path / "set")
    (tmp_path / f"set{suffix}").unlink()
    with pytest.raises(InputError, match=rf"set\{suffix}: no such file.*preprocess_data"):
        IndexedDataset(tmp_path / "set")
    (tmp_path / f"set{suffix}").mkdir()
    with pytest.raises(InputError, match=rf"set\{suffix}: cannot be read"):
        IndexedDataset(tmp_path / "set")


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, len(GOLDEN_IDX) - 1), flipped=st.integers(1, 255))
def test_no_changed_byte_passes_but_the_one_that_leaves_a_valid_index(tmp_path, offset, flipped):
    changed = bytearray(GOLDEN_IDX)
    changed[offset] ^= flipped
    # int16 has the width of uint16, and a document may start at any sequence: only the digest sees these.
    undetectable = (offset == 17 and changed[17] == 3) or (offset in (78, 86) and changed[78] <= changed[86] <= 3)
    place(tmp_path / "set", bytes(changed))
    if undetectable:
        IndexedDataset(tmp_path / "set")
    else:
        with pytest.raises(InputError):
            IndexedDataset(tmp_path / "set")


def test_a_finished_dataset_is_not_overwritten_unless_asked(tmp_path):
    place(tmp_path / "set")
    with pytest.raises(InputError, match=r"set\.idx: a finished dataset"):
        IndexedDatasetWriter(tmp_path / "set", np.uint16)
    assert (tmp_path / "set.idx").read_bytes() == GOLDEN_IDX
    (tmp_path / "set.json").write_text("of the old dataset")
    with IndexedDatasetWriter(tmp_path / "set", np.uint16, overwrite=True) as writer:
        writer.add_document([9])
        assert IndexedDataset(tmp_path / "set").tokens.size == 7
    assert IndexedDataset(tmp_path / "set").tokens.tolist() == [9]
    assert not (tmp_path / "set.json").exists()


def test_an_exception_leaves_no_trace(tmp_path):
    with pytest.raises(KeyError), IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([1])
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    place(tmp_path / "set")
    with pytest.raises(KeyError), IndexedDatasetWriter(tmp_path / "set", np.uint16, overwrite=True) as writer:
        raise KeyError
    assert len(IndexedDataset(tmp_path / "set")) == 3


@pytest.mark.parametrize("token", [-1, 65536, 2**40])
def test_a_token_that_does_not_fit_is_refused_rather_than_wrapped(tmp_path, token):
    with (
        pytest.raises(InputError, match="do not fit uint16"),
        IndexedDatasetWriter(tmp_path / "set", "uint16") as writer,
    ):
        writer.add_document([1, token])


def test_callers_mistakes_are_value_errors(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        for tokens, lengths in (([1.5], None), ([[1]], None), ([1, 2], [1]), ([1, 2], [3, -1])):
            with pytest.raises(ValueError, match="document"):
                writer.add_document(tokens, lengths)
        assert (writer.document_count, writer.sequence_count, writer.token_count) == (0, 0, 0)
    with pytest.raises(RuntimeError):
        writer.add_document([1])
    with pytest.raises(InputError, match="float32"):
        IndexedDatasetWriter(tmp_path / "other", np.float32)


def test_an_unwritable_directory_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/set\.bin: cannot be written"),
        IndexedDatasetWriter(tmp_path / "file" / "set", np.uint16),
    ):
        pass


def test_the_reader_needs_no_memory(tmp_path):
    documents = 30_000
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_documents(np.ones(2 * documents, np.uint16), np.full(documents, 2))
    tracemalloc.start()
    dataset = IndexedDataset(tmp_path / "set")
    assert tracemalloc.get_traced_memory()[0] < 12_000
    tracemalloc.stop()
    assert len(dataset) == documents
