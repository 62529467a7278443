"""`accessory inspect DIR`: what a folder of weights is, holds and lacks, from headers; with --verify from every byte.

Must not load a tensor or build a model.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from accessory.checkpoint import hub, manifest, names, open_folders
from accessory.checkpoint.files import FORMS, Folder, recognise
from accessory.checkpoint.read import open_source
from accessory.checkpoint.shards import ShardFile
from accessory.checkpoint.source import Source
from accessory.checkpoint.training import TrainingSource
from accessory.config import parse

TINY = Path(__file__).parent / "tiny"
FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "rope_theta", "rope_scaling", "lora_rank")


@dataclass
class Settings:
    """What to look at."""

    paths: list[str] = field(default_factory=list)
    """Folders of weights; may be given without the flag. None: the embedded tiny model."""
    verify: bool = False
    """Hash every file and compare with the folder's manifest; without one, check the checksums inside .pth files."""
    json: bool = False
    """Print one JSON list instead of text."""


@dataclass
class Report:
    """What is known about one folder."""

    path: str
    form: str = "not recognised"
    partial: bool = False
    """Holds some tensors only (a PEFT or trained-part folder), to be loaded on top of a base."""
    shards: list[str] = field(default_factory=list)
    nbytes: int = 0
    tensors: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    """Parameters by dtype."""
    parts: dict[str, int] = field(default_factory=dict)
    """Parameters by part of the model."""
    config: dict[str, Any] = field(default_factory=dict)
    llama_type: str | None = None
    tokenizer: str | None = None
    step: int | None = None
    """Of a training checkpoint: when it was written."""
    base: list[str] = field(default_factory=list)
    """Of a training checkpoint: the folders that its run began with."""
    state: int = 0
    """Of a training checkpoint: numbers of the optimiser's state."""
    manifest: str = "none"
    leftovers: int = 0
    discarded: int = 0
    faults: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a report per folder; 1 when something is missing or damaged."""
    argv = list(sys.argv[1:] if argv is None else argv)
    bare = next((at for at, token in enumerate(argv) if token.startswith("-") or _is_pair(token)), len(argv))
    argv = [*(["--paths", *argv[:bare]] if bare else []), *argv[bare:]]
    settings = parse(Settings, argv, prog="accessory inspect", description=__doc__.splitlines()[0])
    if not settings.paths:
        sys.stderr.write("no folder given: this is the embedded tiny model\n")
        settings.paths = [str(TINY)]
    reports = [inspect(path, verify=settings.verify) for path in settings.paths]
    together = _together(settings.paths) if len(reports) > 1 and not any(r.faults for r in reports) else None
    if settings.json:
        sys.stdout.write(json.dumps([asdict(report) for report in reports], indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(render(report) for report in reports))
        sys.stdout.write(f"\ntogether: {together}\n" if together else "")
    return 1 if any(report.faults for report in reports) or (together or "").startswith("cannot") else 0


def inspect(path: str | Path, *, verify: bool = False) -> Report:
    """Report on one folder. Nothing is raised for a bad one: what is wrong stands in `faults`, a sentence each."""
    report = Report(str(path))
    try:
        folder = recognise(hub.find(path))
    except (ValueError, OSError) as error:
        report.faults.append(str(error))
        return report
    report.form, report.leftovers = folder.form, folder.leftovers
    report.shards = [shard.name for shard in folder.shards]
    report.nbytes = sum(shard.stat().st_size for shard in folder.shards if shard.exists())
    report.config = {key: folder.config[key] for key in FIELDS if folder.config.get(key) is not None}
    report.llama_type = folder.meta.get("llama_type")
    report.tokenizer = str(folder.tokenizer) if folder.tokenizer else None
    _check_files(report, folder, verify=verify)
    if not report.faults:
        try:
            _count(report, open_source(folder))
        except ValueError as error:
            report.faults.append(str(error))
    return report


def render(report: Report) -> str:
    """The report as text."""
    form = FORMS.get(report.form, report.form)
    rows = [("form", form + (", some tensors only: load it after its base" if report.partial else ""))]
    if report.shards:
        rows.append(("shards", f"{len(report.shards)} ({report.shards[0]} ...), {report.nbytes:,} bytes"))
    if report.tensors:
        rows.append(("parameters", f"{report.parameters:,} in {report.tensors} tensors"))
        rows += [(f"  {part}", f"{count:,}") for part, count in report.parts.items()]
        rows.append(("dtypes", ", ".join(f"{name} {count:,}" for name, count in report.dtypes.items())))
    if report.step is not None:
        rows.append(("training", f"step {report.step}, {report.state:,} numbers of the optimiser's state"))
        rows.append(("base", ", ".join(report.base) or "not recorded"))
    if report.form in FORMS:
        rows.append(("config", ", ".join(f"{key} {value}" for key, value in report.config.items()) or "none"))
        rows.append(("llama_type", report.llama_type or "not recorded"))
        rows.append(("tokenizer", report.tokenizer or "none"))
        rows.append(("manifest", report.manifest))
    if report.leftovers or report.discarded:
        rows.append(("passed over", f"{report.leftovers} files of a training run, {report.discarded} unused tensors"))
    rows += [("FAULT", fault) for fault in report.faults]
    return "".join([f"{report.path}\n", *(f"  {name:<16}{text}\n" for name, text in rows)])


def _check_files(report: Report, folder: Folder, *, verify: bool) -> None:
    """Look at every file's header, the manifest, and on request every byte."""
    for shard in folder.shards:
        try:
            ShardFile(shard)
        except ValueError as error:
            report.faults.append(str(error))
    try:
        entries = manifest.read(folder.path)
        with tqdm(total=len(entries or ()), desc="hashing", disable=not (verify and entries), leave=False) as bar:
            found = manifest.faults(folder.path, hashes=verify, watch=lambda name: bar.update())
    except ValueError as error:
        report.faults.append(str(error))
        return
    report.faults += [f"{folder.path}: {fault}" for fault in found]
    if entries is not None:
        report.manifest = f"{len(entries)} files, {'hashes' if verify else 'sizes'} {'differ' if found else 'agree'}"
    elif verify:
        report.manifest = "none: no hashes to compare, checksums inside .pth files only"
        report.faults += [fault for shard in folder.shards if (fault := _archive_fault(shard))]


