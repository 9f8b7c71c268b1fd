"""The wheel in an environment with torch alone: imports, one step of training, and the command without its extra.

`make release` runs it from outside the checkout, without pytest.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


def main() -> None:
    import chunked_ce

    assert "site-packages" in chunked_ce.__file__, f"not the wheel: {chunked_ce.__file__}"
    assert not any(map(importlib.util.find_spec, ("rich", "matplotlib", "deepspeed"))), "not a bare environment"
    missing = [name for name in chunked_ce.__all__ if not hasattr(chunked_ce, name)]
    assert not missing, f"public names that are missing: {missing}"

    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    target = torch.randint(0, 300, (50,))
    losses = chunked_ce.linear_cross_entropy(hidden, weight, target), F.cross_entropy(F.linear(hidden, weight), target)
    ours, expected = ((loss, *torch.autograd.grad(loss, (hidden, weight))) for loss in losses)
    torch.testing.assert_close(ours, expected)

    command = Path(sys.executable).with_name("chunked-ce")
    bench = subprocess.run([command, "bench"], capture_output=True, text=True, check=False)
    assert bench.returncode == 1 and "pip install 'chunked_ce[cli]'" in bench.stderr, bench
    print(f"chunked_ce {chunked_ce.__version__}: the wheel works with torch {torch.__version__} alone")


if __name__ == "__main__":
    main()
