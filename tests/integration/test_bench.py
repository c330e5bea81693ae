"""The bench measures what it says: the same token ids on all sides, TRL's patched head computes the same, and the
arithmetic of its ratios. How long anything takes is no test."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
import trl.trainer.utils

from benchmarks import ranks, step, steps, steps_report
from benchmarks.step import PROFILES, Profile, Spec
from benchmarks.variants import FLOORS, PROCESSES, TRL
from prefopt.config.schema import ModelConfig
from tests.helpers.tiny import save_tiny, tiny_model, tiny_tokenizer

# TRL 1.16 asks transformers for names that are going to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TINY = Profile((5, 12), (3, 9), 4)


@pytest.fixture
def tiny_vocabulary(monkeypatch):
    tokenizer = tiny_tokenizer()
    assert tokenizer.eos_token_id == step.EOS
    monkeypatch.setattr(step, "SPECIAL_TOKENS", 3)
    monkeypatch.setattr(step, "VOCABULARY", len(tokenizer))
    return tokenizer


@pytest.mark.parametrize("name", PROFILES)
def test_pairs_are_a_function_of_the_profile_and_within_it(name):
    profile = PROFILES[name]
    pairs = step.make_pairs(profile, 50)
    assert pairs == step.make_pairs(profile, 50) != step.make_pairs(profile, 50, seed=1)
    assert step.make_pairs(profile, 60)[:50] == pairs
    for p in pairs:
        assert profile.prompt[0] <= len(p.prompt) <= profile.prompt[1]
        for completion in (p.chosen, p.rejected):
            assert profile.completion[0] <= len(completion) <= profile.completion[1]
            assert completion[-1] == step.EOS
        tokens = [*p.prompt, *p.chosen[:-1], *p.rejected[:-1]]
        assert min(tokens) >= step.SPECIAL_TOKENS
        assert max(tokens) < step.VOCABULARY
    assert max(len(p.prompt) for p in pairs) > 0.9 * profile.prompt[1]


def test_pairs_come_back_from_their_file(tmp_path):
    pairs = step.make_pairs(TINY, 6)
    step.write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert step.read_pairs(tmp_path / "pairs.jsonl") == pairs


def tiny_spec(variant, tmp_path, **changes):
    """A run of the bench on the tiny model: two steps of four pairs."""
    model, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    if not model.is_dir():
        save_tiny(model)
        step.write_pairs(data, step.make_pairs(TINY, 2 * TINY.pairs))
    folder = tmp_path / variant
    folder.mkdir()
    overrides = ["model=hub", f"model.path={model}", "precision=float32"]
    settings = {"data": str(data), "batch_size": TINY.pairs, "steps": 2, "device": "cpu", "overrides": overrides}
    return Spec(variant, str(folder), **settings | changes)


@pytest.fixture
def measured(tiny_vocabulary, tmp_path, monkeypatch):
    """What every variant measures on the tiny model."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)  # a variant patches it
    common = {"peak_memory_gib": 1.0, "threads": 1, "user_seconds": 3.0, "system_seconds": 1.0}
    found = {v: step.MEASUREMENTS[v](tiny_spec(v, tmp_path)) | common for v in PROCESSES}
    return found | {"floor_all_tokens": found["floor"] | found["floor"]["all_tokens"]}


def test_all_variants_see_the_same_tokens(measured, tmp_path):
    pairs = step.read_pairs(tmp_path / "pairs.jsonl")
    expected = step.digests(step.in_order(pairs, 0, 2, TINY.pairs))[1:]
    assert {v: r["digests"] for v, r in measured.items() if v not in FLOORS} == dict.fromkeys(
        ["prefopt", *TRL], expected
    )
    for variant in ("prefopt", *TRL):
        assert measured[variant]["losses"][0] == pytest.approx(0.693147, abs=1e-5), variant
        assert len(measured[variant]["losses"]) == 2
        assert len(measured[variant]["seconds"]) == 1
    tokens = steps.tokens_per_step(str(tmp_path / "pairs.jsonl"), TINY.pairs, 1)
    assert 0 <= tokens["prompts_once"] - measured["floor"]["tokens"][0] <= 1
    # Random weights: each token costs about log(vocabulary), which says that the means are over what they should be.
    for variant in FLOORS:
        assert measured[variant]["losses"][0] == pytest.approx(math.log(step.VOCABULARY), abs=0.3)


