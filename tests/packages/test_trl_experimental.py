"""Trainers of TRL's experimental part, which take logits themselves: `LMHead.wrap` is all that they need."""

import pytest

from chunked_ce import LMHead
from tests.packages import trainings as t
from tests.packages import trl_trainers as r

trl = pytest.importorskip("trl")
cpo = pytest.importorskip("trl.experimental.cpo")
gkd = pytest.importorskip("trl.experimental.gkd")
orpo = pytest.importorskip("trl.experimental.orpo")

PACKAGE = f"TRL {trl.__version__}"


@pytest.mark.parametrize(
    "name, trainer, config, rate",
    [("ORPO", orpo.ORPOTrainer, orpo.ORPOConfig, 0.5), ("CPO", cpo.CPOTrainer, cpo.CPOConfig, 0.1)],
)
def test_preferences(tmp_path, name, trainer, config, rate):
    def build(wrapped, folder):
        model = t.new_model()
        if wrapped:
            LMHead.wrap(model, options=t.OPTIONS)
        return r.build(trainer, config, folder, r.preferences(), model=model, max_length=128, learning_rate=rate)

    t.compare(build, tmp_path, r.TOKENS, t.Row(PACKAGE, name, "", "LMHead.wrap"), scale=44.0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd(tmp_path, beta):
    def build(wrapped, folder):
        model, teacher = t.new_model(), t.new_model(hidden_size=24, initializer_range=0.15)
        if wrapped:
            LMHead.wrap(model, options=t.OPTIONS)
            LMHead.wrap(teacher, options=t.OPTIONS, lazy="always")
        settings = {"beta": beta, "lmbda": 0.0, "max_length": 128, "learning_rate": 10.0}
        more = {"teacher_model": teacher}
        return r.build(gkd.GKDTrainer, gkd.GKDConfig, folder, r.chats(), model=model, more=more, **settings)

    t.compare(build, tmp_path, r.TOKENS, t.Row(PACKAGE, "GKD", f"beta {beta:g}", "LMHead.wrap"))
