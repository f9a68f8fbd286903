"""Writes the tables of `docs/performance.md` from `results/`, so that the page says what was measured and nothing else.

    python -m benchmarks.page

What stands between `<!-- name -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def heaps() -> tuple[list[Found], list[Found]]:
    """The shapes under the default heap and under the kept one; what was not run there has no variants."""
    default = load("adapter_speed")["shapes"]
    try:
        kept = load("adapter_speed-kept_heap")["shapes"]
    except FileNotFoundError:
        kept = [{"variants": {}} for _ in default]
    return default, kept


def time_of(shape: Found, name: str) -> Found | None:
    return shape["variants"][name]["time"] if name in shape["variants"] else None


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
            kept = time_of(k, name)
            times = [spread(v["time"]), spread(kept) if kept else ""]
            rows.setdefault(name, [name]).extend([*times, f"{v['flops']:.3f}", f"{v['saved']:.2f} x"])
    return table(head, list(rows.values()))


def shapes() -> str:
    """The shapes as rows, PEFT's and ours as columns: default heap / kept heap."""
    default, kept = heaps()
    rows = []
    for s, k in zip(default, kept, strict=True):
        names = (lora(s, total=False), lora(s, total=True), LOOP, OURS)
        both = ((time_of(s, n), time_of(k, n)) for n in names)
        times = [" / ".join(median(t) for t in pair if t) for pair in both]
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


def picture() -> str:
    sweep = {one["axis"].split()[0]: one for one in load("scaling")["sweeps"]}
    heads = sweep["heads"]
    rows = [
        [name, *(spread(points[str(n)]) if str(n) in points else "" for n in heads["values"])]
        for name, points in heads["variants"].items()
    ]
    image = "![Time of one adapted linear layer by heads, rank, tasks and tokens](images/scaling.svg)"
    return f"{image}\n\n{table([heads['axis'], *map(str, heads['values'])], rows)}"


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
    tokens = load("training_throughput")["steps"]["tokens_per_step"]
    return f"{table(head, rows)}\n\nTokens in a step that are not padding: {spread(tokens, 0)}."


def step_runs() -> list[Found]:
    """The runs of whole steps, by dtype and rows of a batch."""
    found = [load("training_throughput"), *(load(path.stem) for path in RESULTS.glob("training_steps-*.json"))]
    return sorted(found, key=lambda run: (run["environment"]["settings"]["dtype"] != "float32", rows_of(run)))


def rows_of(run: Found) -> int:
    return run["environment"]["settings"]["batch"]


def place_of(run: Found) -> str:
    return f"{run['environment']['settings']['dtype']}, {rows_of(run)} rows"


def sizes() -> str:
    """Whole steps by dtype and rows of a batch: time to the frozen model's / speed to PEFT LoRA's of rank r."""
    runs = step_runs()
    rows = [["tokens", *(spread(run["steps"]["tokens_per_step"], 0) for run in runs)]]
    for name in runs[0]["steps"]["variants"]:
        found = [run["steps"]["variants"].get(name) for run in runs]
        rows.append([name, *(f"{median(v['time'])} / {v['speed_to_peft_lora']:.2f}" if v else "" for v in found)])
    return table(["", *map(place_of, runs)], rows)


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


def gpu_runs() -> list[Found]:
    """The runs of `gpu_speed`, one a device."""
    return [load(path.stem) for path in sorted(RESULTS.glob("gpu_speed-*.json"))]


def gpu() -> str:
    """Each device's layers and whole model."""
    return "\n\n".join(text for run in gpu_runs() for text in (gpu_layers(run), gpu_model(run)))


def gpu_layers(run: Found) -> str:
    head = ["", *(f"{s['d_in']} → {s['d_out']}, r {s['r']}" for s in run["shapes"])]
    names = list(dict.fromkeys(plain_name(name) for shape in run["shapes"] for name in shape["variants"]))
    rows = []
    for name in names:
        row = [name]
        for shape in run["shapes"]:
            v = next((v for own, v in shape["variants"].items() if plain_name(own) == name), None)
            row.append("out of memory" if v is None else gpu_cell(v))
        rows.append(row)
    return f"{run['environment']['device']}, {gpu_versions(run)}:\n\n{table(head, rows)}"


