"""Calls with hostile arguments of functions that are handed addresses, and of those that are handed tensors."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hostile_calls import INTEGERS, NOT_INTEGERS, expect, is_integer, outcome_of

LARGEST_ADDRESS = 2**63 - 1
WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
WORDS = ("", "float", "FLOAT32", "float32\0", "float32 ", "x" * 100_000, "\ud800", "float16", "int32", None, 4, b"\xff")
GUARD, SENTINEL = 64, 0xA5


class Memory:
    """Numbers in memory of their own, between two guards."""

    def __init__(self, chance: random.Random, type_: str, elements: int) -> None:
        width = WIDTHS[type_]
        self._bytes = np.full(elements * width + 2 * GUARD, SENTINEL, np.uint8)
        values = np.array([chance.uniform(0.1, 2.0) for _ in range(elements)])
        if type_ == "bfloat16":
            stored = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            stored = values.astype(type_)
        self._inside = self._bytes[GUARD : GUARD + elements * width]
        self._inside[:] = stored.view(np.uint8)
        self.type, self.address = type_, self._inside.ctypes.data
        assert self.address % 8 == 0

    def values(self) -> np.ndarray:
        if self.type == "bfloat16":
            return (self._inside.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self._inside.view(self.type).astype(np.float64)

    def check_guards(self) -> None:
        guards = np.concatenate([self._bytes[:GUARD], self._bytes[-GUARD:]])
        expect(bool((guards == SENTINEL).all()), "wrote outside the memory")


def is_word(value: object, allowed: Sequence[str]) -> bool:
    return value in allowed or (isinstance(value, bytes) and value in [word.encode() for word in allowed])


def is_address(value: object, elements: int, width: int) -> bool:
    """Whether a sound call may carry it: none but real, aligned ones are drawn beside those refused here."""
    if not is_integer(value, 0, 2**64 - 1):
        return False
    address = int(value)  # type: ignore[call-overload]
    return elements == 0 or (address > 0 and address % width == 0 and address + elements * width <= LARGEST_ADDRESS)


def hostile_address(chance: random.Random, real: int) -> object:
    return chance.choice((0, real + 1, -real, -1, 2**63, 2**64 - 8, 2**64, 1, 3, *NOT_INTEGERS))


def hostile_elements(chance: random.Random) -> object:
    """Never a count that some memory could have: it would be believed."""
    return chance.choice((-1, -(2**63), 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, *NOT_INTEGERS))


HOSTILE_THREADS = (-(2**31), -1, 0, 1, 2, 2**31 - 1, 2**31, *NOT_INTEGERS)
HOSTILE_FLOATS = (math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -1.0, 0, 10**400, None, "1", 1j, b"1", [])
FACTORS = {
    "gradient_scale": 0.5,
    "first_weight": 0.1,
    "second_decay": 0.95,
    "second_weight": 0.05,
    "epsilon": 1e-8,
    "decay": 0.99,
    "update_size": 0.01,
}
BUFFERS = ("param", "grad", "exp_avg", "exp_avg_sq", "narrow")


def is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not (isinstance(value, int) and abs(value) > 10**300)


def expected_update(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    gradient = values["grad"] * FACTORS["gradient_scale"]
    first = values["exp_avg"] + FACTORS["first_weight"] * (gradient - values["exp_avg"])
    second = FACTORS["second_decay"] * values["exp_avg_sq"] + FACTORS["second_weight"] * gradient**2
    step = FACTORS["update_size"] * first / (np.sqrt(second) + FACTORS["epsilon"])
    param = FACTORS["decay"] * values["param"] - step
    return {"param": param, "exp_avg": first, "exp_avg_sq": second, "narrow": param, "grad": values["grad"]}


def draw_update(chance: random.Random) -> tuple[dict[str, Memory], dict[str, Any]]:
    """A sound call of adamw: its memory and its arguments."""
    elements = chance.choice((0, 1, 7, 31, 33, 100))
    wide = chance.choice(("float32", "float64"))
    types = dict.fromkeys(BUFFERS, wide)
    types |= {name: chance.choice((wide, "bfloat16")) for name in ("exp_avg", "exp_avg_sq")}
    types["narrow"] = chance.choice(("bfloat16", "float16"))
    memory = {name: Memory(chance, type_, elements) for name, type_ in types.items()}
    arguments: dict[str, Any] = {name: each.address for name, each in memory.items()}
    arguments |= {"elements": elements, "type": wide, **FACTORS}
    arguments |= {f"{name}_type": types[name] for name in ("exp_avg", "exp_avg_sq", "narrow")}
    return memory, arguments


def spoil(chance: random.Random, arguments: dict[str, Any], fewest: int) -> None:
    """Put something hostile in the place of some arguments."""
    for name in chance.sample(sorted(arguments), chance.randint(fewest, 2)):
        if name in BUFFERS or name == "values":
            arguments[name] = hostile_address(chance, arguments[name])
        elif name == "elements":
            arguments[name] = hostile_elements(chance)
        elif name in FACTORS:
            arguments[name] = chance.choice(HOSTILE_FLOATS)
        elif name == "threads":
            arguments[name] = chance.choice(HOSTILE_THREADS)
        else:
            arguments[name] = chance.choice(WORDS)


def is_sound_update(arguments: dict[str, Any], native: Any) -> bool:
    wide, elements = arguments["type"], arguments["elements"]
    if not (is_word(wide, ("float32", "float64")) and is_integer(elements, 0, 1000)):
        return False
    moments = [arguments["exp_avg_type"], arguments["exp_avg_sq_type"]]
    types = all(is_word(each, (wide, "bfloat16")) for each in moments)
    types = types and is_word(arguments["narrow_type"], ("", "bfloat16", "float16"))
    if not types or not all(is_factor(arguments[name]) for name in FACTORS):
        return False
    if not is_integer(arguments["threads"], -(2**31), 2**31 - 1) or not is_instructions(arguments, native):
        return False
    widths = dict.fromkeys(("param", "grad"), WIDTHS[wide])
    widths |= {name: WIDTHS[arguments[f"{name}_type"]] for name in ("exp_avg", "exp_avg_sq")}
    if arguments["narrow_type"] == "":
        return is_integer(arguments["narrow"], 0, 2**64 - 1) and addresses_sound(arguments, widths, elements)
    return addresses_sound(arguments, {**widths, "narrow": 2}, elements)


def is_instructions(arguments: dict[str, Any], native: Any) -> bool:
    return is_word(arguments["instructions"], ("best", "baseline", *(["avx2"] * native.has_avx2())))


def addresses_sound(arguments: dict[str, Any], widths: dict[str, int], elements: int) -> bool:
    return all(is_address(arguments[name], elements, width) for name, width in widths.items())


def call_adamw(chance: random.Random, native: Any) -> str:
    memory, arguments = draw_update(chance)
    arguments |= {"threads": 1, "instructions": chance.choice(("best", "baseline"))}
    before = {name: each.values() for name, each in memory.items()}
    expected = expected_update(before)
    spoil(chance, arguments, 0)
    if not all(arguments[name] == value for name, value in FACTORS.items()) or (
        arguments["narrow_type"] != memory["narrow"].type
    ):
        expected = {}  # of these nothing is expected but that they do no harm
    valid = is_sound_update(arguments, native)

    def check(answer: Any) -> None:
        for name, values in expected.items():
            close = np.allclose(memory[name].values(), values, rtol=1e-4 if WIDTHS[memory[name].type] > 2 else 1e-2)
            expect(answer is None and close, f"adamw wrote something else to {name}")

    outcome = outcome_of(lambda: native.adamw(**arguments), valid, check)
    for name, each in memory.items():
        each.check_guards()
        expect(valid or np.array_equal(each.values(), before[name]), f"a refused call wrote to {name}")
    return outcome


def call_sum_of_squares(chance: random.Random, native: Any) -> str:
    type_ = chance.choice(("float32", "float64", "bfloat16"))
    memory = Memory(chance, type_, chance.choice((0, 1, 5, 1023, 1025)))
    elements = len(memory.values())
    arguments = {"values": memory.address, "elements": elements, "type": type_, "threads": 1, "instructions": "best"}
    spoil(chance, arguments, 0)
    valid = is_word(arguments["type"], ("float32", "float64", "bfloat16")) and is_instructions(arguments, native)
    valid = valid and is_integer(arguments["threads"], -(2**31), 2**31 - 1)
    valid = valid and is_integer(arguments["elements"], 0, elements)
    valid = valid and is_address(arguments["values"], elements, WIDTHS[type_])

    def check(answer: Any) -> None:
        expect(bool(np.isclose(answer, (memory.values() ** 2).sum(), rtol=1e-5)), "sum_of_squares added up wrongly")

    return outcome_of(lambda: native.sum_of_squares(**arguments), valid, check)


def call_pieces_of(chance: random.Random, native: Any) -> str:
    elements = chance.choice((*INTEGERS, *NOT_INTEGERS, 2**15, 2**15 + 1, chance.randint(0, 2**64 - 1)))
    valid = is_integer(elements, 0, 2**64 - 1)
    return outcome_of(
        lambda: native.pieces_of(elements),
        valid,
        lambda answer: expect(answer == -(-elements // 2**15), f"pieces_of({elements}) is not {answer}"),
    )


def call_without_arguments(chance: random.Random, native: Any) -> str:
    name = chance.choice(("has_avx2", "cuda_targets", "cuda_available"))
    arguments = [chance.choice((*INTEGERS, *NOT_INTEGERS))] * chance.randint(0, 1)
    kinds = {"has_avx2": bool, "cuda_targets": tuple, "cuda_available": tuple}
    return outcome_of(
        lambda: getattr(native, name)(*arguments),
        not arguments,
        lambda answer: expect(isinstance(answer, kinds[name]), f"{name}() gave {answer!r}"),
    )


def call_cuda(chance: random.Random, native: Any) -> str:
    """The launches where there is no device: refused, unless there is nothing to do. Where there is one: not tried."""
    if native.cuda_available()[0]:
        return "not tried"
    if chance.random() < 0.5:
        _, arguments = draw_update(chance)
        for name in ("type", "gradient_scale"):
            del arguments[name]
        arguments |= {"stream": 0, "found_inf": 0}
        spoil(chance, arguments, 0)
        launch = native.adamw_cuda
    else:
        real = chance.choice((0, 16, 1024, 2**62))
        arguments = dict.fromkeys(("values", "elements", "partials", "result", "stream"), real) | {"type": "float32"}
        for name in chance.sample(sorted(arguments), chance.randint(0, 2)):
            arguments[name] = chance.choice((*INTEGERS, *NOT_INTEGERS, *WORDS))
        launch = native.sum_of_squares_cuda
    valid = None if is_integer(arguments["elements"], 0, 0) else False
    return outcome_of(lambda: launch(**arguments), valid, lambda answer: expect(answer is None, f"gave {answer!r}"))


# ---- functions of tensors, which hand the addresses on ----

HOSTILE_TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda x: x[:-1],
    lambda x: torch.cat([x, x[:1]]),
    lambda x: torch.cat([x, x])[::2],
    lambda x: x.reshape(1, -1),
    lambda x: x[0],
    lambda x: x[:1].expand(x.numel()),
    lambda x: x.to(torch.int32),
    lambda x: x.to(torch.float16),
    lambda x: x.to(torch.complex64),
    lambda x: x.to("meta"),
    lambda x: x.to_sparse(),
    lambda x: x.numpy() if x.dtype != torch.bfloat16 else x.tolist(),
    lambda x: None,
)


def call_adamw_of_tensors(chance: random.Random, native: Any) -> str:
    from megalrps.kernels.adamw import adamw_, adamw_reference_

    elements = chance.choice((2, 33, 100))
    wide = chance.choice((torch.float32, torch.float64))
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    tensors: dict[str, Any] = {
        name: torch.rand(elements, generator=generator, dtype=torch.float64).to(
            torch.bfloat16 if name.startswith("exp") and chance.random() < 0.3 else wide
        )
        for name in BUFFERS[:4]
    }
    settings: dict[str, Any] = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    settings |= {"weight_decay": 0.1, "step": 3}
    twins = {name: tensor.clone() for name, tensor in tensors.items()}
    valid = chance.random() < 0.3
    if not valid:
        name = chance.choice(BUFFERS[:4])
        tensors[name] = chance.choice(HOSTILE_TENSORS)(tensors[name])
    elif chance.random() < 0.3:
        settings["step"] = chance.choice((0, -1, None))
        valid = False

    def check(answer: Any) -> None:
        adamw_reference_(**twins, **settings)
        for name, tensor in tensors.items():
            close = torch.allclose(tensor, twins[name], rtol=1e-5 if tensor.dtype == wide else 1e-2)
            expect(close, f"adamw_ wrote something else to {name}")

    return outcome_of(lambda: adamw_(**tensors, **settings), valid, check)


def call_sum_of_tensors(chance: random.Random, native: Any) -> str:
    from megalrps.kernels.native import sum_of_squares_native

    type_ = chance.choice((torch.float32, torch.float64, torch.bfloat16))
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    whole = torch.rand(chance.choice((2, 1023, 40_000)), generator=generator, dtype=torch.float64).to(type_)
    change = chance.choice((None, None, lambda x: x[:-1], lambda x: x[1:], lambda x: x[:0], *HOSTILE_TENSORS[2:]))
    x = whole if change is None else change(whole)
    valid = isinstance(x, torch.Tensor) and x.dtype == type_ and x.device.type == "cpu"
    valid = valid and not x.is_sparse and x.dim() == 1 and x.is_contiguous()

    def check(answer: Any) -> None:
        expect(math.isclose(answer.item(), float(x.double().square().sum()), rel_tol=1e-5), "added up wrongly")

    return outcome_of(lambda: sum_of_squares_native(x), valid, check)
