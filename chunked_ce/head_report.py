"""What `LMHead.report` says of the heads of a model."""

from __future__ import annotations

import copy
import dataclasses

from torch import nn

from chunked_ce.lazy.activity import Activity
from chunked_ce.lazy.classes import TokenAdapter
from chunked_ce.lazy.head import LazyHead
from chunked_ce.lazy.obstacles import is_fsdp_unit, obstacle_of_head
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.dtensors import is_dtensor
from chunked_ce.parallel.fsdp import is_fsdp_shard
from chunked_ce.sharded.low_rank import LowRankHead

__all__ = ["HeadReport", "Report", "report_of"]


@dataclasses.dataclass(frozen=True)
class HeadReport:
    """One head of a model.

    Attributes:
        name: in the model, as ``named_modules`` gives it.
        kinds: words such as ``"plain"``, ``"tied to model.embed_tokens"``, ``"LoRA"``, ``"tensor-parallel"``,
            ``"vocab-parallel, rows 0 to 8 of 16"``, ``"sharded over 2 ranks"``, ``"partitioned by ZeRO-3"``.
        settings: the keywords of the head that are not the default ones.
        is_lazy: whether a call with hidden states returns lazy logits in the mode that the head is in.
        why_not: the reason if it does not.
        training: the calls since the optimizer's last step, or of the last step if there were none since.
        evaluation: the calls in evaluation mode, likewise.
    """

    name: str
    kinds: tuple[str, ...]
    settings: str
    is_lazy: bool
    why_not: str | None
    training: Activity
    evaluation: Activity

    def __str__(self) -> str:
        state = "lazy" if self.is_lazy else f"not lazy: {self.why_not}"
        lines = [f"{self.name or 'the model itself'} ({', '.join(self.kinds)}): {state}"]
        lines += [f"  settings: {self.settings}"] if self.settings else []
        lines += _lines("last training step", self.training) + _lines("last evaluation", self.evaluation)
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
    """The heads of a model; its text is for people."""

    heads: tuple[HeadReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.heads))


def _lines(title: str, activity: Activity) -> list[str]:
    if not activity.calls and not activity.bypasses:
        return []
    taken = [f"    without logits: {operation} ({count} x)" for operation, count in activity.taken.items()]
    computed = [
        f"    logits computed: {tuple(shape)} by {one.operation} at {one.where} ({count} x)"
        for one, (count, shape) in activity.computed.items()
    ]
    plain = [f"    logits computed at once: {reason} ({count} x)" for reason, count in activity.plain.items()]
    bypasses = [
        f"    the head's weight read, and the head not called: {by} ({n} x)" for by, n in activity.bypasses.items()
    ]
    calls = "1 call" if activity.calls == 1 else f"{activity.calls} calls"
    return [f"  {title}: {calls} of the head", *taken, *computed, *plain, *bypasses]


def report_of(model: nn.Module) -> Report:
    """The report on all heads in ``model``."""
    modules = dict(model.named_modules())
    heads = {name: module for name, module in modules.items() if isinstance(module, LazyHead)}
    if not heads:
        raise ValueError("the model has no LMHead: LMHead.wrap(model) makes one of its output embedding")
    return Report(tuple(_report_of_head(name, head, modules) for name, head in heads.items()))


def _report_of_head(name: str, head: LazyHead, modules: dict[str, nn.Module]) -> HeadReport:
    why_not = obstacle_of_head(head)
    if why_not is None and not head.is_always_lazy:
        why_not = "in evaluation mode logits wait for a loss where nothing else is asked for"
        for purpose, reader in head.record.reads_logits.items():
            why_not += f"; no longer in {purpose}, since logits were read ({reader})"
    settings: dict[str, object] = {
        **head.loss_keywords,
        "softcap": head._settings.logits.softcap,
    }
    settings |= {"logit_scale": head._settings.logits.scale} if head._settings.logits.scale != 1 else {}
    settings |= {"lazy": head._settings.lazy} if head._settings.lazy != "auto" else {}
    settings |= _options(head)
    shown = ", ".join(f"{keyword}={value}" for keyword, value in settings.items() if value)
    activities = (copy.deepcopy(head.record.training), copy.deepcopy(head.record.evaluation))
    return HeadReport(name, _kinds(name, head, modules), shown, why_not is None, why_not, *activities)


def _options(head: LazyHead) -> dict[str, object]:
    """The options of a head that are not the default ones."""
    options, default = vars(head.options or ChunkOptions()), vars(ChunkOptions())
    return {name: value for name, value in options.items() if value != default[name]}


def _kinds(name: str, head: LazyHead, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    weight, vocab = head.own_parameters()[0], head.vocab
    found = [
        f"tied to {other}"
        for other, module in modules.items()
        if module is not head and weight is not None and dict.get(module._parameters, "weight") is weight
    ]
    parents = [module for module in modules.values() if getattr(module, "base_layer", None) is head]
    found += ["LoRA"] if any(isinstance(parent, LowRankHead) for parent in parents) else []
    found += ["trainable tokens"] if any(isinstance(parent, TokenAdapter) for parent in parents) else []
    if head.layout is not None:
        found.append("tensor-parallel")
    elif vocab is not None and vocab.tokens == "own":
        found.append(f"sharded over {vocab.size} ranks")
    elif vocab is not None:
        found.append(f"vocab-parallel, rows {vocab.start} to {vocab.stop} of {vocab.total}")
    if hasattr(weight, "ds_id"):
        found.append("partitioned by ZeRO-3")
    elif weight is not None and is_dtensor(weight) and (is_fsdp_unit(head) or is_fsdp_shard(weight)):
        found.append("sharded by FSDP2")
    return tuple(found) or ("plain",)
