"""Writes the tables of `docs/performance.md` from `results/`, so that the page says what was measured and nothing else.

    python -m benchmarks.page

What stands between `<!-- name -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.methods import methods

from .layers import LOOP
from .measure import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
OURS = "R-LoRA"
GOAL_SHAPES = (0, 1, 3)  # of adapter_speed's: 896 -> 4864, 4864 -> 896, 640 -> 2048
Found = Mapping[str, Any]


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(value: Found, digits: int = 2) -> str:
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"


def median(value: Found) -> str:
    return f"{value['median']:.2f}"


def heaps() -> tuple[Any, Any]:
    return load("adapter_speed")["shapes"], load("adapter_speed-kept_heap")["shapes"]


def lora(shape: Found, *, total: bool) -> str:
    return f"PEFT LoRA r={shape['r'] * (shape['N'] if total else 1)}"


def layer() -> str:
    """All methods on the first two shapes."""
    rows: dict[str, list[str]] = {}
    head = [""]
    for s, k in zip(*(shapes[:2] for shapes in heaps()), strict=True):
        size = f"{s['d_in']} → {s['d_out']}"
        head += [f"{size}: time, default heap", "kept heap", "FLOPs", "saved"]
        for name, v in s["variants"].items():
            time, kept = spread(v["time"]), spread(k["variants"][name]["time"])
            rows.setdefault(name, [name]).extend([time, kept, f"{v['flops']:.3f}", f"{v['saved']:.2f} x"])
    return table(head, list(rows.values()))


def shapes() -> str:
    """The shapes as rows, PEFT's and ours as columns: default heap / kept heap."""
    default, kept = heaps()
    rows = []
    for s, k in zip(default, kept, strict=True):
        names = (lora(s, total=False), lora(s, total=True), LOOP, OURS)
        times = [f"{median(s['variants'][n]['time'])} / {median(k['variants'][n]['time'])}" for n in names]
        size = [f"{s['d_in']} → {s['d_out']}", *(f"{s[key]:g}" for key in ("tokens", "r", "N", "dropout"))]
        saved = [f"{s['variants'][n]['saved']:.2f}" for n in names]
        rows.append([*size, *times, " / ".join(saved)])
    head = [
        "layer",
        "tokens",
        "r",
        "N",
        "dropout",
        "PEFT LoRA, r",
        "PEFT LoRA, N r",
        "public loop",
        "R-LoRA",
        "saved, the same four",
    ]
    return table(head, rows)


def decode() -> str:
    one, eight = load("decode_speed")["batches"]
    rows = [[name, spread(v), spread(eight["variants"][name])] for name, v in one["variants"].items()]
    return table(["", "batch 1", "batch 8"], rows)


def steps() -> str:
    found = load("training_throughput")["steps"]["variants"]
    head = ["", "step time", "tokens/s", "speed to PEFT LoRA, rank r", "saved MiB", "saved to frozen"]
    rows = [
        [
            name,
            spread(v["time"]),
            f"{v['tokens_per_second']:.0f}",
            f"{v['speed_to_peft_lora']:.2f}",
            f"{v['saved_bytes'] / 2**20:.0f}",
            f"{v['saved_to_floor']:.2f}",
        ]
        for name, v in found.items()
    ]
    return table(head, rows)


def trainers() -> str:
    found = load("training_throughput")["trainers"]
    rows = [
        [name, spread(v["useful_tokens_per_second"], 0), f"{v['share_of_useful_tokens']['median']:.1%}"]
        for name, v in found["trainers"].items()
    ]
    return table(["", "useful tokens/s", "tokens that are not padding"], rows)


