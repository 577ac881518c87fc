"""Hugging Face BPE models whose texts the library gigatoken encodes, and why the others are not.

gigatoken was compared with ``tokenizers`` for what this module admits, and for nothing else: byte-level BPE with one of
a few rules of splitting, no normaliser but NFC, and added tokens that take no white space with them. The settings are
read from the reference library, and gigatoken gets its canonical JSON, so that both mean the same model.
"""

import importlib.metadata
import json
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalrps.data.fast_check import WORD_END, OutsideError
from megalrps.data.tokenizer import CutAtSpaces, Encoded, HuggingFaceTokenizer

_PROVED_VERSIONS = ("0.10.0",)
_MOST_GROWTH = 96 << 20
"""Bytes that gigatoken's memory of words, which it does not bound, may take before it is begun anew."""
_UNSET = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
"""Settings of the model that must be left out."""
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = resource.getpagesize()

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PROVED_SPLITS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES: "Llama 3",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES: "Qwen 2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES: "o200k",
}
"""Rules by which texts are split before the pieces are looked for, beside GPT-2's, which is built in."""


# What Unicode 17 added: gigatoken takes these for the letters, digits and marks that they are, tokenizers 0.23 does not
# know them yet. All other code points were compared (tests/faults/test_tokenizer_identity.py), but for those behind the
# last of these, which nearly no text has.
_NEW_CHARACTERS = "\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1" + "".join(
    map(chr, (*range(0x1ACF, 0x1ADE), *range(0x1AE0, 0x1AEC)))
)
_NEW_ASTRAL = re.compile(
    "[\U00010940-\U0001095f\U00010ec0-\U00010eff\U00011b60-\U00011b67\U00011db0-\U00011def\U00016ea0-\U00016edf\U00016ff0-\U00016fff\U000187f8-\U000187ff\U00018cd6-\U00018dff"
    "\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002ceaf\U000323b0-\U0010ffff]"
)
# The two libraries normalise by tables of different years. All characters but these are inert: they stay as they are,
# and so does what is beside them, in every version of Unicode (it promises so for the characters that it has assigned).
_NOT_INERT = re.compile(
    "[^\\0-\u02ff\u0400-\u0482\u048a-\u052f\u05d0-\u05ea\u2010-\u2027\u2030-\u205e\u2080-\u208e\u20a0-\u20bf\u2190-\u21ff"
    "\u2500-\u27bf\u3001-\u3029\u3041-\u3096\u309b-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uff01-\uffbe\U0001f300-\U0001f64f]"
)


class GigatokenBackend:
    """gigatoken in the place of ``tokenizers``; OutsideError where it is not proved to be its equal.

    It is called for one text at a time, on the calling thread: its own threads are never started.
    """

    def __init__(self, reference: HuggingFaceTokenizer) -> None:
        try:
            version = importlib.metadata.version("gigatoken")
            from gigatoken.gigatoken_rs import load_hf_json
        except ImportError as error:
            raise OutsideError(f"gigatoken is not installed, or broken ({error})") from None
        if version not in _PROVED_VERSIONS:
            raise OutsideError(
                f"gigatoken {version} was not compared with the reference; install {_PROVED_VERSIONS[-1]}"
            )
        library = reference.library
        check_model(library)
        if not reference.has_distinct_ids:
            raise OutsideError("two tokens of the model have one id")
        before, behind = template(library) if reference.special_tokens else ([], [])
        self.name = f"gigatoken {version}"
        self.ids_behind = len(behind)
        # All rules of splitting end a part where a space follows a letter; only an added token may go on.
        added = [token.content for token in library.get_added_tokens_decoder().values()]
        self.can_be_cut = not any(map(WORD_END.search, added))
        self.cut_at_spaces: CutAtSpaces = "keep" if self.can_be_cut and not (before or behind) else None
        self._before, self._behind = np.array(before, np.uint32), np.array(behind, np.uint32)
        self._normalizes = library.normalizer is not None
        self._library, self._load, self._content = library, load_hf_json, library.to_str()
        self._growth = 0
        try:
            self._encode = self._load(self._content).encode
        except (RuntimeError, ValueError) as error:
            raise OutsideError(f"gigatoken does not know the model ({' '.join(str(error).split())})") from None

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """As in Tokenizer."""
        if self._growth > _MOST_GROWTH:
            self._growth = 0
            del self._encode  # not two memories at once
            self._encode = self._load(self._content).encode
        resident = _resident_bytes()
        wrapped = self._before.size + self._behind.size > 0
        parts: list[npt.NDArray[np.uint32]] = []
        lengths = np.empty(len(texts), np.int64)
        for i, text in enumerate(texts):
            ids = self._encode(text) if text.isascii() or self._is_proved(text) else self._encode_slowly(text)
            lengths[i] = ids.size
            parts += [self._before, ids, self._behind] if wrapped else [ids]
        self._growth += max(0, _resident_bytes() - resident - int(lengths.sum()) * 4)
        lengths += self._before.size + self._behind.size
        return Encoded(np.concatenate(parts) if parts else np.empty(0, np.uint32), lengths)

    def _is_proved(self, text: str) -> bool:
        """Whether ``text``, not all ASCII, holds only characters that the two libraries take for the same."""
        return not has_new_characters(text) and not (self._normalizes and _NOT_INERT.search(text))

    def _encode_slowly(self, text: str) -> npt.NDArray[np.uint32]:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.uint32)


