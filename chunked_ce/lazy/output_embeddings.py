"""The linear layers of a model that make its logits, whatever is around them."""

from __future__ import annotations

from typing import Any

from torch import nn

from chunked_ce.arguments import described
from chunked_ce.lazy.autotp import autotp_of, is_autotp

__all__ = ["AUTOTP", "check_model", "output_embeddings"]

AUTOTP = (
    "Losses are taken in chunks from a VocabParallelLinear (vocab_parallel_lm_head of tensor_parallel in DeepSpeed's "
    "configuration), from a column-parallel head that gathers its output, and from a head that AutoTP leaves alone (a "
    "partition_config that has no spec for it, or one that skips it)"
)

_AS_A_LAYER = (
    "If the logits are a function of an embedding's weight, such as F.linear(hidden, embedding.weight), let the model "
    "call a layer with this weight: head = LMHead(*reversed(embedding.weight.shape)), head.weight = embedding.weight, "
    "and head(hidden)"
)


def output_embeddings(model: nn.Module, name: str | None) -> list[nn.Linear]:
    """The linear layers that make the logits; several where an adapter library keeps copies of one."""
    check_model(model)
    if name is not None:
        return _linears_of(_named(model, name))
    for candidate in model.modules():
        method = getattr(candidate, "get_output_embeddings", None)
        found = method() if callable(method) else None
        if isinstance(found, nn.Embedding):
            return _tied_to(found, candidate) or [_as_wide_as_the_vocabulary(candidate)]
        if isinstance(found, nn.Module):
            linears = _linears_of(found)
            for linear in linears:
                _check_makes_words(linear, candidate)
            return linears
    return [model if isinstance(model, nn.Linear) else _as_wide_as_the_vocabulary(model)]


def _tied_to(embedding: nn.Embedding, model: nn.Module) -> list[nn.Linear]:
    """The linear layers that have the embedding's weight."""
    linears = (one for one in model.modules() if isinstance(one, nn.Linear))
    return [one for one in linears if one._parameters.get("weight") is embedding._parameters["weight"]]


def _check_makes_words(linear: nn.Module, model: nn.Module) -> None:
    """Raise if the layer is one before the logits, such as DeBERTa's dense layer: as many outputs as inputs."""
    sizes = {one.num_embeddings for one in model.modules() if isinstance(one, nn.Embedding)}
    if isinstance(linear, nn.Linear) and sizes and linear.in_features == linear.out_features not in sizes:
        raise ValueError(
            f"get_output_embeddings() returns a layer from {linear.in_features} to {linear.out_features} features, but "
            f"the model's largest embedding has {max(sizes)} words: name the layer that makes the logits, "
            f"LMHead.wrap(model, 'lm_head'). {_AS_A_LAYER}"
        )


def _named(model: nn.Module, name: str) -> nn.Module:
    if not isinstance(name, str):
        raise TypeError(f"module must be None or the name of a module of the model, was {described(name)}")
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"module must name a module of the model, was {name!r}") from error


def _as_wide_as_the_vocabulary(model: nn.Module) -> nn.Linear:
    """The only linear layer with as many outputs as the largest embedding has entries."""
    modules = dict(model.named_modules())
    width = max((one.num_embeddings for one in modules.values() if isinstance(one, nn.Embedding)), default=None)
    fitting = {name: one for name, one in modules.items() if isinstance(one, nn.Linear) and one.out_features == width}
    if len(fitting) != 1:
        has_autotp = any(map(is_autotp, modules.values()))
        fit = f"{len(fitting)} of its linear layers have the {width} outputs of its largest embedding"
        fit += f" ({', '.join(fitting)})" if fitting else ""
        raise ValueError(
            "no output embedding found: the model has no get_output_embeddings(), and "
            f"{'no embedding' if width is None else fit}: name it, "
            f"LMHead.wrap(model, 'lm_head'). {_AS_A_LAYER}"
            + (f". DeepSpeed's AutoTP has replaced layers of this model. {AUTOTP}" if has_autotp else "")
        )
    return next(iter(fitting.values()))


def _linears_of(module: nn.Module) -> list[nn.Linear]:
    """The linear layers inside whatever an adapter library has put around them."""
    layer: Any = module
    if autotp_of(module) is not None:
        return [layer]  # which has all that a linear layer has
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return [linear for copy in (*copies.values(), layer.original_module) for linear in _linears_of(copy)]
    if isinstance(getattr(module, "token_adapter", None), nn.Module):  # PEFT's trainable tokens
        module = layer = layer.token_adapter
    if callable(getattr(module, "get_base_layer", None)):  # before the next: some of PEFT's layers are linear too
        return _linears_of(layer.get_base_layer())
    if isinstance(module, nn.Linear):
        return [module]
    pointer = ""
    if is_autotp(module):
        pointer = f" of DeepSpeed's AutoTP. {AUTOTP}"
    elif isinstance(module, nn.Embedding):
        pointer = f". {_AS_A_LAYER}"
    elif isinstance(module, nn.ModuleList):
        pointer = f" of {len(module)}: LMHead.wrap(model, name) takes one of its layers at a time"
    raise ValueError(f"the output embedding must be an nn.Linear, was {type(module).__name__}{pointer}")


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, was {type(model).__name__}")
