"""The settings of `accessory export`.

Must not import torch: `--help` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ExportSettings:
    """Merge adapters and deltas into a model, write it in any form, and prove that the folder answers as the model."""

    dialect: Literal["accessory", "llamafactory", "swift"] | None = None
    """Whose words and defaults the settings are given in; none: told by the words."""
    model_name_or_path: list[str] = field(default_factory=list)
    """Folder or hub id of the model, then folders of deltas or trained parts, in order. Without it: the tiny model."""
    adapter_name_or_path: list[str] = field(default_factory=list)
    """Folders of adapters that are merged into the model, in order."""
    model_type: str | None = None
    """A name such as llava1d6-mistral-7b-instruct, which chooses hub id and template where these are not given."""
    template: str = ""
    """How conversations are written (chat_template of the folder); without it the model's own."""
    tokenizer_path: str | None = None
    """Tokenizer file, or the folder that holds it; needed where the model's folder has none."""
    llama_type: str | None = None
    """llama, llama_peft, llava, ...; needed where the folder is silent."""
    llama_config: list[str] = field(default_factory=list)
    """JSON files of model sizes (params.json), later ones override; needed where the folder has none."""
    quantization_bit: int | None = None
    """Must stay empty: adapters are merged into full weights; export_quantization_bit quantises afterwards."""
    export_dir: str = ""
    """The folder to write; it must not hold a model yet."""
    export_form: Literal["hf", "meta", "accessory"] = "hf"
    """Hugging Face's form, Meta's (consolidated.NN.pth and params.json), or Accessory's."""
    export_family: str | None = None
    """hf: llama, mistral, qwen2, llava, llava_next, llava_llama, llava_mistral or llava_qwen; none: as it came."""
    export_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Of the weights written; none: as most of the model's are stored."""
    export_size: float = 5.0
    """hf: most gigabytes (10^9 bytes) of a file."""
    export_shards: int = 1
    """meta, accessory: files that the weights are cut into, one per tensor-parallel rank of a loader that needs it."""
    export_legacy_format: bool = False
    """hf: pytorch_model*.bin and not model*.safetensors; accessory: .pth."""
    export_device: str = "cpu"
    """Where the models are compared: cpu, auto, cuda or cuda:N."""
    export_verify: bool = True
    """Open the folder again and compare its logits with the model's, which takes memory for the model in fp32; without
    it that of a few tensors is enough."""
    dry_run: bool = False
    """Print what would be written, and stop."""

    def check(self) -> None:
        """ValueError for values that contradict each other or make no sense."""
        if not self.export_dir and not self.dry_run:
            raise ValueError("export_dir: missing, expected the folder to write; give one")
        if self.quantization_bit is not None:
            raise ValueError(
                f"quantization_bit: got {self.quantization_bit}, but nothing is merged into quantised weights nor are"
                " they written by export; leave it out and give the unquantised base"
            )
        if not self.export_size > 0:
            raise ValueError(f"export_size: got {self.export_size}, expected gigabytes above 0")
        if self.export_shards != 1 and self.export_form == "hf":
            raise ValueError(
                f"export_shards: got {self.export_shards} with export_form hf, whose files have a size; set export_size"
            )
        if self.export_family is not None and self.export_form != "hf":
            raise ValueError(f"export_family: got {self.export_family} with export_form {self.export_form}; drop it")
