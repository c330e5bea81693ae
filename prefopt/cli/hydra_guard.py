"""Hydra's own section of a config, `hydra.*`: what may stand in it, checked before Hydra builds anything from it.

Hydra imports and calls what this section names: callbacks, logging handlers, launchers, sweepers, packages of configs.
A sweep file or an override may therefore set the few nodes in FREE alone. All else is as conf/ has it.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import hydra._internal.hydra as hydra_application
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from prefopt.errors import UserError
from prefopt.utils.files import ROOT

# Plain values, which Hydra neither imports nor calls.
FREE = ("hydra.sweeper.params", "hydra.sweep.dir", "hydra.mode", "hydra.verbose")
# What Hydra writes itself while it composes.
WRITTEN_BY_HYDRA = (
    *("hydra.overrides", "hydra.runtime"),
    *("hydra.job.name", "hydra.job.override_dirname", "hydra.job.config_name"),
)
GROUPS = {
    "hydra/launcher": "Hydra's own launchers are not used here; choose one by launcher=NAME (conf/launcher)",
    "hydra/sweeper": "Hydra's own sweepers are not used here; a grid is key=VALUE,VALUE after -m",
}


class GuardedLoader(ConfigLoaderImpl):
    """Hydra's loader of configs for the program `conf/<program>.yaml`. It raises UserError for a config in which
    Hydra's own section is another than the program's."""

    def __init__(self, config_search_path: ConfigSearchPath, program: str):
        super().__init__(config_search_path)
        self.program = program

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        check_overrides(overrides)
        # Hydra opens the search path, and imports its packages, while it composes: afterwards would be too late.
        primary = self.repository.load_config(config_name) if config_name else None
        if primary is not None and OmegaConf.select(primary.config, "hydra.searchpath"):
            raise _refused("hydra.searchpath")
        cfg = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        check_section(cfg, expected_section(self.program), len(overrides))
        return cfg


@contextlib.contextmanager
def guarded(program: str) -> Iterator[None]:
    """Inside, Hydra composes with a GuardedLoader."""
    original = hydra_application.ConfigLoaderImpl
    hydra_application.ConfigLoaderImpl = functools.partial(GuardedLoader, program=program)  # type: ignore
    try:
        yield
    finally:
        hydra_application.ConfigLoaderImpl = original  # type: ignore


@functools.cache
def expected_section(program: str) -> dict[str, Any]:
    """{dotted key: value} of Hydra's section as `conf/<program>.yaml` alone has it."""
    search_path = create_automatic_config_search_path(None, None, str(ROOT / "conf"))
    cfg = ConfigLoaderImpl(search_path).load_configuration(program, [], RunMode.RUN)
    return dict(_leaves("hydra", OmegaConf.to_container(cfg.hydra, resolve=False)))


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for an override, or a choice of a group, of Hydra's section outside of FREE."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            key = parser.parse_override(text).key_or_group
        except HydraException:
            continue  # Hydra says itself what it cannot read, before it composes
        if key in GROUPS:
            raise UserError(GROUPS[key])
        if key.replace("/", ".").split(".")[0] == "hydra" and not _is_below(key, FREE):
            raise _refused(key)


def check_section(cfg: DictConfig, expected: dict[str, Any], number_of_overrides: int) -> None:
    """Raise UserError where Hydra's section of a composed config differs from `expected` outside of FREE."""
    section = OmegaConf.to_container(cfg.hydra, resolve=False)
    found = dict(_leaves("hydra", section))
    for key in sorted(found.keys() | expected.keys()):
        if not _is_below(key, (*FREE, *WRITTEN_BY_HYDRA)) and found.get(key) != expected.get(key):
            raise _refused(key)
    # Hydra appends each override to these lists, and runs what stands there.
    if len(cfg.hydra.overrides.hydra) + len(cfg.hydra.overrides.task) != number_of_overrides:
        raise _refused("hydra.overrides")
    params = cfg.hydra.sweeper.params or {}
    for key in params:
        # The value, not the text: a reference may lead to a mapping with a _target_, which Hydra would call.
        if str(key).startswith("_") or not isinstance(params[key], str | int | float | bool | None):
            raise _refused(f"hydra.sweeper.params.{key}")


def _leaves(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    """The values below a node, and its empty mappings, by dotted key."""
    if not isinstance(node, dict) or not node:
        yield prefix, node
        return
    for key, value in node.items():
        yield from _leaves(f"{prefix}.{key}", value)


def _is_below(key: str, nodes: Sequence[str]) -> bool:
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


def _refused(key: str) -> UserError:
    return UserError(
        f"{key} is not taken: Hydra runs code that its own section names. Of that section, a sweep file sets "
        "hydra.sweeper.params, and a command line hydra.sweep.dir. Take the key out of the line or the file."
    )
