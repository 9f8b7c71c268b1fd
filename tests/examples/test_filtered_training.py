import json

import pytest
import torch

from tests.examples.commands import EXAMPLES, run

SCRIPT = EXAMPLES / "filtered_training.py"
TINY = ["--steps=30", "--batch=8", "--width=16", "--depth=1", "--heads=2", "--context=64", "--learning-rate=2e-2"]


@pytest.mark.thorough
def test_the_filter_trains_as_exact_gradients_do(tmp_path):
    printed = run(SCRIPT, *TINY, f"--out={tmp_path}", log=tmp_path / "log")
    found = json.loads((tmp_path / "losses.json").read_text())
    exact, filtered = found["exact"]["losses"], found["filtered"]["losses"]
    assert len(exact) == 30
    assert exact[-1] < exact[0] - 1
    assert filtered != exact, "nothing was filtered"
    assert filtered == pytest.approx(exact, rel=1e-2, abs=0)
    again = found["exact, other chunks"]["losses"]
    assert again != exact and again == pytest.approx(exact, rel=1e-2, abs=0)
    for name, losses in (("exact, other chunks", again), ("filtered", filtered)):
        assert f"losses of {name} and exact differ by at most" in printed
        largest = max(abs(one - other) for one, other in zip(losses, exact, strict=True))
        assert found["differences"][name]["largest_difference"] == pytest.approx(largest)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")

    head = torch.load(tmp_path / "head.pt")
    assert head["hidden"].shape == (2048, 16)
    assert head["weight"].shape == (131072, 16)
    assert head["target"].shape == (2048,)
