"""What a sharded head refuses, on every rank: models, replacements, and uses that need the logits of all words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.distributed.sharded_head_checks import raises_everywhere, sharded
from tests.distributed.sharded_head_worker import RANKS, WIDTH, Case, Direct, LanguageModel, tokens


def check_models_that_are_refused(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from chunked_ce import LMHead

    def refused(match: str, model: nn.Module, *args, kind=ValueError, **keywords) -> None:
        with raises_everywhere(kind, match):
            LMHead.shard(model, *args, **keywords)
        assert not any("_row_shardings" in vars(one) for one in model.modules())

    refused("no output embedding found", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    refused("vocab is not a keyword", LanguageModel(), vocab=None, kind=TypeError)
    refused("lazy must be", LanguageModel(), lazy="never")
    refused("group_or_mesh must be", LanguageModel(), [0, 1, 2], kind=TypeError)
    refused("must name a module", LanguageModel(), module="head")
    refused("does not look its tokens up by super", LanguageModel(Case(embedding=Direct)))
    refused("DistributedDataParallel yet", nn.parallel.DistributedDataParallel(LanguageModel()))
    for keyword, value in {"max_norm": 1.0, "scale_grad_by_freq": True, "sparse": True}.items():
        model = LanguageModel()
        setattr(model.embed, keyword, value)
        refused(f"'embed' is tied to the head, and its {keyword}={value}", model)
    model = LanguageModel()
    model.twin = nn.Linear(WIDTH, 11)
    model.twin.weight = model.lm_head.weight
    refused("twin.weight is tied to the head's weight", model, module="lm_head")
    model = LanguageModel(Case(tied=False))
    nn.utils.parametrizations.weight_norm(model.lm_head)
    refused("parametrized weight", model)
    model = LanguageModel()
    model.lm_head.weight.ds_id = 0  # ZeRO-3's
    refused("an engine has sharded or released the head", model)
    model = LanguageModel(Case(tied=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    refused("an engine has sharded or released the head", model)
    model, _ = sharded()
    with raises_everywhere(ValueError, "sharded already: LMHead.unwrap"):
        LMHead.shard(model)


def check_ranks_that_differ(rank: int) -> None:
    from chunked_ce import LMHead

    odd = rank == 2
    with raises_everywhere(ValueError, r"different heads; their shapes are .*\[\(12, 6\)\]"):
        LMHead.shard(LanguageModel(Case(words=12 if odd else 11)))
    with raises_everywhere(ValueError, "numbers of places"):
        LMHead.shard(LanguageModel(Case(tied=odd)))
    with raises_everywhere(ValueError, "no output embedding" if odd else "rank 2 of the group cannot shard its head"):
        LMHead.shard(nn.Sequential(nn.Tanh()) if odd else LanguageModel())
    model = LanguageModel()
    with torch.no_grad():
        model.lm_head.weight.add_(rank)
    LMHead.shard(model)
    assert torch.equal(model.state_dict()["lm_head.weight"], LanguageModel().lm_head.weight)  # the first rank's


def check_what_needs_all_words(rank: int) -> None:
    model, _ = sharded()
    for mode in (True, False):
        model.train(mode)
        logits = model(torch.zeros(1, 2, dtype=torch.long))
        with raises_everywhere(NotImplementedError, "of which this rank holds . of 11 .*LMHead.unwrap"):
            logits.sigmoid()
    assert F.cross_entropy(logits[0], torch.ones(2, dtype=torch.long)).isfinite()


def check_replacements_and_late_optimizers(rank: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    from chunked_ce import LMHead

    model = LanguageModel()
    early = torch.optim.SGD(model.parameters(), 0.1)
    LMHead.shard(model)
    with raises_everywhere(RuntimeError, "make the optimizer afterwards"):
        early.step()
    model.embed(torch.zeros(1, dtype=torch.long))
    partitioned = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with raises_everywhere(RuntimeError, "ZeroRedundancyOptimizer gives every rank"):
        partitioned.step()
    for name, module in {"embed": nn.Embedding(12, WIDTH), "lm_head": nn.Linear(WIDTH, 12)}.items():
        with raises_everywhere(RuntimeError, f"would take the place of '{name}'.*unwrap"):
            setattr(model, name, module)


def check_resizing(rank: int) -> None:
    """As Transformers' models do it: a parameter's data is replaced, and the module stays."""
    from chunked_ce import LMHead

    class Resizable(LanguageModel):
        def resize_token_embeddings(self, number: int) -> None:
            self.embed.weight.data = self.embed.weight.data[:number]

    model = LMHead.shard(Resizable())
    with raises_everywhere(RuntimeError, "rows sharded over ranks: call LMHead.unwrap"):
        model.resize_token_embeddings(5)
    assert model.state_dict()["embed.weight"].shape == (11, WIDTH)
    model.embed = model.embed
    LMHead.unwrap(model).resize_token_embeddings(5)
    assert model.embed.weight.shape == (5, WIDTH)


def check_tied_modules_may_take_each_others_places(rank: int) -> None:
    """As T5's embeddings of encoder and decoder."""
    from chunked_ce import LMHead

    model = LanguageModel()
    model.twin = nn.Embedding(11, WIDTH)
    model.twin.weight = model.embed.weight
    LMHead.shard(model)
    model.twin = model.embed
    assert model.twin is model.embed


def check_uneven_inputs_of_ddp(rank: int) -> None:
    """A rank that stops early would let the others wait."""
    engine = nn.parallel.DistributedDataParallel(sharded()[0])
    ids, _ = tokens(Case(), rank, 0, 0)
    with raises_everywhere(RuntimeError, "lets a rank stop before the others"), engine.join():
        engine(ids)
    with raises_everywhere(RuntimeError, "exhausted"), engine.join(throw_on_early_termination=True):
        for _ in range(1 + rank):
            F.cross_entropy(engine(ids)[0], ids[0], reduction="sum").backward()


REFUSALS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
