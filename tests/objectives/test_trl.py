"""docs/trl.md is true: each row's two sides give the same loss and gradient on the same tensors.

TRL's own loss code runs, on a stand-in for the trainer that holds nothing but its arguments, and on a stand-in for the
model that returns given logits. Gradients are compared at the logits.
"""

import contextlib
import re
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from prefopt.config.parse import build, register
from prefopt.objectives.base import Objective, PairInputs
from prefopt.training.config import TrainConfig
from prefopt.utils.files import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, of transformers' renamed arguments

DOC = (ROOT / "docs" / "trl.md").read_text()
ROWS = re.findall(r"^\| `(objective=[^`]*)` \| `(\w+Trainer[^`]*)` \|(.*)\|$", DOC, re.MULTILINE)
PAIRS, VOCABULARY = 4, 13
CHOSEN, REJECTED = [3, 1, 6, 2], [2, 5, 1, 4]  # tokens; every prompt is a single one
WIDTH = 1 + max(CHOSEN + REJECTED)


class Data:
    """2B rows [prompt, completion] padded on the right, chosen first; random logits as leaves, and a reference."""

    def __init__(self, pairs: slice):
        generator = torch.Generator().manual_seed(0)
        rows = [*range(PAIRS)[pairs], *range(PAIRS, 2 * PAIRS)[pairs]]
        self.lengths = torch.tensor(CHOSEN + REJECTED)[rows]
        self.ids = torch.randint(0, VOCABULARY, (2 * PAIRS, WIDTH), generator=generator)[rows]
        self.logits = torch.randn(2 * PAIRS, WIDTH, VOCABULARY, generator=generator)[rows].requires_grad_()
        self.reference_logits = torch.randn(2 * PAIRS, WIDTH, VOCABULARY, generator=generator)[rows]
        self.reference = self.sums(self.reference_logits)
        # Of completions under other prompts, policy and reference: their log-probs are what KTO's trainer is given too.
        self.mismatched = torch.randn(2 * PAIRS, generator=generator)[rows] - 10.0
        self.mismatched_reference = torch.randn(2 * PAIRS, generator=generator)[rows] - 11.0
        self.scores = torch.randn(2 * PAIRS, generator=generator)[rows].requires_grad_()

    @property
    def completion_mask(self) -> torch.Tensor:
        places = torch.arange(WIDTH)
        return ((places >= 1) & (places <= self.lengths[:, None])).long()

    def token_logps(self, logits: torch.Tensor) -> torch.Tensor:
        """(2B, WIDTH - 1), 0 outside the completions."""
        logps = logits[:, :-1].log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0]
        return logps * self.completion_mask[:, 1:]

    def log_sum_sq_probs(self) -> torch.Tensor:
        """(2B, WIDTH - 1)."""
        return (2 * self.logits.detach()[:, :-1].log_softmax(-1)).logsumexp(-1)

    def on_policy(self) -> torch.Tensor:
        mask = self.completion_mask[:, 1:]
        return ((self.token_logps(self.logits).detach() - self.log_sum_sq_probs()) * mask).sum(-1) / self.lengths

    def prefixes(self, logits: torch.Tensor) -> torch.Tensor:
        """(2B,): the sums over as many tokens as the pair's shorter completion has."""
        shorter = torch.minimum(*self.lengths.chunk(2)).repeat(2)
        return torch.stack([row[:n].sum() for row, n in zip(self.token_logps(logits), shorter, strict=True)])

    def sums(self, logits: torch.Tensor) -> torch.Tensor:
        return self.token_logps(logits).sum(-1)