def gpu_cell(v: Found) -> str:
    busy, alone, peak = v["seconds"]["median"] * 1e3, v["alone"]["median"] * 1e3, f"{v['peak_bytes'] / 2**20:.0f} MiB"
    if busy > alone:  # the step waits for the GPU, and so for the pause that its launches were queued behind
        return f"waits ({alone:.2f}) ms, {peak}"
    return f"{median(v['time'])}: {busy:.2f} ({alone:.2f}) ms, {peak}"


def plain_name(name: str) -> str:
    """A variant's name without the rank, which is another one in each column."""
    return name.replace("r=8", "r").replace("r=16", "r").replace("r=24", "N r").replace("r=48", "N r")


def gpu_versions(run: Found) -> str:
    return ", ".join(f"{name} {run['environment']['versions'][name]}" for name in ("torch", "transformers", "peft"))


def gpu_model(run: Found) -> str:
    model = run["model"]
    plain = model["variants"][f"PEFT LoRA r={model['r']}"]["tokens_per_second"]
    rows = [
        [
            name,
            spread(v["time"]),
            f"{v['tokens_per_second']:,.0f}",
            f"{v['tokens_per_second'] / plain:.2f}",
            f"{v['peak_bytes'] / 2**30:.1f}",
        ]
        for name, v in model["variants"].items()
    ]
    rows += [[name, "out of memory", "", "", ""] for name in model["out_of_memory"]]
    layers, width = model["num_hidden_layers"], model["hidden_size"]
    size = f"{layers} layers of width {width}, {model['batch']} rows of {model['length']}"
    head = ["", "step time", "tokens/s", "speed to PEFT LoRA, rank r", "peak GiB beside the weights"]
    return f"A whole step, {size} tokens, adapters on the MLP projections:\n\n{table(head, rows)}"


Target = tuple[str, str, float, float]  # what, <= or >=, the limit, what was measured


def layer_targets() -> Iterator[Target]:
    default, kept = heaps()
    for heap, found in (("default", default), ("kept", kept)):
        for i in GOAL_SHAPES:
            s, v = default[i], found[i]["variants"]
            if not v:
                continue
            where = f"{s['d_in']} → {s['d_out']}, {heap} heap"
            ours = v[OURS]["time"]["median"]
            yield f"R-LoRA to the frozen layer, {where}", "≤", 1.12, ours
            yield f"R-LoRA to PEFT LoRA of rank r, {where}", "≤", 0.9, ours / v[lora(s, total=False)]["time"]["median"]
    for i in GOAL_SHAPES:
        s = default[i]
        yield f"R-LoRA's saved bytes to x, {s['d_in']} → {s['d_out']}", "≤", 1.05, s["variants"][OURS]["saved"]
    for s in default[:2]:
        v = s["variants"]
        plain = v[lora(s, total=True)]["time"]["median"]
        ratio = {m: v[m.title]["time"]["median"] / plain for m in methods() if m.title in v}
        for what, some, most in (
            ("mixture", [m for m in ratio if m.family == "mixture"], 1.25),
            ("method", list(ratio), 1.5),
        ):
            slowest = max(some, key=ratio.__getitem__)
            where = f"{s['d_in']} → {s['d_out']}"
            yield f"slowest {what} ({slowest.title}) to PEFT LoRA of rank N r, {where}", "≤", most, ratio[slowest]


def scaling_targets() -> Iterator[Target]:
    sweep = {one["axis"].split()[0]: one["variants"] for one in load("scaling")["sweeps"]}
    for what, points, most, few, many in (
        ("R-LoRA with 32 heads to one head, r 4", sweep["heads"][OURS], 1.25, "1", "32"),
        ("MTL-LoRA with 1,000 tasks to 3", sweep["tasks"]["MTL-LoRA"], 1.0, "3", "1000"),
    ):
        yield what, "≤", most, points[many]["seconds"]["median"] / points[few]["seconds"]["median"]


