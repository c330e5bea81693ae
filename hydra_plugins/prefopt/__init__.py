"""prefopt's plugins for Hydra, which looks for plugins in the namespace package hydra_plugins.

Every application of Hydra in the same environment imports this file, so it must change nothing for others.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, ValueType
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, open_dict

from prefopt.cli.multirun import Point, files_of_groups
from prefopt.config.parse import drop_left_over_of_files
from prefopt.utils.files import ROOT


class SweepsSearchPath(SearchPathPlugin):
    """Lets `+sweep=NAME` find sweeps/sweep/NAME.yaml, whatever the current folder is."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        main = [entry.path for entry in search_path.get_path() if entry.provider == "main"]
        # Hydra asks all plugins for all applications: this one is for ours alone.
        if main and main[0].removeprefix("file://") == str(ROOT / "conf"):
            search_path.append("prefopt", f"file://{ROOT / 'sweeps'}")


class PointsSweeper(Sweeper):
    """Composes all points of a multirun and hands them to the program at once, which starts the jobs itself.

    Hydra's basic sweeper composes every point twice, from all its files, at 0.1 s each time. Points with the same
    choice of files (objective=dpo) differ only in values. Here their files are composed once, and each point is a copy
    with its values put in.
    """

    def __init__(self, params: dict[str, str] | None):
        self.params = [f"{key}={values}" for key, values in (params or {}).items()]

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.program = hydra_context.config_loader, task_function
        self.config: Any = config

    def sweep(self, arguments: list[str]) -> None:
        ranges = OverridesParser.create(config_loader=self.loader).parse_overrides([*self.params, *arguments])
        for override in ranges:
            if override.value_type == ValueType.RANGE_SWEEP:  # 0.1 + 2 * 0.1 is 0.3, as a list has it
                rounded: list[Any] = [
                    float(f"{v:.12g}") if isinstance(v, float) else v for v in override.sweep_iterator()
                ]
                override.value_type, override._value = ValueType.CHOICE_SWEEP, ChoiceSweep(list=rounded)
        (grid,) = BasicSweeper.split_arguments(ranges, None)
        parsed = functools.cache(OverridesParser.create().parse_override)
        is_group = functools.cache(self.loader.repository.group_exists)
        composed: dict[tuple[str, ...], DictConfig] = {}
        points = []
        for overrides in grid:
            # KEY={...} sets values, also where KEY is a group.
            values = [o for o in map(parsed, overrides) if isinstance(o.value(), dict) or not is_group(o.key_or_group)]
            files = tuple(text for text in overrides if parsed(text) not in values)
            if files not in composed:
                composed[files] = self.loader.load_sweep_config(self.config, list(files))
                drop_left_over_of_files(composed[files], files_of_groups(composed[files].hydra))
                with open_dict(composed[files]):
                    del composed[files]["hydra"]
            cfg = copy.deepcopy(composed[files])
            self.loader._apply_overrides_to_config(values, cfg)
            points.append(Point(overrides, cfg))
        self.program(points)


@dataclass
class PointsSweeperConfig:
    """hydra/sweeper: prefopt"""

    _target_: str = f"{__name__}.{PointsSweeper.__name__}"
    params: dict[str, str] | None = None  # override: values, as a sweep file names them


ConfigStore.instance().store(group="hydra/sweeper", name="prefopt", node=PointsSweeperConfig, provider="prefopt")
