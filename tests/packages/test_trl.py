"""TRL's own trainers, three steps with `chunked_ce.integrations.trl.install` and without: the same training."""

import pytest

from tests.packages import trainings as t
from tests.packages import trl_trainers as r

trl = pytest.importorskip("trl")

from chunked_ce import LMHead  # noqa: E402
from chunked_ce.integrations import trl as integration  # noqa: E402

PACKAGE = f"TRL {trl.__version__}"


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    integration.uninstall()


def sft(folder, rows=r.texts, rank=0, targets=("q_proj",), **settings):
    more = {}
    if rank:
        peft = pytest.importorskip("peft")
        more["peft_config"] = peft.LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=False)
    return r.build(trl.SFTTrainer, trl.SFTConfig, folder, rows(), more=more, **{"max_length": 128, **settings})


def dpo(folder, **settings):
    more = {"ref_model": t.new_model(initializer_range=0.15)}
    return r.build(trl.DPOTrainer, trl.DPOConfig, folder, r.preferences(), more=more, **settings)


def kto(folder, **settings):
    more = {"ref_model": t.new_model(initializer_range=0.15)}
    return r.build(trl.KTOTrainer, trl.KTOConfig, folder, r.judged(), more=more, **settings)


def sampled(trainer, config, folder, **settings):
    more = {"reward_funcs": r.share_of_even_words}
    sizes = {"num_generations": 4, "max_completion_length": r.ANSWER, "temperature": 0.8}
    return r.build(trainer, config, folder, r.prompts(), model=r.saved(folder), more=more, **{**sizes, **settings})


def grpo(folder, **settings):
    return sampled(trl.GRPOTrainer, trl.GRPOConfig, folder, **settings)


def rloo(folder, **settings):
    return sampled(trl.RLOOTrainer, trl.RLOOConfig, folder, **settings)


def distillation(folder, **settings):
    more = {"teacher_model": t.new_model(hidden_size=24, initializer_range=0.15)}
    sizes = {"max_completion_length": r.ANSWER, "temperature": 0.8}
    return r.build(
        trl.DistillationTrainer, trl.DistillationConfig, folder, r.prompts(), more=more, **{**sizes, **settings}
    )


CASES = {
    ("SFT", ""): (sft, {}),
    ("SFT", "packing"): (sft, {"packing": True, "max_length": 60}),
    ("SFT", "completion only"): (sft, {"rows": r.completions}),
    ("SFT", "assistant only"): (sft, {"rows": r.chats, "assistant_only_loss": True}),
    ("SFT", "LoRA"): (sft, {"rank": 4, "learning_rate": 0.2}),
    ("SFT", "loss_type dft"): (sft, {"loss_type": "dft", "learning_rate": 10_000.0}),
    ("DPO", ""): (dpo, {"learning_rate": 0.1}),
    ("DPO", "use_weighting"): (dpo, {"use_weighting": True, "learning_rate": 2.0}),
    ("KTO", ""): (kto, {}),
    ("RLOO", ""): (rloo, {"learning_rate": 0.2}),
    ("GRPO", ""): (grpo, {}),
    ("GRPO", "beta, entropy mask"): (grpo, {"beta": 0.1, "top_entropy_quantile": 0.5}),
    ("GRPO", "cast_lm_head_to_fp32"): (grpo, {"cast_lm_head_to_fp32": True}),
    ("Distillation", "beta 0"): (distillation, {"beta": 0.0}),
    ("Distillation", "beta 0.5"): (distillation, {"beta": 0.5, "learning_rate": 10.0}),
    ("Distillation", "beta 1"): (distillation, {"beta": 1.0}),
}


# Sums of log-probabilities are terms of these losses: 40 words of some 11 nats, times beta.
SCALES = {"DPO": 44.0, "KTO": 44.0, "RLOO": 22.0}


@pytest.mark.parametrize("trainer, setting", CASES)
def test_same_training(tmp_path, trainer, setting):
    make, settings = CASES[trainer, setting]

    def build(wrapped, folder):
        if wrapped:
            integration.install(options=t.OPTIONS)
        return make(folder, **settings)

    t.compare(build, tmp_path, r.TOKENS, t.Row(PACKAGE, trainer, setting, "trl.install"), SCALES.get(trainer, 1.0))


