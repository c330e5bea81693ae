"""What README, the pages and the YAML files say can be done works, and their links lead somewhere."""

import dataclasses
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import build, parse, register
from prefopt.data.dataset_path import replace_path
from prefopt.evaluation.config import (
    AlpacaConfig,
    ArenaConfig,
    HarnessConfig,
    JudgeCheckConfig,
    MtbenchConfig,
    RankConfig,
    RewardBenchConfig,
)
from prefopt.generation.config import ChatConfig, SampleConfig
from prefopt.lab import LabConfig
from prefopt.objectives.__main__ import markdown
from prefopt.objectives.base import Objective
from prefopt.prefetch import PrefetchConfig
from prefopt.reporting.config import ClaimsConfig, CompareConfig, DataReportConfig, PapersConfig, ReportConfig
from prefopt.rewards.config import ScoreConfig, TokenWeightsConfig
from prefopt.tracking.status import RunsConfig
from prefopt.training.config import OnlineConfig, TrainConfig, check
from prefopt.training.optim import Schedule
from tests.helpers.tiny import ROOT, run_program, write_pairs

README = (ROOT / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "prefopt/data/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
YAMLS = sorted([*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")])
SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "harness": HarnessConfig,
    "alpaca": AlpacaConfig,
    "mtbench": MtbenchConfig,
    "arena": ArenaConfig,
    "judge_check": JudgeCheckConfig,
    "reward_bench": RewardBenchConfig,
    "compare": CompareConfig,
    "claims": ClaimsConfig,
    "online": OnlineConfig,
    "chat": ChatConfig,
    "sample": SampleConfig,
    "score": ScoreConfig,
    "rank": RankConfig,
    "token_weights": TokenWeightsConfig,
    "report": ReportConfig,
    "papers": PapersConfig,
    "runs": RunsConfig,
    "prefetch": PrefetchConfig,
    "data_report": DataReportConfig,
    "lab": LabConfig,
}
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
SAID_OF_A_FILE = r"`([\w/.]+)`:\n\n```\w+\n(.*?)```"  # a block, and the path that the line above it names
spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert spec
assert spec.loader
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(page: Path) -> list[str]:
    """What stands in code marks or is a line of a block."""
    text = page.read_text().replace("\\\n", " ")
    blocks = [line for block in FENCE.findall(text) for line in block.splitlines()]
    return blocks + re.findall(r"`([^`]+)`", FENCE.sub("", text)) + re.findall(r"^    (\S.*)$", text, re.MULTILINE)


def commands() -> list[str]:
    """`PROGRAM OVERRIDES` of every command of prefopt in a page or a YAML, `prefopt X` or `python -m prefopt.X`."""
    lines = [line for page in PAGES for line in code(page)]
    lines += [line for file in YAMLS for line in file.read_text().splitlines()]
    found = [m for line in lines if (m := re.search(r"(?:-m prefopt\.|^prefopt )(\w+[^`#(]*)", line))]
    # Two tests below write and use the objectives of README and extend.md; two programs take no overrides; one command
    # reads runs (tests/tracking/test_best.py).
    listing = ("objectives --markdown", "objectives NAME")
    elsewhere = ("=softplus_margin", "--config-dir", "--help", *listing, "prefopt diff", "prefopt.diff", "${best:")
    texts = {m.group(1).strip() for m in found if not any(e in m.group() for e in elsewhere)}
    return sorted(texts - {"objectives"} - set(SCHEMAS))  # without overrides it is the program's name in a sentence


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command, tmp_path, monkeypatch):
    name, *overrides = shlex.split(command)
    if "dataset=pairs.jsonl" in overrides:  # a file of the reader's, whose rows are looked at
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        monkeypatch.chdir(tmp_path)
        overrides = replace_path(overrides, name)
    schema = SCHEMAS[name]
    grid = [[f"{key}={value}" for value in values.split(",")] if "[" not in values else [o]
            for o in overrides if o != "-m" and not o.startswith("--")
            for key, _, values in [o.partition("=")]]  # fmt: skip
    register(schema)
    for point in itertools.product(*grid):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(compose(name, list(point)), schema)
        if isinstance(config, TrainConfig):
            check(config)
            build(config.objective, Objective, "objective")
            build(config.schedule, Schedule, "schedule")


def test_there_are_commands_to_test():
    assert len(commands()) >= 100
    assert {c.split()[0] for c in commands()} == set(SCHEMAS)


def written(page: str, folder: Path) -> list[str]:
    """Write the blocks of `page` that name a path into `folder`; returns the paths."""
    blocks = re.findall(SAID_OF_A_FILE, page, re.DOTALL)
    for path, text in blocks:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return [path for path, _ in blocks]


@pytest.mark.slow
def test_an_objective_is_one_file_and_one_yaml(tiny_folder, overrides, tmp_path):
    """README's own example, written into a copy of the checkout: it trains, and the tests of objectives find it."""
    copy = tmp_path / "copy"
    for folder in ("prefopt", "conf", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert written(README, copy) == [
        "prefopt/objectives/softplus_margin.py",
        "conf/objective/softplus_margin.yaml",
    ]
    process = run_program(*overrides(tmp_path / "runs"), "objective=softplus_margin", "steps=2", cwd=copy)
    assert process.returncode == 0, process.stderr
    assert list((tmp_path / "runs").glob("softplus_margin-*/policy/model.safetensors"))
    arguments = ["-q", "-p", "no:cacheprovider", "tests/objectives/test_objectives.py", "-k", "softplus_margin"]
    tests = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=copy, capture_output=True, text=True)
    failing = re.findall(r"^FAILED \S+::(\w+)", tests.stdout, re.MULTILINE)
    assert failing == [], tests.stdout
    assert int(re.search(r"(\d+) passed", tests.stdout.splitlines()[-1]).group(1)) > 20, tests.stdout  # type: ignore[union-attr]


@pytest.mark.slow
def test_modules_outside_the_checkout_are_used_as_the_page_says(tiny_folder, overrides, tmp_path):
    page = (ROOT / "docs/extend.md").read_text()
    assert len(written(page, tmp_path)) == 9
    train, score = re.findall(r"^prefopt (\w+ --config-dir .*)$", page, re.MULTILINE)
    for split in ("questions", "questions_heldout"):
        rows = [json.loads(line) for line in write_pairs(tmp_path / f"{split}.jsonl").read_text().splitlines()]
        ours = [{"question": f"{row['prompt']} {split}", "good": row["chosen"], "bad": row["rejected"]} for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    program, *arguments = shlex.split(train)
    others = [o for o in overrides(tmp_path / "runs") if not o.startswith(("dataset", "sampling"))]
    others.append("sampling.max_new_tokens=4")
    process = run_program(*arguments, *others, program=program, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (record,) = (tmp_path / "runs").glob("exponential-*-questions-*/record.json")
    config = json.loads(record.read_text())["config"]
    assert config["dataset"]["oracle"] == {"_target_": "brief.Brief", "per_word": 0.1}
    rows = [json.loads(line) for line in (record.parent / "metrics.jsonl").read_text().splitlines()]
    peak = config["optimizer"]["lr"]
    assert {row["lr"] for row in rows if row["split"] == "train"} == {peak, peak / 2}
    assert all(row["oracle_reward"] < 0 for row in rows if row["split"] == "heldout")

    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "?", "responses": ["one", "one two"]}) + "\n")
    program, *arguments = shlex.split(score)
    process = run_program(*arguments, program=program, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "scored.jsonl").read_text())["rewards"] == pytest.approx([-0.1, -0.2])


