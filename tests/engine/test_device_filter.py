"""The gradient filter as an accelerator computes it, with the torch twins of its kernels, in the tests of the CPU's."""

import pytest
import torch

from chunked_ce import ChunkOptions
from chunked_ce.engine import device_filter, sweep
from chunked_ce.plan import ROOM_SHARE
from chunked_ce.rows import torch_filter
from tests import test_accumulate_into, test_depths, test_logits_dtype
from tests.cases import gradients
from tests.engine import test_filtered
from tests.engine.test_filtered import EPS, slow_twin, zipf_problem

for name in (
    "test_filtered_gradients_are_those_of_the_slow_twin",
    "test_upstream_gradients_weigh_the_tail",
    "test_every_row_sums_to_zero_and_every_word_gets_a_gradient",
    "test_an_untrained_head_gets_dense_products",
    "test_edges",
    "test_frozen_tensors_get_nothing",
    "test_fp16_class_weights_of_all_sizes",
    "test_auto_stays_below_the_rounding_of_the_dtype",
    "test_what_is_not_finite_is_so_in_the_gradients",
    "test_tokens_that_are_mostly_tail_make_the_products_dense",
    "test_a_narrow_gradient_that_exists_is_added_to_once",
    "test_each_shard_has_a_tail_of_its_own",
    "test_compiles_in_one_graph",
):
    globals()[name] = getattr(test_filtered, name)
test_into_grad = test_accumulate_into.test_into_grad
test_depths_and_accumulation = test_depths.test_gradient_filter_and_accumulation
test_wide_logits = test_logits_dtype.test_a_gradient_filter


@pytest.fixture(autouse=True)
def on_an_accelerator(monkeypatch):
    monkeypatch.setattr(sweep, "filter_kernels", lambda specification, device: torch_filter)


def test_the_graph_may_be_kept():
    """The terms of the head's gradient are added up anew for each upstream gradient, and stay as they are."""
    case = zipf_problem()
    value = case.loss(reduction="sum", options=ChunkOptions(chunk_size=40, gradient_filter=EPS))
    first = gradients(value, case, torch.tensor(-3.0, dtype=torch.float64), retain_graph=True)
    for g, expected in zip(gradients(value, case), first, strict=True):
        torch.testing.assert_close(-3 * g, expected, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(value, case)


@pytest.mark.parametrize("share", [0.0, ROOM_SHARE, 0.4])
@pytest.mark.parametrize("most", [0.01, 0.5])
def test_room_changes_nothing(most, share, monkeypatch):
    """Too little room for the kept columns is made up for; many rows are added up before the last chunk."""
    monkeypatch.setattr(device_filter, "ROOM_SHARE", share)
    monkeypatch.setattr(device_filter, "_MOST_PARTS", most)
    case = zipf_problem(bias=True)
    expected, kept = slow_twin(case, EPS, 9)
    assert kept > 0.03
    for way in ("forward", "backward"):
        got = gradients(case.loss(reduction="sum", options=ChunkOptions(9, gradients=way, gradient_filter=EPS)), case)
        for g, e in zip(got, expected, strict=True):
            assert (g - e).abs().max() <= 1e-12 * e.abs().max()


def test_a_frozen_head_pays_for_no_tail(monkeypatch):
    case, made = zipf_problem(), []
    case.head.requires_grad_(False)
    make = sweep.DeviceFilter
    monkeypatch.setattr(sweep, "DeviceFilter", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    gradients(case.loss(options=ChunkOptions(gradient_filter=EPS, chunk_size=8)), case)
    assert made and not any(filter.sums[0].numel() or len(filter.sums) > 1 for filter in made)
