"""The page of ``chunked-ce plan --html`` shows the numbers of the planner, wherever its controls stand."""

import dataclasses
import itertools
import json
import re
import shlex

import pytest

from chunked_ce.cli import calculator, main
from chunked_ce.cli.arguments import parser
from chunked_ce.cli.calculator import save_calculator, tables
from chunked_ce.cli.model_shapes import MODELS
from chunked_ce.cli.planning import Run, estimate, paths_of, verdict
from chunked_ce.cli.planning.requests import runs_of
from chunked_ce.cli.units import GIB, bytes_text
from tests.browser import needs_browser, opened

RUN = Run(MODELS["llama-3-8b"], tokens=6000, data=8, engine="zero3")
WORDS = ["plan", "--model", "llama-3-8b", "--tokens", "6000", "--gpus", "8", "--zero", "3", "--html", "plan.html"]
MEMORY = 80 * GIB


@pytest.fixture(scope="module")
def plan():
    return tables(RUN, MEMORY, "forward", WORDS)


def terms_at(plan, path, **position):
    """Terms by label at a position of the controls, as the page looks them up; None if there are none."""
    row = 0
    for name, stops in plan["axes"].items():
        row = row * len(stops) + stops.index(position[name])
    found = plan["rows"][row][plan["paths"].index(path)]
    if found is None:
        return None
    pairs = itertools.batched(found, 2) if hasattr(itertools, "batched") else zip(found[::2], found[1::2], strict=True)
    return {plan["terms"][term]: tuple(plan["values"][value]) for term, value in pairs}


@pytest.mark.parametrize("path", ["full", "compiled", "forward", "backward", "filtered", "sharded"])
def test_tables_hold_what_estimate_gives(plan, path):
    positions = [
        {"tokens": 6000, "data": 8, "engine": "zero3", "checkpointing": "none", "lora": 0},
        {"tokens": 131072, "data": 128, "engine": "fsdp", "checkpointing": "full", "lora": 16},
        {"tokens": 1024, "data": 2, "engine": "zero1", "checkpointing": "selective", "lora": 0},
        {"tokens": 1024, "data": 1, "engine": "ddp", "checkpointing": "none", "lora": 0},
    ]
    for position in positions:
        engine = "none" if position["data"] == 1 else position["engine"]
        run = dataclasses.replace(RUN, **position | {"engine": engine})
        shown = terms_at(plan, path, **position)
        if path not in paths_of(run):
            assert shown is None
            continue
        expected = estimate(run, path)
        assert sum(size for size, _ in shown.values()) == expected.total
        assert list(shown.values()) == [(term.bytes, term.exact) for term in expected.terms.values()]


def test_the_page_starts_at_the_run(plan):
    start = plan["start"]
    position = {name: stops[start[name]] for name, stops in plan["axes"].items()}
    assert dataclasses.replace(RUN, **position) == RUN
    assert (plan["memories"][start["memory"]], plan["paths"][start["path"]]) == (MEMORY, "forward")


def test_the_command_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(calculator, "_TOKENS", (1024,))
    monkeypatch.setattr(calculator, "_DATA", (2,))
    page = tmp_path / "plan.html"
    words = ["--model", "llama-3-8b", "--zero", "3", "--tp", "2", "1", "--batch", "3", "--accum", "2"]
    asked = ["--tokens", "6000", "--gpus", "8", "--mem", "80GiB", "--html", str(page)]
    with pytest.raises(SystemExit):
        main(["plan", *words, *asked])
    written = json.loads(re.search(r'id="plan">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    model = dataclasses.replace(RUN.model, name="llama-3-8b")
    run = dataclasses.replace(RUN, model=model, data=4, tensor=2, batch=3, accumulation=2)
    assert written == json.loads(json.dumps(tables(run, MEMORY, "forward", ["plan", *words])))
    assert written["words"] == ["plan", "--model", "llama-3-8b", "--accum", "2"]  # the rest is what controls say


def test_the_page_needs_the_memory_of_a_device(tmp_path, capsys):
    with pytest.raises(SystemExit) as ending:
        main(["plan", "--model", "gpt2", "--budget", "1GiB", "--html", str(tmp_path / "plan.html")])
    assert ending.value.code == 2 and "--budget is for the loss alone" in capsys.readouterr().err


@needs_browser
def test_sliders_move_the_bars(tmp_path):
    """Every way's bytes, the verdict and the command, at the start and after the controls moved."""
    page = tmp_path / "plan.html"
    save_calculator(RUN, MEMORY, "forward", WORDS, page)
    with opened(page.as_uri()) as (tab, asked):

        def move(name, value):
            """As a person does: with the keys of a slider, or by choosing."""
            if tab.locator(f"#{name}").evaluate("(it) => it.tagName") == "SELECT":
                tab.select_option(f"#{name}", str(value))
                return
            tab.press(f"#{name}", "Home")
            for _ in range(value):
                tab.press(f"#{name}", "ArrowRight")

        def check(run, path, memory):
            shown = tab.eval_on_selector_all(
                "[data-path]", "(all) => all.map((it) => [it.dataset.path, Number(it.dataset.bytes), it.innerText])"
            )
            expected = {one: estimate(run, one).total for one in paths_of(run)}
            assert {one: size for one, size, _ in shown} == expected
            assert all(bytes_text(expected[one]) in text for one, _, text in shown)
            found = verdict(run, memory, path)
            text = tab.inner_text("#verdict")
            assert text.startswith("Fits" if found.fits else "Does not fit")
            assert f"{bytes_text(found.total)} of {bytes_text(memory)}" in text
            assert f"{found.total:,}" in tab.inner_text("#terms")
            # The command that the page shows plans the same run.
            arguments = parser().parse_args(shlex.split(tab.inner_text("#command"))[1:])
            assert arguments.memory == memory and arguments.loss == path
            assert [one for one in runs_of(arguments) if estimate(one, path).total == found.total]

        check(RUN, "forward", MEMORY)
        move("tokens", 7)  # 65,536, after the run's own 6,000
        check(dataclasses.replace(RUN, tokens=65536), "forward", MEMORY)
        move("checkpointing", 2)
        move("memory", 3)
        tab.click("[data-path=backward]")
        run = dataclasses.replace(RUN, tokens=65536, checkpointing="full")
        check(run, "backward", 40 * GIB)
        move("data", 0)
        assert tab.is_disabled("#engine")
        move("lora", 1)
        run = dataclasses.replace(run, data=1, engine="none", lora=16)
        check(run, "backward", 40 * GIB)

        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            for width in (390, 1200):
                tab.set_viewport_size({"width": width, "height": 900})
                assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert asked == [page.as_uri()]
