"""Bad input to every program: one message that says what is wrong, where, and what to do next; a non-zero exit code, no
traceback, nothing written, no model loaded.

The table is the test. A case is a command line, run in a folder that holds model/ (a tiny Llama), train.jsonl,
heldout.jsonl and the files of the case, and the words that the message must contain.
"""

import contextlib
import gzip
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from safetensors.torch import load_file, save_file

from prefopt.models import load
from prefopt.utils import signals
from tests.helpers.tiny import ROOT, run_program, write_pairs

ALWAYS = {
    "train": "model=hub model.path=model dataset=jsonl dataset.train=train.jsonl dataset.heldout=heldout.jsonl "
    "runs_dir=runs logger=quiet device=cpu precision=float32",
    "chat": "device=cpu precision=float32",
    "sample": "model=hub model.path=model device=cpu precision=float32 prompts=in.jsonl output=out.jsonl",
    "score": "device=cpu precision=float32 input=in.jsonl output=out.jsonl",
    "online": "model=hub model.path=model device=cpu precision=float32 logger=quiet prompts=in.jsonl stages=1",
    "harness": "device=cpu precision=float32",
    "alpaca": "device=cpu precision=float32 instructions=in.jsonl",
    "compare": "device=cpu precision=float32 instructions=in.jsonl",
    "data_report": "model=hub model.path=model dataset=jsonl output=out",
}
Content = str | bytes | Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    wrong: str
    program: str
    """With its flags: "train -m"."""
    given: str
    """What is added to ALWAYS on the command line."""
    says: tuple[str, ...]
    files: dict[str, Content] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    loads: bool = False
    """Whether only the loaded model shows it."""


def pair(**changes) -> str:
    return json.dumps({"prompt": "Hi", "chosen": "x", "rejected": "y"} | changes) + "\n"


def scored(**changes) -> str:
    return json.dumps({"prompt": "Hi", "responses": list("abcd"), "rewards": [1, 2, 3, 4]} | changes)


def config(wrong: str, given: str, *says: str, **more) -> Case:
    return Case(f"train: {wrong}", "train", given, says, **more)


def sweep(wrong: str, given: str, *says: str, **more) -> Case:
    return Case(f"sweep: {wrong}", "train -m", given, ("nothing was started", *says), **more)


def rows(wrong: str, content: Content, *says: str, given: str = "", name: str = "bad.jsonl", **more) -> Case:
    """Bad training rows."""
    given = f"dataset.train={name} dataset.heldout=null {given}"
    return Case(f"rows: {wrong}", "train", given, (name, *says), files={name: content}, **more)


def format_(name: str) -> str:
    return f"dataset.format._target_=prefopt.data.formats.{name}"


def model(wrong: str, change: Callable[[Path], object], *says: str, given: str = "", **more) -> Case:
    """A model that is the tiny one but for a change."""

    def make(folder: Path) -> None:
        shutil.copytree(folder.parent / "model", folder)
        change(folder)

    return Case(f"model: {wrong}", "train", f"model.path=bad {given}", says, files={"bad": make}, **more)


def other(program: str, wrong: str, given: str, *says: str, **more) -> Case:
    return Case(f"{program}: {wrong}", program, given, says, **more)


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def changed(name: str, **values) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def weights(change: Callable) -> Callable[[Path], object]:
    """Each tensor by `change(name, tensor)`; None leaves it out."""

    def rewrite(folder: Path) -> None:
        file = folder / "model.safetensors"
        kept = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file, {"format": "pt"})

    return rewrite


def without_eos(folder: Path) -> None:
    """No file says which token ends a turn."""
    written("tokenizer_config.json", "{}")(folder)
    changed("config.json", eos_token_id=None)(folder)
    changed("generation_config.json", eos_token_id=None)(folder)


def shortened(folder: Path) -> None:
    """The vocabulary of the model, but not of its tokenizer, becomes 50."""
    changed("config.json", vocab_size=50)(folder)
    weights(lambda name, tensor: tensor[:50].clone() if tensor.shape[0] > 300 else tensor)(folder)


RECORD = {
    "name": "A",
    "id": "1",
    "objective": "dpo",
    "status": "finished",
    "command": "python -m prefopt.train seed=0",
    "config": {
        "steps": 2,
        "seed": 0,
        "model": {"name": "m", "path": "model", "revision": None, "tokenizer": None},
        "dataset": {"name": "d", "train": "train.jsonl", "format": {}, "heldout": None, "heldout_split": "heldout"}
        | {"heldout_share": 0.0},
        "objective": {"beta": 0.1},
        "optimizer": {"lr": 0.1},
        "precision": "float32",
    },
    "initial_weights": "0",
    "machine": {"cores": 1, "processor": "p", "instructions": "i", "memory_gib": 1.0, "gpus": []},
    "git": None,
    "versions": {"torch": "2", "transformers": "5"},
    "seconds": 1.0,
    "evaluations": [],
}
PROMPT = {"in.jsonl": '{"prompt": "Hi"}'}
RESPONSES = {"in.jsonl": '{"prompt": "Hi", "responses": ["a", "b"]}'}


