"""The reference in its three forms, and the cache on disk: made once, complete, checked, shared."""

import multiprocessing
import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from prefopt.data.collate import LAYOUTS
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.models import reference
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import AdapterOff, Cached, Following, LoadedOnce, Resident, cached, pair_key
from prefopt.utils import tensor_store
from prefopt.utils.files import atomic_write
from tests.helpers.harm import HARMS
from tests.helpers.tiny import records, run_program, tiny_model

SCORE = LogprobComputer("float32")
PACKED = LAYOUTS["packed"]


def pairs(n: int, start: int = 0) -> list[TokenizedPair]:
    """Of different lengths and tokens."""
    return [
        TokenizedPair(str(i), [1 + i % 7, 2 + i % 5], [3 + i % 40] * (1 + i % 4), [4 + i % 30] * (1 + i % 3))
        for i in range(start, start + n)
    ]


def weighted(wanted: list[TokenizedPair], seed: int = 0) -> list[TokenizedPair]:
    """With weights for the tokens."""
    draw = random.Random(seed).uniform
    return [
        replace(
            pair,
            chosen_token_weights=[draw(0, 2) for _ in pair.chosen],
            rejected_token_weights=[draw(0, 2) for _ in pair.rejected],
        )
        for pair in wanted
    ]


def policy(seed: int = 0):
    model = tiny_model(50, seed).eval()
    enable_packed_attention(model)
    return model


SAMPLES = LoadedOnce(policy, "cpu")


