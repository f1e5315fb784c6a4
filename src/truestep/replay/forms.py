"""Tables that two implementations keep in different forms: angles, or their cosines and sines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

Tensor = torch.Tensor
SAME = 1e-4
"""Relative distance: above float32's rounding of an angle of 1000, below bfloat16's (2e-3)."""


def holds_the_same(tensor: Tensor, references: Iterable[Tensor]) -> bool:
    """Whether every reference is some form of a tensor.

    Forms are the tensor itself, its cosine and sine, and the parts of a complex one; each value
    once or twice along the last axis (neighbours, or two halves). Sizes of 1 do not count.

    Args:
        tensor: What one implementation hands on.
        references: What the other hands on in its place; none of them is not the same.
    """
    wanted = [_value(reference) for reference in references]
    return bool(wanted) and all(
        any(_close(made, reference) for made in _forms(tensor)) for reference in wanted
    )


def in_another_form(tensor: Tensor, other: Tensor) -> bool:
    """Whether one of two tensors is a form of the other that is not the other itself; not of those
    of which sizes alone are known."""
    if tensor.is_meta or other.is_meta:
        return False
    one, two = _value(tensor), _value(other)
    if _close(one, two):
        return False
    return holds_the_same(tensor, [other]) or holds_the_same(other, [tensor])


def _forms(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.is_complex():
        yield from (part.double() for part in (tensor.real, tensor.imag, tensor.angle()))
    elif tensor.is_floating_point():
        wide = tensor.double()
        yield from (wide, wide.cos(), wide.sin())


def _value(tensor: Tensor) -> Tensor:
    """A real table, or the real part of a complex one."""
    return (tensor.real if tensor.is_complex() else tensor).double()


def _close(made: Tensor, reference: Tensor) -> bool:
    size = reference.norm()
    for one, other in ((made, reference), (reference, made)):
        once = one.squeeze()
        if not once.ndim:
            continue
        for repeated in (once, once.repeat_interleave(2, -1), torch.cat([once, once], -1)):
            target = other.squeeze()
            if repeated.shape == target.shape and bool((repeated - target).norm() <= SAME * size):
                return True
    return False
