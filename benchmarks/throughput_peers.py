"""What benchmarks/throughput.py lets train side by side: the main program's own loop, and other people's.

All see the samples of one job in one order, and make the same updates: AdamW with the job's betas, decay of matrices
alone, one clipping, one constant learning rate. All but litgpt start from the same weights, so their losses agree.
The peers get their samples drawn beforehand, in memory; ours draws them as it trains, as always.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from throughput_breakdown import region_of
from throughput_rounds import Train, Turns, Work
from torch import Tensor, nn

from megalrps.errors import InputError
from megalrps.model.config import ModelConfig
from megalrps.model.huggingface import to_huggingface
from megalrps.model.initialisation import initialise_
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import decays_matrices
from megalrps.parallel.world import open_world
from megalrps.training.loop import Loop
from megalrps.training.opening import open_run
from megalrps.training.prepare import Job, prepare


@dataclass(frozen=True)
class Peer:
    """What ``--peer NAME`` means."""

    train: Train
    does: str
    """What is measured, in words, for the result."""
    needs: tuple[str, ...]
    """Packages, by the names that pip and Python know them by."""


def ours(work: Work, turns: Turns) -> list[float]:
    """``pretrain_gpt.py`` between opening the run and the first checkpoint: the loop's own steps."""
    with TemporaryDirectory() as place, _run_of(work, place) as run:
        loop, segment = Loop(run), run.job.plan.segments[0]
        loop.restore(segment)
        state = run.state
        turns.watch(
            state.engine.modules(),
            [(state.optimizer, "update", region_of("adamw")), (state.buffers, "gradient_norm", region_of("clip"))],
        )
        while turns.more():
            loop.step(segment)
        assert run.metrics is not None
        run.metrics.sync()
        lines = run.directory.metrics.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]


@contextmanager
def _run_of(work: Work, place: str) -> Iterator[Any]:
    checkpoint = replace(work.config.checkpoint, save=str(Path(place) / "run"), save_interval=0)
    runtime = work.config.runtime
    with (
        open_world({}, device=work.device, backend=None, timeout_minutes=runtime.distributed_timeout_minutes) as world,
        open_run(replace(work.config, checkpoint=checkpoint), world) as run,
    ):
        yield run


def hf(work: Work, turns: Turns) -> list[float]:
    """Hugging Face transformers' Trainer, without logging, saving and evaluation."""
    import transformers
    from transformers import Trainer, TrainerCallback

    transformers.logging.set_verbosity_error()
    job = prepare(work.config, 1)
    model = _llama(work, job)
    losses: list[Tensor] = []

    class ByTurns(TrainerCallback):
        """Lets the trainer go on from one update to the next when its turn has come."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.watch(model.modules())
            control.should_training_stop = not turns.more()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = not turns.more()

    class InOrder(Trainer):
        """Takes the samples in the order in which they are."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with TemporaryDirectory() as place:
        arguments = _trainer_arguments(place, work, job)
        samples = _Samples(samples_of(work, job))
        trainer = InOrder(model=model, args=arguments, train_dataset=samples, callbacks=[ByTurns()])
        handle = model.register_forward_hook(lambda _model, _inputs, output: losses.append(output.loss.detach()))
        trainer.train()
        handle.remove()
    return _of_updates(losses, work, job)


def _trainer_arguments(place: str, work: Work, job: Job) -> Any:
    from transformers import TrainingArguments

    options = work.config.optimizer
    return TrainingArguments(
        output_dir=place,
        max_steps=work.updates + 1,  # stopped by the callback
        per_device_train_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=work.config.training.global_batch_size // job.micro_batch_size,
        learning_rate=work.config.plan.lr,
        lr_scheduler_type="constant",
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_epsilon=options.adam_eps,
        max_grad_norm=options.clip_grad,
        optim="adamw_torch_fused",
        bf16=work.config.training.bf16,
        use_cpu=work.device == "cpu",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=work.device == "cuda",
    )


class _Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples as a user hands them to the Trainer: inputs, and the labels that are already shifted."""

    def __init__(self, tokens_NS: Tensor) -> None:
        self._tokens_NS = tokens_NS

    def __len__(self) -> int:
        return len(self._tokens_NS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels_S = self._tokens_NS[index, 1:]
        return {"input_ids": self._tokens_NS[index, :-1], "labels": labels_S, "shift_labels": labels_S}


def hf_loop(work: Work, turns: Turns, *, compiled: bool = False) -> list[float]:
    """transformers' LLaMA in a loop as a user of torch writes it; ``compiled``: under torch.compile, loss included."""
    import transformers

    transformers.logging.set_verbosity_error()
    job = prepare(work.config, 1)
    model = _llama(work, job).to(work.device)
    forward: Callable[..., Any] = torch.compile(model) if compiled else model

    def loss_of(tokens_BS: Tensor) -> Tensor:
        labels_BS = tokens_BS[:, 1:].contiguous()
        loss: Tensor = forward(
            input_ids=tokens_BS[:, :-1].contiguous(), labels=labels_BS, shift_labels=labels_BS, use_cache=False
        ).loss
        return loss

    return _plain_loop(model, loss_of, work, job, turns, () if compiled else model.modules())