def make(wanted: list[TokenizedPair], model=None, weights: str = "w", further=()) -> Cached:
    model = model or policy()
    return cached(model, weights, wanted, PACKED, 100, SCORE, SAMPLES, False, further)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    return tmp_path / "reference"


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The ids of the pairs that a forward pass is spent on."""
    ids: list[str] = []
    compute = reference._compute
    monkeypatch.setattr(
        reference,
        "_compute",
        lambda p, l, s, part, *more: (ids.extend(x.id for x in part), compute(p, l, s, part, *more))[1],
    )
    return ids


def test_every_form_gives_the_same_bits():
    model = policy()
    wanted = pairs(20)
    batch = PACKED.collate(wanted[3:7])
    expected = Resident.copy_of(model, SCORE).logps(wanted[3:7], batch, prefixes=True)
    for found in (
        make(wanted, model).logps(wanted[3:7], batch),
        make(wanted, model, further=["prefixes"]).logps(wanted[3:7], batch, prefixes=True),
    ):
        assert torch.equal(found.sums, expected.sums)
    assert torch.equal(found.prefixes, expected.prefixes)
    assert not torch.equal(found.prefixes, found.sums)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with torch.no_grad():
        assert not torch.allclose(SCORE(model, batch).sums, expected.sums, atol=1e-3)
        off = AdapterOff(model, SCORE).logps(wanted[3:7], batch, prefixes=True)
        assert torch.allclose(off.sums, expected.sums, atol=1e-5)
        assert torch.allclose(off.prefixes, expected.prefixes, atol=1e-5)
        with AdapterOff(model, SCORE).model() as off:
            assert torch.allclose(SCORE(off, batch).sums, expected.sums, atol=1e-5)
        assert not torch.allclose(SCORE(model, batch).sums, expected.sums, atol=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_reference_follows_the_policy_as_trls_does(alpha):
    """TRL's own update of TR-DPO, every second step."""
    from trl.trainer.callbacks import SyncRefModelCallback

    model, theirs = policy(), policy()
    reference = Following.starting_at(model, SCORE, 2, alpha)
    for done in range(1, 7):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        assert reference.follow(model, done) == (done % 2 == 0)
        if done % 2 == 0:
            SyncRefModelCallback._sync_target_model(model, theirs, alpha)
        for ours, expected in zip(reference.frozen.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(ours, expected)
    assert all(map(torch.equal, reference.frozen.parameters(), model.parameters())) == (alpha == 1)


def test_the_model_for_samples_is_loaded_once_and_when_it_is_asked_for():
    loaded = []
    samples = LoadedOnce(lambda: loaded.append(policy()) or loaded[-1], "cpu")
    reference = cached(policy(), "w", pairs(3), PACKED, 100, SCORE, samples, show=False)
    assert loaded == []
    for _ in range(2):
        with reference.model() as model:
            assert [model] == loaded


def test_only_what_is_missing_is_computed(computed):
    make(pairs(10))
    assert sorted(map(int, computed)) == list(range(10))
    computed.clear()
    found = make(pairs(8, start=5))
    spot = computed[: reference.SPOT_CHECKS]
    assert set(map(int, spot)) <= set(range(5, 10))
    assert sorted(map(int, computed[reference.SPOT_CHECKS :])) == [10, 11, 12]
    batch = PACKED.collate(pairs(8, start=5))
    assert torch.equal(found.logps(pairs(8, start=5), batch).sums, Resident(policy(), SCORE).logps([], batch).sums)


def test_the_key_is_the_tokens_and_nothing_else():
    pair = TokenizedPair("a", [1, 2], [3], [4])
    assert pair_key(pair) == pair_key(TokenizedPair("b", [1, 2], [3], [4], 0.5, 0.1, source="other"))
    others = [
        TokenizedPair("a", [1], [2, 3], [4]),
        TokenizedPair("a", [1, 2], [4], [3]),
        TokenizedPair("a", [1, 2], [3, 4], []),
        TokenizedPair("a", [2, 1], [3], [4]),
    ]
    assert len({pair_key(p) for p in [pair, *others]}) == 5


def test_other_weights_precision_layout_and_contents_have_files_of_their_own(cache):
    wanted = pairs(3)
    make(wanted)
    make(wanted, policy(1), "other")
    cached(policy(), "w", wanted, PACKED, 100, LogprobComputer("bfloat16"), SAMPLES, show=False)
    cached(tiny_model(50).eval(), "w", wanted, LAYOUTS["padded"], 100, SCORE, SAMPLES, show=False)
    make(wanted, further=["prefixes"])
    make(weighted(wanted), further=["weighted"])
    assert len(list(cache.iterdir())) == 6


def test_the_cache_holds_weighted_log_probs_of_these_weights():
    """Bit for bit those of a resident reference, in another batch; other weights of the same tokens are other rows."""
    model, some, others = policy(), weighted(pairs(20)), weighted(pairs(20), seed=1)
    resident = Resident.copy_of(model, SCORE)
    known = make([*some, *others], model, further=["weighted"])
    for wanted in (some, others):
        batch = PACKED.collate(wanted[3:7])
        found, expected = known.logps(wanted[3:7], batch), resident.logps(wanted[3:7], batch)
        assert torch.equal(found.sums, expected.sums)
        assert torch.equal(found.weighted, expected.weighted)
        by_hand = [
            sum(weight * value for weight, value in zip(weights, values, strict=False))
            for weights, values in zip(
                [getattr(p, f"{side}_token_weights") for side in ("chosen", "rejected") for p in wanted[3:7]],
                expected.tokens.tolist(),
                strict=True,
            )
        ]
        assert found.weighted.tolist() == pytest.approx(by_hand)
    assert pair_key(some[0]) == pair_key(others[0])
    assert pair_key(some[0], ["weighted"]) != pair_key(others[0], ["weighted"])
    ones = [replace(p, chosen_token_weights=[1.0] * len(p.chosen), rejected_token_weights=[1.0] * len(p.rejected))
            for p in some]  # fmt: skip
    plain = resident.logps(ones, PACKED.collate(ones))
    assert torch.equal(plain.weighted, plain.sums)
    assert resident.logps(pairs(4), PACKED.collate([*some[:3], *pairs(1)])).weighted is None


def test_values_that_the_model_does_not_give_are_refused():
    make(pairs(5))
    with pytest.raises(UserError, match=r"of pair \d in .* are off by .* nats"):
        make(pairs(5), policy(1))  # other weights under the same digest


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_named_and_its_rows_made_anew(harm, cache, computed, monkeypatch, capsys):
    monkeypatch.setattr(tensor_store, "SHARD_ROWS", 4)
    wanted = pairs(8)
    expected = make(wanted).known.get([pair_key(p) for p in wanted])
    whole = {file.name: file.read_bytes() for file in cache.rglob("*.safetensors")}
    file = min(cache.rglob("*.safetensors"))
    (file.parent / f"{file.name}.1.tmp").write_bytes(b"half")  # of a process that was killed
    harm(file)
    computed.clear()
    capsys.readouterr()
    assert torch.equal(make(wanted).known.get([pair_key(p) for p in wanted]), expected)
    assert len(computed) == reference.SPOT_CHECKS + 4
    assert f"{file} is damaged" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in cache.rglob("*.safetensors")} == whole
    assert not list(file.parent.glob("*.tmp"))