def device() -> str:
    found = load("adapter_speed")["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if name != "headwater")
    return f"{found['device']}; {found['threads']} thread, float32; {packages}."


def targets() -> str:
    """Each target, what was measured, and whether it is met."""
    rows: list[list[str]] = []

    def target(what: str, value: float, most: float, *, least: bool = False, digits: int = 2) -> None:
        met = value >= most if least else value <= most
        sign = "≥" if least else "≤"
        rows.append([what, f"{sign} {most:g}", f"{value:.{digits}f}", "yes" if met else "**no**"])

    for heap, found in zip(("default", "kept"), heaps(), strict=True):
        for i in GOAL_SHAPES:
            s, v = found[i], found[i]["variants"]
            where = f"{s['d_in']} → {s['d_out']}, {heap} heap"
            target(f"R-LoRA to the frozen layer, {where}", v[OURS]["time"]["median"], 1.12)
            ratio = v[OURS]["time"]["median"] / v[lora(s, total=False)]["time"]["median"]
            target(f"R-LoRA to PEFT LoRA of rank r, {where}", ratio, 0.9)
    for i in GOAL_SHAPES:
        s = heaps()[0][i]
        target(f"R-LoRA's saved bytes to x, {s['d_in']} → {s['d_out']}", s["variants"][OURS]["saved"], 1.05)
    for heap, found in zip(("default", "kept"), heaps(), strict=True):
        v = found[0]["variants"]
        plain = v[lora(found[0], total=True)]["time"]["median"]
        by_title = {m.title: v[m.title]["time"]["median"] / plain for m in methods() if m.title in v}
        mixtures = {m.title: by_title[m.title] for m in methods() if m.family == "mixture"}
        slowest = max(mixtures, key=mixtures.__getitem__)
        target(f"slowest mixture ({slowest}) to PEFT LoRA of rank N r, {heap} heap", mixtures[slowest], 1.25)
        slowest = max(by_title, key=by_title.__getitem__)
        target(f"slowest method ({slowest}) to PEFT LoRA of rank N r, {heap} heap", by_title[slowest], 1.5)
    sweep = {one["axis"].split()[0]: one["variants"] for one in load("scaling")["sweeps"]}
    heads, tasks = sweep["heads"][OURS], sweep["tasks"]["MTL-LoRA"]
    grows = heads["32"]["seconds"]["median"] / heads["1"]["seconds"]["median"]
    target("R-LoRA with 32 heads to one head, r 4", grows, 1.25)
    target("MTL-LoRA with 1,000 tasks to 3", tasks["1000"]["seconds"]["median"] / tasks["3"]["seconds"]["median"], 1.0)
    whole = load("training_throughput")
    found = whole["steps"]["variants"]
    target("R-LoRA's training step to the frozen model's", found[OURS]["time"]["median"], 1.1)
    target("R-LoRA's saved activations to the frozen model's", found[OURS]["saved_to_floor"], 1.0)
    for m in methods():
        if "num_heads" in m.config.__dataclass_fields__:
            target(f"{m.title}'s tokens/s to PEFT LoRA's", found[m.title]["speed_to_peft_lora"], 1.1, least=True)
    target(
        "`headwater train` to SFTTrainer, useful tokens/s",
        whole["trainers"]["headwater_to_trl"]["median"],
        1.5,
        least=True,
    )
    for batch in load("decode_speed")["batches"]:
        target(f"R-LoRA's token to the base model's, batch {batch['batch']}", batch["variants"][OURS]["median"], 1.15)
    return table(["target", "", "measured", "met"], rows)


def formulations() -> str:
    wide, narrow = load("formulations")["shapes"]
    head = ["", *(f"{s['d_in']} → {s['d_out']}: {what}" for s in (wide, narrow) for what in ("time", "saved"))]
    rows = []
    for name, v in wide["variants"].items():
        other = narrow["variants"][name]
        rows.append([name, spread(v["time"]), f"{v['saved']:.2f} x", spread(other["time"]), f"{other['saved']:.2f} x"])
    return table(head, rows)


SECTIONS = (device, targets, layer, shapes, decode, steps, trainers, formulations)


def written(page: str) -> str:
    """The page with every table made anew."""
    for section in SECTIONS:
        pattern = rf"(<!-- {section.__name__} -->\n).*?(\n<!-- end -->)"
        page, count = re.subn(pattern, lambda m, s=section: f"{m[1]}{s()}{m[2]}", page, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, f"{PAGE.name} has {count} places for {section.__name__}"
    return page


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
