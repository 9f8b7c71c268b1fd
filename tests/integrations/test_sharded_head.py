"""A sharded head inside Transformers' `Trainer`, Accelerate and PEFT on two ranks: one process on the whole batch."""

import traceback

import pytest
import torch

from tests.distributed.launch import run

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")

from tests.integrations import sharded_fsdp_trainings as f  # noqa: E402
from tests.integrations import sharded_trainings as s  # noqa: E402

SAVED = [training for training in s.TRAININGS if "save_steps" in dict(training.settings)]
FSDP = [s.Training(), s.Training(tied=False)]
LOADED = [(tied, *how) for tied in (True, False) for how in (("bf16", True), ("no", True), ("bf16", False))]
PLACES = ["tied", "untied", "copy", "on the head", "on the head, late"]


def on_rank(rank, world_size, folder):
    found = {}

    def attempt(name, function, *args):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        try:
            found[name] = function(*args, world_size)
        except Exception:
            found[name] = traceback.format_exc()

    for place in PLACES:
        attempt(("peft", place), s.run_peft, place)
    attempt("trainable tokens", s.trainable_tokens)
    for training in s.TRAININGS:
        attempt(training, s.run_trainer, training, folder / str(training))
    for training in SAVED:
        start = folder / str(training) / "checkpoint-2"
        attempt(
            (training, "resumed"), lambda *args, start=start: s.run_trainer(*args, start), training, folder / "again"
        )
    for tied in (True, False):
        attempt(tied, s.run_accelerate, tied, folder / f"accelerate {tied}")
    for case in LOADED:
        attempt(case, f.loaded_with_accelerate, *case)
    for training in FSDP:
        under = folder / f"fsdp {training}"
        attempt(("fsdp", training), f.run_trainer_with_fsdp, training, under)
        again = lambda *args, start=under / "checkpoint-2": f.run_trainer_with_fsdp(*args, start)  # noqa: E731
        attempt(("fsdp", training, "resumed"), again, training, folder / "again")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "0")
        return run(on_rank, s.RANKS, folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return {training: s.run_trainer(training, folder / str(training), 1) for training in s.TRAININGS}


def results(ranks, name):
    found = [rank[name] for rank in ranks]
    assert not any(isinstance(one, str) for one in found), found
    return found


def assert_same_state(found, expected):
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize("training", s.TRAININGS, ids=str)
def test_trainer(ranks, plain, training):
    expected = plain[training]
    for found in results(ranks, training):
        assert found.losses == pytest.approx(expected.losses, rel=1e-6)
        assert found.norms == pytest.approx(expected.norms, rel=1e-5)
        assert found.evaluation == pytest.approx(expected.evaluation, rel=1e-6)
        assert_same_state(found.state, expected.state)


@pytest.mark.parametrize("training", SAVED, ids=str)
def test_a_checkpoint_is_resumed_on_any_number_of_ranks(ranks, plain, folder, training):
    expected = plain[training]
    checkpoint = folder / str(training) / "checkpoint-2"
    for found in [*results(ranks, (training, "resumed")), s.run_trainer(training, folder / "one", 1, checkpoint)]:
        assert found.losses[2:] == pytest.approx(expected.losses[2:], rel=1e-6)
        assert_same_state(found.state, expected.state)


@pytest.mark.parametrize("training", s.TRAININGS, ids=str)
def test_the_saved_model_is_whole(ranks, folder, training):
    found = results(ranks, training)[0]
    loaded = type(s.new_model(training)).from_pretrained(folder / str(training) / "final")
    assert type(loaded.lm_head) is torch.nn.Linear
    for name, value in found.state.items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("tied", [True, False])
def test_accelerate(ranks, tmp_path, tied):
    losses, norms, state = s.run_accelerate(tied, tmp_path, 1)
    for found in results(ranks, tied):
        assert found[0] == pytest.approx(losses, rel=1e-6)
        assert found[1] == pytest.approx(norms, rel=1e-5)
        assert_same_state(found[2], state)


@pytest.mark.parametrize("case", LOADED, ids=str)
def test_accelerate_with_fsdp2_loads_the_rows(ranks, case):
    results(ranks, case)


@pytest.mark.parametrize("training", FSDP, ids=str)
def test_trainer_with_fsdp2(ranks, folder, tmp_path, training):
    expected = f.run_trainer_with_fsdp(training, tmp_path, 1)
    for name in (("fsdp", training), ("fsdp", training, "resumed")):
        first, *_ = found = results(ranks, name)
        for one in found:
            assert one.losses == pytest.approx(expected.losses, rel=1e-6)
            assert one.norms == pytest.approx(expected.norms, rel=1e-5)
        assert_same_state(first.state, expected.state)  # gathered on the main process
    loaded = type(s.new_model(training)).from_pretrained(folder / f"fsdp {training}" / "final")
    assert_same_state(loaded.state_dict(), expected.state)


@pytest.mark.parametrize("place", PLACES)
def test_peft(ranks, place):
    losses, adapters, trained = s.run_peft(place, 1)
    found = results(ranks, ("peft", place))
    assert [sum(both) / 2 for both in zip(*(one[0] for one in found), strict=True)] == pytest.approx(losses, rel=1e-6)
    for _, adapters_of_rank, trained_on_rank in found:
        assert trained_on_rank == trained and adapters_of_rank.keys() == adapters.keys()
        assert_same_state(adapters_of_rank, adapters)


def test_trainable_tokens_are_refused(ranks):
    for said in results(ranks, "trainable tokens"):
        assert len(said) == 2 and all("PEFT's trainable tokens read rows" in one for one in said)
