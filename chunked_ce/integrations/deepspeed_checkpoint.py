"""The files of a sharded head in a DeepSpeed checkpoint: each rank writes its rows and reads any that it needs.

DeepSpeed writes its files of a checkpoint into the folder ``save_dir/tag``. Each rank of the head puts one beside them,
with its rows in fp32 and what its optimizer keeps of them; so a checkpoint can be loaded with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chunked_ce.integrations.deepspeed_rows import Rows

__all__ = ["load", "save"]

_NAME = "sharded_head_{rank:05d}_of_{size:05d}.pt"
_PATTERN = "sharded_head_*_of_*.pt"


def save(rows: list[Rows], folder: Path) -> None:
    """Write this rank's rows into the folder of a checkpoint; every rank calls it."""
    vocab = rows[0].vocab
    rank = dist.get_rank(vocab.group)
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        one.name: {
            "bounds": (vocab.start, vocab.stop, vocab.total),
            "values": one.master.detach(),
            "optimizer": dict(one.state),
        }
        for one in rows
    }
    path = folder / _NAME.format(rank=rank, size=vocab.size)
    partial = path.with_suffix(".partial")
    torch.save(held, partial)
    partial.rename(path)
    if rank == 0:  # of a checkpoint with this tag from another number of ranks
        expected = {_NAME.format(rank=one, size=vocab.size) for one in range(vocab.size)}
        for other in folder.glob(_PATTERN):
            if other.name not in expected:
                other.unlink()


@torch.no_grad()
def load(rows: list[Rows], folder: Path, *, with_optimizer: bool) -> None:
    """Read this rank's rows from the folder of a checkpoint, whatever the number of ranks that wrote it.

    Raises:
        FileNotFoundError: the checkpoint has no files of a sharded head, and holds its weights nowhere else either or
            the optimizer's state is asked for.
        ValueError: its files do not hold all of this rank's rows.
    """
    paths = sorted(folder.glob(_PATTERN))
    if not paths:
        if with_optimizer or not all(one.was_loaded for one in rows):
            raise FileNotFoundError(
                f"{folder} holds no {_PATTERN}: this is the checkpoint of a model whose head was not sharded, from "
                "which only the weights can be loaded, and only where ZeRO has not partitioned them (stages 0 to 2): "
                "load_module_only=True; or a universal one, into whose folder these files have to be copied"
            )
        for one in rows:
            one.copy_from_parameter()
        return
    files = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    for one in rows:
        pieces = [file[one.name] for file in files if one.name in file]
        one.master.copy_(_assembled(one, pieces, [piece["values"] for piece in pieces], folder))
        one.copy_to_parameter()
        if with_optimizer:
            one.state = {
                name: _state(one, pieces, [piece["optimizer"].get(name) for piece in pieces], folder)
                for name in dict.fromkeys(name for piece in pieces for name in piece["optimizer"])
            }
        one.clear()


def _state(rows: Rows, pieces: list[dict[str, Any]], values: list[Any], folder: Path) -> Any:
    """An entry of the optimizer's state: of rows, or of a whole parameter, as a count of steps is."""
    present = [value for value in values if value is not None]
    per_row = any(
        isinstance(value, Tensor) and value.dim() and value.shape == piece["values"].shape
        for value, piece in zip(values, pieces, strict=True)
    )
    if per_row:
        return _assembled(rows, pieces, values, folder).to(rows.master.device)
    return present[0].clone() if isinstance(present[0], Tensor) else present[0]


def _assembled(rows: Rows, pieces: Iterable[dict[str, Any]], values: Iterable[Tensor | None], folder: Path) -> Tensor:
    """This rank's rows (V_r, ...) of a tensor that ``pieces`` hold in parts."""
    start, stop, total = rows.vocab.start, rows.vocab.stop, rows.vocab.total
    parts, done = [], start
    for piece, value in sorted(zip(pieces, values, strict=True), key=lambda pair: pair[0]["bounds"]):
        first, last, of = piece["bounds"]
        if of != total:
            raise ValueError(f"{folder} holds a head of {of} rows as {rows.name}, and the model's has {total}")
        if value is not None and first <= done < min(last, stop):
            parts.append(value[done - first : min(last, stop) - first])
            done = min(last, stop)
    if done < stop:
        raise ValueError(f"{folder} holds no row {done} of {rows.name}: a file of another rank is missing")
    return torch.cat(parts) if parts else torch.empty_like(rows.master)
