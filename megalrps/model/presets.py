"""Shapes by name. Sizes count every parameter, embedding and head included."""

from collections.abc import Mapping
from types import MappingProxyType

from megalrps.model.config import ModelConfig

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        # For tests and the first minutes: tied heads, vocabulary from the tokenizer (named by their size with 2,048).
        "llama-tiny": ModelConfig(
            num_layers=2,
            hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=344,
            untie_embeddings_and_output_weights=False,
        ),
        "llama-1m": ModelConfig(
            num_layers=4,
            hidden_size=128,
            num_attention_heads=4,
            ffn_hidden_size=344,
            untie_embeddings_and_output_weights=False,
        ),
        "llama-3m": ModelConfig(
            num_layers=6,
            hidden_size=192,
            num_attention_heads=6,
            ffn_hidden_size=512,
            untie_embeddings_and_output_weights=False,
        ),
        "llama-20m": ModelConfig(
            num_layers=4, hidden_size=256, num_attention_heads=8, ffn_hidden_size=688, vocab_size=32000
        ),
        # Sizes of the learning rate path switching paper (arXiv 2410.04103); the shapes that reach them are ours.
        "llama-203m": ModelConfig(
            num_layers=15, hidden_size=896, num_attention_heads=14, ffn_hidden_size=2432, vocab_size=32000
        ),
        "llama-1.2b": ModelConfig(
            num_layers=21, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=5504, vocab_size=32000
        ),
        "llama-3.1b": ModelConfig(
            num_layers=37, hidden_size=2560, num_attention_heads=40, ffn_hidden_size=6912, vocab_size=32000
        ),
    }
)
