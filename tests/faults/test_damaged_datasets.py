"""Damaged ``.idx``, ``.bin`` and ``.blocks``: refused by the structure or by the digests, and none read as other text.

Ten ways to damage an index, four to damage the tokens and four to damage the digests of blocks. Each mutant is opened
as a small dataset, all of which is read, and as a large one, of which samples are: what is accepted then is read at
random places, where its entries are checked as they are used. The mutants run in a process of their own, so that a
read outside a mapping, which the system answers with a signal, is seen as such.
"""

import itertools
import json
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from counts import count, record, seed
from distributed_harness import processes

from megalrps.data.increment import OpeningChecks, open_increment
from megalrps.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, blocks_path, idx_path
from megalrps.data.manifest import TokenizerIdentity, describe_written, write_manifest
from megalrps.data.windows import IndexDamagedError, TokenOutsideError
from megalrps.errors import InputError

MUTANTS = count("F11", small=600, full=20_000)
PATHS = (idx_path, bin_path, blocks_path)
ALL_SAMPLED = OpeningChecks(whole_bytes=0, sampled_blocks=10**6)
HEADER, COUNTS = 34, (18, 26)
EXTREMES = (0, -1, 1, 2**31 - 1, -(2**31), 2**32, 2**53, 2**61, 2**62, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Dataset:
    """A sound dataset, as bytes, and as the arrays of its index."""

    index: bytes
    content: bytes
    blocks: bytes
    lengths: tuple[int, ...]
    documents: tuple[int, ...]
    token_bytes: int

    def rebuilt(self, lengths: list[int], documents: list[int]) -> bytes:
        """An index of other sequences and documents, in itself as sound as this one."""
        pointers = [self.token_bytes * end for end in itertools.accumulate(lengths[:-1], initial=0)]
        arrays = struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(documents)}q", *lengths, *pointers, *documents)
        return self.index[:18] + struct.pack("<QQ", len(lengths), len(documents)) + arrays

    def put(self, offset: int, layout: str, value: int) -> bytes:
        """The index with one number changed; ``value`` is cut to what ``layout`` holds."""
        size = struct.calcsize(layout)
        stored = (value % 2 ** (8 * size)).to_bytes(size, "little")
        return self.index[:offset] + stored + self.index[offset + size :]


