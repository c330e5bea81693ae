"""The answers of two policies side by side, as a page."""

from typing import Any

from prefopt.reporting.templating import render

SIDES = {"": "all", "a": "A preferred", "b": "B preferred", "tie": "neither"}
# The page sorts by the first word, a key of an item's `data`, times the second.
ORDERS = {
    "index 1": "in their order",
    "preference 1": "most clearly preferred: B first",
    "preference -1": "most clearly preferred: A first",
    "reward -1": "reward of A above B's",
    "reward 1": "reward of B above A's",
    "length -1": "A longer than B",
    "length 1": "B longer than A",
}


def page(record: dict[str, Any], annotations: list[dict[str, Any]]) -> str:
    """One HTML file that needs nothing besides.

    Args:
        record: the record.json of prefopt.alpaca. A is the run, B its baseline.
        annotations: alpaca-eval's rows, where the run's answer is `output_2` and the baseline's `output_1`; with
            `reward_1` and `reward_2` if the answers were scored.
    """
    figures, baseline, cut_off = record["figures"], record["baseline"], record["unfinished"]
    items = [_item(row) for row in annotations]
    wins = {side: sum(item["side"] == side for item in items) for side in ("a", "b", "tie")}
    facts = {
        "A": f"{record['model']} ({record['path']})",
        "B": f"{baseline['name']} ({baseline['path']})",
        "judge": record["judge"]["name"],
        "preferred": f"A {wins['a']}, B {wins['b']}, neither {wins['tie']}, of {figures['n']}",
        "win rate of A": f"{figures['win_rate']:.1f} ± {figures['standard_error']:.1f} %",
        "cut off": f"A {cut_off['model']}, B {cut_off['baseline']}",
        "sampling": ", ".join(f"{k} {v}" for k, v in record["settings"]["sampling"].items()),
        "weights": f"A {record['weights'][:12]}, B {(baseline['weights'] or 'from a file')[:12]}",
    }
    has_rewards = "reward_1" in annotations[0]
    orders = {key: name for key, name in ORDERS.items() if has_rewards or not key.startswith("reward")}
    titles = record["model"], baseline["name"]
    return render("compare.html", titles=titles, facts=facts, sides=SIDES, orders=orders, items=items)


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of an annotation; `data` are the keys by which the page filters and orders."""
    a, b, preference = row["output_2"], row["output_1"], row["preference"]
    # alpaca-eval's preference goes from 1 (the baseline's answer) to 2 (the run's).
    side = "a" if preference > 1.5 else "b" if preference < 1.5 else "tie"
    data = {"index": row["index"], "side": side, "preference": preference, "length": len(a) - len(b)}
    rewards = {}
    if "reward_1" in row:
        rewards = {"a": row["reward_2"], "b": row["reward_1"]}
        data["reward"] = rewards["a"] - rewards["b"]
    return {"prompt": row["instruction"], "a": a, "b": b, "side": side, "rewards": rewards, "data": data}
