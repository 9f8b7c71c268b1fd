"""What the ranks of `test_sharded_head_fsdp.py` check by themselves: state dicts, checkpoints, errors, other uses."""

from __future__ import annotations

import copy
import importlib.util
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from chunked_ce import LMHead, VocabShard, linear_cross_entropy
from tests.distributed.sharded_head_fsdp import OPTIONS, WIDTH, Case, LanguageModel, sharded, tokens, whole

FULL = StateDictOptions(full_state_dict=True)


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(whole(found[name]), value), name


def marked() -> tuple[dict[str, Tensor], nn.Module]:
    """A whole state dict with values of its own, and a sharded model without them."""
    model = LanguageModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model.state_dict(), sharded(Case(), line())


# ---- state dicts ----


def full_state_dicts(rank: int, folder: str) -> None:
    expected, model = marked()
    set_model_state_dict(model, dict(expected), options=FULL)  # which changes the dictionary
    assert_same(get_model_state_dict(model, options=FULL), expected)
    on_the_first = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert_same(on_the_first, expected if rank == 0 else {})
    assert model.lm_head.weight is model.embed.weight and isinstance(model.lm_head.weight, DTensor)

    other = sharded(Case(), line())
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, dict(expected) if rank == 0 else {}, options=broadcast)
    assert_same(other.state_dict(), expected)


def plain_state_dicts(rank: int, folder: str) -> None:
    """As without FSDP2: DTensors, which `load_state_dict` takes, and whole tensors for the rows."""
    expected, model = marked()
    rows = {name: value for name, value in expected.items() if name in ("embed.weight", "lm_head.weight")}
    model.load_state_dict(rows, strict=False)
    assert torch.equal(whole(model.lm_head.weight), expected["lm_head.weight"])
    state = model.state_dict()
    assert all(isinstance(value, DTensor) for value in state.values())
    other = sharded(Case(), line())
    other.load_state_dict(state)
    assert_same(other.state_dict(), {name: whole(value) for name, value in state.items()})
    with pytest.raises(RuntimeError, match=re.escape("the state dict has (10, 6), and the whole parameter")):
        model.load_state_dict({name: value[:10] for name, value in rows.items()}, strict=False)


def meta_device(rank: int, folder: str) -> None:
    for tied in (True, False):
        case = Case(tied=tied)
        with torch.device("meta"):
            model = LanguageModel(case)
        model = sharded(case, line(), model)
        assert all(parameter.is_meta for parameter in model.parameters())
        model.to_empty(device="cpu")
        expected = LanguageModel(case).state_dict()
        set_model_state_dict(model, dict(expected), options=FULL)
        assert_same(model.state_dict(), expected)
        assert (model.lm_head.weight is model.embed.weight) == tied
        model(*tokens(case, rank, 0, 0)).backward()


def trained(case: Case, mesh: DeviceMesh, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(case, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model(*tokens(case, rank, 0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save(rank: int, folder: str) -> None:
    for tied in (True, False):
        model, optimizer = trained(Case(tied=tied), line(), rank)
        states = get_state_dict(model, optimizer)
        dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=f"{folder}/tied {tied}")
        full = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=FULL), strict=True))
        if rank == 0:
            torch.save(full, f"{folder}/tied {tied}.pt")


def load(rank: int, folder: str) -> None:
    """On other numbers of ranks than it was saved with."""
    three = DeviceMesh("cpu", [0, 1, 2])
    for mesh, tied in ((line(), True), (square(), False), (three, True)):
        if rank not in mesh.mesh.flatten().tolist():
            continue
        case = Case(tied=tied)
        model, optimizer = trained(case, mesh, rank + 1)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=f"{folder}/tied {tied}", process_group=_group_of(mesh))
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        expected = torch.load(f"{folder}/tied {tied}.pt")
        assert_same(model.state_dict(), expected["model"])
        for name, parameter in model.named_parameters():
            for key, value in expected["optimizer"]["state"][name].items():
                assert torch.equal(whole(optimizer.state[parameter][key]), value), (name, key)


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    return mesh.get_group() if mesh.size() < dist.get_world_size() else None


def safetensors(rank: int, folder: str) -> None:
    if importlib.util.find_spec("safetensors") is None:
        return
    files = importlib.import_module("safetensors.torch")
    expected, model = marked()
    set_model_state_dict(model, dict(expected), options=FULL)
    state = get_model_state_dict(model, options=FULL)
    if rank == 0:
        files.save_file({name: value.clone() for name, value in state.items()}, f"{folder}/model.safetensors")
    dist.barrier()
    other = sharded(Case(), line())
    set_model_state_dict(other, files.load_file(f"{folder}/model.safetensors"), options=FULL)
    assert_same(other.state_dict(), expected)


# ---- other uses ----


