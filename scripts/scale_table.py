"""Print the tables of docs/scale.md: memory and communication on paper, from the plan's formulas.

A test compares them with the page. Change the formulas, then put what this prints into the page.
"""

from unlearn.engines import Engine
from unlearn.recipes.communication import Machine, sent, traffic
from unlearn.recipes.memory import Training, model_states

MODELS = {"1B": 1e9, "8B": 8e9, "70B": 70e9}
ENGINES: tuple[Engine, ...] = ("ddp", "zero2", "fsdp2", "zero3")
DEVICES = (8, 64)
TOKENS = 64 * 2 * 512
"""One optimiser step: 64 forget and 64 retain rows of 512 tokens, dealt out over the devices."""


def states_gib(engine: Engine, devices: int, parameters: float) -> float:
    """Give weights, gradients and optimiser states of one device; all in bfloat16, AdamW."""
    how = Training(engine, processes=devices, half=True)
    sizes = model_states(how, weights=2 * parameters, trained=2 * parameters, trainable=parameters)
    return sum(sizes.values()) / 2**30


def sent_bytes(engine: Engine, devices: int, parameters: float) -> float:
    """Give what one device sends in a step of one micro-batch."""
    return sent(traffic(engine, devices, weights=2 * parameters, gradients=2 * parameters))


def engine_table() -> list[str]:
    """Give one row per model and engine, with a column for each number of devices."""
    ways = [f"{what}, {n} devices" for what in ("GiB", "GB sent", "seconds") for n in DEVICES]
    lines = [f"| model | engine | {' | '.join(ways)} |", "|:--|:--|" + "--:|" * len(ways)]
    for name, parameters in MODELS.items():
        for engine in ENGINES:
            moved = {n: sent_bytes(engine, n, parameters) for n in DEVICES}
            cells = [number(states_gib(engine, n, parameters)) for n in DEVICES]
            cells += [number(moved[n] / 1e9) for n in DEVICES]
            cells += [number(Machine().seconds(moved[n], n)) for n in DEVICES]
            lines.append(f"| {name} | `{engine}` | {' | '.join(cells)} |")
    return lines


def step_table() -> list[str]:
    """Set the least time for sending beside the time for computing, for an engine that splits."""
    lines = ["| model | devices | computing | sending, `zero3` | sending, `ddp` |"]
    lines.append("|:--|--:|--:|--:|--:|")
    for name, parameters in MODELS.items():
        for devices in DEVICES:
            computing = Machine().compute_seconds(parameters, TOKENS / devices)
            each = [
                Machine().seconds(sent_bytes(engine, devices, parameters), devices)
                for engine in ("zero3", "ddp")
            ]
            cells = " | ".join(f"{number(value)} s" for value in (computing, *each))
            lines.append(f"| {name} | {devices} | {cells} |")
    return lines


def number(value: float) -> str:
    """Write two significant digits, or whole numbers above ten."""
    if value >= 10:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def main() -> None:
    """Print both tables as Markdown."""
    print("\n".join([*engine_table(), "", *step_table()]))


if __name__ == "__main__":
    main()