def run(policy: bool = True, **changes) -> dict[str, Content]:
    """runs/A, as a training run leaves it."""
    files: dict[str, Content] = {"runs/A/record.json": json.dumps(RECORD | changes)}
    return files | ({"runs/A/policy/config.json": "{}"} if policy else {}) | PROMPT


TABLE = [
    # The command line, and what Hydra makes of it
    config("a choice that is none", "objective=nonsense", "there is no objective=nonsense", "mmpo", "--help"),
    config("a key that is none", "sead=1", "unknown key sead. Did you mean seed?"),
    config("the same with a plus", "+sead=1", "unknown key sead. Did you mean seed?"),
    config("a nested key", "optimizer.lrr=1", "unknown key optimizer.lrr. Did you mean optimizer.lr?"),
    config("several keys", "+a=1 +model.b=2", "unknown key a.", "unknown key model.b. The keys here are: name"),
    config("an objective's key", "objective.gamma=1", "unknown key objective.gamma. The keys here are", "beta"),
    config("an objective's key with a plus", "+objective.gamma=1", "unknown key objective.gamma"),
    config("another's key", "objective=simpo +objective.label_smoothing=0.1", "unknown key objective.label_smoothing"),
    config("a relative's key", "objective=ipo objective.label_smoothing=0.1", "unknown key objective.label_smoothing"),
    config("a column without plus", "dataset.columns.prompt=q", "+dataset.columns.prompt=q"),
    config("no value", "seed", "cannot read seed: it is no KEY=VALUE", "--help"),
    config("no key", "=3", "must be a string or a list", "=3", "--help"),
    config("no group", "objective=null", "must be a string or a list", "objective=null"),
    config("an open bracket", "optimizer.betas=[0.9", "'[0.9'", "--help"),
    config("a flag that is none", "--multirn", "unrecognized arguments: --multirn"),
    config("another program's config", "--config-name=nonsense", "Cannot find primary config 'nonsense'"),
    config("a deleted key that is none", "~sead", "'sead' does not exist"),
    config("no objective", "~objective", "no value for objective", "objective=VALUE"),
    config("a reference to nothing", "model.name='${nope}'", "model.name: Interpolation key 'nope'", "name=VALUE"),
    config("a reference to itself", "model.name='${model.name}'", "model.name", "Recursive interpolation"),
    config("an unset variable", "objective.beta='${oc.env:NOPE}'", "objective.beta", "'NOPE' not found"),
    # Types and values
    config("text for a number", "steps=many", "steps=many", "'many'", "Integer", "--help"),
    config("a float for an integer", "steps=1.5", "steps=1.5", "Integer"),
    config("null for a number", "seed=null", "seed=null", "not Optional"),
    config("a list for a number", "steps=[1,2]", "steps=[1,2]", "Integer"),
    config("a list for a mapping", "dataset.columns=[a]", "dataset.columns=[a]", "Cannot merge DictConfig"),
    config("an objective's type", "objective.beta=strong", "objective.beta", "'strong'", "Float"),
    config("negative beta", "objective.beta=-1", "objective.beta must be positive, got -1.0"),
    config("beta is not a number", "objective.beta=nan", "objective.beta must be a finite number, is nan"),
    config("infinite beta", "objective.beta=inf", "objective.beta must be a finite number, is inf"),
    config("infinite learning rate", "optimizer.lr=inf", "optimizer.lr must be a finite number, is inf"),
    config("infinite epochs", "epochs=inf", "epochs must be a finite number, is inf"),
    config("a beta of Adam's of 1", "optimizer.betas=[0.9,1]", "optimizer.betas must be two numbers in [0, 1)"),
    config("no epsilon", "optimizer.eps=0", "optimizer.eps must be positive, is 0.0"),
    config("zero steps", "steps=0", "steps must be at least 1, is 0"),
    config("steps and epochs", "steps=4 epochs=2", "steps=4 and epochs=2 are given: leave one of them out"),
    config("several values", "steps=0 optimizer.lr=0", "steps must be at least 1", "optimizer.lr must be positive"),
    config("a seed too large", "seed=99999999999", "seed must be from 0 to 4294967295, is 99999999999"),
    config("an unused parameter", "objective=f_dpo objective.alpha=0.5", "objective.alpha must be null unless"),
    config("micro-batches", "objective=mmpo objective.micro_batch_size=3", "must be a multiple of objective.micro_b"),
    config("a missing device", "device=cuda:7", "device=cuda:7 is not on this machine. Give device=auto or device=cpu"),
    config("precision", "precision=float16", "precision must be auto, bfloat16 or float32, is 'float16'"),
    config("layout", "layout=dense", "layout must be packed or prefix_shared or padded, is 'dense'"),
    config("temperature", "sampling.temperature=-1", "sampling.temperature must not be negative"),
    config("warm-up", "schedule.warmup=1.5", "schedule.warmup must be a share"),
    config("alarm", "squeeze_alarm=0", "squeeze_alarm must be positive, or null"),
    config("adapter of no rank", "peft=lora_attention peft.r=0", "peft.r must be at least 1, is 0"),
    config("no adapter", "model.adapter=none", "model.adapter=none is no adapter", "adapter_config.json"),
    config("no adapter to switch off", "reference=adapter_off", "reference=adapter_off", "peft=lora_attention"),
    config("patience for nothing", "dataset.heldout=null dataset.heldout_share=0 patience=2",
           "no pairs are held out: give dataset.heldout=FILE"),
    config("a reference that is none", "reference_model=none", "reference_model=none", "Give a hub name"),
    config("runs in a file", "runs_dir=train.jsonl", "runs_dir=train.jsonl", "is a file", "Give another runs_dir"),
    # What a _target_ names
    config("a target that is none", "objective._target_=prefopt.objectives.nope.Nope", "objective._target_: cannot im"),
    config("another kind", "objective._target_=prefopt.training.optim.Cosine", "be a dataclass derived from Objective"),
    config("a function", "dataset.format._target_=os.system", "dataset.format._target_: cannot import 'os.sys"),
    config("no mapping", "dataset.format=Pairs", "dataset.format must be a mapping with `_target_`, is 'Pairs'"),
    config("a base by name", "objective=mappo objective/base=sft", "there is no objective/base=sft", "simpo"),
    config(
        "a base by target", "objective=mappo objective.base._target_=prefopt.objectives.sft.SFT",
             "derived from Pairwise"
    ),
    config("a base's value", "objective=mappo objective.base.beta=0", "objective.base.beta must be positive, got 0.0"),
    config("a base of no wrapper", "objective=dpo objective/base=dpo", "Could not override 'objective/base'"),
    config("a policy that is none", "dataset.policies.identical=keeep", "one of drop, fail, keep, is 'keeep'"),
    config("a scale of one end", "dataset.reward_scale=[1]", "dataset.reward_scale must be [lowest, highest]"),
    config("a source with rows besides", "+dataset.sources.a.train=x.jsonl", "either train (and heldout) or sources"),
    config(
        "a source's key",
        "dataset.train=null dataset.heldout=null +dataset.sources.a.train=train.jsonl +dataset.sources.a.trian=x",
        "unknown key dataset.sources.a.trian. Did you mean dataset.sources.a.train?",
    ),
    # Sweeps and launchers
    config("a launcher without sweep", "launcher=slurm", "a launcher is for a sweep: add -m"),
    config("a dry run without sweep", "--dry-run", "--dry-run shows the jobs of a sweep", "-m ... --dry-run"),
    other("train -m", "Hydra's launcher", "hydra/launcher=basic", "choose one by launcher=NAME"),
    other("train -m", "Hydra's sweeper", "hydra/sweeper=basic", "Hydra's own sweepers are not used here"),
    other("train -m", "a sweep that is none", "+sweep=nonsense", "there is no +sweep=nonsense", "demo"),
    other("train -m", "a choice that is none", "objective=dpo,nonsense", "there is no objective=nonsense"),
    other("train -m", "launcher's key", "+launcher.jobs=3 seed=1,2",
             "unknown key launcher.jobs. The keys here are: at"),
    other("train -m", "no jobs at once", "launcher.at_once=0 seed=1,2", "launcher.at_once must be at least 1, or null"),
    sweep("one bad point", "objective.beta=0.1,-1", "objective.beta=-1: objective.beta must be positive, got -1.0"),
    sweep("a missing file", "seed=1,2 dataset.train=none.jsonl", "seed=1; seed=2: data file none.jsonl does not exist"),
    sweep("two launchers", "launcher=local,slurm", "launcher=slurm: the jobs of a sweep have one launcher"),
    # Files of rows
    rows("empty", "", "is empty. It must hold at least one row"),
    rows("only blanks", "\n \n", "is empty. It must hold at least one row"),
    rows("half a row", pair() + '{"prompt": "Hi"', "row 2 is not JSON", "one JSON object, in UTF-8"),
    rows("a list", pair() + "[1]", "row 2 must be a JSON object, is a list"),
    rows("invalid UTF-8", pair().encode() + b'{"prompt": "\xff"}', "row 2 is not JSON", "0xff", "in UTF-8"),
    rows("UTF-16", pair().encode("utf-16"), "bad.jsonl is in UTF-16", "iconv -f UTF-16 -t UTF-8 bad.jsonl >"),
    rows("half a character", pair(chosen="\ud800"), "row 1 is not JSON", "surrogates not allowed"),
    rows("deep brackets", pair() + "[" * 100_000, "row 2 is not JSON", "recursion"),
    rows("5,000 digits", pair() + '{"id": ' + "9" * 5000 + "}", "row 2 is not JSON", "4300 digits"),
    rows("half a gzip", gzip.compress(pair().encode())[:-9], "cannot be read", "Get it again", name="bad.jsonl.gz"),
    rows("no gzip", pair(), "cannot be read: Not a gzipped file", "Get it again", name="bad.jsonl.gz"),
    rows("no list", "{}", "must hold a list of JSON objects", "an object without fields", name="bad.json"),
    rows("half a row in .json", pair() + '{"prompt', "row 2 is not JSON", "one JSON object, in UTF-8", name="bad.json"),
    rows("no Parquet", b"PAR1", "cannot be read", "Get it again", name="bad.parquet"),
    rows("another kind of file", "a,b", "of no kind that can be read", ".jsonl", name="bad.txt"),
    rows("a short row", "prompt,chosen,rejected\nHi,x\n", "bad.csv, row 1 (line 2) has 2 cells", name="bad.csv"),
    rows("an open quote", 'prompt,chosen,rejected\nHi,"x,y\n', "bad.csv, line 2", "never closed", name="bad.csv"),
    rows("another split", pair(split="test"), "no row of bad.jsonl has split 'train'; there are: test"),
    rows("a split that is a list", pair(split=["train"]), "has split 'train'; there are: ['train']"),
    config("no file", "dataset.train=none.jsonl", "data file none.jsonl does not exist. Give a file (.jsonl"),
    config("no file given", "dataset.train=null", "no value for dataset.train", "dataset.train=VALUE"),
    # Rows
    rows("no field", pair() + '{"prompt": "Hi"}', "row 2 has no field 'chosen' (its fields: prompt)",
             "dataset.columns"),
    rows("a mapped field", pair(), "row 1 has no field 'prompt.deeper'", given="+dataset.columns.prompt=prompt.deeper"),
    rows("null", pair(chosen=None), "(missing_text: 1). bad.jsonl, row 1: field 'chosen' is null", "Mend the row"),
    rows("an empty prompt", pair(prompt=" "), "row 1: 'prompt' is empty"),
    rows("parts", pair(prompt=[{"role": "user", "content": [{"type": "text"}]}]), "has a text part without 'text'"),
    rows(
        "swapped roles",
        pair(prompt=[{"role": "assistant", "content": "Hi"}]),
        "row 1: wrong roles (the turns are assistant, assistant)",
        "dataset.policies.wrong_roles=drop",
    ),
    rows("NaN reward", pair(chosen_reward=float("nan")), "'chosen_reward' must be a finite number, is nan"),
    rows("a reward of 400 digits", pair(chosen_reward=10**400), "row 1: field 'chosen_reward' must be a finite number"),
    rows("a reward as words", pair(chosen_reward="high"), "(bad_reward: 1)", "must be a finite number, is 'high'"),
    rows("a reward off the scale", pair(chosen_reward=5), "chosen_reward 5 is outside",
             given="dataset.reward_scale=[0,1]"),
    rows("only identical pairs", pair(chosen="y"), "nothing is left", "(identical: 1)", "dataset.policies.DEFECT"),
    rows("a repeated prompt", pair() * 2, "row 2: duplicate prompt", given="dataset.policies.duplicate_prompt=fail"),
    Case(
        "rows: a million characters",
        "train",
        "dataset.train=bad.jsonl dataset.heldout=null",
        ("nothing is left of the train split (dropped: prompt_too_long 1). Raise max_prompt_tokens=1800",),
        {"bad.jsonl": pair(prompt="so " * 333_333)},
    ),
    rows("responses as text", scored(responses="abcd"), "'responses' must be a list of texts",
             given=format_("ScoredResponses")),
    rows("a reward too few", scored(rewards=[1, 2, 3]), "4 responses have 3 rewards", given=format_("ScoredResponses")),
    rows("finished as text", scored(finished=["no"] * 4), "'finished' must be a list of true",
             given=format_("ScoredResponses")),
    rows("a prior too few", scored(responses=list("abc"), rewards=[1, 2, 3], rewards_high=[1]),
             "3 responses have 1 rewards_high",
             given=format_("NoisyPreferences")),
    rows("four responses", scored(), "a row needs 3 responses",
             given=format_("NoisyPreferences")),
    rows("no beginning in common", pair(), "no common beginning", given=format_("ImplicitPrompt")),
    rows("no transcript", pair(), "a transcript must begin with", given=format_("Transcripts")),
    rows("no chat", pair(), "has no field 'messages'", "Chats rows are", given=format_("Chats")),
    config("no rewards", "objective=mappo dataset.train=bad.jsonl", "mappo_dpo needs the prior rewards",
           "1 of 1 train items have none", "chosen_reward and rejected_reward", files={"bad.jsonl": pair()}),
    config("a step of one pair", "objective=kto batch_size=1 dataset.train=bad.jsonl",
           "objective kto takes the completions of another pair of the step, and batch_size=1 has none",
           files={"bad.jsonl": pair()}),
    config("no prior for labels", "objective=reward objective.labels=soft objective.gamma=2 dataset.train=bad.jsonl",
           "objective reward needs the prior rewards", "1 of 1 train items have none", files={"bad.jsonl": pair()}),
    config("rewards above 1", "objective=mappo dataset.train=bad.jsonl", "needs rewards in [0, 1]", "has 5",
           "dataset.reward_scale", files={"bad.jsonl": pair(chosen_reward=5, rejected_reward=1)}),
    config("chats for pairs", f"dataset.train=bad.jsonl dataset.heldout=null {format_('Chats')}",
           "objective dpo compares two completions, and bad.jsonl holds chats", files={"bad.jsonl": json.dumps(
               {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]})}),
    config("rows' columns as oracle", "dataset.oracle={_target_:prefopt.rewards.scorers.Columns}",
           "dataset.oracle: Columns reads what a row holds", "+scorer@dataset.oracle=vader"),
    config("no model of the oracle", "+scorer@dataset.oracle=reward_model dataset.oracle.path=no/such",
           "no model can be loaded from dataset.oracle.path=no/such"),
    config("no function of the oracle", "+scorer@dataset.oracle=function dataset.oracle.function=json.none",
           "dataset.oracle.function: cannot import 'json.none'"),
    config("prompts", "sampling.prompts=-1", "sampling.prompts must not be negative"),
    config("oracle without prompts",
           "dataset.oracle={_target_:prefopt.rewards.scorers.Vader} dataset.heldout=null dataset.heldout_share=0",
           "no pairs are held out: give dataset.heldout=FILE"),
    # Models
    config("no model", "model.path=no/such-model", "no model can be loaded from model.path=no/such",
             "prefopt.prefetch"),
    config("no GGUF", "model.path=none.gguf", "model file none.gguf does not exist"),
    config("junk as GGUF", "model.path=bad.gguf", "bad.gguf cannot be read", "Get it again",
             files={"bad.gguf": "GGUF no"}),
    config("no package", "model.path=package://no_such_package/x.gguf", "no_such_package is not installed",
             "pip install"),
    model("no config", without("config.json"), "no model can be loaded from model.path=bad", "Give a hub name"),
    model("half a config", written("config.json", "{"), "model.path=bad", "config.json' is not a valid JSON file"),
    model("another library's", changed("config.json", model_type="nonsense"), "model.path=bad",
             "model type `nonsense`"),
    model("heads that do not fit", changed("config.json", hidden_size=33), "model.path=bad", "Give a hub name"),
    model("no template", without("chat_template.jinja"), "has no chat template. Use an instruction-tuned model"),
    model("half a template", written("chat_template.jinja", "{% for"),
          "the chat template of bad is no Jinja: unexpected",
          "model.chat_template=FILE"),
    model("a template that refuses", written("chat_template.jinja",
             "{{ raise_exception('never') }}"), "fails on a plain conversation: never. Use"),
    model("a template without end", written("chat_template.jinja",
             "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
          "does not close the assistant's turn", "model.chat_template=FILE"),
    model("no end of a turn", without_eos, "does not close the assistant's turn with an eos token (the tokenizer has",
          "model.eos_token='<|im_end|>'"),
    model("no tokenizer", written("tokenizer.json", "{}"), "no tokenizer can be loaded from model.path=bad",
          "Give a hub name"),
    model("too short for the rows", changed("config.json", max_position_embeddings=16), "the longest row has ",
             "bad was made for 16 (max_position_embeddings). Lower max_prompt_tokens=1800"),
    model("a vocabulary that does not fit", shortened, "has 320 tokens and the model 50 embeddings", loads=True),
    model("a layer is missing", weights(lambda name, tensor: None if "layers.1" in name else tensor),
          "the checkpoint bad lacks 9 of its model's weights", "get the checkpoint again", loads=True),
    model("weights of another size", weights(lambda name, tensor: tensor[:8].clone() if "norm" in name else tensor),
          "the checkpoint bad lacks", "or has them in another shape", loads=True),
    model("half a checkpoint", written("model.safetensors", b"\x00" * 100), "can be loaded from model.path=bad",
             "Give a hub", loads=True),
    model("no weights", without("model.safetensors"), "no model can be loaded from model.path=bad", "model.safetensors",
             loads=True),
    model("weights are not numbers", weights(lambda name, tensor: tensor * float("nan")), "gives nan", "again",
             loads=True),
    model("no such layers", lambda folder: None, "none with the name nope in llama. All layers",
          given="peft.target_modules=[nope]", loads=True),
    # The environment
    config("two processes", "", "WORLD_SIZE", "engine=single trains in one: add engine=fsdp", env={"WORLD_SIZE": "2"}),
    config("many processes", "", "WORLD_SIZE must be a number, is 'many': unset it", env={"WORLD_SIZE": "many"}),
    config("a cache in a file", "", "PREFOPT_CACHE=train.jsonl", "is a file", env={"PREFOPT_CACHE": "train.jsonl"}),
    # prefopt.sample
    other("sample", "no file", "", "data file in.jsonl does not exist. Give a file"),
    other("sample", "no value", "output=???", "no value for output", "output=VALUE", files=PROMPT),
    other("sample", "no prompt", "", "in.jsonl, row 1 has no field 'prompt' (its fields: q)",
             files={"in.jsonl": '{"q": 1}'}),
    other("sample", "a number", "", "row 1: field 'prompt' must be text", "Mend", files={"in.jsonl": '{"prompt": 1}'}),
    other("sample", "nobody asks", "", "row 1: the turns are system, assistant, and must be user and",
          files={"in.jsonl": '{"prompt": [{"role": "system", "content": "Hi"}]}'}),
    other("sample", "output is input", "output=in.jsonl", "output=in.jsonl is what is read", "another", files=PROMPT),
    other("sample", "output is a folder", "output=model", "output=model must be a file", ".jsonl.gz", files=PROMPT),
    other("sample", "output of another kind", "output=out.json", "whose name ends in .jsonl", files=PROMPT),
    other("sample", "a folder in a file", "output=in.jsonl/a.jsonl", "in.jsonl is a file, and no folder", files=PROMPT),
    other("sample", "no samples", "samples_per_prompt=0", "samples_per_prompt must be at least 1", files=PROMPT),
    other("sample", "no backend", "backend=nope", "backend must be transformers or server, is 'nope'", files=PROMPT),
    other("sample", "a folder of two splits", "prompts=data", "data is no file", "the splits test, train", "split=NAME",
          files={"data/train.jsonl": "", "data/test.jsonl": ""}),
    other("sample", "a folder without rows", "prompts=model", "model/generation_config.json must hold a list of JSON"),
    other("sample", "another's rest", "", "was begun with other settings", "remove the file to begin again", loads=True,
          files=PROMPT | {"out.jsonl.partial": "junk\n"}),
    # prefopt.chat
    other("chat", "no run", "run=nowhere", "nowhere", "record.json"),
    other("chat", "no model", "model=hub model.path=nowhere", "no tokenizer can be loaded from model.path=nowhere"),
    # prefopt.score
    other("score", "no scorer", "", "no value for scorer", "scorer=VALUE", files=RESPONSES),
    other("score", "nothing to score", "scorer=vader", "row 1 has no field 'chosen'", "A row to score has",
             files=PROMPT),
    other("score", "no texts", "scorer=vader", "row 1: field 'responses' must be text, is int",
          files={"in.jsonl": '{"prompt": "Hi", "responses": [1]}'}),
    other("score", "the prompt's field", "scorer=vader name=prompt", "name=prompt cannot be the field",
             files=RESPONSES),
    other("score", "no numbers", "scorer=columns", "has no number 'scores'", "scorer.responses", files=RESPONSES),
    other("score", "scale", "scorer=columns scorer.scale=[1]", "scorer.scale must be [lowest, highest]",
             files=RESPONSES),
    other("score", "code of others", "scorer=custom_reward_model scorer.path=x", "scorer.trust_remote_code=true",
          files=RESPONSES),
    other("score", "no reward model", "scorer=reward_model scorer.path=model", "model is no reward model",
          "it lacks score.weight. Give the policy/", files=RESPONSES, loads=True),
    # prefopt.online
    other("online", "too few prompts", "scorer=vader stages=3", "1 different prompts do not suffice for stages=3",
          files=PROMPT),
    other("online", "one sample", "scorer=vader samples_per_prompt=1", "samples_per_prompt must be at least 2",
             files=PROMPT),
    other("online", "no pairs", "scorer=vader objective=sft", "reads no pairs", "dataset.format.pairing=group",
          files=PROMPT),
    other("online", "no groups", "scorer=vader objective=dpo dataset.format.pairing=group", "compares two responses",
          "dataset.format.pairing=best_worst", files=PROMPT),
    other("online", "no policy", "scorer=vader objective=reward", "does not train a policy", "dpo", files=PROMPT),
    other("online", "rows of its own", "scorer=vader dataset.train=train.jsonl", "dataset.train: a stage makes its own",
          files=PROMPT),
    other("online",
             "another format", f"scorer=vader {format_('Pairs')} ~dataset.format.pairing ~dataset.format.min_gap",
          "dataset.format does not read", "leave dataset=samples", files=PROMPT),
    other("online", "what a stage would refuse", "scorer=vader schedule.warmup=-1", "schedule.warmup must be",
             files=PROMPT),
    other("online", "runs in a file", "scorer=vader runs_dir=in.jsonl", "runs_dir=in.jsonl", "is a file", files=PROMPT),
    # prefopt.harness
    other("harness", "no run", "run=none", "run=none is no run's folder: it holds no record.json"),
    other("harness", "nothing at all", "", "give run=FOLDER, or a model with output=FOLDER"),
    other("harness", "no policy", "run=runs/A",
             "runs/A has no policy yet: it is failed. Finish it: python -m prefopt.train",
          files=run(policy=False, status="failed")),
    other("harness", "half a record", "run=runs/A", "record.json cannot be read", "Bring it back",
          files={"runs/A/record.json": "{"}),
    other("harness", "no record", "run=runs/A", "record.json holds a list, and should hold",
          files={"runs/A/record.json": "[]"}),
    other("harness", "no tasks", "run=runs/A tasks=[]", "tasks must be mmpo, mappo, a task of lm-eval", files=run()),
    other("harness", "a number as task", "run=runs/A tasks=[3]", "or a list of them, is [3]", files=run()),
    other("harness", "no rows", "run=runs/A limit=0", "limit must be at least 1, or null, is 0", files=run()),
    other("harness -m", "one bad run", "run=runs/A,none", "nothing was started", "run=none is no run's folder",
             files=run()),
    # prefopt.alpaca and prefopt.compare
    other("alpaca", "no key", "run=runs/A judge=gpt4o_mini", "environment variable OPENAI_API_KEY. Set it, or take",
          files=run()),
    other("alpaca", "no judge", "run=runs/A", "no value for judge", "judge=VALUE", files=run()),
    other("alpaca", "no model to judge", "run=runs/A judge=local", "no value for judge.model", files=run()),
    other("alpaca", "no address", "run=runs/A judge=local judge.model=x judge.base_url=ftp://x", "http(s)://HOST",
             files=run()),
    other("alpaca", "no prompt", "run=runs/A judge=local judge.model=x judge.base_url=http://x "
          "judge.annotator.prompt_template=none", "judge.annotator.prompt_template=none: no such file", files=run()),
    other("alpaca", "no such judge", "run=runs/A judge=gpt4o_mini judge.name=none",
             "judge.name=none: alpaca-eval has no",
          files=run(), env={"OPENAI_API_KEY": "none"}),
    other("alpaca", "cost", "run=runs/A judge=reward_model max_cost=-1", "max_cost must not be negative", files=run()),
    other("alpaca", "no questions", "run=runs/A judge=reward_model", "neither a field 'instruction' nor 'prompt'",
          "its fields: q", files=run() | {"in.jsonl": '{"q": "Hi"}'}),
    other("alpaca", "no baseline", "run=runs/A judge=reward_model baseline=none", "baseline=none", "Give", files=run()),
    other("alpaca", "a baseline that is silent", "run=runs/A judge=reward_model baseline=b.jsonl",
          "b.jsonl has no answer to 1 of 1 questions",
          files=run() | {"b.jsonl": '{"instruction": "a", "output": "b"}'}),
    other("alpaca -m", "one bad judge", "run=runs/A judge=reward_model,gpt4o_mini", "judge=gpt4o_mini: judge",
             "OPENAI_API_KEY",
          files=run()),
    other("compare", "three runs", "run=a run=b run=c", "two runs are compared", "run=A run=B"),
    other("compare", "no second run", "run=runs/A run=none", "baseline=none", "Give", files=run()),
    other("compare", "no questions", "run=runs/A run=runs/A instructions=null",
             "name the questions by instructions=FILE",
          files=run()),
    # prefopt.report, prefopt.papers, prefopt.runs
    other("report", "no runs", "", "no finished run in runs", "python -m prefopt.train"),
    other("report", "half a record", "", "runs/A/record.json cannot be read", "Bring it back",
          files={"runs/A/record.json": "{"}),
    other("report", "a record in another code", "", "record.json cannot be read",
             files={"runs/A/record.json": b"\xff"}),
    other("report", "a column that is none", "columns=nope", "run A has no nope", files=run()),
    other("report", "a file for a folder", "output=train.jsonl", "output=train.jsonl", "Give another output",
             files=run()),
    other("papers", "no paper", "", "no value for paper", "paper=VALUE"),
    other("papers", "another paper", "paper=nope", "paper must be mmpo, mappo, madpo, is 'nope'"),
    other("papers", "no figures", "paper=mmpo published=none", "published=none holds no", "results/published"),
    other("papers", "nothing evaluated", "paper=mmpo runs_dir=runs published={published}",
             "no policy in runs has been evalu",
          "prefopt.harness", files=run()),
    other("runs", "no folder", "runs_dir=none", "runs_dir=none: there is no such folder", "python -m prefopt.train"),
    other("runs", "another state", "status=[nope]", "there is no nope. A run is new, queued"),
    other("runs", "a path as name", "name=/a", "name=/a must be the name of a run's folder", files=run()),
    # prefopt.data_report and prefopt.prefetch
    other("data_report", "no file", "dataset.train=none.jsonl", "data file none.jsonl does not exist. Give"),
    other("data_report", "no length", "dataset.train=train.jsonl max_prompt_tokens=0",
             "max_prompt_tokens must be at least 1"),
    other("data_report", "no prompts", "dataset.train=train.jsonl evaluation_prompts=[in.jsonl]",
          "in.jsonl, row 1 has no field 'prompt' or 'instruction'", files={"in.jsonl": "{}"}),
    other("data_report", "a file for a folder", "dataset.train=train.jsonl output=train.jsonl", "Give another output"),
    other("prefetch", "no hub", "model=hub model.path=a/b", "it is switched off: unset HF_HUB_OFFLINE", "check=true"),
    other("prefetch", "missing", "model=hub model.path=a/b check=true", "missing: model a/b",
             "prefopt.prefetch model=hub"),
    other("prefetch", "no name", "model=hub model.path='a b' check=true",
             "neither a folder here nor a name on the hub"),
    other("prefetch", "text for yes or no", "check=maybe", "check=maybe", "not a valid bool"),
]  # fmt: skip