def never_gathered(rank: int, folder: str) -> None:
    """No collective of a step is as large as the head, nor is any tensor that it allocates."""
    case = Case(words=3001)
    model = sharded(case, line())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ) as profile:
        model(*tokens(case, rank, 0, 0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    events = profile.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest <= 1.01 * 4 * -(-case.words // 2) * WIDTH
    collectives = [event for event in events if event.name().startswith("c10d::")]
    assert len(collectives) > 5
    assert all(number < case.words for event in collectives for number in _sizes(event.shapes()))


def _sizes(shapes) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(shapes))]


def copies(rank: int, folder: str) -> None:
    """A copy from before `fully_shard` trains too, and `unwrap` makes it whole."""
    model = LMHead.shard(LanguageModel(), line(), options=OPTIONS)
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.embed.weight is not model.embed.weight
    for one in (model, copied):
        one(*tokens(Case(), rank, 0, 0)).backward()
        one.embed.weight.data.sub_(0.1 * one.embed.weight.grad)
    assert torch.equal(whole(copied.lm_head.weight), whole(model.lm_head.weight))
    assert not torch.equal(whole(copied.lm_head.weight), LanguageModel().lm_head.weight)
    LMHead.unwrap(copied)
    assert type(copied.lm_head) is nn.Linear and type(copied.embed) is nn.Embedding
    assert torch.equal(copied.embed.weight, whole(model.embed.weight)) and copied.lm_head.weight is copied.embed.weight
    fully_shard([copied.embed, copied.lm_head], mesh=line())
    fully_shard(copied, mesh=line())
    copied(*tokens(Case(), rank, 0, 0)).backward()
    with pytest.raises(NotImplementedError, match=r"are never gathered: LMHead\.unwrap"):
        model.lm_head.unshard()


def managed_by_fsdp(rank: int, folder: str) -> None:
    """A head that FSDP2 has sharded, and never gathers because its unit is never called."""
    world_size = dist.get_world_size()
    for mesh in [line()] if world_size == 2 else [line(), square()]:
        case = Case(tied=False, words=5)
        model = LanguageModel(case)
        expected = LanguageModel(case)
        fully_shard(model.lm_head, mesh=mesh)
        head = model.lm_head
        if mesh.ndim == 2:
            head.set_gradient_divide_factor(2.0 * world_size)
        vocab = VocabShard.from_dtensor(head.weight, tokens="own")
        parts = [tokens(case, other, 0, 0) for other in range(world_size)]
        ids, labels = parts[rank]
        hidden = model.embed(ids).detach()
        keywords = {"linear_bias": head.bias, "vocab": vocab, "reduction": "sum"}
        linear_cross_entropy(hidden, head.weight, labels, **keywords).backward()
        total = sum(
            F.cross_entropy(expected.lm_head(expected.embed(ids)).flatten(0, 1), labels.flatten(), reduction="sum")
            for ids, labels in parts
        )
        (total / (world_size if mesh.ndim == 1 else 2 * world_size)).backward()
        for name, parameter in expected.lm_head.named_parameters():
            torch.testing.assert_close(whole(getattr(head, name).grad), parameter.grad, rtol=1e-5, atol=1e-6)
            assert getattr(head, name).grad.placements == head.weight.placements
        with pytest.raises(ValueError, match=r"LMHead\.shard"):
            VocabShard.from_dtensor(head.weight)


# ---- errors ----


def errors(rank: int, folder: str) -> None:
    model = LMHead.shard(LanguageModel())
    with pytest.raises(RuntimeError, match=re.escape("LMHead.shard(model, mesh), and fully_shard leaves the rows")):
        fully_shard(model, mesh=line())
    for over in (None, line()):
        with pytest.raises(RuntimeError, match="the older FSDP, does not take"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FullyShardedDataParallel(LMHead.shard(LanguageModel(), over), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="before the model goes into the engine"):
        LMHead.shard(fully_shard(LanguageModel(), mesh=line()), line())
    with pytest.raises(ValueError, match="group_or_mesh must be a process group, or a mesh as fully_shard"):
        LMHead.shard(LanguageModel(), init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("a", "b", "c")))
    with pytest.raises(TypeError, match="None, a ProcessGroup that this rank is in, or a DeviceMesh, was str"):
        LMHead.shard(LanguageModel(), "data")
    with pytest.raises(AssertionError, match="fully_shard has already been applied"):
        fully_shard(LMHead.shard(LanguageModel(), line()).lm_head, mesh=line())
    _other_mesh(init_device_mesh("cpu", (2,), mesh_dim_names=("data",)), line(), rank)


def meshes_that_differ(rank: int, folder: str) -> None:
    mesh = square()
    for head, others in ((line(), mesh), (mesh["shard"], mesh), (mesh, line())):
        _other_mesh(head, others, rank)


def _other_mesh(head: DeviceMesh, others: DeviceMesh, rank: int) -> None:
    model = LMHead.shard(LanguageModel(Case(tied=False)), head)
    fully_shard(model, mesh=others)
    with pytest.raises(ValueError, match=r"group_or_mesh of LMHead\.shard must be the mesh of fully_shard"):
        model(*tokens(Case(), rank, 0, 0))


def different_values(rank: int, folder: str) -> None:
    """Those of the first rank count, on both dimensions of a mesh."""
    model = LanguageModel()
    expected = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(rank)
    LMHead.shard(model, square())
    assert torch.equal(whole(model.lm_head.weight), expected)
    one = LanguageModel(Case(words=12 if rank == 3 else 11))
    with pytest.raises(ValueError, match="ranks of the group have different heads; their shapes are"):
        LMHead.shard(one, square())
    one = nn.Linear(3, 3) if rank == 3 else LanguageModel()
    with pytest.raises(ValueError, match=r"have different heads|cannot shard its head"):
        LMHead.shard(one, square())


CHECKS = {
    2: {
        check.__name__.replace("_", " "): check
        for check in (
            full_state_dicts,
            plain_state_dicts,
            meta_device,
            save,
            safetensors,
            never_gathered,
            copies,
            managed_by_fsdp,
            errors,
        )
    },
    4: {
        check.__name__.replace("_", " "): check
        for check in (load, managed_by_fsdp, meshes_that_differ, different_values)
    },
}
