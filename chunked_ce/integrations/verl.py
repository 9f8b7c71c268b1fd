"""verl's fused log-probabilities and entropies, computed by this library.

``install()`` puts it under verl's fused forward, for every model that ``use_fused_kernels`` covers and for its backends
``torch``, ``triton`` and ``liger`` alike. `FusedLinearForPPO` and `linear_cross_entropy` have verl's names and
signatures and need no verl.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chunked_ce.arguments import described, is_one_of
from chunked_ce.checks import check_options
from chunked_ce.functional import linear_statistics
from chunked_ce.narrowing import not_none
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.dtensors import is_dtensor
from chunked_ce.parallel.fsdp import is_fsdp_shard
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["FusedLinearForPPO", "install", "linear_cross_entropy", "uninstall"]

_IGNORED = -100
_LEAST_TEMPERATURE = 1e-8  # verl's own, where it divides logits
_KERNEL = "verl.utils.kernel.linear_cross_entropy"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl"


class FusedLinearForPPO(nn.Module):
    """Log-probabilities and entropies of ``(hidden_states @ vocab_weights.T) / temperature``, without the logits.

    Args:
        chunk_size: tokens in a chunk; None leaves the choice to ``options``.
        impl_backend: ``"torch"`` or ``"liger"``, which verl passes to choose between implementations of its own; here
            both mean this library.
        options: how to compute (`ChunkOptions`), such as ``logits_dtype=torch.float32``; None chooses well.

    Raises:
        ValueError, TypeError: an argument is not as described.

    >>> fused = FusedLinearForPPO()
    >>> log_probs, entropy = fused(torch.zeros(1, 2, 4), torch.eye(8, 4), torch.tensor([[3, 5]]))
    >>> log_probs
    tensor([[-2.0794, -2.0794]])
    """

    default_options: ClassVar[ChunkOptions | None] = None

    def __init__(
        self, chunk_size: int | None = None, impl_backend: str = "torch", *, options: ChunkOptions | None = None
    ) -> None:
        super().__init__()
        if not is_one_of(impl_backend, ("torch", "liger")):
            raise ValueError(f"impl_backend must be 'torch' or 'liger', was {described(impl_backend)}")
        check_options(options, None)
        options = self.default_options if options is None else options
        if chunk_size is not None:
            options = dataclasses.replace(options or ChunkOptions(), chunk_size=chunk_size)
        self.options = options

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
        *,
        return_sum_pi_squared: bool = False,
    ) -> tuple[Tensor, ...]:
        """``(log_probs, entropy)``, both differentiable.

        Args:
            hidden_states: (..., D).
            vocab_weights: the head (V, D). A DTensor sharded on dim 0 is used where it lies: by tensor parallelism, as
                this rank's words; by FSDP2, as rows that ranks with different tokens share, which all of them call.
            input_ids: (...) the ids whose log-probabilities are wanted; -100 is ignored.
            temperature: a number, or a tensor: one for each token, or (B,) one for each sample of ``input_ids`` (B, T).
            return_sum_pi_squared: return ``(log_probs, entropy, sum_pi_squared)``, the last sum_v p_v^2, as of verl's
                ``calculate_sum_pi_squared``.

        Returns:
            Tensors in the shape of ``input_ids``, in float32 (float64 for float64 input), 0 where ignored.
        """
        found = _statistics(
            hidden_states,
            vocab_weights,
            input_ids,
            _for_each_token(temperature, input_ids.shape),
            vocab=_own_rows(vocab_weights),
            options=self.options,
            squares=return_sum_pi_squared,
        )
        log_probs, entropy, sum_pi_squared = found
        return (log_probs, entropy, not_none(sum_pi_squared)) if return_sum_pi_squared else (log_probs, entropy)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
    *,
    input_grad: str = "partial",
    options: ChunkOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """``(log_probs, entropy)`` of the tokens, flattened to (N,), with the signature of verl's kernel.

    Args:
        hidden: (..., D).
        weight: the head (V, D); with a group, this rank's equal share of its rows.
        labels: N ids in any shape; -100 is ignored.
        temperature: a number, or a tensor: one for each token, or (B,) one for each sample of ``labels`` (B, T).
        reduction: ``"none"``, or ``"sum"`` or ``"mean"`` of the log-probabilities (of those that are not ignored). The
            entropy is one number for each token always.
        dist_process_group: the tensor-parallel ranks, which hold the same tokens.
        input_grad: with a group, ``"partial"`` as in verl: the gradient of ``hidden`` is this rank's share, which
            Megatron's gather of sequence-parallel hidden states sums; ``"complete"`` sums it here.
        options: how to compute (`ChunkOptions`); None chooses well.

    Raises:
        ValueError, TypeError: an argument is not as described.

    >>> log_probs, entropy = linear_cross_entropy(torch.zeros(1, 2, 4), torch.eye(8, 4), torch.tensor([[3, 5]]))
    >>> entropy
    tensor([2.0794, 2.0794])
    """
    if not is_one_of(reduction, ("none", "sum", "mean")):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', was {described(reduction)}")
    ids, temperature = labels.reshape(-1), _for_each_token(temperature, labels.shape)
    vocab = _own_rows(weight)
    if dist_process_group is not None:
        vocab = _equal_rows(weight.shape[0], dist_process_group, input_grad)
    log_probs, entropy, _ = _statistics(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ids,
        temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature,
        vocab=vocab,
        options=options,
        squares=False,
    )
    if reduction != "none":
        counted = 1 if reduction == "sum" else (ids != _IGNORED).sum().clamp(min=1)
        log_probs = log_probs.sum() / counted
    return log_probs, entropy


class _Squares(threading.local):
    """How sum_v p_v^2 gets from the fused forward of a model, which has no place for it, to verl's engine."""

    wanted = False
    found: Tensor | None = None


