"""``chunked-ce plan``: the verdict on a run, its terms beside published numbers, and the smallest changes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunked_ce import torch_stand_in
from chunked_ce.cli import arguments, implementations, main
from chunked_ce.cli.model_shapes import MODELS, ModelShape, read_config
from chunked_ce.cli.planning import Run, estimate, paths_of, verdict
from chunked_ce.cli.planning.activations import layer_bytes
from chunked_ce.cli.planning.changes import smallest_changes
from chunked_ce.cli.planning.state import state_of
from chunked_ce.plan import predict_memory
from chunked_ce.sharded.costs import predict_sharded_memory

GIB = 2**30
LLAMA = MODELS["llama-3-8b"]
SFT = Run(LLAMA, tokens=8192)
EIGHT = dataclasses.replace(SFT, data=8, engine="zero3")


def ended(capsys, *words):
    """Exit code, output and error output."""
    with pytest.raises(SystemExit) as ending:
        main(["plan", *map(str, words)])
    printed = capsys.readouterr()
    return ending.value.code, printed.out, printed.err


# ---- shapes ----


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwen-2.5-7b", 7_615_616_512),
        ("qwen-3-8b", 8_190_735_360),
        ("qwen-3-30b-a3b", 30_532_122_624),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-3-1b", 999_885_952),
        ("mistral-7b", 7_248_023_552),
        ("mixtral-8x7b", 46_702_792_704),
        ("phi-4", 14_659_507_200),
        ("deepseek-v3", 671_026_404_352),
    ],
)
def test_parameters_are_the_published_ones(name, published):
    assert MODELS[name].parameters == published


@pytest.mark.parametrize(
    ("name", "more", "allowed"),
    [
        ("Qwen3", {"head_dim": 16}, 0.01),
        pytest.param("Llama", {}, 0.01, marks=pytest.mark.thorough),
        pytest.param("Qwen2", {}, 0.01, marks=pytest.mark.thorough),
        pytest.param("Gemma3Text", {"head_dim": 16}, 0.12, marks=pytest.mark.thorough),
        pytest.param("Phi3", {"pad_token_id": 0}, 0.125, marks=pytest.mark.thorough),
        pytest.param("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 0.02, marks=pytest.mark.thorough),
    ],
)
def test_configurations_of_transformers(name, more, allowed, tmp_path):
    """Parameters and kept activations are those of the real classes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    kept = []
    for layers in (1, 2):
        config_class = getattr(transformers, f"{name}Config")
        config = config_class(num_hidden_layers=layers, vocab_size=96, use_cache=False, **sizes, **more)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        config.save_pretrained(tmp_path)
        shape = read_config(tmp_path / "config.json")
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        kept.append(kept_bytes(model, tokens=128))
    run = Run(shape, tokens=128, dtype="fp32")
    assert (kept[1] - kept[0]) / 128 == pytest.approx(layer_bytes(run), rel=allowed)


@pytest.mark.parametrize(
    ("name", "allowed"), [("Falcon", 1e-4), ("Mpt", 1e-4), ("CodeGen", 1e-3), ("Persimmon", 1e-4), ("GPTBigCode", 0.01)]
)
def test_families_with_their_own_layers(name, allowed, tmp_path):
    """One head of keys, MLPs of two matrices, heads that are the embedding though the file does not say so."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")()
    config.save_pretrained(tmp_path)
    shape = read_config(tmp_path / "config.json")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape.layers
    assert shape.parameters == pytest.approx(sum(one.numel() for one in model.parameters()), rel=allowed)


@pytest.mark.parametrize(
    "more",
    [{"layer_types": ["linear_attention", "full_attention"]}, {"mamba_d_state": 16}, {"attn_layer_period": 8}],
    ids=["kinds of layers", "states", "a period"],
)
def test_layers_without_attention_are_not_planned(more, tmp_path, capsys):
    sizes = {"hidden_size": 64, "vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sizes | more))
    assert read_config(path) == ModelShape(str(path), str(path), 64, 96)
    _, out, _ = ended(capsys, "--config", path, "--memory", "8GiB")
    assert out.startswith("Fits: head and loss alone take ")


def test_no_experts(tmp_path):
    """Hybrid families' dense models have 0 of them."""
    sizes = {"hidden_size": 64, "vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_local_experts": 0, "num_experts_per_tok": 0}))
    shape = read_config(tmp_path / "config.json")
    assert (shape.layers, shape.experts, shape.active_experts) == (2, 0, 0)


