"""Which models a fast backend takes, what is said of the others, and the comparison that goes on while it is used."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import odd_texts
import pytest
from tokenizer_models import CONTROL, UNUSED, USER_DEFINED, stored, trained_hugging_face, trained_sentencepiece
from tokenizer_models import written_model as written

from megalrps.data import fast_check, fast_hugging_face
from megalrps.data.tokenizer import Encoded, Tokenizer, load_tokenizer
from megalrps.errors import InputError

PIECES = [("a", -1.0), ("b", -2.0), ("\u2581", -3.0)]
BPE = ((3, 2), (35, 1))

OUTSIDE_OF_WORD_PIECES = {
    "not BPE": lambda: written(PIECES, trainer=((3, 1), (35, 1))),
    "no byte fallback": lambda: trained_sentencepiece(byte_fallback=False),
    "white space as a suffix": lambda: written(PIECES, trainer=(*BPE, (24, 1))),
    "does not escape white space": lambda: written(PIECES, normalizer=((3, 1), (4, 0), (5, 0))),
    "unknown field 9": lambda: written(PIECES, normalizer=((4, 0), (9, 1))),
    "another kind: 'ab'": lambda: written(PIECES, others=[("ab", 0.0, USER_DEFINED)]),
    "another kind: 'ba'": lambda: written(PIECES, others=[("ba", 0.0, UNUSED)]),
    "control symbol of one character: 'c'": lambda: written(PIECES, others=[("c", 0.0, CONTROL)]),
    "scores 0 and -0": lambda: written([("a", 0.0), ("b", -0.0)]),
    "has no score": lambda: written([("a", float("nan"))]),
    "longer than 1024": lambda: written([("a" * 1025, 0.0)]),
}


@pytest.mark.parametrize("why", OUTSIDE_OF_WORD_PIECES)
def test_word_pieces_leave_other_models_to_sentencepiece(why: str, tmp_path: Path) -> None:
    pytest.importorskip("megalrps._native", reason="megalrps._native is not built here")
    tokenizer = load_tokenizer("SentencePieceTokenizer", stored(tmp_path, OUTSIDE_OF_WORD_PIECES[why]()))
    assert why in tokenizer.why
    assert tokenizer.backend.startswith("sentencepiece 0.")
    assert tokenizer.encode_batch(["ab c"]).tokens.size > 0


def changed(*path: str | int, to: object, rule: str = "GPT-2") -> str:
    """A sound tokenizer.json with another value at ``path``."""
    content = json.loads(trained_hugging_face(rule))
    place: Any = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return json.dumps(content)


def without_a_byte() -> str:
    content = json.loads(trained_hugging_face())
    del content["model"]["vocab"]["\u0100"]
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "\u0100" not in "".join(pair)]
    return json.dumps(content)


OUTSIDE_OF_GIGATOKEN = {
    "the model's unk_token": lambda: changed("model", "unk_token", to="<s>"),
    "the model's byte_fallback": lambda: changed("model", "byte_fallback", to=True),
    "the model's dropout": lambda: changed("model", "dropout", to=0.5),
    "lacks single bytes": without_a_byte,
    "two tokens of the model have one id": lambda: changed("model", "vocab", "a", to=100),
    "'<s>' looks at what is beside it": lambda: changed("added_tokens", 1, "rstrip", to=True),
    "'</s>' looks at what is beside it": lambda: changed("added_tokens", 2, "single_word", to=True),
    "the normalizer is Lowercase": lambda: changed("normalizer", to={"type": "Lowercase"}),
    "there is no pre-tokenizer": lambda: changed("pre_tokenizer", to=None),
    "ByteLevel without splitting": lambda: changed("pre_tokenizer", "use_regex", to=False),
    "the pre-tokenizer is WhitespaceSplit": lambda: changed("pre_tokenizer", to={"type": "WhitespaceSplit"}),
    "a rule that was not compared": lambda: trained_hugging_face(r"\p{L}+|\s+|[^\s\p{L}]"),
    "goes on as no other": lambda: changed("pre_tokenizer", "pretokenizers", 1, "use_regex", to=True, rule="Llama 3"),
    "the post-processor is BertProcessing": lambda: changed(
        "post_processor", to={"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}
    ),
    "has the text 2 times": lambda: changed(
        "post_processor",
        "single",
        to=[{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    ),
}


@pytest.mark.parametrize("why", OUTSIDE_OF_GIGATOKEN)
def test_gigatoken_leaves_other_models_to_tokenizers(why: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", stored(tmp_path, OUTSIDE_OF_GIGATOKEN[why]()), eod_token="</s>")
    assert why in tokenizer.why
    assert tokenizer.backend.startswith("tokenizers 0.")
    assert tokenizer.encode_batch(["ab c"]).tokens.size > 0


def test_another_gigatoken_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_hugging_face, "_PROVED_VERSIONS", ("0.9.9",))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", stored(tmp_path, trained_hugging_face()), eod_token="</s>")
    assert "was not compared with the reference; install 0.9.9" in tokenizer.why


def both(kind: str, path: Path, **settings: Any) -> tuple[Tokenizer, Tokenizer]:
    eod = {"eod_token": "</s>"} if kind == "HuggingFaceTokenizer" else {}
    return load_tokenizer(kind, path, **eod, **settings), load_tokenizer(
        kind, path, backend="reference", **eod, **settings
    )


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_a_fast_tokenizer_is_the_reference_in_all_but_speed(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("megalrps._native", reason="megalrps._native is not built here")
    model = trained_sentencepiece() if kind == "SentencePieceTokenizer" else trained_hugging_face()
    fast, reference = both(kind, stored(tmp_path, model))
    assert fast.backend in ("word pieces", "gigatoken 0.10.0")
    assert reference.why == "--tokenizer-backend reference"
    assert reference.backend in fast.why
    for name in ("kind", "vocab_size", "eod", "fingerprint"):
        assert getattr(fast, name) == getattr(reference, name)
    texts = ["", *odd_texts.MANY_TONGUES, *odd_texts.real_texts(20_000), ""]
    ours, theirs = fast.encode_batch(texts), reference.encode_batch(texts)
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    assert ours.lengths.dtype == np.int64
    assert fast.encode_batch([]).tokens.size == fast.encode_batch([]).lengths.size == 0


@pytest.mark.parametrize("special_tokens", [False, True])
def test_the_template_stays_a_choice(special_tokens: bool, tmp_path: Path) -> None:
    path = stored(tmp_path, trained_hugging_face())
    fast, reference = both("HuggingFaceTokenizer", path, special_tokens=special_tokens)
    texts = ["", "the word", "<s>", ""]
    ours, theirs = fast.encode_batch(texts), reference.encode_batch(texts)
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert (ours.tokens[0] == 1) == special_tokens


@pytest.mark.parametrize("text", ["\u0c5cab", "ab\U000323b0", "a\u1acf", "\U00011db0\u2019"])
def test_characters_newer_than_the_reference_are_left_to_it(text: str) -> None:
    assert fast_hugging_face.has_new_characters(text)
    assert fast_hugging_face.has_new_characters("x" * 5000 + text + "\u2019" * 5000)
    assert not any(map(fast_hugging_face.has_new_characters, odd_texts.MANY_TONGUES[:13]))


def test_gigatokens_memory_of_words_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, reference = both("HuggingFaceTokenizer", stored(tmp_path, trained_hugging_face()))
    loads: list[object] = []
    load = fast._fast._load  # type: ignore[attr-defined]
    monkeypatch.setattr(fast._fast, "_load", lambda content: loads.append(content) or load(content))  # type: ignore
    resident = iter(range(0, 1 << 60, 60 << 20))  # every look finds 60 MiB more
    monkeypatch.setattr(fast_hugging_face, "_resident_bytes", lambda: next(resident))
    texts = list(odd_texts.MANY_TONGUES)
    for _ in range(6):
        assert fast.encode_batch(texts).tokens.tolist() == reference.encode_batch(texts).tokens.tolist()
    assert len(loads) == 2  # after 120 MiB, and 120 more


class Wrong:
    """A backend that is wrong about one word, and says which texts it was given."""

    name = "wrong 1.0"
    can_be_cut = True
    cut_at_spaces = None
    ids_behind = 0

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        ids = [[ord(letter) + (word == "wrong") for word in text.split(" ") for letter in word] for text in texts]
        return Encoded.of_lists(ids)


class Right(Wrong):
    """The reference of that one."""

    kind, vocab_size, eod, fingerprint, backend, why = "letters", 1 << 21, 0, "0" * 64, "right 1.0", ""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        self.seen += texts
        return Encoded.of_lists([[ord(letter) for letter in text.replace(" ", "")] for text in texts])


def test_a_difference_ends_the_job_and_names_the_mend() -> None:
    tokenizer = fast_check.CheckedTokenizer(Right(), Wrong(), Path("tok.model"))
    tokenizer.encode_batch(["all is well"])
    with pytest.raises(InputError) as caught:
        tokenizer.encode_batch(["all is well", "here\nis a wrong word"])
    message = str(caught.value)
    assert "\n" not in message
    for part in ("tok.model", "wrong 1.0", "right 1.0", r"'here\nis a wrong word'", "--tokenizer-backend reference"):
        assert part in message


def test_the_first_documents_and_one_in_1024_are_compared() -> None:
    right = Right()
    tokenizer = fast_check.CheckedTokenizer(right, Wrong(), Path("tok.model"))
    texts = [f"document number {number}" for number in range(12_000)]
    for start in range(0, 12_000, 3):
        tokenizer.encode_batch(texts[start : start + 3])
    assert right.seen[: fast_check.FIRST] == texts[: fast_check.FIRST]
    assert 4 <= len(right.seen) - fast_check.FIRST <= 30  # 12 on average
    later = Right()  # another process, which has other documents first, compares the same ones
    fast_check.CheckedTokenizer(later, Wrong(), Path("tok.model")).encode_batch(texts[::-1])
    assert set(right.seen[fast_check.FIRST :]) <= set(later.seen)


def test_of_a_long_document_the_beginning_is_compared() -> None:
    right = Right()
    tokenizer = fast_check.CheckedTokenizer(right, Wrong(), Path("tok.model"))
    tokenizer.encode_batch(["so it is " * 100_000])
    assert 16_384 <= len(right.seen[0]) <= 16_400
    assert right.seen[0].endswith(("so", "it", "is"))
    with pytest.raises(InputError):
        tokenizer.encode_batch(["so it is " * 1_000 + "wrong " + "so it is " * 100_000])


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_the_beginning_of_a_long_document_has_its_first_tokens(kind: str, tmp_path: Path) -> None:
    """What the comparison of long documents rests on."""
    pytest.importorskip("megalrps._native", reason="megalrps._native is not built here")
    model = (
        trained_sentencepiece() if kind == "SentencePieceTokenizer" else trained_hugging_face("Llama 3", spaced=False)
    )
    tokenizer = load_tokenizer(kind, stored(tmp_path, model), **({} if kind[0] == "S" else {"eod_token": "</s>"}))
    assert tokenizer._fast.can_be_cut  # type: ignore[attr-defined]
    text = "  ".join(odd_texts.real_texts(30_000))
    for place in range(0, 10_000, 900):
        cut = fast_check.WORD_END.search(text, place)
        assert cut is not None
        tokenizer._compare(text[: cut.end() + 17_000], tokenizer.encode_batch([text]).tokens)  # type: ignore


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("SentencePieceTokenizer", lambda: trained_sentencepiece("nmt_nfkc")),
        ("SentencePieceTokenizer", lambda: trained_sentencepiece(split_by_whitespace=False)),
    ],
)
def test_where_a_cut_is_not_proved_documents_are_compared_whole(kind: str, model: Any, tmp_path: Path) -> None:
    pytest.importorskip("megalrps._native", reason="megalrps._native is not built here")
    assert not load_tokenizer(kind, stored(tmp_path, model()))._fast.can_be_cut  # type: ignore[attr-defined]


def test_an_unknown_backend_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tokenizer-backend 'fast' is unknown: choose one of auto, reference"):
        load_tokenizer("SentencePieceTokenizer", tmp_path, backend="fast")


def test_a_fast_tokenizer_starts_no_threads_and_imports_little(tmp_path: Path) -> None:
    path = stored(tmp_path, trained_hugging_face())
    code = (
        "import sys, os; from megalrps.data.tokenizer import load_tokenizer; "
        f"tokenizer = load_tokenizer('HuggingFaceTokenizer', {str(path)!r}, eod_token='</s>'); "
        "tokenizer.encode_batch(['a word'] * 100); print(tokenizer.backend, len(os.listdir('/proc/self/task')), "
        "[name for name in ('torch', 'awkward', 'typer', 'sentencepiece') if name in sys.modules])"
    )
    environment = {"PATH": "", "OPENBLAS_NUM_THREADS": "1"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout
    assert output.strip() == "gigatoken 0.10.0 1 []"
