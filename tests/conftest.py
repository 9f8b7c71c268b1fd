import hypothesis
import pytest
import torch

# Two workers end together if no long file comes last.
LONG_FILES = [f"test_{name}.py" for name in ("compile_dynamic", "compile", "memory", "fuzz", "precision")]

# `make packages` runs these, in an environment of their own.
collect_ignore = ["packages"]

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
