"""What ranks check of a sharded head among themselves, against the whole model that each of them has too."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._foreach_utils import _has_foreach_support

from tests.distributed.sharded_head_worker import RANKS, WIDTH, Case, LanguageModel, Scaled, Wrapper

NUMBERS = [3, 0, 5]  # of tokens on the ranks
ORDERS = [1.0, 2.0, 3.0, 0.0, math.inf, -math.inf]


def sharded(case: Case = Case(), **keywords) -> tuple[nn.Module, nn.Module]:  # noqa: B008
    """A model with a sharded head, and the same model whole."""
    from chunked_ce import LMHead

    plain = LanguageModel(case)
    return LMHead.shard(copy.deepcopy(plain), **keywords), plain


def assert_same_state(model: nn.Module, expected: dict[str, Tensor], change: float = 0.0) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value + change), name
        assert state[name].untyped_storage().nbytes() == value.untyped_storage().nbytes(), name


def ids_of(rank: int, words: int) -> Tensor:
    return torch.randint(words, (1, NUMBERS[rank]), generator=torch.Generator().manual_seed(rank))


@contextlib.contextmanager
def raises_everywhere(kind: type[Exception] | tuple, match: str):
    with pytest.raises(kind, match=match):
        yield
    dist.barrier()  # all ranks are in step


# ---- state dicts ----


def check_whole_state_dicts(rank: int) -> None:
    for case in (Case(bias=True), Case(tied=False, bias=True), Case(words=4, embedding=Scaled)):
        model, plain = sharded(case)
        expected = plain.state_dict()
        assert_same_state(model, expected)
        state = model.state_dict()
        assert (state["embed.weight"] is state["lm_head.weight"]) == case.tied
        assert state["lm_head.weight"].shape == (case.words, WIDTH)
        rows = len(range(case.words)[rank * -(-case.words // RANKS) :][: -(-case.words // RANKS)])
        named = dict(model.named_parameters(remove_duplicate=False))
        assert named["lm_head.weight"].shape == (rows, WIDTH) and model.lm_head.out_features == case.words
        assert model.load_state_dict({name: value + 1 for name, value in expected.items()}) == ([], [])
        assert_same_state(model, expected, change=1)
        assert_same_state(model, expected, change=1)  # the first whole tensors are gone
        state = model.state_dict()
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        for destination in (state, {}):
            model.state_dict(destination=destination)
            assert torch.equal(destination["lm_head.weight"], expected["lm_head.weight"] + 1 + 1)
            assert (destination["embed.weight"] is destination["lm_head.weight"]) == case.tied


def check_loading_by_assignment(rank: int) -> None:
    model, plain = sharded(Case())
    state = {name: value + 1 for name, value in plain.state_dict().items()}
    state["lm_head.weight"] = state["embed.weight"]
    for one in (model, plain):
        one.load_state_dict(state, assign=True)
        assert one.lm_head.weight.data_ptr() == one.embed.weight.data_ptr()  # tied by their memory alone
    assert_same_state(model, state)
    assert model.lm_head.weight.untyped_storage().nbytes() < state["lm_head.weight"].nbytes
    model.embed(ids_of(rank, 11)).sum().backward()
    assert type(model.embed.weight.grad).__name__ == "RowGradient"  # it is a new parameter
    state["embed.weight"].add_(1)
    model.load_state_dict(state)
    assert_same_state(model, state)


def check_states_that_do_not_fit(rank: int) -> None:
    model, plain = sharded(Case(bias=True))
    before = plain.state_dict()
    rows = len(model.lm_head.weight)
    for wrong in (torch.zeros(rows, WIDTH), torch.zeros(12, WIDTH)):
        with raises_everywhere(RuntimeError, r"size mismatch for lm_head.weight: .*whole parameter.* \(11, 6\)"):
            model.load_state_dict(before | {"lm_head.weight": wrong})
    assert_same_state(model, before)
    missing = {name: value for name, value in before.items() if name != "lm_head.bias"}
    with raises_everywhere(RuntimeError, "Missing key.*lm_head.bias"):
        model.load_state_dict(missing)
    assert model.load_state_dict(missing, strict=False).missing_keys == ["lm_head.bias"]


def check_copies(rank: int) -> None:
    model, plain = sharded(Case(bias=True, embedding=Scaled))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same_state(other, plain.state_dict())
        assert other.embed.weight is other.lm_head.weight is not model.lm_head.weight
        other.embed(ids_of(rank, 11)).sum().backward()
        assert type(other.embed.weight.grad).__name__ == "RowGradient" and model.embed.weight.grad is None
        assert set(other._ddp_params_and_buffers_to_ignore) == {"embed.weight", "lm_head.weight", "lm_head.bias"}
        assert other._ddp_params_and_buffers_to_ignore._module is other
        from chunked_ce import LMHead

        assert type(LMHead.unwrap(other).embed) is Scaled


def check_unwrapping(rank: int) -> None:
    from chunked_ce import LMHead

    for case in (Case(bias=True, embedding=Scaled), Case(tied=False)):
        model, plain = sharded(case)
        modules = list(model.modules())
        assert LMHead.unwrap(model) is model
        assert [type(one) for one in model.modules()] == [type(one) for one in plain.modules()]
        assert list(model.modules()) == modules and (model.embed.weight is model.lm_head.weight) == case.tied
        assert {name for one in modules for name in vars(one)} == {n for one in plain.modules() for n in vars(one)}
        assert_same_state(model, plain.state_dict())
        assert_same_state(LMHead.shard(model), plain.state_dict())


def check_a_models_own_head(rank: int) -> None:
    from chunked_ce import LMHead

    model = LMHead.wrap(LanguageModel(), z_loss=0.5)
    LMHead.shard(model, label_smoothing=0.25)
    assert model.lm_head.loss_keywords == {"z_loss": 0.5, "label_smoothing": 0.25}
    own = nn.Sequential(nn.Embedding(11, WIDTH), LMHead(WIDTH, 11, softcap=2.0))
    LMHead.shard(own)
    assert own[1].vocab is not None and own[1].weight.shape[0] < 11
    LMHead.unwrap(own)
    assert own[1].vocab is None and own[1]._settings.logits.softcap == 2.0 and own[1].weight.shape[0] == 11


def check_dtypes(rank: int) -> None:
    model, plain = sharded(Case(bias=True))
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight is model.embed.weight
    assert_same_state(model, plain.to(torch.bfloat16).state_dict())
    ids = ids_of(rank, 11)
    found = model.embed(ids)
    assert torch.equal(found, plain.embed(ids))
    found.sum().backward()
    assert model.embed.weight.grad.dtype == torch.bfloat16


def check_other_numbers_of_ranks(rank: int) -> None:
    """A model and an optimizer that trained on three ranks go on with two, and with one."""
    case = Case(optimizer="adamw")
    model, plain = sharded(case)
    states = []
    for one in (model, plain):
        optimizer = torch.optim.AdamW(one.parameters(), 0.1)
        one.embed(torch.arange(11)).sin().sum().backward()
        optimizer.step()
        states.append((one.state_dict(), optimizer.state_dict()))
        if one is model:
            assert optimizer.state[model.embed.weight]["exp_avg"].shape == model.embed.weight.shape
    torch.testing.assert_close(model.state_dict(), states[1][0], rtol=1e-6, atol=1e-7)
    pair = dist.new_group([0, 1])
    if rank < 2:
        other, _ = sharded(case, group_or_mesh=pair)
        assert len(other.embed.weight) == [6, 5][rank]
        both = []
        for one, (state, of_optimizer) in ((other, states[0]), (plain, states[1])):
            optimizer = torch.optim.AdamW(one.parameters(), 0.1)
            one.load_state_dict(state)
            optimizer.load_state_dict(copy.deepcopy(of_optimizer))
            one.zero_grad()
            one.embed(torch.arange(11)).cos().sum().backward()
            optimizer.step()
            both.append(optimizer.state_dict()["state"][0]["exp_avg_sq"])
        torch.testing.assert_close(*both)
        torch.testing.assert_close(other.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-7)
    dist.barrier()


def check_gathering_before(rank: int) -> None:
    """One rank's state dicts need no other's inside of `gathered`."""
    from chunked_ce.sharded.gathering import gathered
    from chunked_ce.sharded.optimizers import sharded_states

    model, _ = sharded()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.embed(ids_of(rank, 11)).sum().backward()
    optimizer.step()
    expected, of_optimizer = model.state_dict(), optimizer.state_dict()["state"]
    with gathered(model, sharded_states(optimizer), keep=rank == 1):
        if rank == 1:
            assert_same_state(model, expected)
            found = optimizer.state_dict()["state"]
            assert all(torch.equal(found[i]["momentum_buffer"], of_optimizer[i]["momentum_buffer"]) for i in found)
    dist.barrier()


def check_waiting_is_noticed(rank: int) -> None:
    from chunked_ce.sharded import rows

    model, _ = sharded()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(rows, "_PATIENCE", 0.05)
        if rank == 0:
            time.sleep(0.5)
        model.state_dict()
    assert rank == 0 or any("state dict's embed.weight is gathered from all" in str(one.message) for one in caught)


def check_a_bias_in_two_places(rank: int) -> None:
    """As BERT's."""
    from chunked_ce import LMHead

    model = LanguageModel(Case(bias=True))
    model.bias = model.lm_head.bias
    expected = copy.deepcopy(model.state_dict())
    LMHead.shard(model)
    assert model.bias is model.lm_head.bias and model.bias.numel() < 11
    assert_same_state(model, expected)
    model.load_state_dict({name: value + 1 for name, value in expected.items()})
    assert_same_state(LMHead.unwrap(model), expected, change=1)
    assert model.bias is model.lm_head.bias