_squares = _Squares()


def _statistics(
    hidden: Tensor,  # (..., D)
    weight: Tensor,
    ids: Tensor,  # (...)
    temperature: float | Tensor,  # (...)
    *,
    vocab: VocabShard | None,
    options: ChunkOptions | None,
    squares: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities, entropies and, if asked for, sums of squared probabilities, in the shape of ``ids``."""
    if ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"input_ids must have the shape of hidden_states without its last dimension, {tuple(hidden.shape[:-1])}, "
            f"was {tuple(ids.shape)}"
        )
    ids = ids.to(torch.int64)
    squares = squares or _squares.wanted
    found = linear_statistics(
        *(hidden, weight, ids),
        outputs=("logprob", "entropy", *(("log_sum_sq_probs",) if squares else ())),
        ignore_index=_IGNORED,
        temperature=temperature,
        vocab=vocab,
        options=options,
    )
    summed = not_none(found.log_sum_sq_probs).exp().where(ids != _IGNORED, 0) if squares else None
    if _squares.wanted:
        _squares.found = summed
    return not_none(found.logprob), not_none(found.entropy), summed


def _for_each_token(temperature: float | Tensor, shape: torch.Size) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return temperature
    if len(shape) == 2 and temperature.shape == shape[:1] and temperature.dim() == 1:
        temperature = temperature.unsqueeze(-1)
    try:
        return temperature.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"temperature must be a number, or a tensor with one for each token {tuple(shape)} or for each sample "
            f"{tuple(shape[:1])}, was {tuple(temperature.shape)}"
        ) from None


def _own_rows(weight: Any) -> VocabShard | None:
    """The rows that FSDP2 has left on this rank, of a head that it has not gathered."""
    if not is_dtensor(weight) or not is_fsdp_shard(weight):
        return None
    return _fsdp_rows(dist.group.WORLD, weight.device_mesh, tuple(weight.placements), tuple(weight.shape))


@functools.lru_cache(maxsize=16)  # a shard that is made once compares its bounds with other ranks' once
def _fsdp_rows(_world: Any, mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...]) -> VocabShard:
    return VocabShard.from_placements(mesh, placements, shape, name="vocab_weights", tokens="own")


@functools.lru_cache(maxsize=16)
def _equal_rows(rows: int, group: dist.ProcessGroup, input_grad: Literal["complete", "sequence"]) -> VocabShard:
    start = dist.get_rank(group) * rows
    return VocabShard(group, start, start + rows, dist.get_world_size(group) * rows, input_grad=input_grad)


# ---- under verl ----

_undo: list[tuple[Any, str, Any, Any]] = []  # owner, name, verl's value and ours


def install(options: ChunkOptions | None = None) -> None:
    """Put this library under verl's fused forward, which ``use_fused_kernels=True`` turns on, in this process.

    Call it in every worker, before or after verl patches its models: in the module that verl imports as the model's
    ``external_lib``. Of verl's FSDP engine two refusals go: a temperature of each sample, and
    ``calculate_sum_pi_squared``, work with fused kernels then. A second call replaces the options.

    Args:
        options: how to compute (`ChunkOptions`), such as ``logits_dtype=torch.float32``; None chooses well.

    Raises:
        ImportError: there is no verl.
        RuntimeError: this verl is not one that is known here; nothing is changed then.
    """
    check_options(options, None)
    uninstall()
    for owner, name, replacement in list(_replacements(options)):
        _undo.append((owner, name, vars(owner)[name], replacement))
        setattr(owner, name, replacement)


def uninstall() -> None:
    """Undo `install`; without it, nothing happens."""
    while _undo:
        owner, name, original, replacement = _undo.pop()
        for holder in (owner, *_modules()):  # some may have imported it meanwhile
            if vars(holder).get(name) is replacement:
                setattr(holder, name, original)
    _squares.wanted, _squares.found = False, None


def _replacements(options: ChunkOptions | None) -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and the new value of everything in verl that is replaced."""
    functional = _module("verl.utils.experimental.torch_functional")
    theirs = _known(functional, "FusedLinearForPPO")
    _check_parameters(theirs.forward, "self", "hidden_states", "vocab_weights", "input_ids", "temperature")
    yield functional, "FusedLinearForPPO", type("FusedLinearForPPO", (FusedLinearForPPO,), {"default_options": options})

    kernel = _module(_KERNEL)
    parameters = ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
    _check_parameters(_known(kernel, "LinearCrossEntropy").forward, "ctx", *parameters)
    original = _known(kernel, "linear_cross_entropy")
    replacement = functools.partial(linear_cross_entropy, options=options)
    for module in _modules():  # those that have imported the function by its name
        if vars(module).get("linear_cross_entropy") == original:
            yield module, "linear_cross_entropy", replacement

    try:
        engine = _known(_module(_ENGINE), "FSDPEngineWithLMHead")
    except ModuleNotFoundError:  # without its dependencies there is no FSDP engine here
        return
    inputs, outputs = _known(engine, "prepare_model_inputs"), _known(engine, "prepare_model_outputs")
    _check_parameters(inputs, "self", "micro_batch")
    _check_parameters(outputs, "self", "output", "output_args", "micro_batch", "logits_processor_func")
    yield engine, "prepare_model_inputs", _taking_temperatures(inputs)
    yield engine, "prepare_model_outputs", _giving_squares(outputs)


def _module(name: str) -> Any:
    importlib.import_module("verl")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("verl"):
            raise
        raise _unknown(f"it has no {name}") from error


def _modules() -> list[types.ModuleType]:
    """The modules of verl that are loaded."""
    return [module for name, module in list(sys.modules.items()) if name.startswith("verl.") and module is not None]


def _known(owner: Any, name: str) -> Any:
    if name not in vars(owner):
        raise _unknown(f"{owner.__name__} has no {name}")
    return vars(owner)[name]


def _check_parameters(function: Callable[..., Any], *names: str) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found != names:
        raise _unknown(f"{function.__qualname__} takes {', '.join(found)} instead of {', '.join(names)}")


def _unknown(why: str) -> RuntimeError:
    version = getattr(sys.modules.get("verl"), "__version__", "of an unknown version")
    return RuntimeError(
        f"chunked_ce.integrations.verl is for verl 0.9 and cannot be installed under verl {version}: {why}"
    )


def _taking_temperatures(original: Callable[..., Any]) -> Callable[..., Any]:
    """``prepare_model_inputs`` of verl's FSDP engine, with a temperature of each sample for the fused forward."""
    import verl.utils.tensordict_utils as tu

    @functools.wraps(original)
    def prepare_model_inputs(self: Any, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # An engine with inputs of its own, such as VeOmni's, has a fused forward of its own, and keeps its refusals.
        has_ours = type(self).prepare_model_inputs is prepare_model_inputs
        fused = has_ours and tu.get_non_tensor_data(data=micro_batch, key="use_fused_kernels", default=False)
        _squares.wanted = bool(fused and tu.get_non_tensor_data(micro_batch, "calculate_sum_pi_squared", False))
        _squares.found = None
        if not fused or not isinstance(micro_batch["temperature"], Tensor):
            given: tuple[dict[str, Any], dict[str, Any]] = original(self, micro_batch)
            return given
        inputs, about = original(self, _with(micro_batch, use_fused_kernels=False))
        if "temperature_rmpad" in about:
            temperature = about["temperature_rmpad"].unsqueeze(0)
            inputs["shift_labels"] = about["input_ids_rmpad_rolled"].unsqueeze(0)
        else:
            temperature = about["temperature"]
        inputs |= {"temperature": temperature.clamp(min=_LEAST_TEMPERATURE), "return_dict": True}
        return inputs, about

    return prepare_model_inputs


def _giving_squares(original: Callable[..., Any]) -> Callable[..., Any]:
    """``prepare_model_outputs`` of verl's FSDP engine, with ``sum_pi_squared`` of the fused forward."""

    @functools.wraps(original)
    def prepare_model_outputs(
        self: Any, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        squares, wanted = _squares.found, _squares.wanted
        _squares.wanted, _squares.found = False, None
        found: dict[str, Any]
        if not wanted:
            found = original(self, output, output_args, micro_batch, logits_processor_func)
            return found
        if squares is None:
            raise RuntimeError("calculate_sum_pi_squared: the model's forward has not called verl's fused kernels")
        without = _with(micro_batch, calculate_sum_pi_squared=False)
        found = original(self, output, output_args, without, logits_processor_func)
        offsets = micro_batch["input_ids"].offsets()
        if "temperature_rmpad" in output_args:
            packed = self._gather_and_unpad_packed(squares.reshape(-1), output_args["pad_size"])
        else:
            squares = squares.view(len(offsets) - 1, -1)
            packed = squares[torch.arange(squares.shape[1], device=squares.device) < offsets.diff().unsqueeze(1)]
        found["sum_pi_squared"] = torch.nested.nested_tensor_from_jagged(packed, offsets)
        return found

    return prepare_model_outputs


def _with(micro_batch: Any, **values: Any) -> Any:
    import verl.utils.tensordict_utils as tu

    return tu.assign_non_tensor(micro_batch.copy(), **values)