def changed_bytes(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    index = bytearray(whole.index)
    for _ in range(chance.randint(1, 8)):
        index[chance.randrange(len(index))] = chance.randrange(256)
    return bytes(index), whole.content


def changed_bit(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    index = bytearray(whole.index)
    index[chance.randrange(len(index))] ^= 1 << chance.randrange(8)
    return bytes(index), whole.content


def cut(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    return whole.index[: chance.randrange(len(whole.index))], whole.content


def extended(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    size = chance.choice((1, 8, 12, len(whole.lengths), chance.randint(1, 5000)))
    return whole.index + chance.choice((bytes(size), chance.randbytes(size))), whole.content


def swapped_pointers(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    sequences = len(whole.lengths)
    first, second = (HEADER + 4 * sequences + 8 * place for place in chance.sample(range(sequences), 2))
    index = bytearray(whole.index)
    index[first : first + 8], index[second : second + 8] = index[second : second + 8], index[first : first + 8]
    return bytes(index), whole.content


def changed_length(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    place = chance.randrange(len(whole.lengths))
    value = chance.choice((*EXTREMES, whole.lengths[place] + chance.choice((-1, 1)), chance.randint(-9, 99)))
    return whole.put(HEADER + 4 * place, "<i", value), whole.content


def changed_document(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    place = chance.randrange(len(whole.documents))
    near = (whole.documents[place] + chance.choice((-1, 1)), chance.randint(0, len(whole.lengths) + 1))
    value = chance.choice(chance.choice((EXTREMES, near)))
    return whole.put(HEADER + 12 * len(whole.lengths) + 8 * place, "<q", value), whole.content


def changed_type(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    return whole.put(17, "<B", chance.choice((*range(10), chance.randrange(256)))), whole.content


def changed_count(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    sizes = len(whole.lengths), len(whole.documents)
    which = chance.randrange(2)
    # The last two make the expected size of the file right again modulo 2^64, or by the other count.
    wrapped = sizes[which] + chance.choice((2**61, 2**62, 2**63, -(2**62)))
    value = chance.choice((*EXTREMES, sizes[which] + chance.choice((-1, 1)), wrapped))
    index = whole.put(COUNTS[which], "<Q", value)
    if chance.random() < 0.3:  # three sequences take the bytes of two without one, and two documents more
        index = whole.index[:18] + struct.pack("<QQ", sizes[0] - 2, sizes[1] + 3) + whole.index[HEADER:]
    return index, whole.content


def moved_boundaries(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    """Some tokens go to the neighbouring sequence, or a document begins elsewhere: every number still fits."""
    lengths, documents = list(whole.lengths), list(whole.documents)
    if chance.random() < 0.7:
        place = chance.randrange(len(lengths) - 1)
        moved = chance.randint(-lengths[place + 1], lengths[place])
        lengths[place] -= moved
        lengths[place + 1] += moved
    if chance.random() < 0.5:
        place = chance.randrange(1, len(documents) - 1)
        documents[place] = chance.randint(documents[place - 1], documents[place + 1])
    return whole.rebuilt(lengths, documents), whole.content


def tokens_cut(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    return whole.index, whole.content[: chance.randrange(len(whole.content))]


def tokens_extended(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    return whole.index, whole.content + chance.randbytes(chance.choice((1, 2, 4, 4096, chance.randint(1, 5000))))


def tokens_changed(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    content = bytearray(whole.content)
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return whole.index, bytes(content)


def files_of_another(chance: random.Random, whole: Dataset, other: Dataset) -> tuple[bytes, bytes]:
    """The tokens, the index, or both of another increment; or its tokens, cut to the size that the index tells."""
    pairs = [(whole.index, other.content), (other.index, whole.content), (other.index, other.content)]
    pairs.append((whole.index, (other.content * 9)[: len(whole.content)]))
    return chance.choice(pairs)


def blocks_changed(chance: random.Random, whole: Dataset, other: Dataset) -> bytes:
    blocks = bytearray(whole.blocks)
    blocks[chance.randrange(len(blocks))] ^= 1 << chance.randrange(8)
    return bytes(blocks)


def blocks_cut(chance: random.Random, whole: Dataset, other: Dataset) -> bytes:
    return whole.blocks[: chance.randrange(len(whole.blocks))]


def blocks_swapped(chance: random.Random, whole: Dataset, other: Dataset) -> bytes:
    """Two digests change places, or one more stands at the end."""
    leaves = [whole.blocks[at : at + 32] for at in range(32, len(whole.blocks), 32)]
    first, second = chance.sample(range(len(leaves)), 2)
    leaves[first], leaves[second] = leaves[second], leaves[first]
    return whole.blocks[:32] + b"".join(leaves + leaves[: chance.randrange(2)])


def blocks_of_another(chance: random.Random, whole: Dataset, other: Dataset) -> bytes:
    return chance.choice((other.blocks, whole.blocks[:32] + (other.blocks[32:] * 9)[: len(whole.blocks) - 32]))


LeafMutator = Callable[[random.Random, Dataset, Dataset], bytes]
LEAF_MUTATORS: tuple[LeafMutator, ...] = (blocks_changed, blocks_cut, blocks_swapped, blocks_of_another)
Mutator = Callable[[random.Random, Dataset, Dataset], tuple[bytes, bytes]]
MUTATORS: tuple[Mutator, ...] = (
    changed_bytes,
    changed_bit,
    cut,
    extended,
    swapped_pointers,
    changed_length,
    changed_document,
    changed_type,
    changed_count,
    moved_boundaries,
    tokens_cut,
    tokens_extended,
    tokens_changed,
    files_of_another,
)


def make_datasets(folder: Path) -> list[Dataset]:
    """Three increments of different types and sizes; some documents have no tokens, some several sequences."""
    datasets = []
    for number, dtype in enumerate(("uint16", "int32", "uint8")):
        chance = random.Random(number)
        highest = int(np.iinfo(dtype).max)
        prefix = folder / str(number)
        with IndexedDatasetWriter(prefix, dtype, block_bytes=64, group_blocks=2) as writer:
            for _ in range(6 + 2 * number):
                lengths = [chance.randint(1, 9) for _ in range(chance.randint(0, 3))]
                writer.add_document(np.array([chance.randint(0, highest) for _ in range(sum(lengths))], int), lengths)
        identity = TokenizerIdentity("SentencePieceTokenizer", highest + 1, 2, "0" * 64)
        manifest = describe_written(
            writer, name=str(number), tokenizer=identity, text_bytes=9, append_eod=False, sources=()
        )
        write_manifest(prefix, manifest)
        opened = open_increment(prefix, verify=True, checks=ALL_SAMPLED).dataset
        lengths_, documents = opened.sequence_lengths.tolist(), opened.document_indices.tolist()
        files = (path_of(prefix).read_bytes() for path_of in PATHS)
        datasets.append(Dataset(*files, tuple(lengths_), tuple(documents), opened.dtype.itemsize))
        assert datasets[-1].rebuilt(lengths_, documents) == datasets[-1].index
    return datasets


def refusal(open_it: Callable[[], object]) -> str | None:
    """The words of our own error; None where it was opened. Every other exception passes through."""
    try:
        open_it()
    except InputError as error:
        return str(error)
    return None


def read_everything(prefix: Path) -> None:
    """Open by the structure alone and read all there is; every view must lie inside the mapping of the tokens."""
    dataset = IndexedDataset(prefix)
    start, size = dataset.tokens.__array_interface__["data"][0], dataset.tokens.nbytes
    assert size == bin_path(prefix).stat().st_size
    total = 0
    for place in range(len(dataset)):
        view = dataset[place]
        at = view.__array_interface__["data"][0]
        assert len(view) == int(dataset.sequence_lengths[place]), "a view that was clipped"
        assert start <= at <= at + view.nbytes <= start + size, "a view outside the mapping"
        total += int(view.sum(dtype=np.int64))
    assert total == int(dataset.tokens.sum(dtype=np.int64)), "some tokens belong to no sequence, or to two"
    bounds = dataset.document_indices.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(dataset)
    assert all(first <= last for first, last in itertools.pairwise(bounds))


def read_lazily(open_it: Callable[[], IndexedDataset], chance: random.Random) -> None:
    """Open a mutant of which little is checked and read at random: our own errors, or what the files hold."""
    try:
        dataset = open_it()
    except InputError:
        return
    stored = dataset.tokens
    starts = np.array([chance.randint(0, stored.size) for _ in range(8)], np.int64)
    length = chance.randint(1, 20)
    starts = starts[starts <= stored.size - length]
    with suppress(TokenOutsideError):
        expected = [stored[start : start + length].tolist() for start in starts.tolist()]
        assert dataset.gather(starts, length).tolist() == expected, "a window that is not what the file holds"
    with suppress(IndexDamagedError):
        places = dataset.document_starts(starts, length)
        assert places.shape == (len(starts), length)
        assert ((places >= 0) & (places <= np.arange(length))).all(), "a document that begins after its tokens"
    for sequence in range(len(dataset)):
        with suppress(InputError):
            assert len(dataset[sequence]) == int(dataset.sequence_lengths[sequence]), "a view that was clipped"


def outcome_of(prefix: Path, whole: Dataset, mutant: tuple[bytes, ...], chance: random.Random) -> str:
    """``structure`` or ``digest``: what refused the mutant; ``silent``, and why, where what must refuse it did not."""
    paths = [path_of(prefix) for path_of in PATHS]
    for path, damaged in zip(paths, mutant, strict=True):
        path.unlink()  # a new file: to cut one short that was just written makes some file systems flush it
        path.write_bytes(damaged)
    read_lazily(lambda: IndexedDataset(prefix, checked_bytes=0), chance)
    one_block = OpeningChecks(whole_bytes=0, sampled_blocks=1, draw=chance.getrandbits(32))
    read_lazily(lambda: open_increment(prefix, checks=one_block).dataset, chance)
    if refusal(lambda: open_increment(prefix, checks=ALL_SAMPLED)) is None:
        return "silent: opened with all blocks compared"
    words = refusal(lambda: read_everything(prefix))
    names = tuple(map(str, paths))
    if words is not None:
        return "structure" if words.startswith(names) and "\n" not in words else f"silent: names no file: {words}"
    sound = (whole.index, whole.content, whole.blocks)
    names_changed = tuple(name for name, *both in zip(names, mutant, sound, strict=True) if both[0] != both[1])
    words = refusal(lambda: open_increment(prefix, verify=True))
    if words is None:
        return "silent: opened with its digests verified"
    if mutant[:2] != sound[:2] and refusal(lambda: open_increment(prefix)) is None:
        return "silent: a changed small dataset opened"
    # A count that the manifest contradicts is told of the manifest.
    if not words.startswith((*names_changed, f"{prefix}.json")):
        return f"silent: names no changed file: {words}"
    return "digest"


def mutants(
    datasets: list[Dataset], numbers: range, chosen_seed: int
) -> Iterator[tuple[int, str, int, tuple[bytes, ...], random.Random]]:
    """Number, mutator, dataset, bytes and chance of each mutant; a number gives the same whatever came before it."""
    all_mutators = (*MUTATORS, *LEAF_MUTATORS)
    for number in numbers:
        chance = random.Random(f"{chosen_seed} {number}")
        kind = number % len(all_mutators)
        place, other = chance.sample(range(len(datasets)), 2)
        whole = datasets[place]
        mutant = sound = (whole.index, whole.content, whole.blocks)
        while mutant == sound:
            if kind < len(MUTATORS):
                mutant = (*MUTATORS[kind](chance, whole, datasets[other]), whole.blocks)
            else:
                leaves = LEAF_MUTATORS[kind - len(MUTATORS)](chance, whole, datasets[other])
                mutant = (whole.index, whole.content, leaves)
        yield number, all_mutators[kind].__name__, place, mutant, chance


def try_mutants(folder: Path, total: int, chosen_seed: int) -> None:
    """The process of its own: the outcomes by mutator as JSON, and always the number of the mutant in hand."""
    datasets = make_datasets(folder)
    outcomes: dict[str, Counter[str]] = {mutator.__name__: Counter() for mutator in (*MUTATORS, *LEAF_MUTATORS)}
    in_hand = os.open(folder / "in_hand", os.O_WRONLY | os.O_CREAT)
    for number, name, place, mutant, chance in mutants(datasets, range(total), chosen_seed):
        os.pwrite(in_hand, f"{number:9d} {name:20}".encode(), 0)
        try:
            outcome = outcome_of(folder / str(place), datasets[place], mutant, chance)
        except Exception as error:
            outcome = f"other: {error!r}"
        failed = outcome.startswith(("silent", "other"))
        outcomes[name][f"{outcome} (mutant {number})" if failed else outcome] += 1
    os.close(in_hand)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


@pytest.mark.timeout(1800)
def test_every_damaged_pair_is_refused(tmp_path: Path) -> None:
    process = processes().Process(target=try_mutants, args=(tmp_path, MUTANTS, seed()))
    process.start()
    process.join(1700)
    process.kill()
    process.join()
    in_hand = (tmp_path / "in_hand").read_text() if (tmp_path / "in_hand").exists() else "none"
    assert process.exitcode == 0, f"ended with {process.exitcode} at mutant {in_hand} (seed {seed()})"
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    totals = sum((Counter(each) for each in outcomes.values()), Counter())
    failed = {name: number for name, number in totals.items() if name not in ("structure", "digest")}
    record(
        "F11",
        mutants=totals.total(),
        refused_by_structure=totals["structure"],
        refused_by_digest=totals["digest"],
        crashes=0,
        other_exceptions=sum(number for name, number in failed.items() if name.startswith("other")),
        silent=sum(number for name, number in failed.items() if name.startswith("silent")),
        refused_by_mutator=outcomes,
        seed=seed(),
    )
    assert not failed, f"seed {seed()}: {dict(itertools.islice(failed.items(), 5))}"
    assert totals.total() == MUTANTS
    # What only the digests see must be among the mutants, or they were not tested.
    for name in ("changed_document", "moved_boundaries", "tokens_changed", "files_of_another", "blocks_swapped"):
        assert outcomes[name].get("digest", 0) > 0, f"no mutant of {name} was left to the digests"
