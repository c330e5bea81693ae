"""Public architectures, tiny and random: each trains, samples and exports, or is refused with a reason.

docs/models.md has the table of these lists.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from prefopt.config.parse import parse, register
from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.data.collate import LAYOUTS
from prefopt.data.fields import as_messages
from prefopt.data.formats import Pairs
from prefopt.data.sources import read_rows
from prefopt.data.tokenize import encode_prompt, tokenize
from prefopt.errors import UserError
from prefopt.generation.sampler import sample
from prefopt.models.load import load_model, load_tokenizer, weights_digest
from prefopt.models.logprobs import completion_logps
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.training.config import TrainConfig, check, resolve
from prefopt.training.setup import prepare_run, run
from prefopt.utils import signals
from tests.helpers.tiny import ROOT, SMALL, tiny_overrides, tiny_tokenizer, write_pairs

TOKENIZER = tiny_tokenizer()
# The model knows another terminator (<|endoftext|>, 0) than its tokenizer writes (<|im_end|>, 2).
COMMON = SMALL | {
    "vocab_size": len(TOKENIZER),
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Trained:
    """`models`: public ones. `layout`: the fastest in which it gives the right numbers. `changes`: of its config, so
    that it is tiny, and a window or an expert has something to do. `frozen`: parts that a loss on text does not
    reach."""

    models: str
    layout: str = "packed"
    changes: dict = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    models: str
    reason: str  # for the table
    message: str  # a part of what the user sees
    changes: dict = field(default_factory=dict)


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 4}

TRAINED = {
    "llama": Trained("Llama 2 and 3, SmolLM2, Yi, DeepSeek-R1-Distill-Llama"),
    "llama4_text": Trained("Llama 4, the text model", "packed", HEADS | {"num_local_experts": 2}),
    "smollm3": Trained("SmolLM3"),
    "qwen2": Trained("Qwen1.5, Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen"),
    "qwen2_moe": Trained("Qwen1.5-MoE", "packed", QWEN_EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3": Trained("Qwen3", "packed", HEADS),
    "qwen3_moe": Trained("Qwen3-MoE", "packed", QWEN_EXPERTS | HEADS),
    "qwen3_next": Trained("Qwen3-Next", "padded", QWEN_EXPERTS | HEADS | {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}),
    "mistral": Trained("Mistral 7B", "packed", WINDOW),
    "ministral": Trained("Ministral", "packed", HEADS | WINDOW),
    "mixtral": Trained("Mixtral", "packed", EXPERTS),
    "gemma": Trained("Gemma", "packed", HEADS),
    "gemma2": Trained("Gemma 2", "packed", HEADS | WINDOW),
    "gemma3_text": Trained("Gemma 3 1B", "packed", HEADS | WINDOW | {"sliding_window_pattern": 2}),
    "gemma3": Trained("Gemma 3 4B and larger; the vision tower is frozen", "packed", {
        "text_config": COMMON | HEADS | WINDOW | {"model_type": "gemma3_text", "sliding_window_pattern": 2},
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
                          "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4, "image_token_index": 5}, frozen=("vision_tower", "multi_modal_projector")),
    "recurrent_gemma": Trained("RecurrentGemma", "padded", HEADS | {
        "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
        "w_init_variance_scale": 1.0}),
    "phi": Trained("Phi-1.5, Phi-2"),
    "phi3": Trained("Phi-3, Phi-3.5, Phi-4"),
    "phimoe": Trained("Phi-3.5-MoE", "packed", {"num_local_experts": 4}),
    "gpt2": Trained("GPT-2"),
    "gpt_neo": Trained("GPT-Neo", "padded", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "gptj": Trained("GPT-J", "padded", {"rotary_dim": 8}),
    "gpt_neox": Trained("GPT-NeoX, Pythia"),
    "gpt_bigcode": Trained("StarCoder"),
    "starcoder2": Trained("StarCoder2", "packed", WINDOW),
    "gpt_oss": Trained("gpt-oss", "padded", EXPERTS | HEADS | WINDOW),
    "opt": Trained("OPT", "packed", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": Trained("BLOOM", "padded"),
    "falcon": Trained("Falcon", "prefix_shared"),
    "falcon_h1": Trained("Falcon-H1", "padded", MAMBA | HEADS | {"mamba_d_ssm": 64}),
    "mpt": Trained("MPT", "padded", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "stablelm": Trained("StableLM", "prefix_shared"),
    "cohere": Trained("Command R", "packed", {"logit_scale": 0.0625}),
    "cohere2": Trained("Command R7B", "packed", WINDOW),
    "granite": Trained("Granite 3", "packed", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "granitemoe": Trained("Granite 3 MoE", "packed", EXPERTS | {"logits_scaling": 8.0}),
    "granitemoehybrid": Trained("Granite 4", "padded", EXPERTS | MAMBA | {
        "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]}),
    "olmo2": Trained("OLMo 2"),
    "olmo3": Trained("OLMo 3", "packed", WINDOW),
    "olmoe": Trained("OLMoE", "packed", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": Trained("DeepSeek-V2", "packed", DEEPSEEK | {"n_group": 1}),
    "deepseek_v3": Trained("DeepSeek-V3, DeepSeek-R1", "packed", DEEPSEEK),
    "glm4": Trained("GLM-4", "packed", HEADS),
    "exaone4": Trained("EXAONE 4", "packed", WINDOW),
    "minimax": Trained("MiniMax-Text-01", "padded", EXPERTS | HEADS | {
        "layer_types": ["linear_attention", "full_attention"]}),
    "lfm2": Trained("LFM2", "padded", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "mamba": Trained("Mamba", "padded", {"state_size": 4}),
    "mamba2": Trained("Mamba 2, Codestral Mamba", "padded", {
        "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "jamba": Trained("Jamba", "padded", {
        "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "rwkv": Trained("RWKV-4", "padded", {"attention_hidden_size": 32, "context_length": 512}),
}  # fmt: skip

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
REFUSED = {
    "t5": Refused("T5, Flan-T5", "an encoder reads the prompt", "is an encoder-decoder model", T5),
    "bart": Refused(
        "BART", "an encoder reads the prompt", "is an encoder-decoder model",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    ),
    "bert-generation": Refused(
        "BERT and other encoders", "a token is predicted with the token in sight", "is no causal language model"
    ),
    "modernbert-decoder": Refused(
        "ModernBERT-decoder", "its head is more than one linear layer", "changes its logits after the output embedding",
        {"cls_token_id": 0, "sep_token_id": 0},
    ),
    "qwen2_vl": Refused(
        "Qwen2-VL, LLaVA and others", "transformers has no causal language model for it", "no model can be loaded",
        {"text_config": COMMON, "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 2}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> tuple[Path, object]:
    """(folder with train.jsonl and heldout.jsonl, the config of a run of 2 DPO steps on them)."""
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "train.jsonl", 8)
    write_pairs(folder / "heldout.jsonl", 2, start=100)
    overrides = tiny_overrides(folder, folder, folder)
    overrides += ["objective=dpo", "steps=2", "eval_every=1", "micro_batch_tokens=200"]
    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return folder, compose("train", overrides)


@pytest.fixture
def start(template, tmp_path, monkeypatch):
    """start(model folder) -> the Run, after the run; in this process."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(signals, "install_handlers", lambda: None)  # pytest has its own

    def start(model: Path):
        node = template[1].copy()
        node.model.path, node.model.name, node.runs_dir = str(model), model.name, str(tmp_path / "runs")
        config = parse(node, TrainConfig)
        check(config)
        resolve(config)
        plan = prepare_run(config)
        run(plan)
        return plan.run

    return start