def litgpt(work: Work, turns: Turns) -> list[float]:
    """litgpt's GPT and its chunked loss in the same plain loop, from weights of its own."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    job = prepare(work.config, 1)
    shape = job.model
    if not shape.untie_embeddings_and_output_weights:
        raise InputError("litgpt ties no weights here: add --untie-embeddings-and-output-weights")
    model = GPT(
        Config(
            name="megalrps-benchmark",
            block_size=work.config.data.seq_length,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.num_layers,
            n_head=shape.num_attention_heads,
            n_embd=shape.hidden_size,
            n_query_groups=shape.query_groups,
            head_size=shape.head_size,
            intermediate_size=shape.feed_forward_width,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=shape.norm_epsilon,
            mlp_class_name="LLaMAMLP",
        )
    )
    torch.manual_seed(work.config.training.seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=shape.init_method_std)
    model.to(work.device)

    def loss_of(tokens_BS: Tensor) -> Tensor:
        loss: Tensor = chunked_cross_entropy(model(tokens_BS[:, :-1]), tokens_BS[:, 1:], chunk_size=0)
        return loss

    return _plain_loop(model, loss_of, work, job, turns, model.modules())


PEERS: Mapping[str, Peer] = {
    "hf": Peer(
        hf,
        "transformers.Trainer: LlamaForCausalLM (sdpa, fp32 parameters, autocast under bf16), adamw_torch_fused, "
        "SequentialSampler, no logging, no saving, no evaluation; everything from the end of an update to the end of "
        "the next",
        ("transformers", "accelerate"),
    ),
    "hf-loop": Peer(
        hf_loop,
        "the same LlamaForCausalLM in a plain loop: zero_grad(set_to_none), forward with loss, backward, "
        "clip_grad_norm_, torch.optim.AdamW(fused=True), loss.item()",
        ("transformers",),
    ),
    "torch-compile": Peer(
        partial(hf_loop, compiled=True),
        "the plain loop of hf-loop with the model and its loss under torch.compile, defaults; compilation is in the "
        "updates that are not counted",
        ("transformers",),
    ),
    "litgpt": Peer(
        litgpt,
        "litgpt.model.GPT with litgpt's chunked_cross_entropy in the same plain loop, from weights of its own",
        ("litgpt", "lightning"),
    ),
}


def check_peer(name: str) -> None:
    """Raise InputError for a peer that is unknown, or for which a package is missing."""
    if name not in PEERS:
        raise InputError(f"--peer {name} is unknown: it is one of {', '.join(PEERS)}")
    missing = [package for package in PEERS[name].needs if find_spec(package) is None]
    if missing:
        raise InputError(f"--peer {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def samples_of(work: Work, job: Job) -> Tensor:
    """The samples of all updates in the order in which the loop draws them: int64 [updates x batch, S + 1]."""
    names = tuple(each.manifest.name for each in job.increments)
    count = (work.updates + 1) * work.config.training.global_batch_size
    return torch.from_numpy(job.union(*names).batch(np.arange(count, dtype=np.int64)).tokens_BS)


def _llama(work: Work, job: Job) -> Any:
    """transformers' model of the job's shape with the weights that ours begins with."""
    import transformers

    weights, config = _exported(job.model, work.config.training.seed, work.config.data.seq_length)
    model = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**config), attn_implementation="sdpa", dtype=torch.float32
    )
    model.load_state_dict(weights, strict=False)  # a tied head is the embedding and has no entry
    model.tie_weights()
    return model.train()


def _exported(shape: ModelConfig, seed: int, sequence_length: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = Transformer(shape)
    initialise_(model, shape, seed)
    exported = to_huggingface(model.state_dict(), shape, max_position_embeddings=sequence_length)
    return {name: weight.clone() for name, weight in exported.weights.items()}, exported.config


def _plain_loop(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], work: Work, job: Job, turns: Turns, watched: Any
) -> list[float]:
    """Updates as a user of torch writes them."""
    options = work.config.optimizer
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays_matrices(n, p) is flag], "weight_decay": decay}
        for flag, decay in ((True, options.weight_decay), (False, 0.0))
    ]
    betas = (options.adam_beta1, options.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=work.config.plan.lr, betas=betas, eps=options.adam_eps, fused=True)
    size = work.config.training.global_batch_size
    batches = iter(samples_of(work, job).split(size))
    turns.watch(watched)
    losses = []
    while turns.more():
        tokens_BS = next(batches).to(work.device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=work.device)
        for part in tokens_BS.split(job.micro_batch_size):
            with torch.autocast(work.device, dtype=torch.bfloat16, enabled=work.config.training.bf16):
                loss = loss_of(part) * (job.micro_batch_size / size)
            loss.backward()
            total += loss.detach()
        if options.clip_grad > 0:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()
        losses.append(total.item())
    return losses


def _of_updates(losses: list[Tensor], work: Work, job: Job) -> list[float]:
    """The mean loss of each update from those of its passes: what the model returns is a share of the sum already."""
    passes = work.config.training.global_batch_size // job.micro_batch_size
    values = torch.stack(losses).double().tolist()
    whole = len(values) - len(values) % passes
    return [sum(values[start : start + passes]) for start in range(0, whole, passes)]
