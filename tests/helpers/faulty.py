"""An objective that ends its job in the ways in which jobs end, and pairs that nobody can read."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefopt.data.formats import Pairs
from prefopt.data.items import Dropped, Pair
from prefopt.objectives.base import PairInputs
from prefopt.objectives.dpo import DPO


@dataclass(frozen=True)
class Faulty(DPO):
    """DPO; `fault` is none, raise, raise_in_second (process of two), stop (asked to, in training), exit, leave (exit
    code 0), kill, or a file to wait for. In training only: loss and gradient (of pairs with a chosen completion of 28
    tokens), memory (suffices for one pair), and at the n-th call in one process, as $FAULT_AT="RANK N" says: hang,
    freeze, die. $MENDED turns it off."""

    fault: str = "none"
    calls: ClassVar[list[int]] = []

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        fault = "none" if "MENDED" in os.environ else self.fault
        if fault == "stop" and torch.is_grad_enabled():
            self.calls.append(1)
            if len(self.calls) == 8 and os.environ.get("RANK") != "0":  # in one process of two
                os.kill(os.getpid(), signal.SIGUSR2)
        if torch.is_grad_enabled():
            chosen = self.in_training(fault, inputs, chosen)
        if fault == "raise" or (fault == "raise_in_second" and os.environ.get("RANK") == "1"):
            raise RuntimeError("the fault in the objective")
        if fault == "exit":
            sys.exit("no more of this")
        if fault == "leave":
            os._exit(0)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault.startswith("/") and not Path(fault).exists():
            time.sleep(0.05)
        return super().losses(inputs, chosen, rejected)

    def in_training(self, fault: str, inputs: PairInputs, chosen: Tensor) -> Tensor:
        if fault in ("hang", "freeze", "die"):
            self.calls.append(1)
            if os.environ["FAULT_AT"] == f"{os.environ.get('RANK', '0')} {len(self.calls)}":
                if fault == "hang":
                    time.sleep(3600)
                os.kill(os.getpid(), signal.SIGSTOP if fault == "freeze" else signal.SIGKILL)
        if fault == "memory" and len(chosen) > 1:
            torch.empty(2**60, dtype=torch.uint8)
        bad = (inputs.chosen_lengths == 28).nonzero()[:, 0]
        if fault == "loss":
            return chosen.index_fill(0, bad, torch.nan)
        if fault == "gradient":  # the square root of 0: a value like any other, whose derivative is not finite
            zero = chosen[bad] - chosen[bad].detach()
            return chosen.index_add(0, bad, zero.sqrt())
        return chosen


@dataclass(frozen=True)
class SlowPairs(Pairs):
    """Each takes an hour to read, and does not say so."""

    def __call__(self, row: dict[str, Any]) -> Pair | Dropped:
        time.sleep(3600)
        return super().__call__(row)
