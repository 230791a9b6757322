r"""Time the fit of curvature, and a step with it, against kronfluence 1.0.1.

    python scripts/bench_curvature.py --width 512 --layers 4 --threads 1 --memory
    python scripts/bench_curvature.py --model ../shared/models/tofu-tiny-target \
        --retain '../shared/data/tofu#full:train[:400]' --forget '../shared/data/tofu#forget10' \
        --threads 1 --memory [--kinds kfac ekfac]

Same model (fp32), rows, layers (all linear ones of the decoder), labels (the rows' own, so that
nothing is random) and threads. ``--width``: a random Llama made in memory, and rows of random
tokens whose lengths lie between a quarter of ``--length`` and all of it. Before any time is given,
a process of its own checks that A, G, Λ (in kronfluence's eigenvectors) and a step at the same
damping are the same, counts mapped (``peer_kronfluence.py``).

Each side runs in a process of its own. They go through the phases in turn, one waiting for the
other; ratios are medians over these pairs. Beside the time on the clock stands that of the
processor. Phases:

- ``factors``: the pass that gives A and G.
- ``eigen``: their eigenvectors. ``kfac`` of ours needs none with its own damping (factored); it
  factorises by Cholesky in the step.
- ``spectrum``: the second pass of ``ekfac``.
- ``step``: the gradient of the forget rows, preconditioned.

Kronfluence writes what it fits after every phase and reads it for the next; ours writes when asked.
``speedup`` leaves files out on both sides, ``speedup_with_files`` counts them on both,
``speedup_as_used`` counts kronfluence's alone. ``--memory``: peak resident size beyond that of the
loaded process, phase by phase, in runs of their own whose allocator gives freed blocks back at
once. Files that are mapped into memory count. ``--same-batches`` gives kronfluence rows sorted by
length, so that it has little padding too; a user would have to do that. Before and after every
phase kronfluence collects Python's garbage, seconds in a process with many modules: what was there
before is frozen, so that this costs nothing and is not measured.

What bounds it, for a weight [o, i], n tokens in r rows:

- ``factors``: products for A and G, 2n(i² + o²), beside the model's own pass forward and back. Ours
  has half of the former (a symmetric matrix) and one A for layers that read the same; the pass
  itself stays, but for padding.
- ``eigen``: about 9(i³ + o³) in fp64, which nothing makes fewer: the widest matrices (one A, two G
  per Llama block) are nobody's twice. It is the bound of ``ekfac`` where tokens are few.
- ``spectrum``: theirs takes 2r·io(i + o), ours the fewer of that and 2n(i² + o² + io): with rows
  far shorter than the matrices are wide, this is where the most is gained.
- Memory: A, G and their eigenvectors, 4(i² + o²) bytes each; ours never holds both for all layers.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

try:
    from peer_kronfluence import Peer, Scales
except ImportError as missing:  # --help does without
    Peer = Scales = None
    MISSING = f"{missing}: pip install --no-deps kronfluence==1.0.1 into a folder on PYTHONPATH"
else:
    MISSING = ""
from random_llama import random_llama
from torch import Tensor
from turns import EXACT, Worker, answer, forget_peak, in_turn, resident, said, worker

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.damping import Damping
from unlearn.curvature.direction import direction
from unlearn.curvature.factors import Counts, LayerCurvature
from unlearn.curvature.fit import (
    Curvature,
    FitSettings,
    fit_factors,
    gradient,
    with_bases,
    with_spectrum,
)
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.curvature.storage import save_curvature
from unlearn.data import Template, encode, load_rows
from unlearn.data.encode import Example
from unlearn.models import ModelSource, load_model, load_tokenizer

KINDS = ("kfac", "ekfac")
SIDES = ("kronfluence", "ours")
PHASES = {"kfac": ("factors", "eigen", "step"), "ekfac": ("factors", "eigen", "spectrum", "step")}
FILES = "files"
"""Our writing, as a phase of its own."""
DAMPINGS = {"kfac": Damping("factored", 1e-3), "ekfac": Damping("relative", 0.1)}
SAME_DAMPING = Damping("relative", 0.1)
"""Kronfluence's own: a tenth of the mean eigenvalue."""
AGREEMENT = {"inputs": 1e-4, "outputs": 1e-4, "eigenvalues": 1e-4, "step": 1e-3}
"""Largest relative distance of a layer's matrices in fp32; a step amplifies that of its factors."""
VOCABULARY = 4096
"""Of the random Llama."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check that both sides agree, then run them in turn and print one JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    if MISSING:
        sys.exit(MISSING)
    warnings.filterwarnings("ignore", ".*loss tokens for factors.*")
    if options.worker:
        answer(_work(options))
        return
    found: dict[str, Any] = {}
    for kind in options.kinds:
        with _started(kind, "check", arguments) as process:
            differences = said(process)
        for name, difference in differences.items():
            if not difference <= AGREEMENT[name]:
                sys.exit(f"{kind}: {name} differ by {difference:.2g}: there is nothing to compare")
        pairs = [pair for _ in range(options.repeats) for pair in _race(kind, arguments)]
        found[kind] = _summary(kind, pairs) | {"largest_relative_differences": differences}
        if options.memory:
            found[kind] |= _memory(kind, arguments)
        print(f"{kind}: {found[kind]['speedup']} times as fast", file=sys.stderr)
    print(json.dumps(found, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--retain", help="rows the curvature is fitted to")
    parser.add_argument("--forget", help="rows whose gradient the step takes")
    parser.add_argument("--width", type=int, help="take a random Llama of this width")
    parser.add_argument("--layers", type=int, default=4, help="depth of the random Llama")
    parser.add_argument("--rows", type=int, default=64, help="rows of random tokens")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest of them")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch", type=int, default=8, help="kronfluence's rows per batch")
    parser.add_argument("--same-batches", action="store_true", help="sort its rows by length")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of processes")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--memory", action="store_true", help="measure memory too")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser


# Processes in turn

Pair = dict[str, dict[str, Any]]
"""What both sides said of one phase."""


def _race(kind: str, arguments: Sequence[str]) -> list[Pair]:
    """Let both sides go through the phases, one at a time and in turn."""
    with ExitStack() as stack:
        started = partial(_started, kind, arguments=arguments)
        workers = {side: stack.enter_context(started(side)) for side in SIDES}
        return in_turn(workers, len(PHASES[kind]) + 1)


def _started(
    kind: str, side: str, arguments: Sequence[str], **environment: str
) -> AbstractContextManager[Worker]:
    if threads := _parser().parse_args(arguments).threads:
        environment["OMP_NUM_THREADS"] = str(threads)  # SciPy's too
    return worker(__file__, arguments, kind, side, **environment)


def _memory(kind: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Compare the memory that both sides take, each alone."""
    peaks: dict[str, dict[str, float]] = {}
    model = 0.0
    for side in SIDES:
        with _started(kind, side, arguments, **EXACT) as process:
            model = said(process)["model"]
            told = [said(process, "go") for _ in PHASES[kind]]
        peaks[side] = {one["phase"]: round(one["peak"] / 2**20, 1) for one in told}
    ours, theirs = (max(peaks[side].values()) for side in reversed(SIDES))
    return {
        "peak_memory_ratio": round(ours / theirs, 3),
        "peak_mebibytes_beyond_the_model": peaks,
        "model_mebibytes": round(model / 2**20, 1),
    }


