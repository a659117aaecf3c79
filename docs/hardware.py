"""Writes the table of compiled memory into docs/hardware.md: `.venv-compile/bin/python docs/hardware.py [CELL ...]`.

Each cell is a run compiled for a device that need not be there, as by `main --plan --compile`, and takes minutes. Finished cells
are kept in docs/hardware.json; the same command goes on with those that are missing or were compiled by other versions. With names
of cells it compiles these only, and with `--table` none.

The compiler for TPUs is in `.venv-compile`, made by `make compile`, and that for GPUs in `.venv-compile-gpu`, made by
`make compile-gpu`. Cells of the other platform are left alone.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import tempfile
import time

from bilevel_jax import files, presets
from bilevel_jax.errors import RunError
from bilevel_jax.planning import compile_plan, targets

PAGE, RESULTS = (pathlib.Path(__file__).with_suffix(suffix) for suffix in (".md", ".json"))
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}

# The published shapes: what the decoder reads of config.json.
MODELS = {
    "pythia-1b": {
        **{"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 8, "max_position_embeddings": 2048, "rotary_pct": 0.25, "use_parallel_residual": True},
    },
    "llama3-8b": {
        **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    },
}
ONE = {"mesh.data": 1, "batch.micro_size": 1, "model.remat": True, "online.slots": 16}  # the smallest run on one device
FOUR = {"batch.micro_size": 4, "online.slots": 16}  # a sequence and four slots on each of four devices


def _cells() -> dict[str, tuple[str, str, dict]]:
    """Name of each cell -> (tier, target, changes of the config), the most useful first."""
    cells = {
        "pythia-1b offline v5p": ("pythia-1b", "tpu-v5p:2x2x1", FOUR),
        "pythia-1b offline v5p xla": ("pythia-1b", "tpu-v5p:2x2x1", FOUR | {"model.attention": "xla"}),
    }
    quantised, last = {"model.quantization": "nf4"}, {"lora.layers": "last:8"}
    for method in ("offline", "online"):
        cells |= {
            f"llama3-8b nf4 {method} v5p": ("llama3-8b", "tpu-v5p:1x1x1", ONE | quantised | {"method": method}),
            f"llama3-8b {method} v5p": ("llama3-8b", "tpu-v5p:1x1x1", ONE | {"method": method}),
        }
    cells |= {
        "llama3-8b nf4 last:8 offline v5p": ("llama3-8b", "tpu-v5p:1x1x1", ONE | quantised | last),
        "pythia-1b online v5p": ("pythia-1b", "tpu-v5p:2x2x1", FOUR | {"method": "online"}),
        "pythia-1b offline v6e": ("pythia-1b", "tpu-v6e:1x1", ONE),
        "pythia-1b online v6e": ("pythia-1b", "tpu-v6e:1x1", ONE | {"method": "online"}),
        "llama3-8b nf4 offline v6e": ("llama3-8b", "tpu-v6e:1x1", ONE | quantised),
        "llama3-8b nf4 online v6e": ("llama3-8b", "tpu-v6e:1x1", ONE | quantised | {"method": "online"}),
        "pythia-1b offline v5e": ("pythia-1b", "tpu-v5e:2x2", FOUR),
    }
    fused = ONE | {"model.attention": "fused"}
    cells |= {
        "pythia-1b offline h100": ("pythia-1b", "gpu-h100", fused | {"batch.micro_size": 4}),
        "pythia-1b offline h100 xla": ("pythia-1b", "gpu-h100", ONE | {"batch.micro_size": 4, "model.attention": "xla"}),
        "llama3-8b online h100": ("llama3-8b", "gpu-h100", fused | {"method": "online"}),
        "llama3-8b nf4 online h100": ("llama3-8b", "gpu-h100", fused | quantised | {"method": "online"}),
    }
    return {name: (tier, target, {"method": "offline"} | changes) for name, (tier, target, changes) in cells.items()}


CELLS = _cells()


def versions(target: str) -> dict[str, str]:
    """The versions that a compiled size depends on."""
    packages = "jax", COMPILERS[targets.parse(target).platform]
    return {name.replace("_", "-"): importlib.metadata.version(name) for name in packages}


def compile_cell(tier: str, target: str, changes: dict) -> dict:
    """All programs of a run but scoring, which takes less than the step."""
    config, parsed, began = presets.get(tier), targets.parse(target), time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / "config.json").write_text(json.dumps(MODELS[tier]))
        config.update_from_flattened_dict(changes | {"model.path": directory})
        todo = compile_plan.make_plan(config, parsed)
        todo = todo._replace(programs=[program for program in todo.programs if program.name != "scoring"])
        compiled = {one.program.name: _numbers(one) for one in compile_plan.compile_all(todo)}
    what = {
        "tier": tier,
        "target": target,
        "changes": changes,
        "attention": "xla" if todo.plan.model.attention == "xla" else "fused",
    }
    return what | {"programs": compiled, "versions": versions(target), "seconds": round(time.perf_counter() - began)}


def _numbers(one: compile_plan.Compiled) -> dict[str, float | None]:
    flops, moved = one.cost
    sizes = dict(zip(("arguments", "temporaries", "code", "results", "held"), one.memory))
    return sizes | {"peak": one.memory.peak, "planned": one.planned, "flops": flops, "bytes": moved if one.counted else None}


def refuse(error: RunError, target: str) -> dict:
    """What is kept of a cell that XLA refuses."""
    return {"refused": str(error), "versions": versions(target)}


def has_compiler(target: str) -> bool:
    """Whether this environment can compile for a target."""
    return importlib.util.find_spec(COMPILERS[targets.parse(target).platform]) is not None


def table(results: dict) -> str:
    """The table in Markdown: a line for each program of each cell."""
    columns = "model", "method", "base", "adapters", "device", "attention", "program", "arguments", "temporaries", "peak"
    columns = *columns, "`--plan`", "FLOPs", "bytes"
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for name, (tier, target, changes) in CELLS.items():
        cell = results.get(name)
        if cell is None:
            continue
        method, base = changes["method"], changes.get("model.quantization", "bfloat16")
        head = [tier, method, base, changes.get("lora.layers", "all"), target]
        if "refused" in cell:
            lines.append(f"| {' | '.join(head)} | {cell['refused']} |" + " |" * 7)
            continue
        for program, numbers in cell["programs"].items():
            sizes = (f"{numbers[key] / 1e9:.2f} GB" for key in ("arguments", "temporaries", "peak"))
            ratio = f"{numbers['planned'] / numbers['peak'] - 1:+.0%}" if compile_plan.is_planned(program) else ""
            cost = f"{numbers['flops']:.3g}", f"{numbers['bytes'] / 1e9:.3g} GB" if numbers["bytes"] else ""
            lines.append(f"| {' | '.join([*head, cell['attention'], program, *sizes, ratio, *cost])} |")
    used = {f"{name} {version}" for cell in results.values() for name, version in cell["versions"].items()}
    missing = [name for name in CELLS if name not in results]
    lines += ["", f"Compiled by {', '.join(sorted(used))}." + (f" Not compiled yet: {', '.join(missing)}." if missing else "")]
    return "\n".join(lines)


def write_page(results: dict) -> None:
    """Replaces what is between the markers of the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    files.write_atomically(PAGE, f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def read() -> dict:
    """The cells that are done."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main(names: list[str]) -> None:
    only_table = "--table" in names
    wanted = [name for name in names if name != "--table"] or list(CELLS)
    unknown = [name for name in wanted if name not in CELLS]
    if unknown:
        sys.exit(f"no cell '{unknown[0]}'; there are: {', '.join(CELLS)}")
    for name in [] if only_table else wanted:
        target = CELLS[name][1]
        if not has_compiler(target):
            if names:
                sys.exit(f"{name}: {COMPILERS[targets.parse(target).platform]} is not installed here")
            continue
        if read().get(name, {}).get("versions") == versions(target):
            continue
        print(f"compiling {name}", flush=True)
        try:
            cell = compile_cell(*CELLS[name])
        except RunError as error:
            cell = refuse(error, target)
        results = read() | {name: cell}  # read again: another process may have added cells
        files.write_atomically(RESULTS, files.to_json(results, indent=1) + "\n")
        write_page(results)
    write_page(read())


if __name__ == "__main__":
    main(sys.argv[1:])
