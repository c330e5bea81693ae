"""The files of MT-Bench and Arena-Hard: published ones alone, which their SHA-256 tells, from a folder or the cache."""

import ast
import hashlib
import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.data.sources import digest
from prefopt.errors import UserError
from prefopt.utils.files import atomic_write, cache_dir

FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat"
ARENA_HARD_AUTO = "https://raw.githubusercontent.com/lmarena/arena-hard-auto/196f6b826783b3da7310e361a805fa36f0be83f3"
SECONDS = 60  # for a download
GIT_DIGITS = 40


@dataclass(frozen=True)
class BenchmarkFile:
    """A published file. `digest`: its SHA-256, or the id of its content in git, of which alone that is known.
    `prefetch`: what `python -m prefopt.prefetch` is told to fetch it. `convert`: what makes the file of what lies at
    `url`."""

    name: str
    digest: str
    url: str
    prefetch: str
    convert: Callable[[bytes], bytes] = bytes

    @property
    def cached(self) -> Path:
        return cache_dir() / "benchmarks" / self.digest[:16] / self.name

    def is_in(self, path: Path) -> bool:
        """Whether the file at `path` is this one."""
        if len(self.digest) == GIT_DIGITS:
            content = path.read_bytes()
            return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest() == self.digest
        return digest(str(path)) == self.digest

    def find(self, files: str | None) -> Path:
        """The file in or below the folder `files`, or else in the user's cache. Raises UserError where there is none
        that has its digest."""
        places = sorted(Path(files).expanduser().rglob(self.name)) if files else []
        others = []
        for path in [*places, self.cached]:
            if path.is_file():
                if self.is_in(path):
                    return path
                others.append(str(path))
        beside = f" ({', '.join(others)} is not it)" if others else ""
        raise UserError(
            f"the published {self.name}, SHA-256 {self.digest}, is not here{beside}. Fetch it on a machine with "
            f"network: python -m prefopt.prefetch {self.prefetch}; or name a folder that holds it: files=FOLDER"
        )

    def fetch(self) -> Path:
        """The file in the cache, downloaded if need be. Raises UserError where that fails, or gives another file."""
        if self.cached.is_file() and self.is_in(self.cached):
            return self.cached
        try:
            with urllib.request.urlopen(self.url, timeout=SECONDS) as response:
                content = self.convert(response.read())
        except (OSError, ValueError, SyntaxError, LookupError) as error:
            raise UserError(f"{self.url}: {error}") from None
        atomic_write(self.cached, content)
        if not self.is_in(self.cached):
            self.cached.unlink()
            raise UserError(f"what lies at {self.url} is not the published {self.name}: it has another SHA-256")
        return self.cached

    def rows(self, files: str | None) -> list[dict[str, Any]]:
        """The rows of `find`. A line ends at a line feed alone: some hold other separators."""
        return [json.loads(line) for line in self.find(files).read_bytes().split(b"\n") if line]

    def json(self, files: str | None) -> Any:
        """The content of `find`, one JSON value."""
        return json.loads(self.find(files).read_text())


def judge_settings(source: bytes) -> bytes:
    """The mapping JUDGE_SETTINGS of Arena-Hard's utils/judge_utils.py as JSON. Its code is read, and not run."""
    values: dict[str, Any] = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(name := statement.targets[0], ast.Name):
            values[name.id] = _literal(statement.value, values)
    return json.dumps(values["JUDGE_SETTINGS"], indent=1).encode()


def _literal(node: ast.expr, values: dict[str, Any]) -> Any:
    """A literal, in which names of `values` may stand."""
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(_present(k)): _literal(v, values) for k, v in zip(node.keys, node.values, strict=True)}
    return ast.literal_eval(node)


def _present(node: ast.expr | None) -> ast.expr:
    if node is None:
        raise ValueError("a mapping is unpacked in it")
    return node


