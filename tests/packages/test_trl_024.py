"""TRL 0.24, which takes logits from the model, with `LMHead.wrap` alone: three steps of its trainers."""

import functools

import pytest
import torch

from chunked_ce import LMHead
from tests.packages import trainings as t

trl = pytest.importorskip("trl")
if not trl.__version__.startswith("0.24."):
    pytest.skip(f"TRL {trl.__version__} has a fused head of its own", allow_module_level=True)
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.timeout(900)

WORDS, COMPLETION = 100, 60  # of the longest sequence, of what a model says itself
BATCH = t.ARGUMENTS["per_device_train_batch_size"]
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": BATCH}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", "init_lora_weights": False}
# Steps that change parameters, but do not blow up the rounding of one step in the next.
RATES = {
    "SFT": 0.5,
    "GKD": 5.0,
    "DPO": 0.05,
    "ORPO": 0.1,
    "CPO": 0.05,
    "KTO": 0.5,
    "BCO": 0.1,
    "GRPO": 0.5,
    "RLOO": 0.05,
}
# These losses add up log-probabilities of whole sequences, some 800 of a sequence.
SCALES = dict.fromkeys(["DPO", "CPO", "KTO", "BCO", "OnlineDPO", "XPO"], 100.0)
GENERATING = ("GRPO", "RLOO", "OnlineDPO", "XPO")

new_tokenizer = functools.cache(t.new_tokenizer)


def new_model(wrapped, **changes):
    # A reference model and a generating one are in evaluation mode, and nobody needs their logits.
    model = t.new_model(**changes)
    return LMHead.wrap(model, options=t.OPTIONS, lazy="always") if wrapped else model


def build(wrapped, folder, kind, rows, settings, dtype=torch.float32, **keywords):
    """``trl.<kind>Trainer`` of a wrapped or plain model, with ``settings`` for its config."""
    model, tokenizer = new_model(wrapped).to(dtype), new_tokenizer()
    tokenizer.padding_side = "left" if kind in GENERATING else "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if kind in ("GRPO", "RLOO"):  # their reference model is read from a folder
        model.save_pretrained(folder / "model")
        model.config._name_or_path = str(folder / "model")
    arguments = t.ARGUMENTS | {"learning_rate": RATES.get(kind, 0.05)} | settings
    config = getattr(trl, f"{kind}Config")(str(folder), **arguments)
    rows = datasets.Dataset.from_list(rows)
    if "eval_strategy" in settings:
        keywords["eval_dataset"] = rows.select(range(BATCH))
    for name in keywords.keys() & {"ref_model", "teacher_model"}:
        keywords[name] = keywords[name](wrapped)
    trainer = getattr(trl, f"{kind}Trainer")
    trainer = trainer(model, args=config, train_dataset=rows, processing_class=tokenizer, **keywords)
    if wrapped and kind in ("GRPO", "RLOO") and trainer.ref_model is not None:
        LMHead.wrap(trainer.ref_model, options=t.OPTIONS, lazy="always")
    return trainer


def check(folder, setting, kind, rows, tokens, settings=None, exact=False, **keywords):
    """The same training as without; with ``exact`` as in float64, where fp32 is not good enough to compare with."""

    def make(wrapped, folder, dtype=torch.float32):
        return build(wrapped, folder, kind, rows, settings or {}, dtype, **keywords)

    plain = t.outcome(make, False, folder / "plain")
    ours = t.outcome(make, True, folder / "ours")
    right = t.outcome(functools.partial(make, dtype=torch.float64), False, folder / "exact") if exact else plain
    t.assert_same(ours, right, scale=SCALES.get(kind, 1.0))
    t.assert_small(ours, tokens, plain=plain)
    assert not ours.warnings
    t.record(ours, plain, tokens, t.Row("TRL 0.24.0", f"{kind}Trainer", setting, "LMHead.wrap"))
    return ours


# ---- data ----


def texts():
    return [{"text": passage} for passage in t.passages(12, WORDS)]


def questions():
    found = [passage.split() for passage in t.passages(12, WORDS)]
    return [{"prompt": " ".join(words[:20]), "completion": " " + " ".join(words[20:])} for words in found]


def conversations():
    says = [(one["prompt"], one["completion"].strip()) for one in questions()]
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, two, strict=True)]} for two in says
    ]


def pairs():
    """Completions of the same prompt, of different lengths."""
    rows = questions()
    both = zip(rows, rows[1:] + rows[:1], strict=True)
    return [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]} for a, b in both]


def judged():
    return [one | {"label": number % 2 == 0} for number, one in enumerate(questions())]


# ---- supervised ----

SFT = {
    "text": (texts, {}),
    "packing": (texts, {"packing": True, "max_length": WORDS}),
    "packing, wrapped": (texts, {"packing": True, "packing_strategy": "wrapped", "max_length": WORDS}),
    "completion only": (questions, {}),
    "assistant only": (conversations, {"assistant_only_loss": True}),
    "DFT loss": (questions, {"loss_type": "dft", "learning_rate": 20_000.0}),
    "evaluation": (questions, EVALUATION),
}


