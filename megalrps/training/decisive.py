"""What each option has to do with the result: whether a run may go on with another value of it.

Every option of every section stands in exactly one of the four tables. Imports no torch.
"""

from collections.abc import Mapping
from types import MappingProxyType

_POSITIONS = "the position of every sample is counted in it; train with another one in a new --save"
_WEIGHTS = "it is the shape of the weights that were trained; train another model in a new --save"
_ONE_MODEL = "every release of a run is measured and converted as one model; train another one in a new --save"
_STEPS = "it says at which steps the states that were trained lie; a plan may only grow, by --increments"
_STATE_TYPE = "the checkpoints hold the moments in that type; train with another one in a new --save"
_DOCUMENTS = "every release of a run is trained on samples that were read one way; train another in a new --save"
_DRAWN = "the samples that were trained on follow from it; a plan may only grow, by --increments"
_DATA = "increments that were trained on stay, in their order; append new ones"

FIXED: Mapping[str, str] = MappingProxyType(
    {
        "num_layers": _WEIGHTS,
        "hidden_size": _WEIGHTS,
        "num_attention_heads": _WEIGHTS,
        "ffn_hidden_size": _WEIGHTS,
        "num_query_groups": _WEIGHTS,
        "kv_channels": _WEIGHTS,
        "untie_embeddings_and_output_weights": _WEIGHTS,
        "vocab_size": _WEIGHTS,
        "make_vocab_size_divisible_by": _WEIGHTS,
        "rotary_base": _ONE_MODEL,
        "norm_epsilon": _ONE_MODEL,
        "seq_length": _POSITIONS,
        "reset_attention_mask": _DOCUMENTS,
        "reset_position_ids": _DOCUMENTS,
        "eod_mask_loss": _DOCUMENTS,
        "pack_documents": _POSITIONS,
        "global_batch_size": _POSITIONS,
        "seed": "the order of the samples follows from it; train with another one in a new --save",
        "paradigm": _STEPS,
        "alpha": f"{_STEPS}, and --alpha of a version not begun may change without --allow, with a value a version",
        "increment_steps": _STEPS,
        "replay": f"{_DRAWN}, and --replay of an increment not begun may change without --allow, with a value each",
        "exp_avg_dtype": _STATE_TYPE,
        "exp_avg_sq_dtype": _STATE_TYPE,
        "loss_scale": "the checkpoints hold the scale with the state; train with another one in a new --save",
        "increments": _DATA,
    }
)
"""Options in which what was trained is counted, laid out or read: no reason makes the old state fit a new value."""

CHANGEABLE = frozenset(
    {
        "lr",
        "min_lr",
        "lr_decay_style",
        "lr_warmup_iters",
        "branch_optimizer",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "clip_grad",
        "bf16",
        "fp16",
        "init_method_std",
        "initial_loss_scale",
        "min_loss_scale",
        "loss_scale_window",
        "hysteresis",
        "deterministic_reduction",
    }
)
"""Options that change the numbers of the steps to come, and leave what was trained as it is: by ``--allow``."""

OF_THE_CURVES = ("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "branch_optimizer")
"""Those of the plan among them: they move no step and no sample. They count where a segment's result follows from them,
which its fingerprint tells."""

ONLY_WITH_FP16 = frozenset({"loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"})

ROUNDING = frozenset(
    {
        "micro_batch_size",
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "pipeline_schedule",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
        "context_parallel_size",
        "data_parallel_sharding_strategy",
        "ddp_bucket_size",
        "optimizer_cpu_offload",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "cross_entropy_fusion_impl",
        "loss_chunk_tokens",
        "attention_backend",
        "optimizer_backend",
        "device",
        "distributed_backend",
    }
)
"""Options that change the order of sums, and with it the last bits at most: the log says so."""

DECISIVE_IN_ORDER = frozenset(
    {"micro_batch_size", "tensor_model_parallel_size", "attention_backend", "optimizer_backend"}
)
"""Those of them that stay as they were under --deterministic-reduction, which promises every bit."""

FREE = frozenset(
    {
        "valid_data_path",
        "tokenizer_type",
        "tokenizer_model",
        "eod_token",
        "num_workers",
        "data_cache_path",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "cpu_offloading_num_layers",
        "on_non_finite",
        "max_skipped_steps",
        "on_loss_spike",
        "loss_spike_window",
        "loss_spike_sigma",
        "save",
        "save_interval",
        "save_keep",
        "async_save",
        "load",
        "allow",
        "lease_seconds",
        "log_interval",
        "tensorboard_dir",
        "distributed_timeout_minutes",
        "paths",
        "exit_duration_in_mins",
        "exit_interval",
    }
)
"""Options that change no number of any update that is made. Whether a run goes on after a loss or gradient that is no
number is among them: what was left out is counted in the checkpoints, and a run without one is the same either way."""