def ours(objective: Objective, data: Data) -> torch.Tensor:
    chosen, rejected = data.sums(data.logits).chunk(2)
    values = {"chosen_lengths": data.lengths.float().chunk(2)[0], "rejected_lengths": data.lengths.float().chunk(2)[1]}
    values["mean_chosen_length"] = values["chosen_lengths"].mean().expand(len(values["chosen_lengths"]))
    if objective.model_kind == "reward_model":
        values |= dict(zip(("policy_chosen_rewards", "policy_rejected_rewards"), data.scores.chunk(2), strict=True))
    else:
        values |= {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
    names = ("reference_chosen_logps", "reference_rejected_logps")
    if "reference" in objective.needs:
        values |= dict(zip(names, data.reference.chunk(2), strict=True))
    if "mismatched" in objective.needs:
        ratios = (data.mismatched - data.mismatched_reference).chunk(2)
        values |= {"mismatched_chosen_logratios": ratios[0], "mismatched_rejected_logratios": ratios[1]}
    if "on_policy" in objective.needs:
        values |= dict(zip(("chosen_on_policy", "rejected_on_policy"), data.on_policy().chunk(2), strict=True))
    if "prefixes" in objective.needs:
        for model, logits in (("policy", data.logits), ("reference", data.reference_logits)):
            prefix_names = (f"{model}_chosen_prefix_logps", f"{model}_rejected_prefix_logps")
            values |= dict(zip(prefix_names, data.prefixes(logits).chunk(2), strict=True))
    losses = objective(PairInputs(**values)).losses
    return losses.sum() / (values["chosen_lengths"].sum() if objective.normalize_by == "chosen_token" else len(losses))


def arguments(trainer: str, text: str) -> Any:
    """The trainer's configuration object, made of `key=value` words."""
    import trl
    from trl.experimental import cpo, orpo

    configs = {"CPO": cpo.CPOConfig, "ORPO": orpo.ORPOConfig, "DPO": trl.DPOConfig, "KTO": trl.KTOConfig}
    config = (configs | {"Reward": trl.RewardConfig})[trainer]
    values: dict[str, Any] = {}
    for key, _, value in [word.partition("=") for word in text.split()]:
        parts = [float(v) if re.fullmatch(r"[\d.]+", v) else v or None for v in value.split(",")]
        values[key] = parts if trainer == "DPO" and key in ("loss_type", "loss_weights") else parts[0]
    return config(output_dir="unused", bf16=False, use_cpu=True, report_to="none", **values)


def trl_trainer(args: Any, **more: Any) -> Any:
    """What TRL's loss methods read from their trainer: its arguments, one device, metrics that nobody reads."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=contextlib.nullcontext
    )
    metrics: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    basics: dict[str, Any] = {
        "args": args,
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "ref_model": SimpleNamespace(),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "_metrics": metrics,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "padding_value": 0,
        "pad_token_id": 0,
        "ld_alpha": getattr(args, "ld_alpha", None),
        "use_weighting": getattr(args, "use_weighting", False),
        "precompute_ref_logps": True,
        "calculate_KL": True,
    }
    return SimpleNamespace(**(vars(args) | basics | more))


def theirs(trainer: str, text: str, data: Data) -> torch.Tensor:
    import trl
    from trl.experimental import cpo, orpo

    args = arguments(trainer, text)
    attention_mask = (torch.arange(WIDTH) <= data.lengths[:, None]).long()
    fused = SimpleNamespace(
        log_probs=data.token_logps(data.logits),
        entropy=torch.zeros(data.ids.shape),
        mean_logits=torch.zeros(data.ids.shape)[:, 1:],
        log_sum_sq_probs=data.log_sum_sq_probs(),
        is_top1=torch.zeros(data.ids.shape, dtype=torch.bool)[:, 1:],
    )
    batch = {
        "input_ids": data.ids,
        "attention_mask": attention_mask,
        "completion_mask": data.completion_mask,
    }
    if trainer == "DPO":
        stand_in = trl_trainer(args, loss_types=args.loss_type, loss_weights=args.loss_weights or [1.0])
        reference = SimpleNamespace(log_probs=data.token_logps(data.reference_logits))
        chosen, rejected = trl.DPOTrainer.compute_ref_log_probs(stand_in, lambda **_: reference, batch)
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return trl.DPOTrainer._compute_loss(stand_in, lambda **_: fused, batch, False)
    if trainer == "KTO":
        stand_in = trl_trainer(args, _compute_kl_logps=lambda model, batch: data.mismatched)
        labels = torch.tensor([True] * (len(data.ids) // 2) + [False] * (len(data.ids) // 2))
        batch |= {"label": labels, "ref_logps": data.reference, "ref_KL_logps": data.mismatched_reference}
        return trl.KTOTrainer._compute_loss(stand_in, lambda **_: fused, batch, False)
    if trainer == "Reward":
        scored = SimpleNamespace(logits=data.scores[:, None])
        return trl.RewardTrainer.compute_loss(trl_trainer(args), lambda **_: scored, batch)
    cls = {"CPO": cpo.CPOTrainer, "ORPO": orpo.ORPOTrainer}[trainer]
    labels = data.ids.masked_fill(data.completion_mask == 0, -100)
    completions = {
        f"{side}_{name}": value.chunk(2)[i]
        for i, side in enumerate(("chosen", "rejected"))
        for name, value in (("input_ids", data.ids), ("attention_mask", attention_mask), ("labels", labels))
    }
    methods = ("concatenated_inputs", "get_batch_logps", "concatenated_forward", "cpo_loss", "odds_ratio_loss")
    stand_in = trl_trainer(args)
    for name in methods:
        method = cls.__dict__.get(name)
        if method is not None:
            setattr(stand_in, name, method.__get__(stand_in, cls))
    model = lambda *_, **__: SimpleNamespace(logits=data.logits)  # noqa: E731
    loss, _ = cls.get_batch_loss_metrics(stand_in, model, completions)
    return loss


@pytest.mark.parametrize(("prefopt", "trl", "note"), [pytest.param(*row, id=row[0]) for row in ROWS])
def test_a_row_of_the_conversion_table(prefopt, trl, note):
    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        objective = build(compose("train", prefopt.split()).objective, Objective, "objective")
    trainer, _, text = trl.partition("Trainer")
    one_by_one = "one pair per device" in note
    for pairs in [slice(i, i + 1) for i in range(PAIRS)] if one_by_one else [slice(0, PAIRS)]:
        results = []
        for loss in (lambda data: ours(objective, data), lambda data: theirs(trainer, text, data)):
            data = Data(pairs)
            value = loss(data)
            leaf = data.scores if trainer == "Reward" else data.logits
            (gradient,) = torch.autograd.grad(value, leaf)
            assert gradient.abs().max() > 1e-3
            results.append((value, gradient))
        (our_loss, our_gradient), (their_loss, their_gradient) = results
        assert their_loss.item() == pytest.approx(our_loss.item(), rel=1e-6, abs=1e-6)
        assert torch.allclose(our_gradient, their_gradient, rtol=1e-6, atol=1e-6)


def test_every_row_is_read():
    assert len(ROWS) == DOC.count("\n| `") == 31
    assert {trl.partition("Trainer")[0] for _, trl, _ in ROWS} == {"DPO", "CPO", "ORPO", "KTO", "Reward"}


def test_what_the_table_says_of_label_smoothing_is_so():
    """TRL's sigmoid loss ignores label_smoothing, so cDPO has no row."""
    data = Data(slice(0, PAIRS))
    plain, smoothed = (theirs("DPO", f"loss_type=sigmoid beta=0.3 label_smoothing={e}", data) for e in (0.0, 0.3))
    assert plain == smoothed
