"""Text attention: padded text as one key, and keys and values of the text kept over steps.

`pad_trim_zero` models attend to hundreds of zero rows. After projection and norm these have equal
keys k and equal values v, so that in softmax(q K) V the N of them weigh as much as one key with
log N added to its logit: the sum of N equal terms exp(q k) is exp(q k + log N). Exact algebra, at
the cost of the real length. Masking the rows instead would be another model.

Keys and values depend on the text alone, so they are the same in every step: kept, they are the
same bits.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.errors import CaseError
from truestep.floors import EPSILON

Tensor = torch.Tensor

KEPT = 8
"""Texts whose keys and values are kept a module: prompt, negative prompt, both in a batch."""

MAX_TERMS = 3
"""Copies of the padding key that log N is split over, so that a 16-bit bias is exact enough."""

_SAME_ROWS = 8.0
"""Rows of matrix products may differ by rounding where a tile ends: epsilons that are the same."""


@dataclass(frozen=True)
class Family:
    """Where a model class has its text.

    Attributes:
        blocks: Attribute with the blocks, each with the cross-attention `attn2`.
        embed: Dotted name of the module that projects the text; None where there is none.
        kept: Modules of the cross-attention that are given the text itself, or what such a module
            returned: only these can tell the same text by its identity.
    """

    blocks: str
    embed: str | None
    kept: tuple[str, ...] = ("to_k", "to_v", "to_kv")

    def embedder(self, model: Any) -> Any:
        """The module that projects the text, or None."""
        found = model
        for part in (self.embed or "").split("."):
            found = getattr(found, part, None) if part else None
        return found

    def attentions(self, model: Any) -> list[Any]:
        """Every cross-attention."""
        return [block.attn2 for block in getattr(model, self.blocks)]


FAMILIES = {
    "WanTransformer3DModel": Family(
        "blocks", "condition_embedder.text_embedder", ("to_k", "to_v", "to_kv", "norm_k")
    ),
    "CosmosTransformer3DModel": Family("transformer_blocks", "crossattn_proj"),
}
"""Model classes without positions on text keys; each text is checked all the same."""

MASKED_BACKENDS = frozenset({"native", "_native_efficient", "_native_math", "_native_cudnn"})
"""diffusers attention backends that take an additive mask."""


@dataclass(frozen=True)
class Collapsed:
    """A text whose padding is one key (or a few), and the bias that makes up for it.

    Attributes:
        text: `b m c`, m rows of which the last ones of a sample stand for its padding.
        bias: `b 1 1 m`, added to the logits, in the text's dtype.
    """

    text: Tensor
    bias: Tensor


def pad_terms(count: int, dtype: torch.dtype) -> list[float]:
    """Numbers of a dtype whose exponentials add up to `count`.

    Args:
        count: Padding rows, 1 or more.
        dtype: Of the bias. log 492 in bfloat16 would be off by 1 % of the weight.

    Returns:
        1 to `MAX_TERMS` numbers, largest first: each takes the most of what is left.
    """
    terms: list[float] = []
    left = float(count)
    epsilon = EPSILON.get(str(dtype).removeprefix("torch."), 0.0)
    while left > epsilon * count / 256 and len(terms) < MAX_TERMS:
        nearest = torch.tensor(math.log(left), dtype=torch.float64).to(dtype)
        value = float(nearest)
        if math.exp(value) > left and len(terms) + 1 < MAX_TERMS:  # leave the rest positive
            value = float(torch.nextafter(nearest.float(), torch.tensor(-math.inf)).to(dtype))
            if math.exp(value) > left:
                value = float(nearest) - epsilon * max(abs(float(nearest)), 1.0)
                value = float(torch.tensor(value, dtype=torch.float64).to(dtype))
        terms.append(value)
        left -= math.exp(value)
    return terms


def real_lengths(text: Tensor) -> list[int]:
    """Rows of each sample before the equal rows at its end; `l` where the last row is unique.

    Args:
        text: `b l c`.
    """
    different = (text != text[:, -1:]).any(-1)
    places = torch.arange(1, text.shape[1] + 1, device=text.device)
    lengths = (different * places).amax(1).tolist()
    return [length if length < text.shape[1] - 1 else text.shape[1] for length in lengths]


def collapse(text: Tensor, lengths: Sequence[int]) -> Collapsed | None:
    """Cut the equal rows at the end of each sample down to what the bias needs.

    Args:
        text: `b l c`.
        lengths: Real rows of each sample.

    Returns:
        The short text; None where it would not be shorter.
    """
    full = text.shape[1]
    terms = [pad_terms(full - n, text.dtype) if n < full else [] for n in lengths]
    short = max(n + len(own) for n, own in zip(lengths, terms, strict=True))
    if short >= full:
        return None
    rows = text.new_zeros(len(text), short, text.shape[2])
    bias = text.new_full((len(text), 1, 1, short), -math.inf)
    for index, (length, own) in enumerate(zip(lengths, terms, strict=True)):
        rows[index, :length] = text[index, :length]
        rows[index, length:] = text[index, -1]
        bias[index, ..., :length] = 0.0
        bias[index, ..., length : length + len(own)] = torch.tensor(own, dtype=torch.float64).to(
            text
        )
    return Collapsed(rows, bias)


class _Kept:
    """Results of a function of one tensor, by that tensor's identity and version."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[int, int], tuple[Tensor, Any]] = OrderedDict()
        self.hits = 0
        self._lock = threading.Lock()

    def of(self, tensor: Tensor, make: Callable[[], Any]) -> Any:
        """The kept result, or a new one. Inference tensors count no changes: nothing is kept."""
        if tensor.is_inference() or torch.is_grad_enabled():
            return make()
        key = (id(tensor), tensor._version)
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                self.hits += 1
                return self._found[key][1]
        made = make()
        with self._lock:
            self._found[key] = (tensor, made)  # holding the tensor keeps its id its own
            while len(self._found) > KEPT:
                self._found.popitem(last=False)
        return made

    def clear(self) -> None:
        with self._lock:
            self._found.clear()
            self.hits = 0