@pytest.fixture
def place(tiny_folder, tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").symlink_to(tiny_folder / "model")
    write_pairs(folder / "train.jsonl", 12)
    write_pairs(folder / "heldout.jsonl", 6, start=100)
    monkeypatch.chdir(folder)
    return folder


def lay(folder: Path, files: dict[str, Content]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


def arguments(case: Case) -> list[str]:
    published = ROOT / "results" / "published"
    program, *flags = case.program.split()
    return [*flags, *ALWAYS.get(program, "").split(), *shlex.split(case.given.replace("{published}", str(published)))]


def call(case: Case, monkeypatch) -> tuple[int, str]:
    """(exit code, what is shown) of the program's own main, in this process."""
    program = case.program.split()[0]
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments(case)])
    shown = io.StringIO()
    code: int | str | None = 0
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            import_module(f"prefopt.{program}").main()
        except SystemExit as error:
            code = error.code
    return (1, f"{shown.getvalue()}{code}") if isinstance(code, str) else (code or 0, shown.getvalue())


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case.program.split()[0]}-{case.wrong}")
def test_bad_input_is_refused(case, place, tiny_folder, monkeypatch):
    def no_model(*_, **__):
        raise AssertionError("a model was loaded")

    for variable, value in {"PREFOPT_CACHE": str(tiny_folder / "cache"), **case.env}.items():
        monkeypatch.setenv(variable, value)
    for key in {"OPENAI_API_KEY", "ANTHROPIC_API_KEY"} - set(case.env):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(signals, "install_handlers", lambda: None)  # the signals of this process are pytest's
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)  # it composes everything once more
    if not case.loads:
        monkeypatch.setattr(load, "_from_pretrained", no_model)
    lay(place, case.files)
    before = tree(place)
    code, shown = call(case, monkeypatch)
    assert code in (1, 2), shown
    assert "Traceback" not in shown, shown
    said = shown.replace("\n", " ")
    assert not [words for words in case.says if words not in said], shown
    assert tree(place) == before


def of(wrong: str) -> Case:
    (case,) = (each for each in TABLE if each.wrong == wrong)
    return case


@pytest.mark.parametrize(
    "case",
    [
        of("train: negative beta"),
        of("train: a key that is none"),
        of("rows: invalid UTF-8"),
        of("model: a vocabulary that does not fit"),
        of("sweep: one bad point"),
        of("alpaca: no key"),
    ],
    ids=lambda case: case.wrong,
)
def test_a_process_shows_the_same(case, place, tiny_folder):
    lay(place, case.files)
    before = tree(place)
    env = {"PREFOPT_CACHE": str(tiny_folder / "cache"), "OPENAI_API_KEY": "", "PYTHONPATH": str(ROOT)}
    process = run_program(*arguments(case), program=case.program.split()[0], cwd=place, env=env)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert process.stderr.startswith("error: ") or "\nerror: " in process.stderr
    assert not [words for words in case.says if words not in process.stderr.replace("\n", " ")], process.stderr
    assert tree(place) == before