def check_compiled_models(rank: int) -> None:
    compiled = torch.compile(sharded()[0], backend="eager")  # `test_compiled` calls one
    assert set(compiled._ddp_params_and_buffers_to_ignore) == {"_orig_mod.embed.weight", "_orig_mod.lm_head.weight"}


# ---- lookups ----


def check_lookups(rank: int) -> None:
    for case in (Case(), Case(embedding=Scaled), Case(words=4)):
        model, plain = sharded(case)
        with torch.no_grad():
            for one in (model, plain):
                one.load_state_dict({k: v.where(v.abs() > 0.1, -0.0) for k, v in plain.state_dict().items()})
        everyones = [ids_of(other, case.words) for other in range(RANKS)]
        ids = everyones[rank]
        for shaped in (ids, ids.int(), ids[0], ids[..., None], torch.full((), 2) if rank else ids[:, :0]):
            found, expected = model.embed(shaped), plain.embed(shaped)
            assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())
        model.embed(ids).sin().sum().backward()
        (sum(plain.embed(other).sin().sum() for other in everyones) / RANKS).backward()
        sharding = model.embed._row_shardings["weight"]
        whole = sharding.whole(model.embed.weight.grad.as_subclass(Tensor), "gradient")
        torch.testing.assert_close(whole, plain.embed.weight.grad)
        assert not whole[1].any()  # padding_idx
        with torch.no_grad():
            assert torch.equal(model.embed(ids), plain.embed(ids))
        model.embed.weight.requires_grad_(False)
        assert not model.embed(ids).requires_grad


