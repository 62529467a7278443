"""The contract of configs/ and exps/: real files, real settings, the reference's numbers, and the table of them.

Must not train: that the loop works is for other tests. What exps/launch.sh does is in test_launch.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from accessory.assemble import read_configs, read_spec
from accessory.checkpoint.fetch import RELEASED
from accessory.config import parse
from accessory.data.feed import read_sources
from accessory.train.settings import Settings
from accessory.vision import VisionConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for kind in ("pretrain", "finetune") for path in (ROOT / "exps" / kind).rglob("*.sh"))
NAMES = [str(path.relative_to(ROOT / "exps").with_suffix("")) for path in SCRIPTS]
SBATCH = sorted((ROOT / "exps/slurm").glob("*.sbatch"))
METAS = sorted((ROOT / "configs/data").rglob("*.yaml"))
JSONS = sorted((ROOT / "configs/model").rglob("*.json"))


@dataclass(frozen=True)
class Numbers:
    """A recipe's numbers as the reference has them: facts of its scripts, per GPU."""

    size: str
    ranks: int
    tp: int
    batch: int
    accumulation: int
    rows: int
    lr: float
    min_lr: float
    decay: float
    cutoff: int
    epochs: float = 0.0
    warmup_epochs: float = 0.0
    micro_steps: int = 0
    warmup_micro_steps: int = 0
    zero: int = 2
    checkpointing: str = "full"

    @property
    def reference(self) -> bool:
        """Whether the reference published this recipe; stage one of its multimodal models it did not."""
        return bool(self.warmup_epochs or self.micro_steps)


def full(size: str = "7b", *, ranks: int = 8, tp: int = 1, batch: int = 4, each: int = 8, cutoff: int) -> Numbers:
    rows = batch * each * ranks // tp
    return Numbers(size, ranks, tp, batch, each, rows, 2e-5, 0.0, 0.0, cutoff, epochs=3, warmup_epochs=0.04)


def peft(cutoff: int = 512, checkpointing: str = "full") -> Numbers:
    numbers = (4, 2, 64, 5e-5, 5e-6, 0.02, cutoff)
    return Numbers("7b", 8, 1, *numbers, epochs=4, warmup_epochs=1, checkpointing=checkpointing)


def mm(tp: int, batch: int, each: int, rows: int, lr: float, *, zero: int = 2) -> Numbers:
    return Numbers("13b", 8, tp, batch, each, rows, lr, 5e-6, 0.02, 512, epochs=3, warmup_epochs=0.2, zero=zero)


def pretrain(size: str, tp: int, rows: int) -> Numbers:
    numbers = (4, 16, rows, 1e-4, 1e-5, 0.02, 2048)
    return Numbers(size, 8, tp, *numbers, micro_steps=400_000, warmup_micro_steps=5_000, zero=3, checkpointing="none")


RECIPES = {
    "pretrain/vanilla": pretrain("7b", 1, 512),
    "pretrain/13B_packed": pretrain("13b", 2, 256),
    "finetune/sg/alpaca": full(cutoff=512),
    "finetune/sg/alpaca_llamaPeft_normBias": peft(),
    "finetune/sg/alpaca_llamaPeft_normBiasLora": peft(),
    "finetune/sg/alpaca_llamaPeft_normBias_QF": peft(),
    "finetune/sg/alpaca_llamaPeft_normBiasLora_QF": peft(),
    "finetune/sg/alpaca_llamaAdapter": peft(1024, "none"),
    "finetune/sg/dialog_lima": full(cutoff=4096),
    "finetune/sg/dialog_sharegpt": full(cutoff=4096),
    "finetune/sg/dialog_sharegpt_13B": full("13b", tp=2, cutoff=4096),
    "finetune/sg/dialog_sharegpt_70B": full("70b", ranks=32, tp=8, batch=2, each=64, cutoff=4096),
    "finetune/sg/dialog_wizardLM": full(cutoff=4096),
    "finetune/sg/gorilla": full(cutoff=512),
    "finetune/mm/caption_llamaQformerv2_13b": Numbers("13b", 8, 2, 16, 4, 256, 1e-4, 5e-5, 0.05, 128, epochs=1),
    "finetune/mm/alpacaLlava_llamaQformerv2_13b": mm(2, 4, 2, 32, 3e-5, zero=3),
    "finetune/mm/alpacaLlava_llamaQformerv2Peft_13b": mm(2, 16, 2, 128, 5e-5),
    "finetune/mm/alpacaLlava_llamaQformerv2Peft_QF_13b": mm(1, 16, 1, 128, 5e-5),
}


