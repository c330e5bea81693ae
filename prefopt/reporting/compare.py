"""The answers of two policies side by side, as a page."""

import html
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --a: #0072b2; --b: #d55e00; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.2rem; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { opacity: .7; } dd { margin: 0; }
form { position: sticky; top: 0; background: Canvas; padding: .6rem 0; border-bottom: 1px solid var(--line); }
form > * { font: inherit; margin-right: .6rem; }
article { border-bottom: 1px solid var(--line); padding: 1rem 0; }
article > p { white-space: pre-wrap; margin: 0 0 .6rem; font-weight: 600; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 45rem) { .answers { grid-template-columns: 1fr; } }
.answers > div { background: var(--soft); border-top: 3px solid transparent; padding: .5rem .7rem; min-width: 0; }
.answers > .a.preferred { border-color: var(--a); } .answers > .b.preferred { border-color: var(--b); }
.answers pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
small { opacity: .75; } .a b { color: var(--a); } .b b { color: var(--b); }
"""
# The texts are in the page; the script only hides and orders them.
SCRIPT = """
const list = document.querySelector('main'), items = [...list.children], form = document.forms[0];
function update() {
  const words = form.words.value.toLowerCase(), side = form.side.value, [key, sign] = form.order.value.split(' ');
  const shown = items.filter(i => (!side || i.dataset.side === side) && i.textContent.toLowerCase().includes(words));
  items.sort((x, y) => sign * (x.dataset[key] - y.dataset[key]) || x.dataset.index - y.dataset.index);
  items.forEach(i => { i.hidden = !shown.includes(i); list.append(i); });
  form.count.value = shown.length + ' of ' + items.length;
}
form.addEventListener('input', update); form.addEventListener('submit', e => e.preventDefault()); update();
"""
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
    """One HTML file that needs nothing besides. All text of models and data is escaped. A is the run, which
    alpaca-eval's annotations call 2, and B the baseline."""
    figures, judge = record["figures"], record["judge"]["name"]
    wins = {side: sum(_side(row) == side for row in annotations) for side in ("a", "b", "tie")}
    facts = {
        "A": f"{record['model']} ({record['path']})",
        "B": f"{record['baseline']['name']} ({record['baseline']['path']})",
        "judge": judge,
        "preferred": f"A {wins['a']}, B {wins['b']}, neither {wins['tie']}, of {figures['n']}",
        "win rate of A": f"{figures['win_rate']:.1f} ± {figures['standard_error']:.1f} %",
        "cut off": f"A {record['unfinished']['model']}, B {record['unfinished']['baseline']}",
        "sampling": ", ".join(f"{k} {v}" for k, v in record["settings"]["sampling"].items()),
        "weights": f"A {record['weights'][:12]}, B {(record['baseline']['weights'] or 'from a file')[:12]}",
    }
    orders = ORDERS if "reward_1" in annotations[0] else {k: v for k, v in ORDERS.items() if "reward" not in k}
    options = "".join(f'<option value="{key}">{html.escape(name)}</option>' for key, name in orders.items())
    sides = {"": "all", "a": "A preferred", "b": "B preferred", "tie": "neither"}
    choices = "".join(f'<option value="{key}">{name}</option>' for key, name in sides.items())
    listed = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(record["model"])} and {html.escape(record["baseline"]["name"])}</title>
<style>{STYLE}</style></head><body>
<h1>What two runs answer</h1><dl>{listed}</dl>
<form><input name="words" type="search" placeholder="words in prompt or answers" aria-label="words">
<select name="side" aria-label="preferred">{choices}</select><select name="order" aria-label="order">{options}</select>
<output name="count"></output></form>
<main>{"".join(_article(row) for row in annotations)}</main>
<script>{SCRIPT}</script></body></html>
"""


def _side(row: dict[str, Any]) -> str:
    return "a" if row["preference"] > 1.5 else "b" if row["preference"] < 1.5 else "tie"


def _article(row: dict[str, Any]) -> str:
    a, b, side = row["output_2"], row["output_1"], _side(row)
    rewards = row.get("reward_2"), row.get("reward_1")
    keys = {"index": row["index"], "side": side, "preference": row["preference"], "length": len(a) - len(b)}
    keys |= {"reward": row["reward_2"] - row["reward_1"]} if "reward_1" in row else {}

    def answer(name: str, text: str, reward: float | None) -> str:
        mark = " preferred" if side == name else ""
        told = f"{len(text)} characters" + (f", reward {reward:.3f}" if reward is not None else "")
        return (
            f'<div class="{name}{mark}"><small><b>{name.upper()}</b> {told}{", preferred" * bool(mark)}</small>'
            f"<pre>{html.escape(text)}</pre></div>"
        )

    data = " ".join(f'data-{k}="{v}"' for k, v in keys.items())
    return (
        f"<article {data}><p>{html.escape(row['instruction'])}</p>"
        f'<div class="answers">{answer("a", a, rewards[0])}{answer("b", b, rewards[1])}</div></article>'
    )