def check_lookups_in_chunks(rank: int) -> None:
    from chunked_ce.sharded import lookup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "_BUDGET", 2 * RANKS * WIDTH * 4)  # two tokens of each rank
        check_lookups(rank)


def check_initialization(rank: int) -> None:
    """Only the row of ``padding_idx``, 1, is zero, whichever rank has it."""
    model, _ = sharded()
    model.embed.reset_parameters()
    assert [row for row, values in enumerate(model.state_dict()["embed.weight"]) if not values.any()] == [1]


def check_ids_out_of_range(rank: int) -> None:
    model, _ = sharded()
    ids = torch.tensor([11 if rank == 1 else 3])
    with raises_everywhere(IndexError, "held 11" if rank == 1 else "on rank 1"):
        model.embed(ids)
    model.embed(ids.clamp(max=10))


# ---- gradients ----


def check_norms(rank: int) -> None:
    for case in (Case(bias=True), Case(words=4)):
        model, plain = sharded(case)
        everyones = [ids_of(other, case.words) for other in range(RANKS)]
        model(everyones[rank]).log_softmax(-1).gather(-1, everyones[rank][..., None]).sum().backward()
        losses = [plain(ids).log_softmax(-1).gather(-1, ids[..., None]).sum() for ids in everyones]
        (sum(losses) / RANKS).backward()
        names = ["lm_head.weight", "lm_head.bias"] if case.bias else ["lm_head.weight"]
        mine, whole = ([one.get_parameter(name).grad for name in names] for one in (model, plain))
        other = torch.tensor([0.5, 2.0])
        assert _has_foreach_support([other, *mine], other.device)
        for order in ORDERS:
            expected = nn.utils.get_total_norm([other, *whole], order)
            for foreach in (True, False, None):
                torch.testing.assert_close(nn.utils.get_total_norm([other, *mine], order, foreach=foreach), expected)
            torch.testing.assert_close(mine[0].detach().data.float().norm(order), whole[0].norm(order))
            torch.testing.assert_close(torch.norm(mine[0] / 2, order), torch.norm(whole[0] / 2, order))
        torch.testing.assert_close(torch.linalg.norm(mine[0]), torch.linalg.norm(whole[0]))
        assert mine[0].norm(dim=-1).shape == mine[0].shape[:1]  # of each row
        assert type(mine[0] + 1) is type(mine[0].clone()) is Tensor
        if rank == 1 and len(mine[0]):
            mine[0][0, 0] = math.nan
        for order in ORDERS:
            assert nn.utils.get_total_norm([other, *mine], order).isnan() or order == 0


