"""Train dual encoders on batches that do not fit into memory, with exact in-batch negatives.

A batch is embedded in micro-batches without a graph. The loss over all its rows gives the gradient
of each row. Then each micro-batch is embedded again, now with a graph, and passes the gradients of
its rows on to the weights. Memory holds the graph of one micro-batch; the price is a second forward
pass. Dropout draws the same values in both passes. Source: GradCache, Gao et al., "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.training.device import at_least_fp32, empty_cache, keep_on_host, on_host

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Gradients:
    """What the loss of a whole batch gives back.

    rows    name of rows -> (B,D), the gradient of the loss by these rows
    direct  name of a parameter -> its gradient, where the loss reads it without the rows
    """

    rows: dict[str, Tensor]
    direct: dict[str, Tensor]

    def part(self, at: slice, last: bool) -> Gradients:
        """Return those of the rows `at`; the direct ones go to the last micro-batch alone."""
        rows = {name: gradient[at] for name, gradient in self.rows.items()}
        return Gradients(rows, self.direct if last else {})


def check(model: nn.Module, micro_batch: int | str) -> None:
    """Raise a UserError if `model` cannot be trained in micro-batches."""
    if micro_batch != "whole" and not (hasattr(model, "rows") and hasattr(model, "losses")):
        raise UserError(
            f"micro_batch is {micro_batch}, but the loss of {type(model).__name__} is not made of "
            "rows of images and captions; set it to 'whole', and lower the batch size or raise "
            "`accumulate` instead."
        )


def parts(batch: Batch, size: int) -> Iterator[tuple[slice, Batch]]:
    """Yield micro-batches of at most `size` pairs, each with its place in the batch."""
    count = len(next(iter(batch.values())))
    for start in range(0, count, size):
        at = slice(start, min(start + size, count))
        part = {name: values[at] for name, values in batch.items()}
        for name, values in batch.items():
            if hasattr(values, "host_values"):
                keep_on_host(part[name], on_host(values)[at])
        yield at, part


def whole_loss(
    model: nn.Module, batch: Batch, size: int, seed: Callable[[int], None]
) -> tuple[dict[str, Tensor], Gradients]:
    """Return the loss terms of a batch, detached, and the gradients of the loss.

    size  pairs of a micro-batch
    seed  seeds torch's generators for the micro-batch of a number, so that the second pass of it
          draws what the first has drawn
    """
    found: list[Batch] = []
    with torch.no_grad():
        for number, (_, part) in enumerate(parts(batch, size)):
            seed(number)
            found.append(model.rows(part))
    rows = {name: at_least_fp32(torch.cat([one[name] for one in found])) for name in found[0]}
    for values in rows.values():
        values.requires_grad_()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        terms = model.losses(rows, batch)
    wanted = [*rows.values(), *(p for _, p in named)]
    gradients = torch.autograd.grad(terms["loss"], wanted, allow_unused=True)
    names = [*rows, *(name for name, _ in named)]
    known = [(name, one) for name, one in zip(names, gradients, strict=True) if one is not None]
    return {name: term.detach() for name, term in terms.items()}, Gradients(
        {name: one for name, one in known if name in rows},
        {name: one for name, one in known if name not in rows},
    )


def stand_in_loss(model: nn.Module, part: Batch, gradients: Gradients) -> Tensor:
    """Return a scalar whose gradients by the weights are the part's share of the true ones."""
    rows = model.rows(part)
    shares = [
        (at_least_fp32(rows[name]) * gradient).sum() for name, gradient in gradients.rows.items()
    ]
    for name, gradient in gradients.direct.items():
        shares.append((model.get_parameter(name) * gradient).sum())
    return torch.stack(shares).sum()


def largest_that_fits(attempt: Callable[[int], None], size: int) -> int:
    """Return the largest of size, size/2, size/4, ... for which `attempt` finds memory.

    attempt  trains on a micro-batch of a size, and leaves no trace. UserError if not even one
             pair fits.
    """
    while size:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            empty_cache()
        size //= 2
    raise UserError(
        "Not even one pair fits into the memory of the GPU; end other programs on it, or choose a "
        "smaller model."
    )
