"""DTensors are taken by their placements; a head that FSDP shards is no shard of the vocabulary."""

import pytest

from tests.distributed.launch import run
from tests.distributed.vocab_placements import RANKS, REFUSED, run_all


@pytest.fixture(scope="module")
def failures():
    return run(run_all, RANKS)


def cases(failures, *kinds: str) -> list:
    found = [case for case in failures[0] if (case if isinstance(case, str) else case[0]) in kinds]
    assert found
    return found


RIGHT = ["right", "whole head", "logits", "input_grad", "num_tokens", "compiled", "beside fsdp", "inside"]


@pytest.mark.parametrize("kind", RIGHT)
def test_equals_one_process_with_gradients_of_its_kind(failures, kind):
    for case in cases(failures, kind):
        found = [of_rank[case] for of_rank in failures if case in of_rank]
        assert found == [None] * (2 if case == ("compiled", "logits") else RANKS), case


def test_tokens_sharded_over_other_ranks_are_refused_by_name(failures):
    for case in cases(failures, "refused"):
        _, name, what = case
        for of_rank in failures:
            assert of_rank[case].type == "ValueError"
            assert of_rank[case].message.startswith(f"{name} must not have its tokens sharded")
            assert f"had placements {REFUSED[what]}" in of_rank[case].message
            assert f"{name}.to_local()" in of_rank[case].message


def test_heads_that_fsdp_shards_are_refused_by_name(failures):
    for case in cases(failures, "fsdp"):
        _, what = case
        name = {"from_dtensor": "weight", "bias": "linear_bias"}.get(what, "linear_weight")
        compiling = what.startswith("compiled")
        found = [of_rank[case] for of_rank in failures if case in of_rank]
        assert len(found) == (2 if compiling else RANKS)
        for refusal in found:
            assert refusal is not None, case
            assert refusal.type == ("Unsupported" if what == "compiled, full graph" else "ValueError"), case
            assert f"{name} is sharded by FSDP over data ranks" in refusal.message, case


def test_a_head_that_fsdp_flattened_is_told_about_fsdp(failures):
    for case in cases(failures, "fsdp1"):
        for of_rank in failures:
            assert of_rank[case].type == "ValueError" and of_rank[case].message.startswith(
                "linear_weight must be (V, D)"
            )
            assert "FSDP shards this one" in of_rank[case].message and "ZeRO" not in of_rank[case].message


def test_vocab_of_another_type(failures):
    for of_rank in failures:
        assert of_rank["wrong vocab"].type == "TypeError"
        assert "vocab must be a VocabShard or None, was" in of_rank["wrong vocab"].message