def check_gradients_live_on(rank: int) -> None:
    model, _ = sharded()
    ids, weight = ids_of(rank, 11), model.embed.weight
    model.embed(ids).sum().backward()
    first = weight.grad
    model.embed(ids).sum().backward()
    assert weight.grad is first and type(first).__name__ == "RowGradient"
    model.zero_grad(set_to_none=False)
    assert weight.grad is first and not first.any()
    model.zero_grad()
    model.embed(ids).sum().backward()
    assert type(weight.grad) is type(first)
    model.double()
    assert weight.grad.dtype == torch.float64 and type(weight.grad) is type(first)
    copied = copy.deepcopy(weight.grad)
    assert type(copied) is type(first) and torch.equal(copied, weight.grad)
    file = io.BytesIO()
    torch.save(weight.grad, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), weight.grad)


def check_scaler(rank: int) -> None:
    """All ranks skip a step if the rows of one overflow."""
    model, plain = sharded()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ids = torch.arange(11)
    for finite in (False, True):
        optimizer.zero_grad()
        scaler.scale(model.embed(ids).sum()).backward()
        if rank == 2 and not finite:
            model.embed.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        gone = (ids != 1).float()[:, None] if finite else 0.0
        torch.testing.assert_close(model.state_dict()["embed.weight"], plain.embed.weight - gone)


# ---- DistributedDataParallel ----


def check_averaging_is_noticed(rank: int) -> None:
    """A root that cannot know of the sharded rows, since its child was put in before."""
    model, _ = sharded(Case(words=12))  # as many rows on every rank
    outer = Wrapper(nn.Identity())
    middle = Wrapper(nn.Identity())
    outer.inner = middle
    middle.inner = model
    engine = nn.parallel.DistributedDataParallel(outer)
    with raises_everywhere(RuntimeError, "has overwritten them"):
        engine(torch.zeros(1, 1, dtype=torch.long))


def check_other_groups_are_noticed(rank: int) -> None:
    pair = dist.new_group([0, 1])
    model, _ = sharded(group_or_mesh=pair) if rank < 2 else (LanguageModel(), None)
    if rank < 2:
        engine = nn.parallel.DistributedDataParallel(model, process_group=pair)
        engine(torch.zeros(1, 1, dtype=torch.long))
        engine = nn.parallel.DistributedDataParallel(
            model, process_group=dist.new_group([rank], use_local_synchronization=True)
        )
        with pytest.raises(
            RuntimeError, match=r"averages over ranks \[\d\], and the head is sharded over ranks \[0, 1\]"
        ):
            engine(torch.zeros(1, 1, dtype=torch.long))
    dist.barrier()


def check_names_after_changes(rank: int) -> None:
    model, _ = sharded()
    wrapper = Wrapper(model)
    layer = model.lm_head
    model.lm_head = Wrapper(layer)
    assert set(wrapper._ddp_params_and_buffers_to_ignore) == {"inner.embed.weight", "inner.lm_head.inner.weight"}
    assert set(model._ddp_params_and_buffers_to_ignore) == {"embed.weight", "lm_head.inner.weight"}


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
