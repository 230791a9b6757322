"""Whether a planned run fits this machine, and which changes would make it fit.

Every change that is named was tried: the estimate was made again with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from unlearn.errors import UserError
from unlearn.machine import free_device_memory, host_memory
from unlearn.recipes.estimate import Estimate, Sized, device_of, estimate
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.schema import Recipe

GIB = 2**30
MOST, MOST_OF_A_KIND = 5, 2
"""Suggestions that are shown, and of one kind."""
FEWEST_TOKENS = 64
DEVICES = (2, 4, 8, 16, 32, 64)
Changes = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What is needed somewhere and what is there, in bytes."""

    where: str
    needed: float
    available: float
    largest: str

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, for a plan."""
        return {
            "where": self.where,
            "needed_bytes": round(self.needed),
            "available_bytes": round(self.available),
            "largest": self.largest,
            "fits": self.fits,
        }


def checks(prepared: Prepared, found: Estimate) -> list[Check]:
    """Compare an estimate with the devices and the memory of this machine.

    ``launch.device_memory`` (GiB) stands for another machine: then its devices alone are compared.
    """
    given = prepared.recipe.launch.device_memory
    peak, largest = found.peak, f"{found.largest.part}, {gib(found.largest.bytes)}"
    if given is not None:
        return [Check("each device", peak.bytes, given * GIB, largest)]
    free, (_, available) = free_device_memory(), host_memory()
    host = Check("the memory of each node", found.host_peak.bytes, available, largest)
    if free is None:
        return [host]
    host = replace(host, largest=f"{found.host_peak.part}, {gib(found.host_peak.bytes)}")
    return [Check("each device", peak.bytes, free, largest), host]


def gib(size: float) -> str:
    """Write a size in GiB, with the digits that tell it from its neighbours."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Suggestion:
    """Changes of recipe keys, and what one device (or the host) needs then, in bytes."""

    changes: Changes
    needed: float

    def __str__(self) -> str:
        named = " ".join(_written(key, value) for key, value in self.changes.items())
        return f"{named} ({gib(self.needed)})"


def _written(key: str, value: Any) -> str:
    if key == "model.lora":
        return "--lora"
    return f"--set {key}={str(value).lower() if isinstance(value, bool) else value}"