def kept_bytes(model, tokens):
    """Bytes that the layers keep for their backward, besides parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=torch.randint(96, (1, tokens)))
    sizes = {at: tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in parameters}
    assert output.last_hidden_state.shape[1] == tokens
    return sum(sizes.values())


def test_a_size_in_place_of_the_models_is_named(capsys):
    code, out, _ = ended(capsys, "--model", "llama-3-8b", "--vocab", 1000, "--memory", "800GiB", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["request"]["vocab"] == 1000
    assert found["request"]["head"] == "llama-3-8b with vocab 1,000"


# ---- terms ----


def test_state_is_that_of_the_zero_paper():
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB each."""
    shape = ModelShape("paper", "paper", hidden=1, vocab=7_500_000_000 // 2, layers=1)
    billions = dataclasses.replace(shape, vocab=7_500_000_000)
    run = Run(billions, tokens=1, data=64, engine="ddp")
    for engine, published in (("ddp", 240), ("zero1", 62.8), ("zero2", 33.2), ("zero3", 3.75)):
        found = state_of(dataclasses.replace(run, engine=engine), "forward", "only")
        assert found.total / 1e9 == pytest.approx(published, rel=0.02)  # twice: embedding and head


@pytest.mark.parametrize(
    ("changes", "per_parameter"),
    [
        ({}, 16),
        ({"precision": "pure"}, 8),
        ({"precision": "autocast"}, 16),
        ({"dtype": "fp32"}, 16),
        ({"engine": "fsdp", "data": 2}, 8),
        ({"optimizer": "sgd"}, 8),
        ({"optimizer": "none"}, 4),
        ({"optimizer": "adamw-8bit"}, 10.03),
        ({"optimizer": "adafactor"}, 8.0),
    ],
    ids=str,
)
def test_state_per_parameter(changes, per_parameter):
    found = state_of(dataclasses.replace(SFT, **changes), "forward", "only")
    assert found.total / LLAMA.parameters == pytest.approx(per_parameter, rel=0.005)


def test_lora_trains_its_adapters_alone():
    run = dataclasses.replace(SFT, lora=16)
    # peft's own count for rank 16 on q, k, v, o, gate, up and down of Llama-3-8B
    assert run.trained == run.adapter_parameters == 41_943_040
    found = state_of(run, "forward", "only")
    assert found.weights == 2 * (LLAMA.parameters + run.trained)
    assert found.gradients == 2 * run.trained
    assert "head_grad" not in estimate(run, "forward").loss_terms


def test_the_loss_is_the_memory_laws():
    shape = 8192, 128256, 4096
    law = predict_memory(*shape, dtype=torch.bfloat16, device_type="cuda")
    assert estimate(SFT, "forward").loss == law.peak
    assert estimate(SFT, "full").loss == 12 * 8192 * 128256
    assert estimate(SFT, "compiled").loss < law.peak
    own = predict_sharded_memory(*shape, ranks=8, dtype=torch.bfloat16, device_type="cuda")
    assert estimate(EIGHT, "sharded").loss == own.peak
    shared = predict_memory(*shape, dtype=torch.bfloat16, device_type="cuda", ranks=8)
    assert estimate(dataclasses.replace(SFT, tensor=8), "forward").loss == shared.peak


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({}, "full compiled forward backward filtered"),
        ({"data": 8, "engine": "zero3"}, "full compiled forward backward filtered sharded"),
        ({"trainer": "dpo"}, "full backward"),
        ({"trainer": "grpo"}, "full compiled forward backward filtered"),
        ({"trainer": "distill", "teacher_hidden": 8192}, "full forward backward"),
        ({"tensor": 8}, "full forward backward filtered"),
        ({"lora": 8, "data": 2, "engine": "ddp"}, "full compiled forward backward filtered"),
    ],
    ids=str,
)
def test_paths_of_trainers(changes, paths):
    assert paths_of(dataclasses.replace(SFT, **changes)) == tuple(paths.split())


def test_trainers_add_their_models_and_tokens():
    weights = 2 * LLAMA.parameters
    plain = estimate(SFT, "backward")
    pairs = estimate(dataclasses.replace(SFT, trainer="dpo"), "backward")
    assert pairs.terms["frozen_model"].bytes == weights
    assert pairs.terms["activations"].bytes == 2 * plain.terms["activations"].bytes
    assert "frozen_model" not in estimate(dataclasses.replace(SFT, trainer="dpo", lora=8), "backward").terms
    teacher = dataclasses.replace(SFT, trainer="distill", other_model=MODELS["llama-3-70b"])
    assert estimate(teacher, "forward").terms["frozen_model"].bytes == 2 * MODELS["llama-3-70b"].parameters
    assert estimate(teacher, "forward").loss > plain.loss
    policy = dataclasses.replace(SFT, trainer="grpo", other_model=MODELS["llama-3.2-1b"])
    assert estimate(policy, "forward").terms["frozen_model"].bytes == 2 * MODELS["llama-3.2-1b"].parameters