def config_of(name: str) -> Path:
    return ROOT / f"configs/train/{name}.yaml"


def settings_of(name: str) -> Settings:
    settings = parse(Settings, [str(config_of(name))])
    settings.check()
    return settings


def what(name: str) -> str:
    """The first sentence of a script."""
    return (ROOT / f"exps/{name}.sh").read_text().splitlines()[1].removeprefix("# ").rstrip(".")


def table() -> list[str]:
    """The table of exps/README.md."""
    lines = ["| recipe | what it trains | ranks | tp | ZeRO | rows a step | learning rate | epochs | positions |"]
    lines.append("|---" * 9 + "|")
    for name, numbers in RECIPES.items():
        settings = settings_of(name)
        rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        rows *= numbers.ranks // settings.tensor_parallel_size
        length = f"{settings.num_train_epochs:g}" if settings.max_steps < 1 else f"{settings.max_steps} steps"
        low = settings.learning_rate * settings.min_lr_ratio
        lr = f"{settings.learning_rate:.0e} to {low:.0e}".replace("e-0", "e-").replace("0e+00", "0")
        cells = (
            f"`{name}.sh`",
            what(name),
            numbers.ranks,
            settings.tensor_parallel_size,
            settings.zero,
            rows,
            lr,
            length,
        )
        lines.append(f"| {' | '.join(map(str, cells))} | {settings.cutoff_len} |")
    return lines


def test_every_recipe_has_a_script_and_a_config_and_none_is_forgotten():
    configs = sorted((ROOT / "configs/train").rglob("*.yaml"))
    assert (
        sorted(RECIPES) == NAMES == [str(path.relative_to(ROOT / "configs/train").with_suffix("")) for path in configs]
    )


def test_every_model_that_the_seed_lists_has_its_recipe():
    sg = ("alpaca", "alpaca_llamaPeft_normBias", "dialog_lima", "dialog_sharegpt", "dialog_wizardLM", "gorilla")
    mm = ("alpacaLlava_llamaQformerv2Peft_13b", "alpacaLlava_llamaQformerv2_13b", "caption_llamaQformerv2_13b")
    assert set(sg) <= set(RELEASED["finetune/sg"]) and set(mm) <= set(RELEASED["finetune/mm"])
    wanted = {
        *(f"finetune/sg/{name}" for name in (*sg, "dialog_sharegpt_70B")),
        *(f"finetune/mm/{name}" for name in mm),
    }
    assert wanted <= set(RECIPES)


