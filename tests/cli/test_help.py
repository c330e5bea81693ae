"""`prefopt`, `prefopt PROGRAM --help`, and what is said of a mistyped command."""

import subprocess
import sys

import pytest
import yaml

from prefopt.__main__ import PROGRAMS, main
from prefopt.cli import help as help_
from prefopt.config.parse import register
from tests.helpers.tiny import ENVIRONMENT, ROOT

NO_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from prefopt.__main__ import main; main()"
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def called(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `prefopt ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["prefopt", *arguments])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # programs wrap both
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0), *capsys.readouterr()  # a text for a code would raise here
    return 0, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_prefopt_alone_lists_the_programs(arguments, monkeypatch, capsys):
    code, said, _ = called(monkeypatch, capsys, *arguments)
    assert code == 0
    listed = [
        line.split()[0] for line in said.partition("Programs:\n")[2].split("\n\n")[0].splitlines() if line[2] != " "
    ]
    assert listed == list(PROGRAMS)
    assert all((ROOT / "prefopt" / f"{p}.py").is_file() or p == "objectives" for p in PROGRAMS)
    assert "Train one policy" in said
    assert said.count("\n  prefopt train ") == 2
    assert max(map(len, said.splitlines())) <= 80


def test_an_unknown_program_gets_a_hint(monkeypatch, capsys):
    code, said, errors = called(monkeypatch, capsys, "trian")
    assert (code, said) == (2, "")
    assert errors == "error: there is no program 'trian'. Did you mean prefopt train?\n"
    code, _, errors = called(monkeypatch, capsys, "xyz")
    assert code == 2
    assert "train, online" in errors


def leaves(node: dict[str, object], prefix: str = "") -> list[str]:
    """The dotted keys of a program's file."""
    found = []
    for name, value in node.items():
        if prefix or name not in ("defaults", "hydra"):
            found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return found


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p not in ("objectives", "diff")])
def test_help_of_a_program(program, monkeypatch, capsys):
    code, said, errors = called(monkeypatch, capsys, program, "--help")
    assert (code, errors) == (0, "")
    assert "hydra" not in said.lower()
    assert said.partition("Examples:\n")[2].startswith(f"  python -m prefopt.{program}")
    assert [line for line in said.splitlines() if len(line) > 80] == []
    for key in leaves(yaml.safe_load((ROOT / "conf" / f"{program}.yaml").read_text())):
        assert f"\n  {key}=" in said, key


def test_help_does_not_depend_on_what_is_registered(monkeypatch, capsys):
    """conf/compare.yaml has keys that the schema of conf/alpaca.yaml, on which it builds, has not."""
    from prefopt.evaluation.config import AlpacaConfig
    from prefopt.reporting.config import CompareConfig

    shown = []
    for schema in (AlpacaConfig, CompareConfig):
        register(schema)
        shown.append(called(monkeypatch, capsys, "compare", "--help"))
    assert shown[0] == shown[1]
    assert shown[0][0] == 0


def test_help_of_train_holds_groups_keys_and_comments(monkeypatch, capsys):
    _, said, _ = called(monkeypatch, capsys, "train", "--help")
    words = " ".join(said.split())
    for part in (
        "peft lora_attention, lora_attention_mlp, none (now: none)",
        "objective alpha_dpo, alpha_po, aot,",
        "steps=null optimizer steps; null: as many as `epochs` take",
        "sampling.top_p=1.0 only the most likely tokens",
        "optimizer.lr=null peak learning rate",
        "Keys of objective=dpo: objective.beta=0.1 strength of the pull",
        "demo, lab/madpo, lab/mmpo, lab/objectives, lab/rewards, lab/sft, madpo/ablation",
    ):
        assert part in words, part


def test_help_follows_the_choices_beside_it(monkeypatch, capsys, tmp_path):
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("_target_: mine.Mine\nsharpness: 2.5 # of the corner\n")
    _, said, _ = called(monkeypatch, capsys, "train", "objective=mmpo", "--help")
    assert "Keys of objective=mmpo:\n  objective.beta=0.05" in said
    _, said, _ = called(monkeypatch, capsys, "train", "--config-dir", str(tmp_path), "objective=mine", "--help")
    assert "Keys of objective=mine:\n  objective.sharpness=2.5         of the corner\n" in said
    assert "mappo, margin_matching, mine," in " ".join(said.split())
    code, said, errors = called(monkeypatch, capsys, "train", "objective=mmop", "--help")
    assert (code, said) == (2, "")
    assert "Did you mean objective=mmpo?" in errors


def test_groups_of_which_nothing_is_chosen_are_listed(monkeypatch, capsys):
    _, said, _ = called(monkeypatch, capsys, "score", "--help")
    assert "scorer columns, custom_reward_model, function, hub_reward_model, lab," in " ".join(said.split())
    assert "input=???" in said
    assert "\n  objective.base.beta=0.1 " in called(monkeypatch, capsys, "train", "objective=mappo", "--help")[1]
    assert "launcher" not in called(monkeypatch, capsys, "compare", "--help")[1]


@pytest.mark.parametrize("arguments", [[], ["train", "--help"], ["alpaca", "--help"], ["data_report", "--help"]])
def test_help_does_without_torch(arguments):
    process = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "Examples:" in process.stdout


def test_python_m_shows_the_same_help(monkeypatch, capsys):
    from prefopt import train

    _, said, _ = called(monkeypatch, capsys, "train", "--help")
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == said


HINTS = {
    "objective=dp": "Did you mean objective=dpo?",
    "objective=zzz": "The choices are: alpha_dpo, alpha_po,",
    "objective=mappo objective/base=ip": "Did you mean objective/base=ipo?",
    "-m objective=dpo,mmop": "Did you mean objective=mmpo?",
    "-m +sweep=demoo": "Did you mean +sweep=demo?",
    "lr=1": "Did you mean optimizer.lr=1?",
    "beta=0.3": "Did you mean objective.beta=0.3?",
    "dataset=/data/path.jsonl": "data file /data/path.jsonl does not exist",
    "dataset=file.jsonl": "data file file.jsonl does not exist",
    "dataset=somebody/pairs": "\n  dataset=jsonl dataset.train=somebody/pairs\n",
    "dataset=HuggingFaceH4/ultrafeedback_binarized": "\n  dataset=ultrafeedback_binarized\n",
    "dataset.columns.prompt=q": "\n  +dataset.columns.prompt=q\n",
    "launcher=slurm launcher.options=[--qos=long]": "\n  'launcher.options=[\"--qos=long\"]'\n",
    "model=/models/llama": "\n  model=hub model.path=/models/llama\n",
    "model=Qwen/Qwen2.5-0.5B": "\n  model=hub model.path=Qwen/Qwen2.5-0.5B\n",
}


@pytest.mark.parametrize("given", HINTS)
def test_a_mistyped_command_gets_the_line_that_works(given, monkeypatch, capsys):
    from prefopt import train

    monkeypatch.setattr(sys, "argv", ["train.py", *given.split()])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as ended:
        train.main()
    said, errors = capsys.readouterr()
    assert (ended.value.code, said) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("error:") == 1
    assert HINTS[given] in errors


@pytest.mark.parametrize("width", [60, 80])
def test_commands_break_where_a_shell_goes_on(width):
    text = "python -m prefopt.train 'a=b c' " + " ".join(f"key{i}=value" for i in range(12))
    lines = help_._command(text, width)
    assert max(map(len, lines)) <= width
    assert " ".join(line.strip().removesuffix("\\").strip() for line in lines) == text


def test_a_key_beside_help_is_not_shown():
    key = "sk-" + "aB3dE5fG7hI9jK1lM3nO5pQ7" * 2
    process = subprocess.run(
        [sys.executable, "-m", "prefopt", "runs", f"name={key}", "--help"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 2
    assert "the command line holds" in process.stderr
    assert key not in process.stdout + process.stderr
