"""Shapes that are refused, shapes that are derived, and an import without torch."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalrps.errors import InputError
from megalrps.model.config import ModelConfig, padded_vocab_size, with_vocabulary
from megalrps.model.presets import PRESETS

GOOD = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"num_layers": 0}, "--num-layers"),
        ({"hidden_size": -64}, "--hidden-size"),
        ({"num_attention_heads": 0}, "--num-attention-heads"),
        ({"num_attention_heads": 5}, "--num-attention-heads"),
        ({"num_query_groups": 3}, "--num-query-groups"),
        ({"num_query_groups": 8}, "--num-query-groups"),
        ({"num_query_groups": 0}, "--num-query-groups"),
        ({"kv_channels": 15}, "--kv-channels"),
        ({"hidden_size": 60, "num_attention_heads": 4}, "--kv-channels"),
        ({"ffn_hidden_size": 0}, "--ffn-hidden-size"),
        ({"hidden_size": 16}, "--ffn-hidden-size"),
        ({"rotary_base": 0.0}, "--rotary-base"),
        ({"norm_epsilon": float("nan")}, "--norm-epsilon"),
        ({"init_method_std": 0.0}, "--init-method-std"),
        ({"vocab_size": -1}, "--vocab-size"),
        ({"make_vocab_size_divisible_by": 0}, "--make-vocab-size-divisible-by"),
    ],
)
def test_a_bad_shape_is_refused_naming_its_flag(change, flag):
    with pytest.raises(InputError, match=flag) as error:
        replace(GOOD, **change).validate()
    assert "\n" not in str(error.value)


def test_unset_fields_are_derived():
    GOOD.validate()
    assert (GOOD.head_size, GOOD.query_groups, GOOD.feed_forward_width) == (16, 4, 128)
    wide = replace(GOOD, hidden_size=50, kv_channels=6, num_query_groups=2, ffn_hidden_size=7)
    wide.validate()
    assert (wide.query_width, wide.key_value_width, wide.feed_forward_width) == (24, 12, 7)


@given(st.integers(1, 10**6), st.integers(1, 4096))
def test_padding_is_the_least_multiple(size, divisor):
    padded = padded_vocab_size(size, divisor)
    assert padded % divisor == 0
    assert size <= padded < size + divisor


def test_vocabulary_comes_from_the_tokenizer_unless_stated():
    assert with_vocabulary(GOOD, 1000).vocab_size == 1024
    stated = replace(GOOD, vocab_size=32000)
    assert with_vocabulary(stated, 32000) == stated
    assert with_vocabulary(stated, 2048) == stated
    with pytest.raises(InputError, match="--vocab-size 32000"):
        with_vocabulary(stated, 32001)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    PRESETS[name].validate()


def test_shapes_and_counts_are_known_without_torch():
    modules = ("config", "presets", "parameters", "counts")
    program = (
        "import sys; " + "".join(f"import megalrps.model.{m}; " for m in modules) + "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