class _Now(threading.local):
    bias: Tensor | None = None


@dataclass
class TextAttention:
    """What is installed on one transformer; `remove` leaves it as it was.

    Attributes:
        collapsed: Padded text is one key.
        cache: Keys and values of a text are kept.
        reasons: Why a text was not collapsed, each once.
    """

    model: Any
    collapsed: bool
    cache: bool
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._family = FAMILIES.get(type(self.model).__name__)
        self._texts, self._now = _Kept(), _Now()
        self._memos: list[_Kept] = []
        self._undo: list[Callable[[], None]] = []
        self.shortened = 0  # forwards whose padded text was one key, since `forget`
        if self._family is None:
            self._say(f"{type(self.model).__name__} is not known to attend to padded text")
            return
        if self.collapsed:
            self._replace(self.model, self._collapsing(self.model.forward))
            for attention in self._family.attentions(self.model):
                hook = attention.register_forward_pre_hook(self._masked, with_kwargs=True)
                self._undo.append(hook.remove)
        if self.cache:
            self._keep(self._family.embedder(self.model))
            for attention in self._family.attentions(self.model):
                for name in self._family.kept:
                    self._keep(getattr(attention, name, None))

    @property
    def hits(self) -> int:
        """How often a kept key or value of a text was given again, since `forget`."""
        return sum(memo.hits for memo in self._memos)

    def remove(self) -> None:
        """Take everything off; what was on the model before stays."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        self.forget()

    def forget(self) -> None:
        """Drop what is kept: weights may change between two generations."""
        self.shortened = 0
        self._texts.clear()
        for memo in self._memos:
            memo.clear()

    # --- collapsed ----------------------------------------------------------------------------

    def _collapsing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward on the short text.

        No hook: what is put around this forward is still shown the whole text.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            text = kwargs.get("encoder_hidden_states")
            reason = self._unfit(text, kwargs)
            if reason or not isinstance(text, Tensor):
                self._say(str(reason))
                return original(*args, **kwargs)
            short: Collapsed | None = self._texts.of(text, lambda: self._short(text))
            if short is None:
                return original(*args, **kwargs)
            self.shortened += 1
            before, self._now.bias = self._now.bias, short.bias
            try:
                return original(*args, **{**kwargs, "encoder_hidden_states": short.text})
            finally:
                self._now.bias = before

        return forward

    def _masked(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = self._now.bias
        if bias is None:
            return None
        if len(args) > 2:
            return (*args[:2], bias, *args[3:]), kwargs
        return args, {**kwargs, "attention_mask": bias}

    def _unfit(self, text: object, kwargs: dict[str, Any]) -> str | None:
        if not isinstance(text, Tensor) or text.ndim != 3:
            return "the text is no tensor `b l c` named encoder_hidden_states"
        if kwargs.get("attention_mask") is not None:
            return "the text has a mask of its own"
        if kwargs.get("encoder_hidden_states_image") is not None:
            return "image embeddings are attended to beside the text"
        backend = attention_backend(self.model, self._attentions())
        if backend not in MASKED_BACKENDS:
            return f"attention backend {backend} takes no additive mask"
        return None

    def _attentions(self) -> list[Any]:
        return self._family.attentions(self.model) if self._family else []

    def _short(self, text: Tensor) -> Collapsed | None:
        lengths = real_lengths(text)
        if max(lengths) >= text.shape[1]:
            self._say("the text has no equal rows at its end")
            return None
        wrong = self._different(text, lengths)
        if wrong:
            self._say(f"padded rows have different {wrong}: they cannot be one key")
            return None
        return collapse(text, lengths)

    def _different(self, text: Tensor, lengths: Sequence[int]) -> str | None:
        """Which of the keys and values of equal text rows are not equal, if any."""
        embed = self._family.embedder(self.model) if self._family else None
        rows = text if embed is None else embed(text)
        terms = max(text.shape[-1], rows.shape[-1])
        for index, attention in enumerate(self._attentions()):
            if getattr(attention, "fused_projections", False):
                key, value = attention.to_kv(rows).chunk(2, dim=-1)
            else:
                key, value = attention.to_k(rows), attention.to_v(rows)
            if attention.norm_k is not None:
                width = getattr(attention.norm_k, "weight", key[0, 0]).shape[-1]
                key = attention.norm_k(
                    key if width == key.shape[-1] else key.unflatten(-1, (-1, width))
                )
            for what, found in (("keys", key), ("values", value)):
                for sample, length in enumerate(lengths):
                    if not _equal_rows(found[sample, length:], terms):
                        return f"{what} in attention {index}"
        return None

    # --- cache --------------------------------------------------------------------------------

    def _keep(self, module: Any) -> None:
        if not isinstance(module, torch.nn.Module) or getattr(module, "_compiled_call_impl", None):
            return
        memo, original = _Kept(), module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                return original(*args, **kwargs)
            return memo.of(args[0], lambda: original(args[0]))

        self._replace(module, forward)
        self._memos.append(memo)

    def _replace(self, module: Any, forward: Callable[..., Any]) -> None:
        """Give a module another forward until `remove`."""
        place, own = weakref.ref(module), vars(module).get("forward")
        object.__setattr__(module, "forward", forward)

        def restore() -> None:
            found = place()
            if found is None or vars(found).get("forward") is not forward:
                return
            if own is None:
                with suppress(AttributeError):
                    object.__delattr__(found, "forward")
            else:
                object.__setattr__(found, "forward", own)

        self._undo.append(restore)

    def _say(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


def _equal_rows(rows: Tensor, terms: int) -> bool:
    """Whether rows are one row, up to the rounding of matrix products.

    Where a tile ends, a row is summed in another order. A sum of n terms made so differs by about
    sqrt(n) roundings of the dtype it is made in (Higham and Mary, 2019), and is rounded once more
    where it is stored.

    Args:
        rows: `l ...`.
        terms: Numbers in each sum.
    """
    first = rows[:1].double()
    size = float(first.square().mean().sqrt())
    stored = EPSILON.get(str(rows.dtype).removeprefix("torch."), 0.0)
    summed = min(stored, EPSILON["float32"]) * math.sqrt(terms)
    limit = _SAME_ROWS * (stored + summed) * size
    return bool(((rows.double() - first).abs() <= limit).all())


def attention_backend(model: Any, attentions: Sequence[Any]) -> str:
    """The diffusers attention backend that a model's cross-attention runs on."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    processor = getattr(attentions[0], "processor", None) if attentions else None
    chosen = getattr(processor, "_attention_backend", None)
    if chosen is None:
        chosen = _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(chosen, "value", chosen))


def set_backend(model: Any, backend: str) -> None:
    """Choose a model's attention backend by diffusers' name for it.

    Raises:
        CaseError: diffusers does not know it, or it cannot run here.
    """
    try:
        model.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise CaseError(
            f"attention backend {backend!r} cannot be used",
            measured=str(error).splitlines()[0],
            hint="truestep doctor",
        ) from None


@contextmanager
def text_attention(model: Any, *, collapsed: bool, cache: bool) -> Iterator[TextAttention]:
    """Install on a transformer for a block of code."""
    installed = TextAttention(model, collapsed=collapsed, cache=cache)
    try:
        yield installed
    finally:
        installed.remove()