@pytest.mark.slow
def test_a_task_outside_the_checkout_is_evaluated_as_the_page_says(tiny_folder, overrides, tmp_path):
    page = (ROOT / "docs/extend.md").read_text()
    written(page, tmp_path)
    (line,) = re.findall(r"^prefopt (harness .*)$", page, re.MULTILINE)
    process = run_program(*overrides(tmp_path / "runs"), "steps=1")
    assert process.returncode == 0, process.stderr
    (run,) = (tmp_path / "runs").iterdir()
    rows = [{"question": f"What is {i}?", "good": " a number", "bad": " nothing"} for i in range(4)]
    (tmp_path / "kind_words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program, *arguments = shlex.split(line.replace("runs/RUN", str(run)))
    process = run_program(*arguments, "device=cpu", "precision=float32", "batch_size=4", program=program, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (file,) = (run / "harness").glob("final-kind_words@*.json")
    record = json.loads(file.read_text())
    assert record["task"].startswith("kind_words@")
    assert record["n"] == 4


def test_what_is_generated_is_up_to_date():
    """`make docs` writes both. An objective of one's own need not be in the table."""
    assert (ROOT / "docs/configuration.md").read_text() == generate.configuration()
    page = (ROOT / "docs/objectives.md").read_text()
    process = run_program("--markdown", program="objectives")
    assert process.stdout.strip() == markdown(), process.stderr
    listed = re.findall(r"^\| `\w+` \| .*2\d{3}\.\d{5}.*$", page, re.MULTILINE)
    assert len(listed) >= 18
    assert set(listed) <= set(markdown().splitlines())


def test_every_key_is_on_the_page_of_the_configuration():
    text = (ROOT / "docs/configuration.md").read_text()
    for field in dataclasses.fields(TrainConfig):
        assert f"| `{field.name}` |" in text or f"## {field.name}=…" in text or f"`{field.name}." in text, field.name


def test_make_help_lists_the_targets_of_the_pages():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {line.split()[0] for line in text.splitlines()}
    assert {"help", "setup", "demo", "test"} <= listed
    for page in PAGES:
        for line in code(page):
            targets = re.match(r"make((?: [a-z-]+\b(?!=))+)", line)
            assert not targets or set(targets.group(1).split()) <= listed, (named(page), line)


def test_the_table_in_the_readme_is_the_demos():
    table = (ROOT / "results" / "demo" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 6  # the header, its rule, the initial policy and three runs
    for row in rows:
        assert row in README
    assert "results/demo/reward_kl.png" in README


def anchors(page: Path) -> set[str]:
    """Of a page's headings: those alone that a code host and mkdocs make alike, so that a link works in both."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = heading.replace("`", "").lower()
        on_host = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        ascii_alone = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        in_site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_alone).strip())
        found += [on_host] if on_host == in_site else []
    return {anchor for anchor in found if found.count(anchor) == 1}  # both number the others, each in its way


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_are_named_exist(page):
    """Paths in code marks, and the modules of commands; not what a run or a report writes."""
    text = page.read_text()
    # README's own example is not there, and is the path above a block.
    examples = {path for path, _ in re.findall(SAID_OF_A_FILE, text, re.DOTALL)}
    paths = re.findall(r"`((?:prefopt|conf|sweeps|scripts|tests|docs|benchmarks)/[a-z0-9_/.]*)`", text)
    for path in set(paths) - examples:
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(name)), name


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(listed) == sorted([*pages, "CONTRIBUTING.md", "SECURITY.md"])


def sentences(text: str) -> list[str]:
    """Of paragraphs, list items and quotes; without code, tables, headings and figures."""
    lines = [re.sub(r"^> ?", "", line) for line in FENCE.sub("", text).splitlines()]
    lines = ["" if line.startswith(("|", "#", "![")) else re.sub(r"^\* ", "\n", line) for line in lines]
    paragraphs = re.sub(r"\]\([^)]*\)", "]", "\n".join(lines)).split("\n\n")
    return [s for p in paragraphs for s in re.split(r"(?<=[.?!:])\s+(?=[`*\[A-Z])", p.strip()) if s]


def test_the_readme_is_short_and_so_are_its_sentences():
    assert len(README.splitlines()) <= 150
    found = sentences(README)
    assert len(found) > 20
    for sentence in found:
        assert len(sentence.split()) <= 30, sentence
