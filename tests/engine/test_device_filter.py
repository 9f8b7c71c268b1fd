"""The gradient filter as an accelerator computes it, with the torch twins of its kernels, in the tests of the CPU's."""

import pytest

from chunked_ce.engine import sweep
from chunked_ce.rows import torch_filter
from tests.engine import test_filtered

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


@pytest.fixture(autouse=True)
def on_an_accelerator(monkeypatch):
    monkeypatch.setattr(sweep, "filter_kernels", lambda specification, device: torch_filter)
