"""Blended samples: each source in its own order, its share of every prefix exact, the counts without looking."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from megalrps.data.blend import BlendManifest, BlendMember, OpenBlend
from megalrps.data.blended_stream import BlendedSource, UnionSource, source_over
from megalrps.data.increment import OpenIncrement
from megalrps.data.stream import Reading, SampleSource, SampleStream
from megalrps.errors import InputError
from megalrps.exact import exact_share

LENGTH = 4
SEED = 1234


@pytest.fixture(scope="module")
def increments(make_increment) -> dict[str, OpenIncrement]:
    """Of 12, 10, 3 and 7 windows; tokens count up from 0, 1000, 2000 and 3000."""
    sizes = {"web": 51, "code": 41, "books": 13, "old": 29}
    return {name: make_increment(size, 1000 * at, name=name) for at, (name, size) in enumerate(sizes.items())}


def blend_of(increments: dict[str, OpenIncrement], **weights: str) -> OpenBlend:
    """As a manifest of its own would open it."""
    members = [increments[name] for name in weights]
    manifest = BlendManifest(
        "mixed",
        members[0].manifest.tokenizer,
        tuple(
            BlendMember(m.manifest.name, "", m.manifest.fingerprint, 0, w)
            for m, w in zip(members, weights.values(), strict=True)
        ),
    )
    named = (replace(each.manifest, name=f"mixed/{each.manifest.name}") for each in members)
    opened = tuple(OpenIncrement(name, each.dataset) for name, each in zip(named, members, strict=True))
    return OpenBlend(manifest, "mixed", opened)


@pytest.fixture(scope="module")
def sources(increments) -> dict[str, SampleSource]:
    """A blend, an increment with replay of two older ones, and a union that holds a blend."""
    blend = blend_of(increments, web="5", code="3", books="2")
    new, older = SampleStream([increments["web"]], LENGTH, SEED), [increments["code"], increments["old"]]
    return {
        "blend": source_over([blend], LENGTH, SEED),
        "replay": BlendedSource([new, source_over(older, LENGTH, SEED)], [Fraction(3, 4), Fraction(1, 4)]),
        "union": source_over([blend, increments["old"]], LENGTH, SEED),
        "replay of a union": BlendedSource(
            [new, source_over([increments["old"], blend], LENGTH, SEED)], [Fraction(2, 3), Fraction(1, 3)]
        ),
    }


def first_tokens(source: SampleSource, count: int, start: int = 0) -> list[int]:
    return source.batch(np.arange(start, start + count)).tokens_BS[:, 0].tolist()


def listed(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def test_each_part_keeps_its_own_order_and_its_own_epochs(sources, increments):
    drawn = first_tokens(sources["blend"], 200)
    for at, name in enumerate(("web", "code", "books")):
        own = [token for token in drawn if token // 1000 == at]
        assert own == first_tokens(SampleStream([increments[name]], LENGTH, SEED), len(own)), name
    assert Counter(token // 1000 for token in drawn) == {0: 100, 1: 60, 2: 40}
    replayed = first_tokens(sources["replay"], 200)
    older = SampleStream([increments["code"], increments["old"]], LENGTH, SEED)
    assert [token for token in replayed if token >= 1000] == first_tokens(older, 50)


@pytest.mark.parametrize(("name", "shares"), [("blend", (0.5, 0.3, 0.2)), ("replay", (0.75, 0.25))])
def test_every_prefix_has_its_shares_to_less_than_one_sample(sources, name, shares):
    source = sources[name]
    ordinals, _ = source.locate(np.arange(300))
    parts = ordinals if name == "blend" else np.minimum(ordinals, 1)
    for part, share in enumerate(shares):
        away = np.cumsum(parts == part) - share * np.arange(1, 301)
        assert float(np.abs(away).max()) < 1, name


@pytest.mark.parametrize("name", ["blend", "replay", "union", "replay of a union"])
def test_counts_are_those_of_the_samples_over_any_range(sources, name):
    source = sources[name]
    names = [increment.manifest.name for increment in source.increments]
    assert len(set(names)) == len(names)
    ordinals, _ = source.locate(np.arange(150))
    for start in (0, 1, 16, 40, 149):
        for stop in (start, start + 1, 41, 82, 150):
            if stop >= start:
                expected = {each: int((ordinals[start:stop] == at).sum()) for at, each in enumerate(names)}
                assert source.consumed(stop, start) == expected, (name, start, stop)


@pytest.mark.parametrize("name", ["blend", "replay", "union", "replay of a union"])
def test_a_sample_is_where_it_is_said_to_be_whatever_is_asked_beside_it(sources, name):
    source = sources[name]
    indices = np.random.default_rng(3).permutation(150)
    ordinals, places = source.locate(indices)
    tokens_BS = source.batch(indices).tokens_BS
    starts = [int(source.increments[at].dataset.read(0, 1)[0]) for at in ordinals.tolist()]
    assert tokens_BS[:, 0].tolist() == (np.array(starts) + LENGTH * places).tolist()
    assert np.array_equal(
        tokens_BS, np.concatenate([source.batch(indices[at : at + 1]).tokens_BS for at in range(150)])
    )
    assert np.array_equal(tokens_BS - tokens_BS[:, :1], np.tile(np.arange(LENGTH + 1), (150, 1)))
    assert source.batch(np.array([], np.int64)).tokens_BS.shape == (0, LENGTH + 1)


def test_one_pass_of_a_blend_repeats_nothing(increments):
    for weights in (
        {"web": "5", "code": "3", "books": "2"},
        {"web": "0.1", "books": "137.2"},
        {"old": "1/3", "code": "1"},
    ):
        source = source_over([blend_of(increments, **weights)], LENGTH, SEED)
        windows = {"web": 12, "code": 10, "books": 3, "old": 7}
        total = sum(exact_share(weight) for weight in weights.values())
        size = min(int(windows[name] * total / exact_share(weight)) for name, weight in weights.items())
        assert source.samples_per_epoch == size
        drawn = first_tokens(source, size)
        assert len(set(drawn)) == len(drawn), weights


def test_each_epoch_of_a_union_draws_the_same_samples_of_the_blend_once(sources):
    union, blend = sources["union"], sources["blend"]
    assert isinstance(union, UnionSource) and union.samples_per_epoch == blend.samples_per_epoch + 7 == 22
    expected = sorted([*first_tokens(blend, 15), *(3000 + LENGTH * window for window in range(7))])
    epochs = [first_tokens(union, 22, 22 * epoch) for epoch in (0, 1, 10**9)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_golden_orders(sources):
    """For ever: a resumed run must meet the order it left."""
    assert (
        listed(first_tokens(sources["blend"], 20))
        == "32 1020 44 2000 4 1028 40 2008 12 1008 24 1036 28 2004 20 1004 36 2008 16 1000"
    )
    assert (
        listed(first_tokens(sources["replay"], 20))
        == "32 44 1004 4 40 12 1036 24 28 20 1020 36 16 8 1024 0 36 0 3020 40"
    )
    assert (
        listed(first_tokens(sources["union"], 24))
        == "3004 2008 2004 20 1020 2000 1008 28 3020 12 3024 3016 1028 3000 3012 32 24 44 4 40 3008 1036 3000 3020"
    )


def test_a_lone_blend_or_increment_and_increments_alone_are_drawn_as_ever(increments):
    blend = blend_of(increments, web="1", code="1")
    assert isinstance(source_over([blend], LENGTH, SEED), BlendedSource)
    plain = [increments["web"], increments["old"]]
    source = source_over(plain, LENGTH, SEED)
    assert isinstance(source, SampleStream)
    assert first_tokens(source, 40) == first_tokens(SampleStream(plain, LENGTH, SEED), 40)


def test_the_weights_the_seed_and_the_contents_decide_the_order_of_a_union(increments):
    def drawn(seed: int = SEED, books: str = "1", reading: Reading | None = None) -> list[int]:
        data = [increments["old"], blend_of(increments, web="2", books=books)]
        return first_tokens(source_over(data, LENGTH, seed, reading), 20)

    assert drawn() == drawn(books="1.0")
    assert drawn() != drawn(seed=1)
    assert drawn() != drawn(books="2")


@pytest.mark.parametrize(
    "reading", [Reading(documents=True), Reading(mask_eod=True), Reading(documents=True, pack=True)]
)
def test_documents_and_masks_are_those_of_the_parts(make_increment, reading):
    generator = np.random.default_rng(5)
    made = {
        name: make_increment(tokens=generator.integers(0, 5, 61) + 0, name=name)  # 2 ends a document
        for name in ("web", "code", "old")
    }
    streams = {name: SampleStream([made[name]], LENGTH, SEED, reading) for name in made}
    source = source_over([blend_of(made, web="2", code="1"), made["old"]], LENGTH, SEED, reading)
    indices = np.arange(source.samples_per_epoch)
    batch = source.batch(indices)
    ordinals, places = source.locate(indices)
    for name, ordinal in (("web", 0), ("code", 1), ("old", 2)):
        stream = streams[name]
        own = np.arange(stream.samples_per_epoch)
        index_of = dict(zip(stream.locate(own)[1].tolist(), own.tolist(), strict=True))
        rows = np.flatnonzero(ordinals == ordinal)
        expected = stream.batch(np.array([index_of[place] for place in places[rows].tolist()]))
        assert rows.size and np.array_equal(batch.tokens_BS[rows], expected.tokens_BS)
        for field in ("starts_BS", "counted_BS"):
            whole, part = getattr(batch, field), getattr(expected, field)
            assert (whole is None) == (part is None), field
            assert whole is None or (whole.dtype == part.dtype and np.array_equal(whole[rows], part)), field


def test_counts_of_a_blend_and_of_whole_epochs_take_no_look_at_the_samples(sources, monkeypatch):
    """A checkpoint counts 1e9 samples and more."""
    monkeypatch.setattr(SampleStream, "locate", None)
    monkeypatch.setattr(UnionSource, "locate", None)
    assert sources["blend"].consumed(10**15) == {
        "mixed/web": 5 * 10**14,
        "mixed/code": 3 * 10**14,
        "mixed/books": 2 * 10**14,
    }
    assert sum(sources["union"].consumed(22 * 10**12).values()) == 22 * 10**12
    assert sources["union"].consumed(22 * 10**12)["old"] == 7 * 10**12


def test_data_of_different_tokenizers_are_not_drawn_together(increments):
    blend = blend_of(increments, web="1", code="1")
    tokenizer = replace(blend.manifest.tokenizer, fingerprint="1" * 64)
    other = replace(increments["old"].manifest, tokenizer=tokenizer)
    with pytest.raises(InputError, match="--increments: mixed and old were made by different tokenizers"):
        source_over([blend, OpenIncrement(other, increments["old"].dataset)], LENGTH, SEED)
    with pytest.raises(ValueError, match="start at 0"):
        source_over([blend, increments["old"]], LENGTH, SEED).batch(np.array([-1]))
