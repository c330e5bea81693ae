"""A policy that was trained with the template of a public model stops by itself: in transformers' `generate` and
`pipeline`, without a setting, and in prefopt's sampler.

The templates have the structure of public ones, shortened. Every policy is trained until it gives its answers by heart.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from prefopt.config.parse import parse, register
from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.generation.sampler import sample
from prefopt.models.load import load_model, load_tokenizer
from prefopt.training.config import TrainConfig, check, resolve
from prefopt.training.setup import prepare_run, run
from prefopt.utils import signals
from tests.helpers.tiny import ROOT, tiny_model, tiny_overrides, tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% set words = m.content.split('</think>')[-1].lstrip('\n') %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ words + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
R1_WITH_THOUGHTS = R1.replace(".split('</think>')[-1]", "")
GPT_OSS = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' }}"
    "{{ m.content }}{% if loop.last and not add_generation_prompt %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}"
    "{% endif %}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
LLAMA31 = (
    "{{ bos_token }}{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + today + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ANSWERS = {"Is it good?": "It was great.", "And the train?": "Quick and loud, really."}
THOUGHTS = {prompt: f"<think>\nHm, {prompt}\n</think>\n\n{answer}" for prompt, answer in ANSWERS.items()}


@dataclass(frozen=True)
class Case:
    models: str
    template: str
    terminator: str  # the one that is trained
    eos: str  # of the tokenizer and of config.json
    remark: str  # for the table
    known: tuple[str, ...] = ()  # further tokens that generation_config.json ends at
    tokens: tuple[str, ...] = ()  # other special tokens
    model: dict[str, str] = field(default_factory=dict)  # keys of model.*
    answers: dict[str, str] = field(default_factory=lambda: ANSWERS)  # rows, by prompt
    text: str = "{}"  # what is generated for an answer


CASES = {
    "chatml": Case("Qwen2.5-Instruct, SmolLM2", CHATML, "<|im_end|>", "<|im_end|>", "closes with eos"),
    "zephyr": Case("Zephyr, Tulu", ZEPHYR, "</s>", "</s>", "closes with eos", tokens=("<|user|>", "<|assistant|>")),
    "gemma": Case(
        "Gemma 2 and 3", GEMMA, "<end_of_turn>", "<eos>",
        "closes with `<end_of_turn>`, which generation_config.json names; system messages go to the user's first turn",
        known=("<end_of_turn>",), tokens=("<bos>", "<start_of_turn>"),
    ),
    "phi3": Case(
        "Phi-3, Phi-3.5", PHI, "<|end|>", "<|endoftext|>",
        "closes with `<|end|>`, which generation_config.json names; eos at the end of every conversation is left out",
        known=("<|end|>", "<|assistant|>"), tokens=("<|user|>", "<|system|>"),
    ),
    "qwen2.5-base": Case(
        "Qwen2.5 base models", CHATML, "<|im_end|>", "<|endoftext|>",
        "closes with `<|im_end|>`, which nothing else names: `model.eos_token='<|im_end|>'`",
        model={"eos_token": "'<|im_end|>'"},
    ),
    "qwen3": Case(
        "Qwen3", QWEN3, "<|im_end|>", "<|im_end|>", "thoughts of the last answer are learnt, in the template's layout",
        known=("<|endoftext|>",), answers=THOUGHTS,
    ),
    "qwen3-without-thoughts": Case(
        "Qwen3", QWEN3, "<|im_end|>", "<|im_end|>",
        "`+model.chat_template_kwargs.enable_thinking=false`: the empty thought is a part of the prompt",
        known=("<|endoftext|>",),
        model={"chat_template_kwargs.enable_thinking": "false"},
    ),
    "r1-distill": Case(
        "DeepSeek-R1-Distill", R1, "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        "deletes the thoughts of answers: such rows are refused; `model.chat_template=FILE` with a template that keeps "
        "them",
        tokens=("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        model={"chat_template": "FILE"}, answers=THOUGHTS,
    ),
    "gpt-oss": Case(
        "gpt-oss", GPT_OSS, "<|return|>", "<|return|>",
        "inner turns close with `<|end|>` and are learnt without it; the date is `model.date`",
        known=("<|endoftext|>", "<|call|>"), tokens=("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
        text="<|channel|>final<|message|>{}",
    ),
    "mistral": Case(
        "Mistral v0.3", MISTRAL, "</s>", "</s>",
        "writes a system message before the last turn alone: it goes to the user's first turn",
        tokens=("<s>", "[INST]", "[/INST]"), text=" {}",
    ),
    "llama3.1": Case(
        "Llama 3.1, 3.2", LLAMA31, "<|eot_id|>", "<|eot_id|>", "the date is `model.date`",
        known=("<|endoftext|>",), tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    ),
}  # fmt: skip


def save(case: Case, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*case.tokens, *case.known, case.eos, case.terminator]})
    tokenizer.add_tokens(["<think>", "</think>"])  # which are no special tokens in public models
    tokenizer.eos_token = case.eos
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.bos_token = case.tokens[0] if "bos_token" in case.template else None
    tokenizer.chat_template = case.template
    tokenizer.save_pretrained(folder)
    model = tiny_model(len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([case.eos, *case.known])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(case) -> the folder of the policy, trained in this process."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(signals, "install_handlers", lambda: None)  # pytest has its own

    def train(case: Case) -> Path:
        save(case, tmp_path / "model")
        rows = [{"prompt": prompt, "chosen": answer, "rejected": "No."} for prompt, answer in case.answers.items()]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "FILE").write_text(R1_WITH_THOUGHTS)
        overrides = tiny_overrides(tmp_path / "model", tmp_path, tmp_path / "runs")
        overrides += ["dataset.heldout=null", "dataset.heldout_share=0", "objective=sft", "steps=120", "batch_size=2"]
        overrides += ["save_every=120", "eval_every=120", "optimizer.lr=1e-2", "micro_batch_tokens=400"]
        overrides += [f"{'+' if '.' in key else ''}model.{key}={value}" for key, value in case.model.items()]
        register(TrainConfig)
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(compose("train", overrides), TrainConfig)
        if config.model.chat_template:
            config.model.chat_template = str(tmp_path / config.model.chat_template)
        check(config)
        resolve(config)
        plan = prepare_run(config)
        run(plan)
        return plan.run.policy_folder

    return train


@pytest.mark.parametrize("name", CASES)
def test_a_policy_stops_by_itself_right_behind_its_answer(name, train):
    case = CASES[name]
    folder = train(case)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stop = tokenizer.convert_tokens_to_ids(case.terminator)
    assert tokenizer.eos_token_id == stop
    for values in (model.config, model.generation_config):
        ids = values.eos_token_id
        assert stop == (ids if isinstance(ids, int) else ids[0])

    generator = pipeline("text-generation", model=str(folder), device="cpu")
    ours = load_model(ModelConfig(name, str(folder)), "cpu")
    for prompt, answer in case.answers.items():
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
        before = tokenizer.decode(inputs["input_ids"][0])
        # Where the generation prompt opens a thought, the answer goes on in it.
        expected = case.text.format(answer.removeprefix("<think>\n") if before.endswith("<think>\n") else answer)
        assert tokenizer.decode(output) == expected + case.terminator

        words = tokenizer.decode(output, skip_special_tokens=True)
        torch.manual_seed(0)  # a pipeline samples, at temperature 0.7
        said = generator(messages, max_new_tokens=60)[0]["generated_text"]
        assert said == [*messages, {"role": "assistant", "content": words}]

        ((response,),) = sample(
            ours, load_tokenizer(ModelConfig(name, str(folder))), [messages], SamplingConfig(0.0, 1.0, 60, 1), 0
        )
        assert response.finished
        assert response.tokens == output.tolist()
        assert response.text == words


@pytest.mark.parametrize("name", ["gpt-oss", "llama3.1"])
def test_the_exported_template_writes_the_date_of_the_training(name, train):
    tokenizer = AutoTokenizer.from_pretrained(train(CASES[name]))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert ("date: 2024-07-26<|end|>" if name == "gpt-oss" else "Date: 26 Jul 2024") in text


def test_the_page_has_the_table():
    lines = [f"| {case.models} | {case.remark.replace('|', chr(92) + '|')} |" for case in CASES.values()]
    page = (ROOT / "docs" / "models.md").read_text()
    assert "\n".join(lines) + "\n\n" in page, "docs/models.md lacks:\n" + "\n".join(lines)