def _summary(kind: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    races = [
        {pair["ours"]["phase"]: pair for pair in pairs[start : start + len(PHASES[kind]) + 1]}
        for start in range(0, len(pairs), len(PHASES[kind]) + 1)
    ]

    def seconds(race: Mapping[str, Pair], side: str, what: str, files: bool = False) -> float:
        phases = [*PHASES[kind], FILES] if files else PHASES[kind]
        return sum(race[phase][side][what] for phase in phases)

    def ratio(their_files: bool, our_files: bool) -> float:
        found = []
        for race in races:
            theirs = seconds(race, "kronfluence", "seconds", True)
            theirs += seconds(race, "kronfluence", "file_seconds") if their_files else 0.0
            found.append(theirs / seconds(race, "ours", "seconds", our_files))
        return round(statistics.median(found), 3)

    processor = [
        seconds(race, "kronfluence", "processor") / seconds(race, "ours", "processor")
        for race in races
    ]
    return {
        "speedup": ratio(False, False),
        "speedup_with_files": ratio(True, True),
        "speedup_as_used": ratio(True, False),
        "speedup_of_processor_time": round(statistics.median(processor), 3),
        "phases": {phase: _phase([race[phase] for race in races]) for phase in PHASES[kind]},
        "pairs": len(races),
    }


def _phase(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Give medians of one phase: its share of each side is as telling as the ratio."""
    found: dict[str, Any] = {
        side: round(statistics.median(pair[side]["seconds"] for pair in pairs), 3) for side in SIDES
    }
    if found["ours"]:
        ratios = [pair["kronfluence"]["seconds"] / pair["ours"]["seconds"] for pair in pairs]
        found["speedup"] = round(statistics.median(ratios), 3)
    return found


# One process


def _work(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Say that all is loaded, then how each phase of one side went; or how far both differ."""
    if options.threads:
        torch.set_num_threads(options.threads)
    kind, side = options.worker
    with tempfile.TemporaryDirectory() as folder:
        if side == "check":
            yield _differences(kind, options, Path(folder))
            return
        model, retain, forget = _given(options)
        make = {"kronfluence": _kronfluence, "ours": _ours}[side]
        phases, file_seconds = make(kind, options, model, retain, forget, Path(folder))
        gc.collect()
        gc.freeze()
        loaded = resident()
        yield {"model": sum(p.numel() * p.element_size() for p in model.parameters())}
        for phase, work in phases.items():
            forget_peak()
            files, start, before = file_seconds(), time.perf_counter(), time.process_time()
            work()
            seconds, processor = time.perf_counter() - start, time.process_time() - before
            files = file_seconds() - files
            peak = resident("VmHWM") - loaded
            yield {"phase": phase, "seconds": seconds - files, "file_seconds": files,
                   "processor": processor, "peak": peak}  # fmt: skip


Work = dict[str, Callable[[], object]]


def _kronfluence(
    kind: str, options: argparse.Namespace, model: Any, retain: list[Example],
    forget: list[Example], folder: Path,
) -> tuple[Work, Callable[[], float]]:  # fmt: skip
    peer = _peer(kind, options, model, folder)
    if options.same_batches:
        retain, forget = (sorted(r, key=lambda one: -len(one.input_ids)) for r in (retain, forget))
    work: Work = {
        "factors": lambda: peer.factors(retain),
        "eigen": peer.eigen,
        "spectrum": lambda: peer.spectrum(retain),
        "step": lambda: peer.step(forget),
        FILES: lambda: None,
    }
    return {phase: work[phase] for phase in (*PHASES[kind], FILES)}, lambda: peer.file_seconds


def _peer(kind: str, options: argparse.Namespace, model: Any, folder: Path) -> Peer:
    names = [layer.name for layer in find_layers(model, "all-linear")]
    return Peer(model, names, folder, strategy=kind, batch=options.batch)


def _ours(
    kind: Any, options: argparse.Namespace, model: Any, retain: list[Example],
    forget: list[Example], folder: Path,
) -> tuple[Work, Callable[[], float]]:  # fmt: skip
    layers, how = find_layers(model, "all-linear"), FitSettings(kind, "empirical")
    found, counts = dict[str, LayerCurvature](), Counts()

    def take(fitted: tuple[dict[str, LayerCurvature], Counts]) -> None:
        nonlocal found, counts
        found, counts = fitted

    def eigen() -> None:
        nonlocal found
        found = with_bases(found) if kind == "ekfac" else found

    def step() -> None:
        grad = gradient(model, Rows(forget), layers)
        direction(Curvature(found, counts, {}), grad, DAMPINGS[kind])

    work: Work = {
        "factors": lambda: take(fit_factors(model, Rows(retain), layers, how)),
        "eigen": eigen,
        "spectrum": lambda: take(with_spectrum(found, model, Rows(retain), layers, how)),
        "step": step,
        FILES: lambda: save_curvature(Curvature(found, counts, {}), folder / "ours.safetensors"),
    }
    return {phase: work[phase] for phase in (*PHASES[kind], FILES)}, lambda: 0.0


def _differences(kind: Any, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Give per kind of number the largest relative distance over layers."""
    model, retain, forget = _given(options)
    peer = _peer(kind, options, _given(options)[0], folder)
    peer.factors(retain)
    peer.eigen()
    if kind == "ekfac":
        peer.spectrum(retain)
    theirs, their_step = peer.found(), peer.step(forget)
    layers, how = find_layers(model, "all-linear"), FitSettings("kfac", "empirical")
    ours, counts = fit_factors(model, Rows(retain), layers, how)
    scales, divided = Scales.of(counts), counts.labels / counts.tokens
    found: dict[str, list[float]] = {"inputs": [], "outputs": [], "step": []}
    for name, layer in ours.items():
        assert layer.inputs is not None
        assert layer.outputs is not None
        mean_in = _mean(theirs, "activation_covariance", name)
        mean_out = _mean(theirs, "gradient_covariance", name) * scales.outputs
        found["inputs"].append(_distance(layer.inputs.dense(), mean_in))
        found["outputs"].append(_distance(layer.outputs.dense(), mean_out))
    if kind == "ekfac":
        ours = {name: _in_their_basis(theirs, name, layer.group) for name, layer in ours.items()}
        ours, _ = with_spectrum(ours, model, Rows(retain), layers, how)
        values = {n: _mean(theirs, "lambda_matrix", n, "lambda") * scales.eigenvalues for n in ours}
        found["eigenvalues"] = [
            _distance(one.eigenvalues, values[name]) for name, one in ours.items()
        ]
        divided = counts.labels / counts.rows
    grad = gradient(model, Rows(forget), layers)
    step = direction(Curvature(ours, counts, {}), grad, SAME_DAMPING).weights
    found["step"] = [
        _distance(one * grad.num_labels / divided, their_step[name]) for name, one in step.items()
    ]
    return {name: max(values) for name, values in found.items()}


def _mean(theirs: Any, what: str, name: str, count: str = "") -> Tensor:
    """Divide one of kronfluence's sums by what it counted."""
    number = theirs[f"num_{count or what}_processed"][name]
    mean: Tensor = theirs[what][name] / number
    return mean


def _in_their_basis(theirs: Any, name: str, group: str) -> LayerCurvature:
    bases = (theirs["activation_eigenvectors"][group], theirs["gradient_eigenvectors"][name])
    right, left = (Blocks((one,)) for one in bases)
    return LayerCurvature(group, input_basis=right, output_basis=left)


def _distance(one: Tensor | None, two: Tensor) -> float:
    assert one is not None
    return float((one - two).double().norm() / two.double().norm())


def _given(options: argparse.Namespace) -> tuple[Any, list[Example], list[Example]]:
    """Give the model and both sets of rows, always alike."""
    if options.width:
        rows = _random_rows(options)
        return (
            random_llama(options.width, options.layers, VOCABULARY, inner=4),
            rows,
            rows[: max(1, len(rows) // 4)],
        )
    if not (options.model and options.retain and options.forget):
        sys.exit("give --width, or --model, --retain and --forget")
    tokenizer = load_tokenizer(options.model)
    template = Template.for_tokenizer(tokenizer)
    sets = [
        encode(load_rows(spec), tokenizer, template, max_length=512, source=spec)
        for spec in (options.retain, options.forget)
    ]
    return load_model(ModelSource(options.model, dtype="float32")), sets[0], sets[1]


def _random_rows(options: argparse.Namespace) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    low, high = max(2, options.length // 4), options.length + 1
    lengths = torch.randint(low, high, (options.rows,), generator=generator).tolist()
    ids = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [Example(one, list(one), 0, row) for row, one in enumerate(ids)]


if __name__ == "__main__":
    main()