def _archive_fault(path: Path) -> str | None:
    """What a .pth file's own checksums say against it."""
    if path.suffix not in (".pth", ".bin") or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    return f"{path}: {bad} does not match its checksum: the content changed; fetch the file again" if bad else None


def _count(report: Report, source: Source | TrainingSource) -> None:
    """Count parameters, and compare the config with the tensors."""
    shapes = {}
    for key, stored in source.stored.items():
        join = source.guess(key)
        if join is None:
            report.faults.append(f"{source.folder.path}: {source.where(key)}, which cannot be joined")
        else:
            shapes[key] = (join.shape, str(stored.dtype).removeprefix("torch."))
    sizes = {key: _numel(shape) for key, (shape, _) in shapes.items()}
    parts, dtypes = Counter(), Counter()
    for key, size in sizes.items():
        parts[names.part(key)] += size
        dtypes[shapes[key][1]] += size
    order = dict.fromkeys([part for _, part in names.PARTS] + ["other"])
    report.parts = {part: parts[part] for part in order if part in parts}
    report.dtypes = dict(dtypes.most_common())
    report.tensors, report.parameters = len(shapes), sum(sizes.values())
    report.partial = report.form not in ("meta", "delta") and "tok_embeddings.weight" not in shapes
    report.discarded = len(source.discarded)
    if isinstance(source, TrainingSource):
        report.step, report.base = source.folder.facts.get("step"), source.folder.facts.get("base", [])
        report.state = sum(spec.numel for spec in source.state.values())
    _compare(report, {key: shape for key, (shape, _) in shapes.items()})


def _compare(report: Report, shapes: dict[str, tuple[int, ...]]) -> None:
    """Note where the config contradicts the tensors."""
    layers = {key.split(".")[1] for key in shapes if key.startswith("layers.")}
    table = shapes.get("tok_embeddings.weight", ())
    vocab, dim = table if len(table) == 2 else (None, None)
    seen = {"vocab_size": vocab, "dim": dim, "n_layers": len(layers) if vocab else None}
    for name, there in seen.items():
        said = report.config.get(name)
        if there is not None and said not in (None, -1, there):
            report.faults.append(f"{report.path}: config says {name} {said}, the tensors {there}; correct the config")


def _together(paths: Sequence[str]) -> str:
    """Whether the folders load on top of each other, in this order."""
    try:
        specs = open_folders(paths).specs()
    except ValueError as error:
        return f"cannot be loaded in this order: {error}"
    return f"{sum(spec.numel for spec in specs.values()):,} parameters in {len(specs)} tensors, loadable in this order"


def _is_pair(token: str) -> bool:
    """Whether a bare token is a setting (verify=true) and not a folder."""
    return token.partition("=")[0] in Settings.__dataclass_fields__ and "=" in token


def _numel(shape: Sequence[int]) -> int:
    """Number of elements."""
    count = 1
    for size in shape:
        count *= size
    return count
