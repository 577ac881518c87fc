"""Texts that tokenizers get wrong: real ones, rare scripts, and seeded mixtures of everything that text can hold."""

# ruff: noqa: RUF001 - characters that look like others are what this is about

import pydoc_data.topics
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

MANY_TONGUES = (
    "Übergrößenträger, naïve façade — «œuvre» ½ ﬁne ÅA\u030a",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "日本語の文章、カタカナとひらがな。𠮷野家で㍿を１２３円",
    "敏捷的棕色狐狸跳过了懒狗。「引用」……",
    "키스의 고유조건은 입술끼리 만나야 하고 \u1112\u1161\u11ab",
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣ \u200f\u202babc\u202c",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा क्\u200dष १२३",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία ς Σ",
    "ᚠᛇᚻ ᛒᛦᚦ ᚠᚱᚩᚠᚢᚱ 𐎠𐎡 𒀀𒁀 𓀀𓂀 \U0001e900\U0001e922",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪🇯 👍🏽 ☃️ 1️⃣",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘",
    "\ufeffbom \u200b\u200c\u2060 \u00ad \ufffd \ufffe \U0010ffff \ue000",
    "don't I'LL we've 'tis he'd'nt ’s can´t ſ K \u0130i I\u0307 ǅ ẞß",
    "x\u00a0y\u2003z\u3000w\u1680v\u2028u\u2029t\u0085s\u001cr\u000bq\u000cp",
    "a\u2581b \u2581\u2581 c\u2581 \u2581d _e_ \u2581",
    "١٢٣ ４５６ ⅷ ² ½ 1234567890 3.14e-10 0xDEADBEEF 1_000_000 ၁၂",
)
_WHITE = (
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\n\n",
    " \n",
    "\r",
    "\u00a0",
    "\u3000",
    "\u2581",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
)
_CONTROL = ("\x00", "\x01", "\x1b[0m", "\x7f", "\x80", "\u200b", "\ufeff", "\ufffd", "\U0010ffff")
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~§¿…—"
_ENGLISH = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "for",
    "was",
    "are",
    "with",
    "his",
    "they",
    "one",
    "word",
)
_ASSIGNED = ((0x20, 0x2FF), (0x300, 0x6FF), (0x900, 0xDFF), (0x1E00, 0x27BF), (0x3040, 0x9FFF), (0xAC00, 0xD7A3))
_ASSIGNED += ((0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x2FFFF), (0xE0000, 0xE01EF))


def real_texts(characters: int) -> list[str]:
    """Sources of Python's library and its pydoc topics, in a fixed order, until they have so many characters."""
    found = list(pydoc_data.topics.topics.values())[::4]
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.append(path.read_text(encoding="utf-8"))
    mixed = random.Random(1).sample(found, len(found))
    kept = []
    for text in mixed:
        kept.append(text)
        size += len(text)
        if size >= characters:
            break
    return kept


def odd_text(chance: random.Random, specials: Sequence[str] = ()) -> str:
    """A text of up to some hundred characters, now and then of some thousand; often empty or one character."""
    kind = chance.random()
    if kind < 0.02:
        return ""
    if kind < 0.1:
        return _part(chance, specials)
    if kind < 0.16:  # one long run
        unit = chance.choice((*_WHITE, "a", "0", "é", "日", "ab", "'s", "-", "🙂", "\x00", " a", "\u0301", "<"))
        return _part(chance, specials) + unit * chance.choice((2, 17, 65, 300, 2000)) + _part(chance, specials)
    if kind < 0.22:  # any code points at all
        return "".join(_code_point(chance) for _ in range(chance.randint(1, 60)))
    return "".join(_part(chance, specials) for _ in range(chance.randint(2, chance.choice((5, 20, 60)))))


def _code_point(chance: random.Random) -> str:
    low, high = chance.choice(_ASSIGNED)
    character = chance.randint(low, high)
    return chr(character) if not 0xD800 <= character <= 0xDFFF else "?"


def _part(chance: random.Random, specials: Sequence[str]) -> str:
    kind = chance.randrange(12 if specials else 11)
    if kind < 3:
        word = chance.choice(_ENGLISH)
        return chance.choice((" ", "", " ")) + chance.choice((word, word.title(), word.upper()))
    if kind == 3:
        return chance.choice(_WHITE) * chance.choice((1, 1, 1, 2, 3, 5))
    if kind == 4:
        return "".join(chance.choice(_PUNCTUATION) for _ in range(chance.randint(1, 4)))
    if kind == 5:
        return str(chance.randrange(10 ** chance.randint(1, 9)))
    if kind == 6:
        text = chance.choice(MANY_TONGUES)
        start = chance.randrange(len(text))
        return text[start : start + chance.randint(1, 12)]
    if kind == 7:
        return chance.choice(_CONTROL)
    if kind == 8:
        return chance.choice(("'s", "'LL", "'re", "'t", "'D", "'ſ", "’s", "''", "'")) + chance.choice(("", " ", "x"))
    if kind == 9:
        return _code_point(chance)
    if kind == 10:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGH_éß"
        return "".join(chance.choice(letters) for _ in range(chance.randint(1, 12)))
    special = chance.choice(specials)
    return chance.choice((special, special, special[:-1], special[1:], " " + special, special + " ", special * 2))
