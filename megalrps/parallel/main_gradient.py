"""Where the weight gradients of linear maps add up: in wide types, at once or when a pipeline schedule has room.

An activation's gradient is what the stage before waits for; a weight's gradient nobody waits for until the update. The
zero-bubble schedules put the second where a pipeline would idle (Qi et al. 2023, arXiv 2401.10241, section 2), so the
linear maps hand out what the product needs rather than the product.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalrps.kernels.weight_gradient import accumulate_

_ATTRIBUTE = "main_gradient"


def _nothing() -> None:
    pass


class ProductQueue:
    """The weight products that one pipeline chunk still owes; its parameters' main gradients share it.

    What is queued keeps the rows of the output's gradient and of the map's input alive: under sequence parallelism
    those of the whole sequence, which is what the filled bubble costs in memory.
    """

    def __init__(self, *, deferring: bool = False) -> None:
        self.deferring = deferring
        self._products: list[Callable[[], None]] = []

    def __len__(self) -> int:
        """How many products wait that :meth:`take` has not handed out."""
        return len(self._products)

    def put(self, product: Callable[[], None]) -> None:
        """Do ``product`` now, or keep it while the queue defers."""
        if self.deferring:
            self._products.append(product)
        else:
            product()

    def take(self) -> Callable[[], None]:
        """Hand out, once, what was queued since the last call: calling the result does the products, in their order.

        The ``dw_builder`` of torch.distributed.pipelining: it is called after the backward pass of a micro-batch, and
        what it gives when the schedule comes to that micro-batch's weights.
        """
        taken, self._products = self._products, []

        def products() -> None:
            while taken:  # what a product held is free before the next one
                taken.pop(0)()

        return products


@dataclass
class MainGradient:
    """The gradient of one linear map's weight [outputs, inputs], outside autograd.

    ``gradient`` has the weight's shape and may be wider. ``ensure`` is called before it is touched and may put another
    tensor in its place (gradients that are allocated when the first one comes); ``contributed`` after each product.
    """

    gradient: Tensor
    queue: ProductQueue = field(default_factory=ProductQueue)
    ensure: Callable[[], None] = _nothing
    contributed: Callable[[], None] = _nothing

    def add_product(self, gradient_TO: Tensor, input_TI: Tensor) -> None:
        """Add gradient^T @ input (rows are tokens) to ``gradient`` and report it; later, while the queue defers.

        Neither operand may be written to before that.
        """
        self.queue.put(lambda: self.add_products_now([(gradient_TO, input_TI)]))

    @torch.no_grad()
    def add_products_now(self, operands: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add gradient^T @ input of each of ``operands`` and report them as one, whatever the queue defers.

        One pair is used up before the next is asked for: both may lie in the same memory.
        """
        self.ensure()
        for gradient_TO, input_TI in operands:
            accumulate_(self.gradient, gradient_TO, input_TI)
        self.contributed()


def main_gradient_of(parameter: Tensor) -> MainGradient | None:
    """The main gradient of ``parameter``, None for one that autograd gives its ``.grad``."""
    main: MainGradient | None = getattr(parameter, _ATTRIBUTE, None)
    return main


def set_main_gradient(parameter: Tensor, main: MainGradient) -> None:
    """From now on the maps that use ``parameter`` add its gradient to ``main``."""
    setattr(parameter, _ATTRIBUTE, main)