def save(name: str, changes: dict, folder: Path) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **COMMON | changes)
    torch.manual_seed(0)
    causal = type(config) in AutoModelForCausalLM._model_mapping and not config.is_encoder_decoder
    model = (AutoModelForCausalLM if causal else AutoModel).from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def plain_logps(model: PreTrainedModel, pair) -> list[float]:
    """Of both completions, from transformers alone."""
    found = []
    for completion in (pair.chosen, pair.rejected):
        row = torch.tensor([pair.prompt + completion])
        logps = model(row, use_cache=False).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
        found.append(logps.gather(-1, torch.tensor(completion)[:, None]).sum().item())
    return found


@torch.no_grad()
def plain_answer(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """The most likely tokens, from transformers alone, up to the policy's own terminator."""
    prompt = torch.tensor([ids])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", TRAINED)
def test_an_architecture_trains_and_its_export_is_what_was_trained(name, template, start, tmp_path, capsys):
    initial = save(name, TRAINED[name].changes, tmp_path / name)
    finished = start(tmp_path / name)
    said = capsys.readouterr().err
    layout = TRAINED[name].layout
    fallen_back = re.findall(r"layout: (\w+), because", said)
    assert fallen_back == ([] if layout == "packed" else [layout])
    assert "step 0: policy = reference (largest |log-ratio| 0), loss 0.693147 = 0.693147" in said

    metrics = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    heldout = {row["step"]: row["loss"] for row in metrics if row["split"] == "heldout"}
    assert heldout[0] == pytest.approx(math.log(2), abs=1e-6)
    assert heldout[2] < heldout[0]

    policy, loading = AutoModelForCausalLM.from_pretrained(
        finished.policy_folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    record = json.loads((finished.folder / "record.json").read_text())
    assert weights_digest(policy) == record["final_weights"]
    before = dict(initial.named_parameters())
    unchanged = {n for n, p in policy.named_parameters() if torch.equal(p, before[n])}
    assert unchanged == {n for n in before if any(part in n for part in TRAINED[name].frozen)}
    assert policy.config.get_text_config().eos_token_id == policy.generation_config.eos_token_id == [2, 0]

    config = ModelConfig(name, str(finished.policy_folder))
    ours, tokenizer = load_model(config, "cpu"), load_tokenizer(config)
    rows = [Pairs()(row) for _, row in read_rows(str(template[0] / "heldout.jsonl"))]
    pairs = tokenize(tokenizer, rows, 100, 100).pairs
    sampled = sample(
        ours, tokenizer, [as_messages(t) for t in ("Hi", "Hi there, train")], SamplingConfig(0.0, 1.0, 6, 2), 0
    )
    for (response,), text in zip(sampled, ("Hi", "Hi there, train"), strict=True):
        plain = plain_answer(policy, encode_prompt(tokenizer, as_messages(text)))
        assert response.tokens[: len(plain)] == plain
    if layout == "packed":
        enable_packed_attention(ours)
    with torch.no_grad():
        logps = completion_logps(ours, LAYOUTS[layout].collate(pairs)).sums.view(2, -1)
    for i, pair in enumerate(pairs):
        assert logps[:, i].tolist() == pytest.approx(plain_logps(policy, pair), abs=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_is_refused_before_training_with_the_reason(name, start, tmp_path):
    save(name, REFUSED[name].changes, tmp_path / name)
    with pytest.raises(UserError, match=REFUSED[name].message):
        start(tmp_path / name)


def test_the_page_has_the_tables():
    page = (ROOT / "docs" / "models.md").read_text()
    trained = [f"| `{name}` | {row.models} | `{row.layout}` |" for name, row in TRAINED.items()]
    refused = [f"| `{name}` | {row.models} | {row.reason} |" for name, row in REFUSED.items()]
    for lines in (trained, refused):
        assert "\n".join(lines) + "\n\n" in page, "docs/models.md lacks:\n" + "\n".join(lines)
