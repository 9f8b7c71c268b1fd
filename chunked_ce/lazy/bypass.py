"""Forwards that multiply by a head's weight themselves, so that the head is never called."""

from __future__ import annotations

from types import FrameType

from chunked_ce.lazy.head import LazyHead

__all__ = ["warn_of_bypass"]

# By package whose patched forwards do: what to do.
_READERS = {
    "trl": "use TRL 1.15 or later and call chunked_ce.integrations.trl.install() before the trainer is made",
    "liger_kernel": "leave its fused loss out (use_liger_kernel=False, or fused_linear_cross_entropy=False of a patch)",
    "cut_cross_entropy": "leave cce_patch out",
    "verl": "leave use_fused_kernels out",
}
# They read a head's weight in forwards of layers around it, and call the head or say themselves why not.
_LAYERS = ("torch", "peft", "deepspeed", "accelerate", "chunked_ce")


def warn_of_bypass(head: LazyHead, reader: FrameType) -> None:
    """Warn once if ``reader``, which looks up a head's weight while training, takes the loss without the head.

    A model's own forward, and other functions of these packages, may read the weight while the head is called all the
    same: the end of the step tells.
    """
    module = reader.f_globals.get("__name__", "")
    package, function = module.split(".")[0], reader.f_code.co_name
    if package in _LAYERS:
        return
    record = head.record
    if package in record.served:
        return
    if package not in _READERS or not ("forward" in function or "loss" in function):
        if function == "forward" or package in _READERS:
            record.activity(training=True).readers[f"{module}.{function}"] += 1
        return
    record.activity(training=True).bypasses[f"{module}.{function}"] += 1
    record.tell(
        "bypass",
        f"LMHead has no effect here: {module} reads the weight of the head and takes the loss without it, so that the "
        f"head's settings do not apply. To let the LMHead take the loss, {_READERS[package]}",
    )
