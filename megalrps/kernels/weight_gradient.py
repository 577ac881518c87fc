"""The weight gradient of a linear map, added to an accumulator that may be wider than its operands.

Micro-batches add up in fp32 while the maps compute in bf16 (Micikevicius et al. 2018, arXiv 1710.03740, section 3).
"""

import torch
from torch import Tensor


def accumulate_(main_OI: Tensor, gradient_TO: Tensor, input_TI: Tensor) -> None:
    """``main += gradient^T @ input``: T tokens, O outputs, I inputs; ``gradient`` and ``input`` are of one type.

    Of the same type as ``main``: one matrix product that adds in place. Narrower ones: on a CUDA device it is one too,
    which adds the fp32 sums that it has to an fp32 ``main`` (``aten::addmm.dtype_out``, torch >= 2.8, CUDA alone), so
    that ``main`` is read and written once, 8 bytes an element; elsewhere the product is rounded to the operands' type
    before it is added.
    """
    if gradient_TO.dtype == main_OI.dtype:
        torch.addmm(main_OI, gradient_TO.T, input_TI, out=main_OI)
    elif main_OI.is_cuda and main_OI.dtype == torch.float32:
        torch.addmm(main_OI, gradient_TO.T, input_TI, out_dtype=torch.float32, out=main_OI)
    else:
        main_OI.add_(gradient_TO.T @ input_TI)


def accumulate_reference_(main_OI: Tensor, gradient_TO: Tensor, input_TI: Tensor) -> None:
    """The formula of :func:`accumulate_` with every product and sum in fp64: what the tests compare with."""
    total = main_OI.double() + torch.einsum("to,ti->oi", gradient_TO.double(), input_TI.double())
    main_OI.copy_(total)