def test_without_warm_up_trl_and_prefopt_have_the_same_losses(tiny_vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(step, "LEARNING_RATE", 1e-2)
    ours = step.measure_prefopt(tiny_spec("prefopt", tmp_path, warmup=0))
    theirs = step.measure_trl(tiny_spec("trl_default", tmp_path, warmup=0))
    assert ours["digests"] == theirs["digests"]
    assert len(ours["digests"]) == 2
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=0, abs=1e-5)
    assert ours["losses"][1] < ours["losses"][0] - 1e-3


def test_a_batch_of_trl_is_read_as_its_collator_writes_it():
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    pairs = step.make_pairs(TINY, 3)
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    # pad is eos, as in SmolLM2
    batch = DataCollatorForPreference(pad_token_id=step.EOS)(rows)
    assert step.batch_pairs(batch) == [(p.prompt, p.chosen, p.rejected) for p in pairs]


def test_the_patched_head_computes_the_same_in_fewer_positions(monkeypatch):
    """Loss and gradient of TRL's forward, with its head as it is and as the bench patches it, in float32."""
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)
    scored = []
    function = trl.trainer.utils._ChunkedLogProbFunction
    original = function.forward

    def counting(ctx, hidden, *rest):
        scored.append(len(hidden))
        return original(ctx, hidden, *rest)

    monkeypatch.setattr(function, "forward", staticmethod(counting))
    plain = tiny_model(320)
    patched = copy.deepcopy(plain)
    torch.manual_seed(0)
    ids = torch.randint(3, 320, (4, 20))
    labels = ids.masked_fill(torch.arange(20) < torch.tensor([12, 9, 15, 4])[:, None], -100)
    weights = torch.randn(4, 1)
    found = []
    for model in (plain, patched):
        if model is patched:
            step.patch_fused_head()
        trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        logps = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        loss = -torch.nn.functional.logsigmoid(weights * logps.sum(1, keepdim=True)).mean()
        loss.backward()
        found.append(loss.item())
    assert scored == [4 * 19, int((labels[:, 1:] != -100).sum())]
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    for (name, p), q in zip(plain.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_floor_has_the_tokens_of_the_step(passes):
    pairs = step.make_pairs(PROFILES["chat"], 8)
    shapes = step.rectangles(pairs, passes)
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    rows = 8 // passes
    assert 0 <= tokens - sum(r * columns for r, columns, _ in shapes) < rows
    assert sum(predicted for _, _, predicted in shapes) == sum(len(p.chosen) + len(p.rejected) for p in pairs)
    assert {r for r, _, _ in shapes} == {rows}
    assert max(c for _, c, _ in shapes) - min(c for _, c, _ in shapes) <= 1
    assert all(predicted < r * columns for r, columns, predicted in shapes)


def test_ratios_are_taken_within_a_round():
    assert steps.ratio([10.0, 20.0, 60.0], [5.0, 5.0, 20.0]) == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 3}
    assert steps.summary([2.0]) == {"median": 2.0, "min": 2.0, "max": 2.0, "n": 1}


def rounds(seconds, memory, **more):
    return [
        {"seconds": s, "peak_memory_gib": memory, "threads": 2, "losses": [0.69], "user_seconds": 9.0}
        | {"system_seconds": 1.0}
        | more
        for s in seconds
    ]


def profile_example(**changes):
    seen = {"digests": ["a"], "reference_seconds": 3.0}
    found = {
        "prefopt": rounds([[9.0, 11.0], [20.0, 20.0], [10.0, 10.0]], 2.0, **seen),
        "trl_default": rounds([[40.0, 40.0], [60.0, 60.0], [50.0, 50.0]], 8.0, **seen),
        "trl_precomputed": rounds([[30.0, 30.0]] * 3, 7.0, **seen),
        "trl_patched": rounds([[20.0, 20.0]] * 3, 4.0, **seen),
        "floor": rounds([[8.0, 8.0], [10.0, 10.0], [10.0, 10.0]], 1.5),
        "floor_all_tokens": rounds([[10.0, 10.0]] * 3, 1.5),
    }
    tokens = {"pairs": 8, "prompts_once": 3000.0, "prompts_twice": 4000.0, "completions": 2000.0}
    return steps.profile_results(found | changes, 8, tokens)


def test_the_ratios_of_a_profile():
    result = profile_example()
    assert result["vs_trl_default"] == {"median": 4.0, "min": 3.0, "max": 5.0, "n": 3}
    assert result["vs_floor"] == {"median": 1.25, "min": 1.0, "max": 2.0, "n": 3}
    assert result["memory_vs_trl_default"]["median"] == 0.25
    assert result["variants"]["prefopt"]["pairs_per_second"] == {"median": 0.8, "min": 0.4, "max": 0.8, "n": 3}