@pytest.mark.parametrize("path", [*SCRIPTS, *SBATCH], ids=lambda path: path.name)
def test_a_script_is_short_and_strict_and_bash_can_read_it(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 120 and "set -euo pipefail" in lines
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK), "not executable"
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_names_its_own_recipe_and_helps_from_anywhere(name: str, tmp_path: Path):
    script = ROOT / f"exps/{name}.sh"
    assert f" {name} " in script.read_text()
    run = subprocess.run([str(script), "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert what(name) in run.stdout and re.search(r"^usage: .*\[PRETRAINED=DIR ...\]", run.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == [], "help left files"


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_an_sbatch_file_requeues_warns_its_ranks_and_has_a_node_of_gpus(path: Path):
    given = re.findall(r"--([\w-]+)(?:=(\S+))?", " ".join(re.findall(r"^#SBATCH (.*)", path.read_text(), re.MULTILINE)))
    options = dict(given)
    assert {"requeue", "open-mode", "job-name", "time"} <= set(options) and options["open-mode"] == "append"
    assert re.fullmatch(r"USR1@\d+", options["signal"]), "without B: it is the ranks that hear it"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8", "one rank per GPU"
    name = re.search(r"exps/(\S+)\.sh", path.read_text()).group(1)
    assert int(options["nodes"]) * 8 == RECIPES[name].ranks and options["job-name"] == RECIPES[name].size


@pytest.mark.parametrize("name", NAMES)
def test_a_config_has_real_settings_real_files_and_the_numbers_of_the_reference(name: str):
    settings, numbers = settings_of(name), RECIPES[name]
    for path in [*settings.dataset, *settings.llama_config]:
        assert (ROOT / path).is_file(), f"{path} is not there"
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * numbers.ranks // numbers.tp
    assert rows == numbers.rows == numbers.batch * numbers.accumulation * numbers.ranks // numbers.tp
    assert settings.per_device_train_batch_size == numbers.batch and settings.tensor_parallel_size == numbers.tp
    assert settings.packing == (name == "pretrain/13B_packed"), "a packed row would be several of the reference's"
    assert settings.learning_rate == numbers.lr
    assert settings.learning_rate * settings.min_lr_ratio == pytest.approx(numbers.min_lr, rel=1e-3)
    assert (settings.weight_decay, settings.cutoff_len) == (numbers.decay, numbers.cutoff)
    assert (settings.zero, settings.activation_checkpointing) == (numbers.zero, numbers.checkpointing)
    assert (settings.adam_beta1, settings.adam_beta2, settings.max_grad_norm) == (0.9, 0.95, 2.0)
    if numbers.micro_steps:
        assert settings.max_steps == numbers.micro_steps / numbers.accumulation
        assert settings.warmup_steps == pytest.approx(numbers.warmup_micro_steps / numbers.accumulation, abs=0.5)
    else:
        assert settings.num_train_epochs == numbers.epochs
    if numbers.warmup_epochs:
        assert settings.warmup_ratio == pytest.approx(numbers.warmup_epochs / numbers.epochs, rel=5e-3)


def test_the_files_of_a_config_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from accessory.train.main import _from_checkout

    monkeypatch.chdir(tmp_path)
    path = "configs/data/finetune/sg/alpaca.yaml"
    assert _from_checkout(path) == str(ROOT / path) and _from_checkout("my.json") == "my.json"
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    assert _from_checkout(path) == path, "what is here comes first"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_is_trained(name: str):
    settings, quantised = settings_of(name), name.endswith("_QF") or "_QF_" in name
    trained = {
        "normBiasLora": "norm_bias_lora",
        "normBias": "norm_bias",
        "Adapter": "adapter",
        "v2Peft": "norm_bias_lora",
        "caption": "frozen",
    }
    kind = next((kind for mark, kind in trained.items() if mark in name), "full")
    assert settings.finetuning_type == kind
    assert (settings.quantization_bit == 4) == quantised == settings.only_save_trainable
    assert settings.lora_rank == 16 or "lora" not in kind
    assert settings.stage == ("pt" if "pretrain" in name else "sft")
    assert settings.train_from_scratch == ("pretrain" in name)
    template = "caption" if "caption" in name else "dialog" if "dialog" in name else "alpaca"
    assert settings.template == ("" if "pretrain" in name else template)
    sees = "/mm/" in name
    assert settings.llama_type == (f"llama_qformerv2{'_peft' if 'Peft' in name else ''}" if sees else None)
    assert settings.train_projector == ("full" if sees and "Peft" not in name else None)
    assert settings.output_dir == f"output/{name.rpartition('/')[2]}"


@pytest.mark.parametrize("path", METAS, ids=lambda path: path.name)
def test_a_meta_file_says_what_its_files_are_and_names_them_below_data(path: Path):
    text = path.read_text()
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    tree = yaml.safe_load(text)
    assert list(tree) == ["META"]
    for entry in tree["META"]:
        assert set(entry) <= {"path", "type", "preprocess", "prompt_type", "root", "ratio"}
        assert entry["path"].startswith("$DATA/") and entry.get("root", "$DATA/").startswith("$DATA/")
        assert entry["type"] in ("text", "image_text") and ("root" in entry) == (entry["type"] == "image_text")
        assert entry.get("preprocess") in (None, "single_turn_llava", "caption")


@pytest.mark.parametrize("path", METAS, ids=lambda path: path.name)
def test_a_meta_file_opens_with_its_files_below_data(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DATA", raising=False)
    with pytest.raises(ValueError, match="DATA is not set"):
        read_sources([str(path)])
    entries = yaml.safe_load(path.read_text())["META"]
    for entry in entries:
        place = Path(entry["path"].replace("$DATA", str(tmp_path)))
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place / "0.parquet" if place.suffix == "" else place
        file.parent.mkdir(exist_ok=True)
        file.touch()
    monkeypatch.setenv("DATA", str(tmp_path))
    sources = read_sources([str(path)])
    assert len(sources) == len(entries) and all(Path(source.path).exists() for source in sources)
    assert [source.root for source in sources] == [
        entry["root"].replace("$DATA", str(tmp_path)) if "root" in entry else None for entry in entries
    ]


def test_every_meta_file_is_a_recipes_or_says_which_recipe_it_is_for():
    used = {str(path) for name in NAMES for path in settings_of(name).dataset}
    for path in METAS:
        mark = re.search(r"for the\s+(?:# )?recipe\s+(?:# )?(\w+)", path.read_text())
        if str(path.relative_to(ROOT)) not in used and path.parent.name == "sg":
            assert mark and f"finetune/sg/{mark.group(1)}" in RECIPES, f"{path.name} names no recipe"


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.name)
def test_a_model_json_is_read_as_part_of_a_spec(path: Path):
    kind = "llama_qformerv2" if "Qformer" in path.name else "llama"
    kind = "llama_peft" if "Peft" in path.name else "llama_adapter" if "Adapter" in path.name else kind
    spec = read_spec({"max_seq_len": 4096, **read_configs([path])}, llama_type=kind, vocab_size=32000)
    known = read_configs([path])
    if "_params" in path.name:
        sizes = {"7B": 11008, "13B": 13824, "70B": 28672}
        assert spec.llama.ffn_dim == sizes[path.name.partition("_")[0]]
    elif kind == "llama_qformerv2":
        assert spec.vision == VisionConfig.reference("qformer")
    else:
        whole = spec.llama if "rope_scaling" in known else spec.peft
        known = {key: value for key, value in known.items() if key != "trainable_mode"}
        assert known and all(getattr(whole, key) == value for key, value in known.items())


def test_the_readme_of_exps_lists_every_recipe_with_its_numbers():
    text = (ROOT / "exps/README.md").read_text()
    assert "\n".join(table()) in text, "\n" + "\n".join(table())
    paths = set(re.findall(r"`((?:exps|configs|tools|accessory)/[\w./]+)`", text))
    assert paths and all((ROOT / path).exists() for path in paths), paths


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_planned_at_its_size_and_its_ranks(name: str, tmp_path: Path):
    numbers = RECIPES[name]
    command = [str(ROOT / f"exps/{name}.sh"), "dry_run=true", f"shape={numbers.size}", f"world_size={numbers.ranks}"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHON": sys.executable}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert f" {numbers.rows} rows " in run.stdout and list(tmp_path.iterdir()) == [], run.stdout