def test_terms_scale_as_they_should():
    """Activations with tokens, state with ranks, layers with pipeline stages."""
    base = estimate(EIGHT, "forward")
    longer = estimate(dataclasses.replace(EIGHT, tokens=2 * 8192), "forward")
    assert longer.state == base.state
    assert longer.terms["activations"].bytes == pytest.approx(2 * base.terms["activations"].bytes)
    split = estimate(dataclasses.replace(EIGHT, sequence=2), "forward")
    assert split.terms["activations"].bytes == pytest.approx(base.terms["activations"].bytes / 2)
    kept = [
        estimate(dataclasses.replace(EIGHT, checkpointing=kind), "forward").terms["activations"].bytes
        for kind in ("none", "selective", "full")
    ]
    assert kept[0] > 1.5 * kept[1] > 5 * kept[2]
    staged = dataclasses.replace(SFT, pipeline=4, accumulation=8)
    assert estimate(staged, "forward").stage == "first"  # with the activations of four micro-batches
    assert estimate(staged, "forward").state.total < estimate(SFT, "forward").state.total / 2


def test_moments():
    """Without checkpointing memory is largest at the loss, with few tokens at the end of the backward."""
    assert estimate(SFT, "full").moment == "loss"
    few = estimate(dataclasses.replace(SFT, tokens=64), "forward")
    assert few.moment == "end"
    assert few.terms["gradients"].bytes == few.state.gradients
    held = dataclasses.replace(SFT, accumulation=4)
    assert estimate(held, "full").terms["gradients"].bytes == few.state.gradients


# ---- verdicts ----


def test_llama_does_not_fit_on_one_card(capsys):
    code, out, _ = ended(capsys, "--model", "llama-3-8b", "--tokens", 8192, "--memory", "80GiB")
    assert code == 1
    first = out.splitlines()[0]
    assert first.startswith("Does not fit: ") and " of 80.00 GiB per rank; " in first
    assert first.endswith("weights, gradients and AdamW's state alone take 119.66 GiB.")
    assert "The smallest change that makes it fit: " in out.splitlines()[1]
    assert len(out.splitlines()) < 30


def test_llama_fits_on_eight_cards_with_zero_3(capsys):
    more = ["--gpus", 8, "--zero", 3]
    code, out, _ = ended(capsys, "--model", "llama-3-8b", "--tokens", 8192, "--memory", "80GiB", *more)
    assert code == 0
    assert out.startswith("Fits: ")
    assert "with full logits" in out.splitlines()[0]
    assert "linear_cross_entropy(hidden, lm_head.weight, target)" in out
    assert "8 ranks (data 8), ZeRO-3" in out