def test_other_pairs_or_threads_are_refused():
    with pytest.raises(RuntimeError, match="same token ids"):
        profile_example(trl_patched=rounds([[1.0]] * 3, 1.0, digests=["b"]))
    with pytest.raises(RuntimeError, match="threads"):
        profile_example(floor=rounds([[1.0]] * 3, 1.0, threads=1))


EVENTS = [
    {"stage": "imports", "began": 100.0, "seconds": 4.0},
    {"stage": "model", "began": 104.5, "seconds": 1.0},
    {"stage": "evaluation", "began": 106.0, "seconds": 3.0},
    {"stage": "step", "began": 109.5, "seconds": 8.0},
    {"stage": "step", "began": 118.0, "seconds": 6.0},
    {"stage": "evaluation", "began": 124.0, "seconds": 3.0},
]


def test_start_up_is_what_comes_before_the_first_step():
    assert steps.startup_stages(EVENTS) == {
        "total": 9.5, "imports": 4.0, "model": 1.0, "evaluation": 3.0, "rest": 1.5, "step_1": 8.0, "step_2": 6.0,
    }  # fmt: skip
    assert steps.stage_seconds(EVENTS)["step"] == 14.0


def example_results():
    return {
        "device": "cpu",
        "machine": {"processor": "A", "instructions": "B", "cores": 2, "memory_gib": 23.5, "gpus": []},
        "versions": {"torch": "2.13", "trl": "1.16.0"},
        "parts": {"chat": {"git": None, "rounds": 3, "load_before": 0.1, "seconds": 60.0}},
        "chat": profile_example(),
        "prompt_scaling": {"128": {"seconds_per_pair": 1.0, "peak_memory_gib": 2.0}},
        "sampling": {"16": {"tokens": 640, "seconds": 10.0, "tokens_per_second": 64.0}},
        "startup": {"seconds": steps.summary([9.0]), "stages": {"imports": 4.0, "step_1": 8.0}, "cold_seconds": 20.0},
        "grid_vs_trl": {
            "runs": 12, "steps": 2, "pairs_per_step": 4, "factor": 3.21, "prefopt_seconds": 100.0, "trl_seconds": 321.0,
            "trl_step_seconds": 200.0, "prefopt_step_seconds": 60.0, "prefopt_reference_seconds": 5.0,
            "prefopt_one_run_seconds": 12.0, "prefopt_one_run_stages": {"imports": 4.0},
            "vs_runs_and_one_reference_pass": 0.9, "vs_steps_and_one_reference_pass": 1.4,
        },
    }  # fmt: skip


def test_the_table_and_the_figure_are_made_of_the_json(tmp_path):
    results = json.loads(json.dumps(example_results()))
    text = steps_report.table(results)
    assert (
        "| TRL, default | 50.0 [40.0–60.0] | 0.160 [0.133–0.200] | 4.00 [3.00–5.00] | 8.00 [8.00–8.00] | 10 % |" in text
    )
    assert "prefopt takes 1.25 [1.00–2.00] of it" in text
    assert "a factor of 3.21" in text
    headings = re.findall("^## (\\w+)", text, re.MULTILINE)
    assert headings == ["chat", "A", "Start", "Longer", "Sampling"]
    # Every table is well-formed: as many cells in each row as in its head.
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block
    written = steps_report.draw(results, tmp_path)
    assert [f.name for f in written] == ["steps.png", "steps.svg", "steps.pdf"]
    assert steps_report.table({k: v for k, v in results.items() if k != "grid_vs_trl"}).count("## ") == 4


@pytest.mark.slow
def test_the_gain_of_a_second_process_is_that_of_every_part(tmp_path):
    pytest.importorskip("deepspeed")
    model = ModelConfig("tiny", str(save_tiny(tmp_path / "model")), None)
    short = ["max_prompt_tokens=150", "max_completion_tokens=150", "batch_size=2"]
    short += ["stage_sampling.max_new_tokens=4", "sampling.max_new_tokens=4"]
    results = ranks.compare(4, 1, model, short)
    assert set(results["parts"]) == set(ranks.PARTS)
    for part, gain in results["parts"].items():
        (one,), (two,) = results["one"], results["two"]
        assert gain["median"] == one[part] / two[part] > 0
        assert f"| {part} " in ranks.table(results)


def test_a_spec_survives_the_command_line():
    spec = Spec("prefopt", "folder", overrides=["a=b"], trl={"beta": 0.3})
    assert Spec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