def test_lora_on_the_head(tmp_path, monkeypatch):
    """TRL refuses it, because its own head would not see it: whole logits are what it is compared with."""
    settings = {"rank": 4, "targets": ("q_proj", "lm_head"), "learning_rate": 0.05}
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        sft(tmp_path / "refused", **settings)

    def build(wrapped, folder):
        if wrapped:
            monkeypatch.undo()
            integration.install(options=t.OPTIONS)
        else:
            monkeypatch.setattr(trl.trainer.sft_trainer, "BaseTunerLayer", ())
            monkeypatch.setattr(trl.trainer.sft_trainer, "add_fused_lm_head", r.add_whole_logits)
        return sft(folder, **settings)

    ours, _ = t.compare(build, tmp_path, r.TOKENS, t.Row(PACKAGE, "SFT", "LoRA on the head", "trl.install"))
    assert any("lm_head.lora_A" in name for name in ours.parameters)


def test_label_smoothing(tmp_path):
    """Beside TRL in float64: its sums of 50,000 log-probabilities are off by more than 1e-6 in fp32."""

    def build(wrapped, folder):
        if wrapped:
            integration.install(options=t.OPTIONS)
        model = t.new_model() if wrapped else t.new_model().double()
        rows = r.completions()
        return r.build(trl.SFTTrainer, trl.SFTConfig, folder, rows, model=model, label_smoothing_factor=0.1)

    plain, ours = (t.outcome(build, wrapped, tmp_path / str(wrapped)) for wrapped in (False, True))
    for log in (*plain.logs, *ours.logs):
        del log["grad_norm"]  # a sum of 1.6 million squares, which torch takes in the gradients' dtype
    t.assert_same(ours, plain)
    t.assert_small(ours, r.TOKENS, plain=plain)
    assert not ours.warnings
    plain = plain._replace(largest=plain.largest // 2)  # as in fp32
    t.record(ours, plain, r.TOKENS, t.Row(PACKAGE, "SFT", "label smoothing", "trl.install"))


def test_a_reward_model_has_no_head(tmp_path):
    def build(wrapped, folder):
        if wrapped:
            integration.install(options=t.OPTIONS)
        config = t.new_model().config
        config.num_labels = 1
        t.torch.manual_seed(0)
        model = t.transformers.LlamaForSequenceClassification(config)
        return r.build(trl.RewardTrainer, trl.RewardConfig, folder, r.preferences(), model=model)

    plain, ours = (t.outcome(build, wrapped, tmp_path / str(wrapped)) for wrapped in (False, True))
    t.assert_same(ours, plain)
    assert not ours.warnings and ours.largest == plain.largest


def test_a_trainer_outlives_uninstall(tmp_path):
    """And a divergence that is not the same from both sides."""

    def build(wrapped, folder):
        if wrapped:
            integration.install(options=t.OPTIONS)
        trainer = distillation(folder, beta=0.3, learning_rate=10.0)
        integration.uninstall()
        return trainer

    t.compare(build, tmp_path, r.TOKENS)


def test_distillation_without_a_teachers_head(tmp_path):
    """No teacher, as where a server has it, is nothing to `install`; a head that is left to TRL has no adapter."""
    integration.install()
    rows = r.prompts()
    trainer = r.build(trl.DistillationTrainer, trl.DistillationConfig, tmp_path, rows, max_completion_length=4)
    assert not isinstance(trainer.model.lm_head, LMHead)

    class Head(t.torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    peft = pytest.importorskip("peft")
    teacher = t.new_model()
    teacher.lm_head.__class__ = Head
    more = {"teacher_model": teacher, "peft_config": peft.LoraConfig(target_modules=["lm_head"])}
    with pytest.warns(UserWarning, match="left to TRL's own"), pytest.raises(ValueError, match="leave out the adapter"):
        r.build(trl.DistillationTrainer, trl.DistillationConfig, tmp_path, rows, more=more, max_completion_length=4)


def test_terms_need_a_cross_entropy(tmp_path):
    integration.install(z_loss=1e-4)
    with pytest.raises(ValueError, match=r"z_loss.* need SFTConfig\(loss_type='nll'\).*'dft'"):
        sft(tmp_path, loss_type="dft")