def training_targets() -> Iterator[Target]:
    whole = load("training_throughput")
    found = whole["steps"]["variants"]
    yield "R-LoRA's training step to the frozen model's", "≤", 1.1, found[OURS]["time"]["median"]
    yield "R-LoRA's saved activations to the frozen model's", "≤", 1.0, found[OURS]["saved_to_floor"]
    for run in step_runs():
        variants = run["steps"]["variants"]
        for m in methods():
            if "num_heads" in m.config.__dataclass_fields__ and m.title in variants:
                what = f"{m.title}'s tokens/s to PEFT LoRA's, {place_of(run)}"
                yield what, "≥", 1.1, variants[m.title]["speed_to_peft_lora"]
    useful = whole["trainers"]["headwater_to_trl"]["median"]
    yield "`headwater train` to SFTTrainer, useful tokens/s", "≥", 1.5, useful


def gpu_targets() -> Iterator[Target]:
    for run in gpu_runs():
        device, found = run["environment"]["device"], run["model"]["variants"]
        plain = found[f"PEFT LoRA r={run['model']['r']}"]["tokens_per_second"]
        yield (
            f"R-LoRA's training step to the frozen model's, {device}",
            "≤",
            1.1,
            found[f"{OURS}, triton"]["time"]["median"],
        )
        for name in (f"{OURS}, triton", "HydraLoRA", "M-LoRA", "MTL-LoRA", "MultiLoRA"):
            what = f"{name.removesuffix(', triton')}'s tokens/s to PEFT LoRA's, {device}"
            yield what, "≥", 1.1, found[name]["tokens_per_second"] / plain


def decode_targets() -> Iterator[Target]:
    for batch in load("decode_speed")["batches"]:
        step = batch["variants"][OURS]["median"]
        yield f"R-LoRA's token to the base model's, batch {batch['batch']}", "≤", 1.15, step


def targets() -> str:
    """Each target, what was measured, and whether it is met."""
    rows: list[list[str]] = []
    for part in (layer_targets, scaling_targets, training_targets, gpu_targets, decode_targets):
        with contextlib.suppress(FileNotFoundError):
            for what, sign, limit, value in part():
                met = round(value, 2) <= limit if sign == "≤" else round(value, 2) >= limit
                rows.append([what, f"{sign} {limit:g}", f"{value:.2f}", "yes" if met else "**no**"])
    return table(["target", "", "measured", "met"], rows)


def formulations() -> str:
    wide, narrow = load("formulations")["shapes"]
    head = ["", *(f"{s['d_in']} → {s['d_out']}: {what}" for s in (wide, narrow) for what in ("time", "saved"))]
    rows = []
    for name, v in wide["variants"].items():
        other = narrow["variants"][name]
        rows.append([name, spread(v["time"]), f"{v['saved']:.2f} x", spread(other["time"]), f"{other['saved']:.2f} x"])
    return table(head, rows)


SECTIONS = (device, targets, layer, shapes, picture, decode, steps, sizes, trainers, gpu, formulations)


def section_text(section: Callable[[], str]) -> str:
    try:
        return section()
    except FileNotFoundError:
        return "Not measured yet."


def filled(page: str, sections: Mapping[str, str]) -> str:
    """The page with the text of every section, by name, between its marks; what stands outside of them is kept.

    Raises:
        ValueError: if the page has no place for a section, or more than one.
    """
    for name, text in sections.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n?<!-- end -->)"
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}{t}\n<!-- end -->", page, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the page has {count} places for <!-- {name} --> ... <!-- end -->, and needs one")
    return page


def written(page: str) -> str:
    """The page with every table made anew."""
    return filled(page, {section.__name__: section_text(section) for section in SECTIONS})


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