def has_new_characters(text: str) -> bool:
    """Whether ``text``, not all ASCII, has characters that the two libraries take for something else."""
    if any(character in text for character in _NEW_CHARACTERS):
        return True
    # A str takes four bytes a character where, and only where, one is beyond U+FFFF. A search in all of it is slow.
    if text.__sizeof__() < 4 * len(text):
        return False
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return _NEW_ASTRAL.search("".join(map(chr, np.unique(points[points > 0xFFFF])))) is not None


def check_model(library: Any) -> None:
    """Raise OutsideError, saying why, for a tokenizer (of the library ``tokenizers``) that was not compared."""
    model = library.model
    if type(model).__name__ != "BPE":
        raise OutsideError(f"the model is {type(model).__name__}, not BPE")
    for setting in _UNSET:
        if value := getattr(model, setting):
            raise OutsideError(f"the model's {setting} is {value!r}")
    from tokenizers.pre_tokenizers import ByteLevel

    if any(model.token_to_id(byte) is None for byte in ByteLevel.alphabet()):
        raise OutsideError("the model's vocabulary lacks single bytes")
    for token in library.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or not token.content:
            raise OutsideError(f"the added token {token.content!r} looks at what is beside it")
    normalizer = _settings(library.normalizer)
    if normalizer not in (None, {"type": "NFC"}):
        raise OutsideError(f"the normalizer is {normalizer['type']}")
    _check_splitting(_settings(library.pre_tokenizer))


def _check_splitting(settings: Any) -> None:
    """Raise OutsideError unless a pre-tokenizer is GPT-2's, with or without a space before, or a rule that is known."""
    if settings is None:
        raise OutsideError("there is no pre-tokenizer")
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if settings["type"] == "ByteLevel":
        if settings | {"add_prefix_space": False, "trim_offsets": True} != plain:
            raise OutsideError("the pre-tokenizer is ByteLevel without splitting")
        return
    steps = settings.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        raise OutsideError(f"the pre-tokenizer is {'+'.join(step['type'] for step in steps) or settings['type']}")
    split, level = steps
    pattern = split.get("pattern", {}).get("Regex")
    if pattern not in _PROVED_SPLITS or split.get("behavior") != "Isolated" or split.get("invert"):
        raise OutsideError("the pre-tokenizer splits by a rule that was not compared")
    if level | {"trim_offsets": True} != plain | {"use_regex": False}:
        raise OutsideError("the pre-tokenizer splits and then goes on as no other model does")


def template(library: Any) -> tuple[list[int], list[int]]:
    """The ids that the library adds before and behind those of a text; OutsideError where it does more than that."""
    settings = _settings(library.post_processor)
    steps = [] if settings is None else [settings]
    if settings is not None and settings["type"] == "Sequence":
        steps = settings["processors"]
    steps = [step for step in steps if step["type"] != "ByteLevel"]  # moves offsets only
    if not steps:
        return [], []
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        raise OutsideError(f"the post-processor is {'+'.join(step['type'] for step in steps)}")
    before: list[int] = []
    behind: list[int] = []
    texts = 0
    for part in steps[0]["single"]:
        if "Sequence" in part:
            texts += 1
        else:
            ids = steps[0]["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            (behind if texts else before).extend(ids)
    if texts != 1:
        raise OutsideError(f"the post-processor's template has the text {texts} times")
    return before, behind


def _settings(part: Any) -> Any:
    """Of a part of a tokenizer, as its JSON has them; None where there is no such part."""
    return None if part is None else json.loads(part.__getstate__())


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0