def test_the_document_has_everything(capsys):
    code, out, _ = ended(capsys, "--model", "llama-3-8b", "--memory", "80GiB", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["fits"] is False
    assert set(found["paths"]) == {"full", "compiled", "forward", "backward", "filtered"}
    for path in found["paths"].values():
        assert path["total"] == sum(term["bytes"] for term in path["terms"].values())
        assert path["total"] == max(sum(terms.values()) for terms in path["moments"].values())
    assert all(change["total"] <= 80 * GIB for change in found["changes"])
    assert found["run"]["parameters"] == LLAMA.parameters


@pytest.mark.parametrize("path", paths_of(EIGHT))
def test_the_longest_sequence_fits_and_a_longer_one_does_not(path):
    found = verdict(EIGHT, 80 * GIB)
    most = found.largest_tokens[path]
    assert estimate(dataclasses.replace(EIGHT, tokens=most), path).total <= 80 * GIB
    assert estimate(dataclasses.replace(EIGHT, tokens=most + 1), path).total > 80 * GIB


def test_sequences_and_batches(capsys):
    sizes = ["--sequence-length", 1024, "--batch", 4, "--memory", "800GiB", "--json"]
    _, out, _ = ended(capsys, "--model", "llama-3-8b", *sizes)
    path = json.loads(out)["paths"]["forward"]
    assert json.loads(out)["run"]["tokens"] == 4096
    assert path["longest_sequence"] == path["largest_tokens"] // 4
    assert path["largest_batch"] == path["largest_tokens"] // 1024


def test_auto_takes_the_fastest_exact_path_that_fits():
    totals = {path: estimate(EIGHT, path).total for path in paths_of(EIGHT)}
    assert totals["backward"] < totals["forward"]
    assert verdict(EIGHT, totals["forward"]).path == "forward"
    assert verdict(EIGHT, totals["backward"]).path == "backward"
    short = verdict(EIGHT, totals["sharded"])
    assert not short.fits
    assert short.changes[0].path == "sharded" and short.changes[0].arguments == "--loss sharded"
    assert verdict(EIGHT, totals["backward"], "full").changes[0].path == "backward"


def test_the_smallest_change_comes_first():
    """Checkpointing before a ZeRO stage, that before LoRA, that before more ranks; each fits."""
    ddp = dataclasses.replace(SFT, data=8, engine="ddp")
    kinds = [change.kinds[-1] for change in smallest_changes(ddp, "forward", 80 * GIB)]
    assert kinds == ["engine", "lora"]
    large = Run(MODELS["llama-3-70b"], tokens=8192, data=8, engine="zero3", checkpointing="full", trainer="plain")
    (more,) = smallest_changes(large, "forward", 80 * GIB)
    assert more.words == ("16 GPUs",) and more.run.ranks == 16
    for change in smallest_changes(SFT, "forward", 80 * GIB):
        assert estimate(change.run, change.path).total == change.total <= 80 * GIB
    assert smallest_changes(SFT, "forward", GIB) == []


def test_a_budget_is_for_the_loss_alone(capsys):
    code, out, _ = ended(capsys, "--model", "llama-3-8b", "--tokens", 8192, "--budget", "3GiB")
    assert code == 0
    assert out.startswith("Fits: the loss takes 2.15 GiB of 3.00 GiB")
    assert "weights" not in out.split("GiB per rank")[1].split("~")[0]


def test_the_first_tensor_parallel_size_that_fits(capsys):
    sizes = ["--model", "llama-3-8b", "--checkpointing", "full", "--memory", "80GiB", "--json"]
    code, out, _ = ended(capsys, *sizes, "--tp", 1, 2, 4)
    assert code == 0
    assert json.loads(out)["run"]["tensor"] == 2
    code, out, _ = ended(capsys, *sizes, "--tp", 1)
    assert code == 1


# ---- arguments ----


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        ("--model llama-3-8b --memory 80", "Write 80GiB"),
        ("--model llama-3-8b --memory 80K", "at least 1MiB"),
        ("--model llama-3-8b --tp 100000", "1, 2, 4, 8, 16, 32"),
        ("--hidden 64 --vocab 100 --tp 101", "at most the 100 rows"),
        ("--model llama-3-8b --tp 3", "--tp must divide"),
        ("--model llama-3-8b --gpus 8 --pp 3", "multiple of"),
        ("--model llama-3-8b --gpus 8 --dp 4", "--gpus must be --dp (4)"),
        ("--model llama-3-8b --engine none --dp 2", "ddp, zero1-3 or fsdp"),
        ("--model llama-3-8b --engine fsdp --zero 1", "contradict"),
        ("--model llama-3-8b --pp 33", "at most the 32 layers"),
        ("--model llama-3-8b --trainer distill", "--teacher-model"),
        ("--model llama-3-8b --trainer dpo --teacher-model gpt2", "--trainer distill"),
        ("--model llama-3-8b --reference-model gpt2", "dpo or grpo"),
        ("--model llama-3-8b --trainer dpo --lora 8 --reference-model gpt2", "without adapters"),
        ("--model llama-3-8b --tokens 100 --batch 3", "--batch must divide"),
        ("--model llama-3-8b --tokens 100 --sequence-length 30", "multiple of --sequence-length"),
        ("--model llama-3-8b --budget 1GiB --memory 80GiB", "use one of them"),
        ("--model llama-3-8b --loss sharded", "auto, full"),
        ("--model llama-3-8b --lora 8 --frozen-input", "use one of them"),
        ("--model llama-3-8b --zero 3", "--zero 3 divides states among data-parallel ranks, of which there is 1"),
        ("--model llama-3-8b --gpus 4 --tp 4 --engine fsdp", "there is 1: give --gpus"),
        ("--model llama-3-8b --kv-heads 7", "must divide the 32 attention heads"),
        ("--model llama-3-8b --teacher-model qwen-3-8b", "say so with --vocab 128256"),
        ("--model llama-3-8b --teacher-model llama-2-7b", "must have the 128256 vocabulary entries"),
        ("--model gpt2 --device cpu --verify --html plan.html", "--html is of a plan"),
        ("--model gpt2 --device cpu --verify --details", "--details is of a plan"),
        ("--hidden 64 --vocab 100 --heads 4", "--heads needs --layers"),
        ("--hidden 64 --vocab 100 --checkpointing full", "needs a model with layers"),
    ],
)
def test_contradictions(words, allowed, capsys):
    code, out, error = ended(capsys, *words.split())
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert allowed in error


