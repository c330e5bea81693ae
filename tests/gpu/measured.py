"""What the GPU tests have measured, for the table at their end."""

MEASURED: list[tuple[str, float, float]] = []


def check(what: str, value: float, limit: float) -> None:
    """Note `value` for the table, and assert that it is at most `limit`."""
    MEASURED.append((what, value, limit))
    assert value <= limit, f"{what}: {value:g} is above {limit:g}"