def _mt_bench(path: str, sha256: str, commit: str = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d") -> BenchmarkFile:
    url = f"{FASTCHAT}/{commit}/fastchat/llm_judge/data/{path}"
    return BenchmarkFile(path.rpartition("/")[2], sha256, url, "mtbench=true")


def _arena(path: str, sha256: str, version: str, name: str | None = None) -> BenchmarkFile:
    convert: Callable[[bytes], bytes] = judge_settings if name else bytes
    url = f"{ARENA_HARD_AUTO}/{path}"
    return BenchmarkFile(name or path.rpartition("/")[2], sha256, url, f"arena={version}", convert)


MT_BENCH_QUESTIONS = _mt_bench(
    "mt_bench/question.jsonl", "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"
)
MT_BENCH_PROMPTS = _mt_bench("judge_prompts.jsonl", "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6")
MT_BENCH_REFERENCES = {
    "gpt-4": _mt_bench(
        "mt_bench/reference_answer/gpt-4.jsonl", "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f"
    ),
    "gpt-4-0125-preview": _mt_bench(
        "mt_bench/reference_answer/gpt-4-0125-preview.jsonl",
        "e484037da5cc14007dde1d821ef76046fccbd0b2f095237fad9ead2c4fc66800",
        commit="71aa329da2b17f387929ae6f5b3a453804e885cd",
    ),
}
MT_BENCH = [MT_BENCH_QUESTIONS, MT_BENCH_PROMPTS, *MT_BENCH_REFERENCES.values()]


@dataclass(frozen=True)
class ArenaHard:
    """A version of Arena-Hard: its files, the baseline of each category, and what its own programs do.

    `answers`: the baselines' by their names. `judge_tokens`: the limit of a judge's reply. `quantiles`: those of the
    leaderboard's interval. `drops_rows`: a question of which one game has no verdict is left out with both.
    """

    name: str
    questions: BenchmarkFile
    config: BenchmarkFile
    settings: BenchmarkFile
    answers: dict[str, BenchmarkFile]
    baselines: dict[str, str]
    judge_tokens: int
    quantiles: tuple[float, float]
    drops_rows: bool

    @property
    def files(self) -> list[BenchmarkFile]:
        return [self.questions, self.config, self.settings, *self.answers.values()]

    def digests(self) -> dict[str, str]:
        """Of the files without the baselines' answers."""
        return {file.name: file.digest for file in (self.questions, self.config, self.settings)}


def _settings(version: str) -> BenchmarkFile:
    digest_of_json = "b66f754e88b34cfae0bfa226b19a2f3d19252879393947525effc26d2795d8b2"
    return _arena("utils/judge_utils.py", digest_of_json, version, "arena_hard_system_prompts.json")


ARENA_HARD = {
    "v0.1": ArenaHard(
        name="arena-hard-v0.1",
        questions=_arena(
            "data/arena-hard-v0.1/question.jsonl",
            "2650242d2883f22b2abd498f273b6a7e02253cce533f5c91a858e1d44aa3002f",
            "v0.1",
        ),
        config=_arena(
            "config/arena-hard-v0.1.yaml", "87ac45a188421218349697b5eda95cc77f6e60b6f61495d67d8cfebba3210528", "v0.1"
        ),
        settings=_settings("v0.1"),
        answers={
            "gpt-4-0314": _arena(
                "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
                "0f6abc84de4600fde987d9db70f838f4ecdbd27a2f1f4058c12aa322a6f791b2",
                "v0.1",
            )
        },
        baselines={"arena-hard-v0.1": "gpt-4-0314"},
        judge_tokens=4096,
        quantiles=(0.025, 0.975),
        drops_rows=False,
    ),
    "v2.0": ArenaHard(
        name="arena-hard-v2.0",
        questions=_arena(
            "data/arena-hard-v2.0/question.jsonl",
            "a75cef6623db6b27aec810497b059f0659705d7ff48dcbccc5bd5b130728ac73",
            "v2.0",
        ),
        config=_arena(
            "config/arena-hard-v2.0.yaml", "ee68e5c6ac98a79720bf11014fc3f7fc3c3e5899153b3b08efe3db0e174215a0", "v2.0"
        ),
        settings=_settings("v2.0"),
        answers={
            "o3-mini-2025-01-31": _arena(
                "data/arena-hard-v2.0/model_answer/o3-mini-2025-01-31.jsonl",
                "c23a7c255eead99f7f86ad48aa1d8ccdb5b3334f2097e0e1e09184df87265e03",
                "v2.0",
            ),
            "gemini-2.0-flash-001": _arena(
                "data/arena-hard-v2.0/model_answer/gemini-2.0-flash-001.jsonl",
                "75513a4feb8e2f642a9bdb952d1c3ed245b9c952",
                "v2.0",
            ),
        },
        baselines={"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"},
        judge_tokens=16_000,
        quantiles=(0.05, 0.95),
        drops_rows=True,
    ),
}