def test_a_new_folder_is_told(tmp_path, capsys):
    words = "--hidden", 64, "--vocab", 100, "--memory", "8GiB"
    _, _, error = ended(capsys, *words, "--json", tmp_path / "new" / "plan.json")
    assert f"made the folder {tmp_path / 'new'}" in error.replace("\n", "")
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["fits"]
    assert ended(capsys, *words, "--json", tmp_path / "new" / "plan.json")[2] == ""


def test_numbers_in_words(capsys):
    """Weights in fp32 have no master weights, nor have those without an optimizer."""
    words = "--model", "gpt2", "--memory", "8GiB", "--tokens", 64
    assert ", bf16, fp32 master weights, adamw;" in ended(capsys, *words)[1]
    assert ", fp32, adamw;" in ended(capsys, *words, "--dtype", "fp32")[1]
    assert ", bf16, no optimizer;" in ended(capsys, *words, "--optimizer", "none")[1]


@pytest.mark.parametrize("words", ["--hidden 64 --vocab 100", "--model gpt2 --frozen-input"])
def test_hidden_states_of_the_head_count(words, capsys):
    _, out, _ = ended(capsys, *words.split(), "--memory", "8GiB", "--tokens", "1000", "--json")
    found = json.loads(out)
    assert found["paths"]["forward"]["terms"]["activations"]["bytes"] == 1000 * found["request"]["hidden"] * 2


def test_sizes_of_a_model(capsys):
    words = "--hidden 2048 --vocab 32000 --layers 24 --heads 16 --kv-heads 4 --intermediate 5632 --tied"
    _, out, _ = ended(capsys, *words.split(), "--memory", "80GiB", "--json")
    per_layer = 2048 * (2 * 2048 + 2 * 4 * 128) + 3 * 2048 * 5632 + 2 * 2048
    assert json.loads(out)["run"]["parameters"] == 24 * per_layer + 2048 + 32000 * 2048


# ---- without torch ----

SCRIPT = """
import sys
from chunked_ce_command import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "numpy", "matplotlib", "transformers") if name in sys.modules]
    print("imported", heavy, file=sys.stderr)
"""


def script(*words, **more):
    command = [sys.executable, "-c", SCRIPT, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **more)


def test_a_plan_imports_no_torch_and_says_the_same(capsys):
    words = ["plan", "--model", "llama-3-8b", "--memory", "80GiB", "--gpus", "8", "--zero", "3", "--json"]
    done = script(*words)
    assert (done.returncode, done.stderr) == (0, "imported []\n")
    if torch.cuda.is_available() or not Path(sys.executable).exists():
        return
    _, out, _ = ended(capsys, *words[1:])
    pytest.importorskip("triton")  # without it the law of this process has no row kernels of Triton
    assert json.loads(done.stdout) == json.loads(out)


def test_other_commands_import_the_library():
    code = """
import sys
import chunked_ce_command
chunked_ce_command.is_light = True
from chunked_ce.cli import load_library
from chunked_ce.cli.arguments import parser
parser()
assert "torch" not in sys.modules
load_library()
from chunked_ce import linear_cross_entropy
from chunked_ce.plan import torch
assert torch.__name__ == "torch"
"""
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


def test_the_stand_in_computes_as_torch_does():
    names = ("float64", "float32", "bfloat16", "float16")
    for first in names:
        one, light = getattr(torch, first), getattr(torch_stand_in, first)
        assert (repr(one), one.itemsize) == (repr(light), light.itemsize)
        assert torch.finfo(one).eps == torch_stand_in.finfo(light).eps
        for second in names:
            promoted = torch.promote_types(one, getattr(torch, second))
            assert repr(torch_stand_in.promote_types(light, getattr(torch_stand_in, second))) == repr(promoted)


def test_arguments_name_what_the_library_has():
    assert implementations.KINDS == arguments.KINDS
    assert tuple(implementations.DTYPES) == arguments.DTYPE_NAMES