def test_what_was_written_before_a_failure_is_kept(cache, computed, monkeypatch):
    monkeypatch.setattr(tensor_store, "SHARD_ROWS", 4)
    write = atomic_write

    def fail_at_the_third(*args):
        if len(list(cache.rglob("*.safetensors"))) == 2:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(tensor_store, "atomic_write", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make(pairs(20))
    assert not list(cache.rglob("*.tmp"))
    monkeypatch.setattr(tensor_store, "atomic_write", write)
    computed.clear()
    make(pairs(20))
    assert len(computed) == reference.SPOT_CHECKS + 20 - 8


def _job(done, start):
    start.wait()
    calls = []
    compute = reference._compute
    reference._compute = lambda p, l, s, part, *more: (calls.extend(part), compute(p, l, s, part, *more))[1]
    make(pairs(30))
    done.put(len(calls))


def test_parallel_jobs_make_it_once(cache):
    context = multiprocessing.get_context("fork")
    done, start = context.Queue(), context.Event()
    jobs = [context.Process(target=_job, args=(done, start)) for _ in range(3)]
    for job in jobs:
        job.start()
    start.set()
    counts = sorted(done.get() for _ in jobs)
    for job in jobs:
        job.join()
    assert counts == [reference.SPOT_CHECKS, reference.SPOT_CHECKS, 30]
    assert len(list(cache.rglob("*.safetensors"))) == 1


@pytest.mark.slow
def test_a_grid_pays_for_its_reference_once_and_modes_agree(overrides, tiny_folder, tmp_path):
    """Three other objectives, another seed and learning rate over the same pairs; then the resident reference."""
    environment = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    common = [*overrides(tmp_path / "runs"), "steps=3"]  # one epoch: every seed sees all 12 pairs
    first = run_program(*common, "objective=dpo", env=environment)
    assert "reference: 0 of 18 pairs from the cache, 18 computed" in first.stderr, first.stderr
    again = run_program("-m", *common, "objective=ipo,simpo,cal_dpo", "seed=1", "optimizer.lr=1e-4", env=environment)
    assert again.stderr.count("reference: 18 of 18 pairs from the cache, 0 computed") == 2, again.stderr
    assert again.stderr.count("reference: 6 of 6 pairs from the cache, 0 computed") == 1  # simpo: the held-out ones
    resident = run_program(*common, "objective=dpo", "reference=resident", env=environment)
    assert resident.returncode == 0
    a, b = (next(r for r in records(tmp_path / "runs") if r["config"]["reference"] == mode and r["objective"] == "dpo")
            for mode in ("cached", "resident"))  # fmt: skip
    assert a["final_weights"] == b["final_weights"]
    assert a["evaluations"] == b["evaluations"]


def test_the_cache_holds_ktos_mismatched_completions(overrides, tmp_path):
    """Of two epochs, whose steps hold other pairs together, and of the held-out pairs."""
    environment = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    common = [*overrides(tmp_path / "runs"), "steps=6", "objective=kto"]
    cached = run_program(*common, env=environment)
    assert cached.returncode == 0, cached.stderr
    # 18 pairs; 6 held-out ones and 24 of steps with other completions, of which two come together in both epochs.
    assert "reference: 0 of 46 pairs from the cache, 46 computed" in cached.stderr
    resident = run_program(*common, "reference=resident", env=environment)
    assert resident.returncode == 0, resident.stderr
    a, b = records(tmp_path / "runs")
    assert a["config"]["reference"] != b["config"]["reference"]
    assert a["final_weights"] == b["final_weights"]
    assert a["evaluations"] == b["evaluations"]
    assert a["evaluations"][-1]["kto/reference_point"] >= 0


def test_tdpo_trains_with_a_reference_that_computes_and_refuses_a_cached_one(overrides, tmp_path):
    common = [*overrides(tmp_path / "runs"), "objective=tdpo", "steps=2"]
    refused = run_program(*common)
    assert refused.returncode == 2
    assert "reference=cached holds log-probs of completions alone: set reference=resident" in " ".join(
        refused.stderr.split()
    )
    assert not list(tmp_path.glob("runs/*"))
    for changes in (["reference=resident"], ["reference=adapter_off", "peft=lora_attention"]):
        process = run_program(*common, *changes)
        assert process.returncode == 0, process.stderr
    for record in records(tmp_path / "runs"):
        assert record["status"] == "finished"
        assert record["evaluations"][0]["tdpo/rejected_kl"] == 0 < record["evaluations"][-1]["tdpo/rejected_kl"]
        assert list((tmp_path / "runs" / record["name"] / "policy").glob("*.safetensors"))