class Trials:
    """Estimates of one prepared run under changed keys; each model is read once."""

    def __init__(self, prepared: Prepared, sized: Sized) -> None:
        self.prepared = prepared
        self.models = {prepared.recipe.model.lora is not None: sized}

    def checks(self, changes: Mapping[str, Any]) -> tuple[Estimate, list[Check]] | None:
        """Make the estimate again with these changes; None when they contradict the rest."""
        try:
            changed = replace(self.prepared, recipe=with_changes(self.prepared.recipe, changes))
        except ValidationError:  # a batch that cannot be dealt out to so many processes
            return None
        adapters = changed.recipe.model.lora is not None
        if adapters not in self.models:
            self.models[adapters] = Sized.of(changed)
        found = estimate(changed, self.models[adapters])
        return found, checks(changed, found)

    def fitting(self, changes: Mapping[str, Any]) -> Suggestion | None:
        """Give these changes as a suggestion if the run would fit with them."""
        found = self.checks(changes)
        if found is None or not all(check.fits for check in found[1]):
            return None
        return Suggestion(dict(changes), found[1][0].needed)

    def suggestions(self) -> list[Suggestion]:
        """Give changes that fit: of each kind the smallest, and none that contains another."""
        measuring = self._measuring()
        found: list[Suggestion] = []
        for kind in [[measuring], *candidates(self.prepared.recipe)]:
            engines: set[Any] = set()
            room = len(found) + MOST_OF_A_KIND
            for changes in ({**measuring, **rest} for rest in kind):
                engine = changes.get("launch.engine")
                if not changes or (engine and engine in engines) or self._contains(changes, found):
                    continue
                if fitting := self.fitting(changes):
                    found.append(fitting)
                    engines.add(engine)
                if len(found) == room:
                    break
        return found[:MOST]

    def _contains(self, changes: Changes, found: list[Suggestion]) -> bool:
        """Tell whether some of these changes already do."""
        return any(one.changes.items() <= changes.items() for one in found)

    def _measuring(self) -> Changes:
        """Give the change with which the measurements fit, if they do not fit as they are."""
        tokens = self.prepared.recipe.evals.batch_tokens
        changes: Changes = {}
        while tokens > FEWEST_TOKENS:
            found = self.checks(changes)
            measuring = next(s for s in found[0].stages if s.part == "measuring") if found else None
            if found and measuring and measuring.bytes <= found[1][0].available:
                return changes
            tokens //= 2
            changes = {"evals.batch_tokens": tokens}
        return {}


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Give the recipe with some keys (``section.key``) changed, checked as a whole."""
    tree = recipe.model_dump(mode="json")
    for name, value in changes.items():
        section, _, key = name.partition(".")
        tree[section][key] = value
    return Recipe.model_validate(tree)


def candidates(recipe: Recipe) -> list[list[Changes]]:
    """List changes worth trying, by kind; of each kind the smallest first.

    First what leaves every step as it is and costs time alone, then other engines and more devices,
    then adapters, which change the method, and 4-bit weights below them.
    """
    checkpointing: Changes = {"training.gradient_checkpointing": True}
    checkpointing = {} if recipe.training.gradient_checkpointing else checkpointing
    batches = list(_smaller_batches(recipe))
    least: Changes = {**checkpointing, **(batches[-1] if batches else {})}
    frugal = [checkpointing, *batches, *({**checkpointing, **batch} for batch in batches)]
    engines = [{**engine, **changes} for engine in _engines(recipe) for changes in ({}, least)]
    kinds = [frugal, engines]
    if recipe.model.lora is None and not recipe.training.trainable:
        adapters: Changes = {"model.lora": {}}
        kinds.append([adapters, *({**adapters, **changes} for changes in frugal)])
        kinds.append([{**adapters, **changes} for changes in engines])
    return [[_same_step(recipe, changes) for changes in kind if changes] for kind in kinds]


def _smaller_batches(recipe: Recipe) -> Iterator[Changes]:
    """Halve the rows of a forward pass again and again."""
    rows = recipe.training.per_device_train_batch_size
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        yield {"training.per_device_train_batch_size": rows}


def _engines(recipe: Recipe) -> list[Changes]:
    """Split the work over as many processes as there are, then over more of them, then offload."""
    launch = recipe.launch
    if device_of(recipe) == "cpu":  # its processes share one memory
        return []
    names = ["zero2"] if recipe.model.quantize else ["zero2", "fsdp2", "zero3"]
    found: list[Changes] = []
    if launch.processes > 1:
        found += [{"launch.engine": name} for name in names if name != launch.chosen]
    more = [n // launch.nnodes for n in DEVICES if n > launch.processes and n % launch.nnodes == 0]
    found += [{"launch.nproc": n, "launch.engine": name} for n in more for name in names]
    if not recipe.model.quantize and launch.chosen != "zero3-offload":
        found.append({"launch.engine": "zero3-offload"})
    return found


def _same_step(recipe: Recipe, changes: Changes) -> Changes:
    """Add the passes with which a step has as many rows as before, or as few as there can be."""
    section, launch = recipe.training, recipe.launch
    if section.global_batch_size is not None:
        return changes
    rows = changes.get("training.per_device_train_batch_size", section.per_device_train_batch_size)
    processes = changes.get("launch.nproc", launch.nproc) * launch.nnodes
    step = section.per_device_train_batch_size * recipe.accumulation * launch.processes
    passes = max(1, step // (rows * processes))
    if passes == recipe.accumulation:
        return changes
    return {**changes, "training.gradient_accumulation_steps": passes}


def fit(prepared: Prepared, sized: Sized) -> dict[str, Any]:
    """Say whether a run fits, and if not, what would; plain values, for a plan."""
    found = checks(prepared, estimate(prepared, sized))
    fits = all(check.fits for check in found)
    tried = [] if fits else Trials(prepared, sized).suggestions()
    return {
        "fits": fits,
        "checks": [check.to_dict() for check in found],
        "suggestions": [
            {"changes": one.changes, "needed_bytes": round(one.needed), "text": str(one)}
            for one in tried
        ],
        "weights_bytes": round(sized.size.weights),
    }


def refusal(planned: Mapping[str, Any]) -> UserError | None:
    """Give the error of a plan that does not fit, in one line; None when it does."""
    failed = [check for check in planned["fit"]["checks"] if not check["fits"]]
    if not failed:
        return None
    check = failed[0]
    needed, there = gib(check["needed_bytes"]), gib(check["available_bytes"])
    message = (
        f"the run needs about {needed} of {check['where']}, {there} are there "
        f"(largest part: {check['largest']})"
    )
    named = [one["text"] for one in planned["fit"]["suggestions"]]
    override = "--set launch.device_memory=GIB runs it all the same, as if so much were there"
    if not named:
        return UserError(message, f"{_hopeless(planned['fit'], check)}; {override}")
    return UserError(message, "\n    ".join(["each of these would fit:", *named, f"({override})"]))


def _hopeless(found: Mapping[str, Any], check: Mapping[str, Any]) -> str:
    if found["weights_bytes"] > check["available_bytes"]:
        weights = gib(found["weights_bytes"])
        return f"no engine helps: each device holds the whole weights to measure them, {weights}"
    return "nothing that was tried would fit: take a smaller model or larger devices"


def require_memory(planned: Mapping[str, Any]) -> None:
    """Refuse a run that does not fit into memory.

    Raises:
        UserError: with what is needed, what is there, and what would fit.
    """
    if error := refusal(planned):
        raise error
