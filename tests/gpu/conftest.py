"""A table of what the GPU tests have measured, at the end."""

import pytest

from tests.gpu.measured import MEASURED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MEASURED:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
        terminalreporter.section(f"measured on {device}, torch {torch.__version__}")
        width = max(len(what) for what, _, _ in MEASURED)
        for what, value, limit in MEASURED:
            terminalreporter.write_line(f"{what:{width}}  {value:>10.3g}  allowed {limit:g}")