@pytest.mark.parametrize("setting", SFT)
def test_sft(tmp_path, setting):
    rows, settings = SFT[setting]
    check(tmp_path, setting, "SFT", rows(), BATCH * WORDS, settings)


def test_sft_with_label_smoothing(tmp_path):
    """The plain training's sums over all log-probabilities in fp32 are two hundred times less exact."""
    settings = {"label_smoothing_factor": 0.1}
    check(tmp_path, "label smoothing", "SFT", questions(), BATCH * WORDS, settings, exact=True)


@pytest.mark.parametrize(
    "setting, modules", [("LoRA", ["q_proj", "v_proj"]), ("LoRA on the head", ["q_proj", "lm_head"])]
)
def test_sft_with_lora(tmp_path, setting, modules):
    adapter = peft.LoraConfig(target_modules=modules, **LORA)
    check(tmp_path, setting, "SFT", questions(), BATCH * WORDS, {"learning_rate": 0.1}, peft_config=adapter)


# ---- preferences ----

PAIRED = {"per_device_train_batch_size": BATCH // 2}
DPO = {
    "": {},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "sigmoid and sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    "rpo_alpha": {"rpo_alpha": 1.0},
    "ld_alpha": {"ld_alpha": 0.5},
    "label smoothing": {"label_smoothing": 0.1},
    "use_weighting": {"use_weighting": True, "learning_rate": 0.3},
    "use_logits_to_keep": {"use_logits_to_keep": True},
    "reference_free": {"reference_free": True},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "padding_free": {"padding_free": True},
    "evaluation": EVALUATION,
}
OTHERS = {
    "ORPO": {"": {}, "evaluation": EVALUATION},
    "CPO": {
        "": {},
        "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "learning_rate": 2.0},
        "hinge": {"loss_type": "hinge"},
        "ipo": {"loss_type": "ipo"},
        "evaluation": EVALUATION,
    },
    "KTO": {"": {}, "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"}, "evaluation": EVALUATION},
    "BCO": {"": {}, "evaluation": EVALUATION},
}


@pytest.mark.parametrize("setting", DPO)
def test_dpo(tmp_path, setting):
    check(tmp_path, setting, "DPO", pairs(), BATCH * WORDS, PAIRED | DPO[setting])


@pytest.mark.parametrize("kind, setting", [(kind, setting) for kind in OTHERS for setting in OTHERS[kind]])
def test_other_preferences(tmp_path, kind, setting):
    rows, settings = (pairs(), PAIRED) if kind in ("ORPO", "CPO") else (judged(), {})
    check(tmp_path, setting, kind, rows, BATCH * WORDS, settings | OTHERS[kind][setting])


# ---- distillation ----


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd(tmp_path, beta):
    settings = {"beta": beta, "lmbda": 0.0, "max_length": WORDS}
    teacher = functools.partial(new_model, hidden_size=24)
    check(tmp_path, f"beta {beta}", "GKD", conversations(), BATCH * WORDS, settings, teacher_model=teacher)


# ---- reinforcement ----


def rewards(completions, **_):
    return [len(completion) % 17 / 17 for completion in completions]


ROLLOUT = {"num_generations": 4, "max_completion_length": COMPLETION, "temperature": 0.9, "beta": 0.04}
GRPO = {
    "": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "sequence importance": {"importance_sampling_level": "sequence"},
    "top_entropy_quantile": {"top_entropy_quantile": 0.2},
    "two iterations": {"num_iterations": 2, "steps_per_generation": 1},
    "beta 0": {"beta": 0.0},
    "evaluation": EVALUATION,
}
RLOO = {"": {}, "two iterations": {"num_iterations": 2, "steps_per_generation": 1}}
OF_POLICIES = [("GRPO", setting) for setting in GRPO] + [("RLOO", setting) for setting in RLOO]


@pytest.mark.parametrize("kind, setting", OF_POLICIES)
def test_policies(tmp_path, kind, setting):
    settings = ROLLOUT | {"GRPO": GRPO, "RLOO": RLOO}[kind][setting]
    ours = check(tmp_path, setting, kind, questions(), BATCH * COMPLETION, settings, reward_funcs=rewards)
    deviations = [log["reward_std"] for log in ours.logs if "reward_std" in log]  # of each generation
    assert deviations and min(deviations) > 0


def longer_text():
    class Judge(trl.BasePairwiseJudge):
        def judge(self, prompts, completions, **_):
            return [float(len(first) < len(second)) for first, second in completions]

    return Judge()


# NashMD is the same too, but it samples from a mixture of two models whose logits it computes for all tokens.
@pytest.mark.parametrize("kind", ["OnlineDPO", "XPO"])
def test_online(tmp_path, kind):
    settings = PAIRED | {"max_new_tokens": COMPLETION, "max_length": 2 * WORDS}
    reference = {} if kind == "OnlineDPO" else {"ref_model": new_model}
    check(tmp_path, "", kind, questions(), BATCH * COMPLETION, settings, judge=longer_text(), **reference)
